"""Faults: what failed, what it costs, and who is replaced.

An attempt is an epoch number, and it fails at most once. That makes the deaths of several ranks at once one
fault, while a new process that dies before its epoch has begun is one more: it was started for the next
attempt.
"""

from __future__ import annotations

from . import causes
from . import events as ev
from .barrier import arrived, expect_the_others, kill
from .commands import EXIT_STALLED, Cause, Command, FailEpoch
from .launch import conclude, spawn
from .placement import expect_nodes, fill_holes
from .slots import SlotState
from .state import Held, JobState, Phase
from .stopping import begin_again, fail, restart_processes

# ---- while an epoch runs ---------------------------------------------------------------------------------


def stepped(job: JobState, event: ev.Stepped, now: float) -> list[Command]:
    """Progress; it counts for its epoch also when the news comes after that of the epoch's fault."""
    job.progress = event.epoch
    job.newest_step = max(job.newest_step, event.step)
    job.stalled = {epoch: cause for epoch, cause in job.stalled.items() if epoch > event.epoch}
    return []


def holds(job: JobState, event: ev.Holds, now: float) -> list[Command]:
    """Two ranks that are taken for replicas and hold different bytes would be given each other's: that ends the job."""
    for group, digest in event.digests.items():
        known = job.digests.get(group)
        if known is None or known.at != (event.epoch, event.step):
            job.digests[group] = Held((event.epoch, event.step), event.rank, digest)
        elif known.digest != digest:
            cause = causes.of_different_replicas(known.rank, event.rank, group, event.step)
            return fail(job, cause, now, EXIT_STALLED)
    return []


def died(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    """Exit code 0 is no better than another: the function has not completed everywhere."""
    cause = _lose(job, event)
    if job.finished_calls:
        return replace_all(job, cause, now)
    return start_recovery(job, cause, now)


def arrived_unannounced(job: JobState, event: ev.Arrived, now: float) -> list[Command]:
    """It has left the epoch, so there was a fault, of which the news is late or lost."""
    commands = start_recovery(job, causes.of_silent_arrival(event.rank), now)
    if job.phase is Phase.RECOVERING:
        commands += arrived(job, event, now)
    return commands


def condemned(job: JobState, event: ev.Condemned, now: float) -> list[Command]:
    """Better now than when the others have waited for it in vain: the process will not get well."""
    commands = start_recovery(job, causes.of_condemned(event), now)
    if job.phase is Phase.RECOVERING:
        commands += condemned_too(job, event, now)
    return commands


def start_recovery(job: JobState, cause: Cause, now: float, *, charged: bool = True) -> list[Command]:
    """Everybody to the barrier. `charged`: it is a fault, and costs what a fault costs."""
    beyond = _charge(job, job.epoch, cause, now) if charged else None
    if beyond is not None:
        return beyond
    job.phase = Phase.RECOVERING
    job.fault = cause
    for slot in job.slots:
        if slot.state in (SlotState.RUNNING, SlotState.COMPLETED):
            slot.state = SlotState.UNWINDING
            slot.due = now + min(job.config.barrier_timeout, slot.abort_timeout or job.config.barrier_timeout)
    job.slots.refile()
    return [FailEpoch(job.epoch, cause, job.next_epoch), *replace_lost(job, now)]


# ---- on the way to the barrier ---------------------------------------------------------------------------


def raised_too(job: JobState, event: ev.Faulted, now: float) -> list[Command]:
    if event.ends_job:
        return fail(job, causes.of_error(event), now, EXIT_STALLED)
    _blame(job, causes.of_error(event))
    return []


def died_too(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    cause = _lose(job, event)
    if job.finished_calls:
        return replace_all(job, cause, now)
    return replace_processes(job, [event.rank], cause, now)


def condemned_too(job: JobState, event: ev.Condemned, now: float) -> list[Command]:
    """It is killed wherever it is; its end is dealt with as any other."""
    slot = job.slots[event.rank]
    return [] if slot.state is SlotState.KILLED else [kill(job, slot, event.reason, now)]


def exited_outside(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    """No epoch runs: to end with exit code 0 is to be done, unless it was at the barrier."""
    slot = job.slots[event.rank]
    if event.exit_code == 0 and slot.state is not SlotState.WAITING:
        job.slots.leave(slot, SlotState.EXITED)
        if job.slots.all_are(SlotState.EXITED):
            return conclude(job)
        return expect_the_others(job, now)
    cause = _lose(job, event)
    if not (job.config.in_process and job.wrapped) or job.finished_calls:
        return replace_all(job, cause, now)
    commands = replace_processes(job, [event.rank], cause, now)
    if job.phase is Phase.ASSEMBLING:
        commands += expect_the_others(job, now)
    return commands


def replace_processes(job: JobState, ranks: list[int], cause: Cause, now: float) -> list[Command]:
    """New processes for ranks. If one of the lost was started for the next epoch, that has failed already."""
    if all(job.slots[rank].spawn_epoch < job.next_epoch for rank in ranks):
        _blame(job, cause)
        return replace_lost(job, now)
    attempt = job.next_epoch
    job.next_epoch += 1
    beyond = _charge(job, attempt, cause, now)
    if beyond is not None:
        return beyond
    job.fault = cause
    return [FailEpoch(attempt, cause, job.next_epoch), *replace_lost(job, now)]


def replace_lost(job: JobState, now: float) -> list[Command]:
    """Only what broke is replaced: on its node, or on the spare that takes a lost node's place."""
    commands: list[Command] = []
    fill_holes(job)
    expect_nodes(job, now)
    for rank in job.slots.to_replace():
        commands.append(spawn(job, rank, now))
        if job.phase is Phase.RECOVERING:
            job.slots.change(job.slots[rank], due=now + job.config.barrier_timeout + job.slowest_start)
    return commands


def replace_all(job: JobState, cause: Cause, now: float) -> list[Command]:
    """A new process begins with the first wrapped function: it cannot join ranks that are past it. And where there is
    no such function, or nobody has come to it, there is nothing that could be entered again."""
    if job.config.in_process and not job.wrapped:
        reason = "and --inprocess-restart could not act: no rank had entered a function under HPWrapper"
        cause = causes.with_reason(cause, reason)
    if job.finished_calls:
        reason = f"after {job.finished_calls} wrapped function(s) had finished on every rank"
        cause = causes.with_reason(cause, reason)
    return restart_processes(job, cause, now)


def begin_again_elsewhere(job: JobState, cause: Cause, now: float) -> list[Command]:
    """A node is lost before anybody has come to the wrapped function: nothing is lost but the time of a start.

    It costs nothing of the budget. Nodes that are lost again and again without progress cost what a restart costs.
    """
    if len(job.stalled) + 1 >= job.config.stall_limit:
        return restart_processes(job, cause, now)
    job.stalled[job.next_epoch] = cause
    return begin_again(job, cause, now)


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
    job.slots.leave(slot, SlotState.LOST)
    return cause


def _blame(job: JobState, cause: Cause) -> None:
    """A broken connection is the consequence of a fault whose own news can come later than it."""
    if job.fault is None or not job.fault.consequence or cause.consequence:
        return
    for epoch, blamed in job.stalled.items():
        if blamed is job.fault:
            job.stalled[epoch] = cause
    job.fault = cause
