"""The start of all processes, and the good end: the scripts before and after training."""

from __future__ import annotations

from . import causes
from . import events as ev
from .commands import EXIT_FAILED, EXIT_OK, Command, End, OpenEpoch, RunHook, Spawn
from .state import JobState, Phase, Slot, SlotState


def begin(job: JobState, event: ev.Begin, now: float) -> list[Command]:
    return start_processes(job, now)


def start_processes(job: JobState, now: float) -> list[Command]:
    """The first time, and again when all are stopped: for an epoch that no process has been started for."""
    job.next_epoch = max(job.next_epoch, 1 + max(slot.spawn_epoch for slot in job.slots))
    if not job.config.pre_train:
        return _launch(job, now)
    job.phase = Phase.PREPARING
    return _run_hook(job, "pre")


def pre_train_ended(job: JobState, event: ev.HookEnded, now: float) -> list[Command]:
    job.hook_running = False
    if event.exit_code != 0:
        return _end_with_hook(job, "pre", event.exit_code)
    return _launch(job, now)


def _launch(job: JobState, now: float) -> list[Command]:
    job.phase = Phase.ASSEMBLING
    return [*open_epoch(job), *(spawn(job, slot.rank, now) for slot in job.slots)]


def open_epoch(job: JobState) -> list[Command]:
    """The store serves the next epoch, unless it does already."""
    if job.opened == job.next_epoch:
        return []
    job.opened = job.next_epoch
    return [OpenEpoch(job.next_epoch)]


def spawn(job: JobState, rank: int, now: float) -> Spawn:
    """A new process takes the slot; nothing of the one before it is kept."""
    slot = Slot(rank, SlotState.STARTING, job.incarnations, job.next_epoch, spawned_at=now)
    job.slots[rank] = slot
    job.incarnations += 1
    return Spawn(rank, slot.incarnation, slot.spawn_epoch)


def conclude(job: JobState) -> list[Command]:
    """Every process has ended well."""
    if job.config.post_train:
        job.phase = Phase.CONCLUDING
        return _run_hook(job, "post")
    return _succeed(job)


def post_train_ended(job: JobState, event: ev.HookEnded, now: float) -> list[Command]:
    job.hook_running = False
    if event.exit_code != 0:
        return _end_with_hook(job, "post", event.exit_code)
    return _succeed(job)


def _run_hook(job: JobState, name: str) -> list[Command]:
    job.hook_running = True
    return [RunHook(name, job.next_epoch)]


def _succeed(job: JobState) -> list[Command]:
    job.phase = Phase.ENDED
    return [End(EXIT_OK, "every worker succeeded")]


def _end_with_hook(job: JobState, name: str, exit_code: int) -> list[Command]:
    """No worker lives while a hook runs: there is nothing to stop."""
    cause = causes.of_hook(name, exit_code)
    job.phase = Phase.ENDED
    return [End(EXIT_FAILED, causes.describe(cause), cause)]
