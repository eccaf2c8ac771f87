"""What can happen to a job, as values. Times are not in them: `Job.handle` is given the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Begin:
    """The launcher asks for the job. Always the first event."""


@dataclass(frozen=True, slots=True)
class HookEnded:
    """The pre-train or post-train script ended. `exit_code` is negative for a signal."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """About one worker process: `incarnation` tells it from earlier and later processes of its rank."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Attached(WorkerEvent):
    """The process has reached its first wrapped function. `abort_timeout`: its limit to unwind, seconds."""

    abort_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Arrived(WorkerEvent):
    """The worker waits at the barrier; the fields are those of `protocol.messages.Arrive`."""

    epoch: int
    call: int = 1
    step: int = 0
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Faulted(WorkerEvent):
    """User code raised in `epoch`. `consequence`: a broken connection, most likely due to another's fault."""

    epoch: int
    summary: str
    traceback: str = ""
    consequence: bool = False


@dataclass(frozen=True, slots=True)
class Stepped(WorkerEvent):
    """The first optimizer step of `epoch` completed on this rank."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Completed(WorkerEvent):
    """The wrapped function returned on this rank."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Exited(WorkerEvent):
    """The process is gone. `exit_code` is negative for the signal that killed it."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody sent the launcher a signal that ends the job."""

    signum: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time that `Job.next_deadline` named has come."""


Event: TypeAlias = (
    Begin | HookEnded | Attached | Arrived | Faulted | Stepped | Completed | Exited | StopRequested | TimePassed
)
