"""The job as its shell sees it: an event and the time go in, commands come out.

Owns: the fences. What is late, doubled, or of a process that was replaced changes nothing and is counted.
Called by: `agent/agent.py`. What an event leads to is in `transitions.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from msgspec.structs import replace

from . import events as ev
from .commands import Command
from .places import NodeState
from .slots import SlotState
from .state import JobConfig, JobState, Phase
from .transitions import TRANSITIONS

_CAN_ARRIVE = (
    SlotState.STARTING,
    SlotState.BETWEEN,
    SlotState.UNWINDING,
    SlotState.RUNNING,
    SlotState.COMPLETED,
)


class Job:
    """The decisions for one job. Not thread-safe: one shell drives it, one event after the other."""

    def __init__(self, config: JobConfig, nodes: Mapping[int, NodeState] | None = None) -> None:
        """`nodes`: the members; None: all ranks are on one node."""
        self.state = JobState.new(config, nodes)

    @classmethod
    def resume(cls, state: JobState) -> Job:
        """A job that another controller has begun."""
        job = cls.__new__(cls)
        job.state = state
        return job

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """What must be done because of `event`. `now` is monotonic, in seconds."""
        event = _at_its_rank(self.state, event)
        transition = TRANSITIONS.get((self.state.phase, type(event)))
        if transition is None or _is_stale(self.state, event):
            self.state.dropped[type(event).__name__] += 1
            return []
        return transition(self.state, event, now)

    def next_deadline(self) -> float | None:
        """When `handle` wants a TimePassed event; None for never."""
        state = self.state
        returned_due = state.returned_due if state.phase is Phase.RUNNING else None
        dues = (state.slots.next_due(), state.stop_due, state.hole_due, returned_due)
        return min((due for due in dues if due is not None), default=None)

    @property
    def phase(self) -> Phase:
        return self.state.phase

    @property
    def epoch(self) -> int:
        """The epoch that runs or ran last."""
        return self.state.epoch

    @property
    def next_epoch(self) -> int:
        """The epoch that new processes are started for."""
        return self.state.next_epoch

    @property
    def dropped(self) -> Counter[str]:
        """Events that changed nothing, by name."""
        return self.state.dropped


def _at_its_rank(job: JobState, event: ev.Event) -> ev.Event:
    """The event with the rank that its process has now: a smaller world has numbered it anew."""
    if not isinstance(event, ev.WorkerEvent):
        return event
    slot = job.find(event.rank, event.incarnation)
    return event if slot is None or slot.rank == event.rank else replace(event, rank=slot.rank)


def _is_stale(job: JobState, event: ev.Event) -> bool:
    """Of an earlier process of the rank, of another epoch than the one its process is in, or said before."""
    if not isinstance(event, ev.WorkerEvent):
        return False
    if not 0 <= event.rank < len(job.slots):
        return True
    slot = job.slots[event.rank]
    if event.incarnation != slot.incarnation or slot.gone:
        return True
    match event:
        case ev.Arrived():
            return slot.state not in _CAN_ARRIVE or event.epoch != slot.epoch
        case ev.Completed() | ev.Waits():
            return slot.state is not SlotState.RUNNING or event.epoch != slot.epoch
        case ev.Faulted() | ev.Stepped() | ev.Registered() | ev.Holds():
            return not event.epoch == slot.epoch == job.epoch
    return False
