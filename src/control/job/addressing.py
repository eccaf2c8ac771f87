"""To which nodes a command of the job goes, and with which part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from . import commands as cmd
from .placement import layout_of
from .state import JobState

_TO_EVERYBODY = cmd.OpenEpoch | cmd.FailEpoch | cmd.End
"""Spares, too: they confirm epoch numbers, and end with the job."""


def deliver(job: JobState, command: cmd.Command, members: Sequence[int]) -> Iterator[tuple[int, cmd.Command]]:
    """The nodes, and the command as each of them gets it."""
    match command:
        case cmd.Spawn() | cmd.Kill():
            yield command.node, command
        case cmd.StartEpoch():
            first = 0
            for index, place in enumerate(job.places):
                own = job.slots[first : first + place.workers]
                first += place.workers
                if place.node is not None:
                    slots = tuple(cmd.LocalSlot(slot.rank, slot.local_rank, slot.incarnation) for slot in own)
                    yield place.node, replace(command, slots=slots, layout=layout_of(job, index))
        case cmd.RunHook():
            for index, place in enumerate(job.places):
                if place.node is not None:
                    yield place.node, replace(command, layout=layout_of(job, index))
        case _:
            held = [place.node for place in job.places if place.node is not None]
            for node in members if isinstance(command, _TO_EVERYBODY) else held:
                yield node, command
