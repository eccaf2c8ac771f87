"""To which nodes a command of the job goes, and with which part of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from ...protocol.plan import RestorePlan, Transfer
from . import commands as cmd
from .state import JobState

_TO_EVERYBODY = cmd.OpenEpoch | cmd.FailEpoch | cmd.End
"""Spares, too: they confirm epoch numbers, and end with the job."""


def deliver(job: JobState, command: cmd.Command, members: Iterable[int]) -> Iterator[tuple[int, cmd.Command]]:
    """The nodes, and the command as each of them gets it. O(what is delivered)."""
    match command:
        case cmd.Spawn() | cmd.Kill():
            yield command.node, command
        case cmd.StartEpoch():
            yield from _start(job, command)
        case cmd.RunHook():
            for index, place in enumerate(job.places):
                if place.node is not None:
                    yield place.node, replace(command, layout=job.places.layout_of(index))
        case _:
            yield from ((node, command) for node in _receivers(job, command, members))


def _receivers(job: JobState, command: cmd.Command, members: Iterable[int]) -> Iterable[int]:
    return members if isinstance(command, _TO_EVERYBODY) else job.places.holders()


def _start(job: JobState, command: cmd.StartEpoch) -> Iterator[tuple[int, cmd.Command]]:
    """Every node gets its own ranks, and of the plan what those have to do."""
    parts = {} if command.plan is None else _parts(job, command.plan)
    rest = None if command.plan is None else command.plan.part((), ())
    for index, place in enumerate(job.places):
        if place.node is None:
            continue
        slots = tuple(cmd.LocalSlot(slot.rank, slot.local_rank, slot.incarnation) for slot in job.slots_of(index))
        layout = job.places.layout_of(index)
        yield place.node, replace(command, plan=parts.get(index, rest), slots=slots, layout=layout)


def _parts(job: JobState, plan: RestorePlan) -> dict[int, RestorePlan]:
    """By place, where there is something to do."""
    transfers: defaultdict[int, list[Transfer]] = defaultdict(list)
    rollbacks: defaultdict[int, list[int]] = defaultdict(list)
    for transfer in plan.transfers:
        source, receiver = job.slots[transfer.source].place, job.slots[transfer.receiver].place
        transfers[receiver].append(transfer)
        if source != receiver:
            transfers[source].append(transfer)
    for rank in plan.rollbacks:
        rollbacks[job.slots[rank].place].append(rank)
    return {place: plan.part(transfers[place], rollbacks[place]) for place in transfers.keys() | rollbacks.keys()}
