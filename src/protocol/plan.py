"""The recovery plan, as control makes it and workers carry it out, and what a rank says it holds.

Source of the idea: HyperPod's checkpointless recovery, where a replaced rank receives from a healthy member of its
replica group. There survivors that differ by a step make everybody load from disk; here they are the normal case.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

NO_EPOCH = -1
"""The epoch of a process that has not run in any."""

MAX_SHARD_NAME = 200
MAX_SNAPSHOTS = 64
MAX_GROUPS = 64
"""Replica groups that one rank can be in."""
MAX_TORN = 400
"""Characters."""


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank could give to others, told at the barrier. Steps count completed steps of training.

    `presumed`: its pass was left when everything that an update moves had moved, and nothing had ever been seen to
    change after that: the state is whole as far as can be known, but a rank whose pass has ended knows better. `torn`:
    what had changed and what had not, of a rank that was found in the middle of a step. `refused`: steps that it cannot
    go on from, because what only it knew of them is lost.

    `shard`: ranks with the same shard hold the same bytes; None as long as nothing is registered. `step`: of the state
    it trains with, None when that is not whole. `kept`: of the state before the last update, where it is kept for a
    rollback. `snapshots`: the
    (rank, step) pairs whose snapshot this rank can read. `disk`: the newest complete checkpoint it can load.
    `distrusted`: ranks whose state it has received with a wrong checksum.
    """

    shard: str | None = None
    step: int | None = None
    kept: int | None = None
    snapshots: tuple[tuple[int, int], ...] = ()
    disk: int | None = None
    distrusted: tuple[int, ...] = ()
    presumed: bool = False
    torn: str = ""
    refused: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """The states in this process's memory that are whole, the current one first."""
        return tuple(step for step in (self.step, self.kept) if step is not None)


class Origin(enum.Enum):
    """Where the state to go on from is."""

    MEMORY = "memory"
    """In the memory of the training processes: nothing is lost."""
    SNAPSHOT = "snapshot"
    """In host memory, as it was some steps ago."""
    DISK = "disk"
    START = "start"
    """Nowhere: training begins, or begins again."""


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """`source` sends its own state to `receiver`, or, when `owner` is given, the snapshot it has of that rank."""

    source: int
    receiver: int
    owner: int | None = None


class RestorePlan(msgspec.Struct, frozen=True):
    """Where the state of a new epoch comes from.

    `target_step`: steps completed in the state to go on from. `source`: the lowest rank that holds it in memory, or
    None. `transfers`: who sends to whom; a rank that is in none as a receiver has what it needs. `rollbacks`: the
    ranks that go back to the state they kept. `lost_steps`: completed steps that must be trained again. A rank is told
    of its own part only (`part`); `elsewhere`: other ranks receive, too.
    """

    target_step: int
    source: int | None
    transfers: tuple[Transfer, ...] = ()
    rollbacks: tuple[int, ...] = ()
    origin: Origin = Origin.MEMORY
    lost_steps: int = 0
    elsewhere: bool = False

    def part(self, transfers: Iterable[Transfer], rollbacks: Iterable[int]) -> RestorePlan:
        """The plan with these of its transfers and rollbacks: what some of the ranks have to do."""
        own = tuple(transfers)
        elsewhere = self.elsewhere or len(own) < len(self.transfers)
        return msgspec.structs.replace(self, transfers=own, rollbacks=tuple(rollbacks), elsewhere=elsewhere)

    def part_of(self, rank: int) -> RestorePlan:
        """What one rank has to do: its own transfers, in the order that all ranks have them in."""
        own = (transfer for transfer in self.transfers if rank in (transfer.source, transfer.receiver))
        return self.part(own, (rank,) if rank in self.rollbacks else ())

    @property
    def moves(self) -> bool:
        """Whether any rank receives state: the same on all ranks."""
        return self.elsewhere or bool(self.transfers)

    @property
    def receivers(self) -> tuple[int, ...]:
        """Of the ranks in this part: those that do not hold the target, since they are new, or a step behind, or torn
        inside an update."""
        return tuple(sorted(transfer.receiver for transfer in self.transfers))

    def source_of(self, rank: int) -> Transfer | None:
        """The transfer by which `rank` receives."""
        return next((transfer for transfer in self.transfers if transfer.receiver == rank), None)

    def sent_by(self, rank: int) -> tuple[Transfer, ...]:
        """What `rank` has to send, in order."""
        return tuple(transfer for transfer in self.transfers if transfer.source == rank)
