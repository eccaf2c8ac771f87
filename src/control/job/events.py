"""What can happen to a job, as values. Times are not in them: `Job.handle` is given the time."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ...protocol.plan import Holding


class Begin(msgspec.Struct, frozen=True):
    """The launcher asks for the job. Always the first event."""


class HookEnded(msgspec.Struct, frozen=True, tag=True):
    """The pre-train or post-train script ended on a node. `exit_code` is negative for a signal."""

    exit_code: int
    node: int = 0


class WorkerEvent(msgspec.Struct, frozen=True, tag=True):
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
    ends_job: bool = False
    """No restart would change it."""


class Stepped(WorkerEvent, frozen=True):
    """The first optimizer step of `epoch` completed on this rank."""

    epoch: int
    step: int


class Holds(WorkerEvent, frozen=True):
    """What the rank's tensors hold after the first step of `epoch`: by replica group, a digest."""

    epoch: int
    step: int
    digests: dict[str, str]


class Completed(WorkerEvent, frozen=True):
    """The wrapped function returned on this rank; the fields are those of `protocol.messages.Completed`."""

    epoch: int
    left: str = ""
    collectives: dict[str, int] = msgspec.field(default_factory=dict)


class Waits(WorkerEvent, frozen=True):
    """The rank, in the wrapped function, waits in torch.distributed, or does so no more. `returned`: how many others
    had returned from it when it was asked."""

    epoch: int
    returned: int
    waiting: bool = True


class Exited(WorkerEvent, frozen=True):
    """The process is gone. `exit_code` is negative for the signal that killed it."""

    exit_code: int


class Condemned(WorkerEvent, frozen=True):
    """The node has seen that this process cannot go on, though it lives: its GPU is in error."""

    reason: str


class NodeJoined(msgspec.Struct, frozen=True):
    """A node has become a member: a spare that can hold `workers` ranks."""

    node: int
    workers: int
    epoch: int = -1
    """The highest epoch number that it has seen: it is not used again."""
    role: str = "default"


class NodeLost(msgspec.Struct, frozen=True):
    """A node is no member any more: closed, silent or gone by itself. Its ranks' processes are dead or will be."""

    node: int
    reason: str


class NodesAgreed(msgspec.Struct, frozen=True):
    """A majority knows who is a member now: only then can what a lost node held be given to another.

    `quorum`: how many nodes must have confirmed an epoch's number before it may start.
    """

    quorum: int


class Opened(msgspec.Struct, frozen=True, tag=True):
    """A node knows the number of an epoch: no later controller that hears this node will use it again."""

    node: int
    epoch: int


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
    | Holds
    | Completed
    | Waits
    | Exited
    | Condemned
    | NodeJoined
    | NodeLost
    | NodesAgreed
    | Opened
    | StopRequested
    | TimePassed
)
