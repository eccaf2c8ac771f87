"""The start of all processes, and the good end: the scripts before and after training."""

from __future__ import annotations

from . import causes
from . import events as ev
from .commands import EXIT_FAILED, EXIT_OK, Command, End, OpenEpoch, RunHook, Spawn, StopWorkers
from .placement import expect_nodes, fill_holes, forget_node, grow
from .slots import Slot, SlotState
from .state import JobState, Phase


def begin(job: JobState, event: ev.Begin, now: float) -> list[Command]:
    return start_processes(job, now)


def start_processes(job: JobState, now: float) -> list[Command]:
    """The first time, and again when all are stopped: for an epoch that no process has been started for."""
    job.next_epoch = max(job.next_epoch, 1 + job.slots.newest_spawn)
    fill_holes(job)
    grow(job)
    if expect_nodes(job, now):
        job.phase = Phase.GATHERING
        return []
    if not job.config.pre_train:
        return _launch(job, now)
    job.phase = Phase.PREPARING
    return _run_hook(job, "pre")


def pre_train_ended(job: JobState, event: ev.HookEnded, now: float) -> list[Command]:
    job.hooks.discard(event.node)
    if event.exit_code != 0:
        return _end_with_hook(job, "pre", event.exit_code, now)
    if job.hooks:
        return []
    return start_processes(job, now) if job.places.has_holes else _launch(job, now)


def _launch(job: JobState, now: float) -> list[Command]:
    job.phase = Phase.ASSEMBLING
    return [*open_epoch(job), *(spawn(job, slot.rank, now) for slot in job.slots)]


def open_epoch(job: JobState) -> list[Command]:
    """The store serves the next epoch, unless it does already."""
    if job.opened == job.next_epoch:
        return []
    job.opened = job.next_epoch
    return [OpenEpoch(job.next_epoch, _owners(job), _first(job))]


def open_again(job: JobState) -> list[Command]:
    """For a node that was no member when the next epoch was opened: it must confirm its number, too."""
    return [OpenEpoch(job.opened, _owners(job), _first(job))] if job.opened == job.next_epoch and job.quorum else []


def _owners(job: JobState) -> tuple[tuple[int, int], ...]:
    return OpenEpoch.runs_of(job.places.holders())


def _first(job: JobState) -> int:
    return next((place.node for place in job.places if place.node is not None), 0)


def spawn(job: JobState, rank: int, now: float) -> Spawn:
    """A new process takes the slot; nothing of the one before it is kept."""
    before = job.slots[rank]
    assert before.node is not None
    slot = Slot(
        rank,
        SlotState.STARTING,
        before.node,
        before.local_rank,
        before.place,
        incarnation=job.incarnations,
        spawn_epoch=job.next_epoch,
        spawned_at=now,
    )
    job.slots.replace(slot)
    job.incarnations += 1
    layout = job.places.layout_of(before.place)
    return Spawn(rank, slot.incarnation, slot.spawn_epoch, before.node, slot.local_rank, layout)


def conclude(job: JobState) -> list[Command]:
    """Every process has ended well."""
    if job.config.post_train:
        job.phase = Phase.CONCLUDING
        return _run_hook(job, "post")
    return _succeed(job)


def post_train_ended(job: JobState, event: ev.HookEnded, now: float) -> list[Command]:
    job.hooks.discard(event.node)
    if event.exit_code != 0:
        return _end_with_hook(job, "post", event.exit_code, now)
    return [] if job.hooks else _succeed(job)


def hook_node_lost(job: JobState, event: ev.NodeLost, now: float) -> list[Command]:
    """The script before or after training ran there, too."""
    forget_node(job, event.node)
    if job.hooks:
        return []
    return _succeed(job) if job.phase is Phase.CONCLUDING else start_processes(job, now)


def _run_hook(job: JobState, name: str) -> list[Command]:
    job.hooks = set(job.places.holders())
    return [RunHook(name, job.next_epoch)]


def _succeed(job: JobState) -> list[Command]:
    job.phase = Phase.ENDED
    return [End(EXIT_OK, "every worker succeeded")]


def _end_with_hook(job: JobState, name: str, exit_code: int, now: float) -> list[Command]:
    """No worker lives while a hook runs: only the hooks of other nodes are there to be stopped."""
    cause = causes.of_hook(name, exit_code)
    if job.hooks:
        job.phase = Phase.STOPPING
        job.outcome = End(EXIT_FAILED, causes.describe(cause), cause)
        job.stop_due = now + job.config.shutdown_timeout
        return [StopWorkers(None)]
    job.phase = Phase.ENDED
    return [End(EXIT_FAILED, causes.describe(cause), cause)]
