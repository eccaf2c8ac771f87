"""Faults: what failed, what it costs, and who is replaced.

An attempt is an epoch number, and it fails at most once. That makes the deaths of several ranks at once one
fault, while a new process that dies before its epoch has begun is one more: it was started for the next
attempt.
"""

from __future__ import annotations

from . import causes
from . import events as ev
from .barrier import arrived, expect_the_others
from .commands import EXIT_STALLED, Cause, Command, FailEpoch
from .launch import conclude, spawn
from .state import JobState, Phase, SlotState
from .stopping import fail, restart_processes

# ---- while an epoch runs ---------------------------------------------------------------------------------


def stepped(job: JobState, event: ev.Stepped, now: float) -> list[Command]:
    """Progress; it counts for its epoch also when the news comes after that of the epoch's fault."""
    job.progress = event.epoch
    job.newest_step = max(job.newest_step, event.step)
    job.stalled = {epoch: cause for epoch, cause in job.stalled.items() if epoch > event.epoch}
    return []


def raised(job: JobState, event: ev.Faulted, now: float) -> list[Command]:
    return _fail_epoch(job, causes.of_error(event), now)


def died(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    """Exit code 0 is no better than another: the function has not completed everywhere."""
    cause = _lose(job, event)
    if job.finished_calls:
        return _replace_all(job, cause, now)
    return _fail_epoch(job, cause, now)


def arrived_unannounced(job: JobState, event: ev.Arrived, now: float) -> list[Command]:
    """It has left the epoch, so there was a fault, of which the news is late or lost."""
    commands = _fail_epoch(job, causes.of_silent_arrival(event.rank), now)
    if job.phase is Phase.RECOVERING:
        commands += arrived(job, event, now)
    return commands


def _fail_epoch(job: JobState, cause: Cause, now: float) -> list[Command]:
    """Everybody to the barrier."""
    beyond = _charge(job, job.epoch, cause, now)
    if beyond is not None:
        return beyond
    job.phase = Phase.RECOVERING
    job.fault = cause
    for slot in job.slots:
        if slot.state in (SlotState.RUNNING, SlotState.COMPLETED):
            slot.state = SlotState.UNWINDING
            slot.due = now + min(job.config.barrier_timeout, slot.abort_timeout or job.config.barrier_timeout)
    return [FailEpoch(job.epoch, cause), *_replace_lost(job, now)]


# ---- on the way to the barrier ---------------------------------------------------------------------------


def raised_too(job: JobState, event: ev.Faulted, now: float) -> list[Command]:
    _blame(job, causes.of_error(event))
    return []


def died_too(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    cause = _lose(job, event)
    if job.finished_calls:
        return _replace_all(job, cause, now)
    return _replace(job, event.rank, cause, now)


def exited_outside(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    """No epoch runs: to end with exit code 0 is to be done, unless it was at the barrier."""
    slot = job.slots[event.rank]
    if event.exit_code == 0 and slot.state is not SlotState.WAITING:
        slot.leave(SlotState.EXITED)
        if all(other.state is SlotState.EXITED for other in job.slots):
            return conclude(job)
        return expect_the_others(job, now)
    cause = _lose(job, event)
    if not (job.config.in_process and job.wrapped) or job.finished_calls:
        return _replace_all(job, cause, now)
    commands = _replace(job, event.rank, cause, now)
    if job.phase is Phase.ASSEMBLING:
        commands += expect_the_others(job, now)
    return commands


def _replace(job: JobState, rank: int, cause: Cause, now: float) -> list[Command]:
    """A new process for a rank. If the lost one was started for the next epoch, that has failed already."""
    if job.slots[rank].spawn_epoch < job.next_epoch:
        _blame(job, cause)
        return _replace_lost(job, now)
    attempt = job.next_epoch
    job.next_epoch += 1
    beyond = _charge(job, attempt, cause, now)
    if beyond is not None:
        return beyond
    job.fault = cause
    return [FailEpoch(attempt, cause), *_replace_lost(job, now)]


def _replace_lost(job: JobState, now: float) -> list[Command]:
    """Only what broke is replaced."""
    commands: list[Command] = []
    for rank in job.ranks(SlotState.LOST):
        commands.append(spawn(job, rank, now))
        if job.phase is Phase.RECOVERING:
            job.slots[rank].due = now + job.config.barrier_timeout + job.slowest_start
    return commands


def _replace_all(job: JobState, cause: Cause, now: float) -> list[Command]:
    """A new process begins with the first wrapped function: it cannot join ranks that are past it."""
    if job.finished_calls:
        reason = f"after {job.finished_calls} wrapped function(s) had finished on every rank"
        cause = causes.with_reason(cause, reason)
    return restart_processes(job, cause, now)


# ---- what a fault costs, and whose it is -----------------------------------------------------------------


def _charge(job: JobState, epoch: int, cause: Cause, now: float) -> list[Command] | None:
    """One failed attempt against its two budgets; what is to be done if one is used up."""
    if epoch != job.progress:
        job.stalled[epoch] = cause
    if len(job.stalled) >= job.config.stall_limit:
        first = next(iter(job.stalled.values()))
        reason = f"{len(job.stalled)} epochs in a row failed without a completed optimizer step"
        return fail(job, first, now, EXIT_STALLED, f"{causes.describe(first)}; {reason}")
    limit = job.config.max_inprocess_restarts
    if limit is not None and job.inprocess_restarts >= limit:
        reason = f"and no more than {limit} restart(s) in process are allowed"
        return restart_processes(job, causes.with_reason(cause, reason), now)
    job.inprocess_restarts += 1
    return None


def _lose(job: JobState, event: ev.Exited) -> Cause:
    slot = job.slots[event.rank]
    cause = causes.of_exit(slot, event.exit_code)
    slot.leave(SlotState.LOST)
    return cause


def _blame(job: JobState, cause: Cause) -> None:
    """A broken connection is the consequence of a fault whose own news can come later than it."""
    if job.fault is None or not job.fault.consequence or cause.consequence:
        return
    for epoch, blamed in job.stalled.items():
        if blamed is job.fault:
            job.stalled[epoch] = cause
    job.fault = cause
