"""Stopping every process: to start them all anew, or for good.

First they are sent the shutdown signal, or the one that the launcher got. After `shutdown_timeout` they are
killed, and what is left of them after `kill_timeout` is given up. A deadline once set is not put off.
"""

from __future__ import annotations

import signal

from msgspec.structs import replace

from . import causes
from . import events as ev
from .commands import EXIT_FAILED, EXIT_SIGNAL_BASE, Cause, Command, End, FinishEpoch, RestartProcesses, StopWorkers
from .launch import start_processes
from .placement import forget_node
from .slots import SlotState
from .state import JobState, Phase

SAME_REQUEST_S = 5.0
SAME_INTERRUPT_S = 1.0
LEFT_BEHIND_NAMED = 1024
"""Every node is told of so many ranks at most."""
_NEVER_A_REQUEST = frozenset(
    {signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL, signal.SIGSEGV}
)
"""Nobody is asked to stop with these: who died of one before we killed anybody had a fault of its own."""


def restart_processes(job: JobState, cause: Cause, now: float, *, charged: bool = True) -> list[Command]:
    """Every process anew, if the budget allows it."""
    if charged and job.restarts >= job.config.max_restarts:
        return fail(job, cause, now)
    job.restarts += charged
    job.stalled.clear()
    return begin_again(job, cause, now)


def begin_again(job: JobState, cause: Cause, now: float) -> list[Command]:
    """Every process anew; it costs nothing of the budget when no step has been completed that could be lost."""
    job.phase = Phase.RESTARTING
    job.fault = None
    job.wrapped = False
    job.finished_calls = 0
    job.newest_step = 0
    job.deserted = False
    job.shards.renumber({})
    job.digests.clear()
    announcement = RestartProcesses(cause, job.restarts, job.config.max_restarts)
    return [announcement, *_stop_all(job, None, now)]


def fail(
    job: JobState, cause: Cause, now: float, exit_code: int = EXIT_FAILED, reason: str | None = None
) -> list[Command]:
    """The job is lost: stop what runs, then end with the cause."""
    job.phase = Phase.STOPPING
    job.outcome = End(exit_code, reason or causes.describe(cause), cause)
    return _stop_all(job, None, now)


def stop_requested(job: JobState, event: ev.StopRequested, now: float) -> list[Command]:
    """The first signal decides the exit code, also of a job that is failing; a later one means at once."""
    if job.stop_asked is not None:
        return _kill_all(job, now) if is_asked_again(*job.stop_asked, event.signum, now) else []
    job.stop_asked = (event.signum, now)
    cause = causes.of_signal(event.signum)
    job.phase = Phase.STOPPING
    job.outcome = End(EXIT_SIGNAL_BASE + event.signum, causes.describe(cause), cause)
    return _stop_all(job, event.signum, now)


def is_asked_again(first: int, asked: float, signum: int, now: float) -> bool:
    """Whether a signal is a second request, and not the first one that has come by two ways.

    A scheduler signals the batch script, which passes it on, and the step as well; a worker that saves its state must
    not lose it to that. Who presses Ctrl-C a second time need not wait so long.
    """
    interrupts = first == signum == signal.SIGINT
    return now - asked >= (SAME_INTERRUPT_S if interrupts else SAME_REQUEST_S)


def stop_again(job: JobState, now: float) -> list[Command]:
    """A new controller goes on with what the last one had begun."""
    return _stop_all(job, None, now)


def exited(job: JobState, event: ev.Exited, now: float) -> list[Command]:
    slot = job.slots[event.rank]
    _reconsider(job, causes.of_exit(slot, event.exit_code))
    job.slots.leave(slot, SlotState.EXITED if event.exit_code == 0 else SlotState.LOST)
    return _when_all_gone(job, now)


def completed(job: JobState, event: ev.Completed, now: float) -> list[Command]:
    """A script that has been asked to stop returns, or calls `sys.exit(0)`: nobody waits for the others any more."""
    job.slots.change(job.slots[event.rank], state=SlotState.COMPLETED)
    if job.released:
        return []
    job.released = True
    return [FinishEpoch(event.epoch)]


def hook_ended(job: JobState, event: ev.HookEnded, now: float) -> list[Command]:
    job.hooks.discard(event.node)
    return _when_all_gone(job, now)


def node_lost(job: JobState, event: ev.NodeLost, now: float) -> list[Command]:
    """What ran there is not waited for."""
    forget_node(job, event.node)
    return _when_all_gone(job, now)


def overdue(job: JobState, event: ev.TimePassed, now: float) -> list[Command]:
    if job.stop_due is None or job.stop_due > now:
        return []
    if not job.killing:
        return _kill_all(job, now)
    left = tuple(slot.rank for slot in job.slots if not slot.gone)
    if job.outcome is None:
        cause = causes.of_left_behind(left)
        job.outcome = End(EXIT_FAILED, causes.describe(cause), cause)
    return _end(job, replace(job.outcome, left_behind=left[:LEFT_BEHIND_NAMED]))


def _stop_all(job: JobState, signum: int | None, now: float) -> list[Command]:
    job.hole_due = None
    for slot in job.slots.awaited():
        job.slots.change(slot, due=None)
    if job.everything_gone:
        return _when_all_gone(job, now)
    if job.stop_due is None:
        job.stop_due = now + job.config.shutdown_timeout
    return [StopWorkers(signum)]


def _kill_all(job: JobState, now: float) -> list[Command]:
    if not job.killing:
        job.killing = True
        job.stop_due = now + job.config.kill_timeout
    return [StopWorkers(signal.SIGKILL)]


def _when_all_gone(job: JobState, now: float) -> list[Command]:
    if not job.everything_gone:
        return []
    if job.outcome is not None:
        return _end(job, job.outcome)
    job.stop_due, job.killing, job.released = None, False, False
    return start_processes(job, now)


def _end(job: JobState, outcome: End) -> list[Command]:
    job.phase = Phase.ENDED
    job.stop_due = None
    return [outcome]


def _reconsider(job: JobState, cause: Cause) -> None:
    """The job fails because a connection broke, and here is the process that broke it."""
    outcome = job.outcome
    if outcome is None or outcome.cause is None or outcome.exit_code != EXIT_FAILED:
        return
    if job.killing or cause.kind != "death" or cause.exit_code is None:
        return
    if outcome.cause.consequence and -cause.exit_code in _NEVER_A_REQUEST:
        job.outcome = End(outcome.exit_code, causes.describe(cause), cause)
