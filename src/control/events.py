"""What can happen to a job, as values. Times are not in them: `Job.handle` is given the time."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..protocol.plan import Holding


class Begin(msgspec.Struct, frozen=True):
    """The launcher asks for the job. Always the first event."""


class HookEnded(msgspec.Struct, frozen=True):
    """The pre-train or post-train script ended. `exit_code` is negative for a signal."""

    exit_code: int


class WorkerEvent(msgspec.Struct, frozen=True):
    """About one worker process: `incarnation` tells it from earlier and later processes of its rank."""

    rank: int
    incarnation: int


class Attached(WorkerEvent, frozen=True):
    """The process has reached its first wrapped function. `abort_timeout`: its limit to unwind, seconds."""

    abort_timeout: float | None = None


class Arrived(WorkerEvent, frozen=True):
    """The worker waits at the barrier; the fields are those of `protocol.messages.Arrive`."""

    epoch: int
    call: int = 1
    step: int = 0
    healthy: bool = True
    holding: Holding | None = None


class Registered(WorkerEvent, frozen=True):
    """The rank has registered its state: who is of the same shard holds the same bytes."""

    epoch: int
    shard: str


class Faulted(WorkerEvent, frozen=True):
    """User code raised in `epoch`. `consequence`: a broken connection, most likely due to another's fault."""

    epoch: int
    summary: str
    traceback: str = ""
    consequence: bool = False


class Stepped(WorkerEvent, frozen=True):
    """The first optimizer step of `epoch` completed on this rank."""

    epoch: int
    step: int


class Completed(WorkerEvent, frozen=True):
    """The wrapped function returned on this rank."""

    epoch: int


class Exited(WorkerEvent, frozen=True):
    """The process is gone. `exit_code` is negative for the signal that killed it."""

    exit_code: int


class StopRequested(msgspec.Struct, frozen=True):
    """Somebody sent the launcher a signal that ends the job."""

    signum: int


class TimePassed(msgspec.Struct, frozen=True):
    """The time that `Job.next_deadline` named has come."""


Event: TypeAlias = (
    Begin
    | HookEnded
    | Attached
    | Arrived
    | Registered
    | Faulted
    | Stepped
    | Completed
    | Exited
    | StopRequested
    | TimePassed
)
