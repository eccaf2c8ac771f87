"""The job as one value: its configuration, its phase and one slot per rank."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..protocol.plan import NO_EPOCH


class Phase(enum.Enum):
    """What the job as a whole does."""

    PREPARING = "preparing"
    """The pre-train script runs; there are no workers."""
    ASSEMBLING = "assembling"
    """Workers run outside any wrapped function, or wait for the others in front of one."""
    RUNNING = "running"
    """An epoch runs: every worker is in the wrapped function or has returned from it."""
    RECOVERING = "recovering"
    """The epoch has failed: survivors unwind, lost ranks are respawned, all gather at the barrier."""
    RESTARTING = "restarting"
    """Every process is being stopped, to be started again."""
    CONCLUDING = "concluding"
    """Training succeeded; the post-train script runs."""
    STOPPING = "stopping"
    """The outcome is known; the processes are being stopped."""
    ENDED = "ended"


class SlotState(enum.Enum):
    """What the process of one rank does."""

    STARTING = "starting"
    """The process runs but has not reached the barrier of its first wrapped function (it may have none)."""
    WAITING = "waiting"
    """At the barrier."""
    RUNNING = "running"
    """In the wrapped function."""
    COMPLETED = "completed"
    """Returned from the wrapped function, waits for the others."""
    UNWINDING = "unwinding"
    """On its way from a failed epoch to the barrier."""
    BETWEEN = "between"
    """Past a wrapped function that returned everywhere."""
    EXITED = "exited"
    """Gone, with exit code 0, as it should be."""
    LOST = "lost"
    """Gone otherwise, or not started."""


GONE = frozenset({SlotState.EXITED, SlotState.LOST})


@dataclass(frozen=True, slots=True)
class JobConfig:
    """What the job was asked to be. Times in seconds."""

    world_size: int
    in_process: bool = False
    max_restarts: int = 0
    max_inprocess_restarts: int | None = None
    barrier_timeout: float = 60.0
    """Fault to barrier, for a survivor; for a respawned process the longest start-up seen is added."""
    start_timeout: float = 600.0
    """First arrival at a barrier that no fault caused, to the last."""
    shutdown_timeout: float = 30.0
    stall_limit: int = 3
    """Epochs in a row without a completed optimizer step that end the job."""
    pre_train: bool = False
    post_train: bool = False


@dataclass(slots=True)
class Slot:
    """One rank: the process that holds it and what is known of it."""

    rank: int
    state: SlotState = SlotState.LOST
    incarnation: int = -1
    attached: bool = False
    abort_timeout: float | None = None
    epoch: int = NO_EPOCH
    """The last epoch this process ran in; NO_EPOCH for a new process."""
    call: int = 0
    step: int = 0
    healthy: bool = True
    spawned_at: float = 0.0
    due: float | None = None
    """When this process must have reached the barrier, or be gone if it was killed."""
    overdue: str = ""
    """Why this process was killed, once it has been."""

    @property
    def gone(self) -> bool:
        return self.state in GONE

    @property
    def fresh(self) -> bool:
        """The process has not run in any epoch: it holds no state."""
        return self.epoch == NO_EPOCH

    def occupy(self, incarnation: int, now: float) -> None:
        """A new process takes the slot."""
        self.state = SlotState.STARTING
        self.incarnation = incarnation
        self.attached = False
        self.abort_timeout = None
        self.epoch = NO_EPOCH
        self.call = self.step = 0
        self.healthy = True
        self.spawned_at = now
        self.due = None
        self.overdue = ""
