"""Ranks that have returned from the wrapped function while others still run in it.

Most often that is the ordinary end of a job: the others are a moment behind, or one of them evaluates and saves. It is
a fault only when nobody can go on: every rank that is still in the function waits in torch.distributed, and whoever
has returned will never answer. Once that is dealt with as any other fault, since what made the rank leave may have
been of the moment; the second time in the same function it is the script, and every process would do it again.
"""

from __future__ import annotations

from . import causes
from . import events as ev
from .barrier import finish_epoch
from .commands import EXIT_STALLED, Cause, Command, TellReturned
from .recovery import replace_all, start_recovery
from .state import JobState, SlotState
from .stopping import fail

RETURN_GRACE = 1.0
"""Seconds from a rank's return until those who still run are asked to say when they wait: mostly all are through."""


def completed(job: JobState, event: ev.Completed, now: float) -> list[Command]:
    """The function is over once it is over everywhere: until then a fault makes everybody re-enter it."""
    slot = job.slots[event.rank]
    slot.state, slot.left = SlotState.COMPLETED, event.left
    for group, count in event.collectives.items():
        job.collectives[group] = min(count, job.collectives.get(group, count))
    if all(other.state is SlotState.COMPLETED for other in job.slots):
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
    return [TellReturned(job.epoch, len(job.ranks(SlotState.COMPLETED)), dict(job.collectives))]


def waits(job: JobState, event: ev.Waits, now: float) -> list[Command]:
    """A wait that was seen before the last return says nothing: that rank may have ended it with its last message."""
    job.slots[event.rank].waits = event.returned if event.waiting else 0
    running = job.ranks(SlotState.RUNNING)
    returned = [slot for slot in job.slots if slot.state is SlotState.COMPLETED]
    if not running or not returned or any(job.slots[rank].waits != len(returned) for rank in running):
        return []
    return _recover_once(job, causes.of_return(returned, running), now)


def raised(job: JobState, event: ev.Faulted, now: float) -> list[Command]:
    """User code raised. Where a connection broke, somebody who had returned may have closed it."""
    cause = causes.of_error(event)
    if event.ends_job:
        return fail(job, cause, now, EXIT_STALLED)
    returned = [slot for slot in job.slots if slot.state is SlotState.COMPLETED]
    if not event.consequence or not returned:
        return start_recovery(job, cause, now)
    cause = causes.with_reason(cause, f"after {causes.describe_return(returned)}")
    if job.deserted or any(slot.left for slot in returned):
        return _recover_once(job, cause, now)
    job.after_return = True  # if no death explains it until the next epoch starts, that was it
    return start_recovery(job, cause, now)


def _recover_once(job: JobState, cause: Cause, now: float) -> list[Command]:
    if job.deserted:
        return replace_all(job, causes.with_reason(cause, "for the second time"), now)
    job.deserted = True
    return start_recovery(job, cause, now)
