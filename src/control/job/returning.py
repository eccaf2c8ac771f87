"""Ranks that have returned from the wrapped function while others still run in it.

Most often that is the ordinary end of a job: the others are a moment behind, or one of them evaluates and saves. It is
a fault only when nobody can go on: every rank that is still in the function waits in torch.distributed, and whoever
has returned will never answer. Once that is dealt with as any other fault, since what made the rank leave may have
been of the moment; the second time in the same function it is the script, and every process would do it again.
"""

from __future__ import annotations

from ...protocol.messages import MAX_COLLECTIVES
from . import causes
from . import events as ev
from .barrier import finish_epoch
from .commands import EXIT_STALLED, Cause, Command, TellReturned
from .recovery import replace_all, start_recovery
from .slots import Slot, SlotState
from .state import JobState
from .stopping import fail

RETURN_GRACE = 1.0
"""Seconds from a rank's return until those who still run are asked to say when they wait: mostly all are through."""


def completed(job: JobState, event: ev.Completed, now: float) -> list[Command]:
    """The function is over once it is over everywhere: until then a fault makes everybody re-enter it."""
    slot = job.slots[event.rank]
    job.slots.change(slot, state=SlotState.COMPLETED, left=event.left)
    for group, count in event.collectives.items():
        if group in job.collectives or len(job.collectives) < MAX_COLLECTIVES:
            job.collectives[group] = min(count, job.collectives.get(group, count))
    if job.slots.all_are(SlotState.COMPLETED):
        return finish_epoch(job)
    expect_the_rest(job, now)
    return []


def expect_the_rest(job: JobState, now: float) -> None:
    """Some have returned and some have not: those are told after a moment."""
    if job.returned_due is None:
        job.returned_due = now + RETURN_GRACE
        job.dues_moved += 1


def tell_returned(job: JobState, event: ev.TimePassed, now: float) -> list[Command]:
    """One message to each node for all that have returned by now, however many they are."""
    if job.returned_due is None or job.returned_due > now:
        return []
    job.returned_due = None
    job.dues_moved += 1
    return [TellReturned(job.epoch, job.slots.count(SlotState.COMPLETED), dict(job.collectives))]


def waits(job: JobState, event: ev.Waits, now: float) -> list[Command]:
    """A wait that was seen before the last return says nothing: that rank may have ended it with its last message."""
    slots = job.slots
    slots.change(slots[event.rank], waits=event.returned if event.waiting else 0)
    running, returned = slots.count(SlotState.RUNNING), slots.count(SlotState.COMPLETED)
    if not running or not returned or slots.waiting_for(returned) < running:
        return []
    return _recover_once(job, causes.of_return(_returned(job), slots.ranks(SlotState.RUNNING)), now)


def _returned(job: JobState) -> list[Slot]:
    return [job.slots[rank] for rank in job.slots.ranks(SlotState.COMPLETED)]


def raised(job: JobState, event: ev.Faulted, now: float) -> list[Command]:
    """User code raised. Where a connection broke, somebody who had returned may have closed it."""
    cause = causes.of_error(event)
    if event.ends_job:
        return fail(job, cause, now, EXIT_STALLED)
    if not event.consequence or not job.slots.count(SlotState.COMPLETED):
        return start_recovery(job, cause, now)
    cause = causes.with_reason(cause, f"after {causes.describe_return(_returned(job))}")
    if job.deserted or job.slots.returned_early():
        return _recover_once(job, cause, now)
    job.after_return = True  # if no death explains it until the next epoch starts, that was it
    return start_recovery(job, cause, now)


def _recover_once(job: JobState, cause: Cause, now: float) -> list[Command]:
    if job.deserted:
        return replace_all(job, causes.with_reason(cause, "for the second time"), now)
    job.deserted = True
    return start_recovery(job, cause, now)
