"""What an agent becomes next, as a value: a role says it and knows no other role; `node.py` makes the role. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from .members import Configurations, Member
from .messages import Join


class BecomeJoining(msgspec.Struct, frozen=True):
    """It is in no job, and looks for one. `first`: where to ask before everywhere else."""

    first: tuple[str, ...] = ()


class BecomeFounding(msgspec.Struct, frozen=True):
    """It collects the nodes of a new job."""


class BecomeFollower(msgspec.Struct, frozen=True):
    """It follows the controller with this key, at this address, in this term."""

    key: str
    address: str
    term: int
    configurations: Configurations


class BecomeCandidate(msgspec.Struct, frozen=True):
    """It has lost its controller. `stranded`: its workers have been stopped already."""

    lost: str
    """The controller's key; its own if it was that itself."""
    reason: str
    stranded: bool = False


class BecomeLeader(msgspec.Struct, frozen=True):
    """It leads a term: elected, or as the founder of a job."""

    term: int
    configurations: Configurations
    """What it knew when it was elected."""
    founds: bool = False
    joins: Mapping[str, Join] | None = None
    """By key: those who found the job with it, or who replace members in its next incarnation."""
    lost: Member | None = None
    """The controller before, if it is not there."""
    reason: str = ""
    voters: frozenset[str] = frozenset()
    """The keys of who is there."""


Next: TypeAlias = BecomeJoining | BecomeFounding | BecomeFollower | BecomeCandidate | BecomeLeader
