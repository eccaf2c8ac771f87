"""The job as one value: its configuration, its phase, one slot per rank, and what is known of its faults.

Must never: decide anything. The transitions change these values; `transitions.py` says which one does when.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping

import msgspec

from ...protocol.plan import NO_EPOCH, Holding
from .commands import Cause, End


class Phase(enum.Enum):
    """What the job as a whole does."""

    NEW = "new"
    """Nothing has been asked for yet."""
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
    GATHERING = "gathering"
    """No process runs: a node was lost, and all start anew when another takes its place."""
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
    BETWEEN = "between wrapped functions"
    """Past a wrapped function that returned everywhere."""
    KILLED = "killed"
    """Sent SIGKILL; what it still says does not count, and its end has yet to be seen."""
    EXITED = "exited"
    """Gone, with exit code 0, as it should be."""
    LOST = "lost"
    """Gone otherwise, or not started."""


GONE = frozenset({SlotState.EXITED, SlotState.LOST})


class JobConfig(msgspec.Struct, frozen=True):
    """What the job was asked to be. Times in seconds."""

    world_size: int
    """The ranks of a job on one node. On many they are counted where they are (`JobState.new`)."""
    in_process: bool = False
    max_restarts: int = 0
    max_inprocess_restarts: int | None = None
    barrier_timeout: float = 60.0
    """Fault to barrier, for a survivor; for a respawned process the longest start-up seen is added."""
    start_timeout: float = 600.0
    """First arrival at a barrier that no fault caused, to the last."""
    shutdown_timeout: float = 30.0
    """From the signal that stops a process to SIGKILL."""
    kill_timeout: float = 30.0
    """From SIGKILL to its end; a process that takes longer is stuck in the kernel and given up."""
    stall_limit: int = 3
    """Failed epochs in a row without a completed optimizer step that end the job."""
    pre_train: bool = False
    post_train: bool = False
    min_nodes: int = 1
    """The world may shrink to so many nodes."""
    max_nodes: int = 1
    """And grow to so many; nodes beyond it are spares."""
    join_timeout: float = 600.0
    """How long a lost node's ranks wait for a node to take them, before the world shrinks or the job ends."""


class Place(msgspec.Struct):
    """One node's share of the world: `workers` ranks in a row. `node`: who holds it, None while nobody does."""

    node: int | None
    workers: int
    role: str | None = None
    """Of its workers; None: the node was lost with the controller, and nobody knows."""


class NodeState(msgspec.Struct):
    """A member, with ranks or as a spare. `confirmed`: the highest epoch number that it is known to know."""

    workers: int
    role: str = "default"
    confirmed: int = NO_EPOCH


class Slot(msgspec.Struct):
    """One rank: the process that holds it and what is known of it."""

    rank: int
    state: SlotState = SlotState.LOST
    node: int | None = 0
    """Where it is; None: its node was lost, and there is no other yet."""
    local_rank: int = 0
    place: int = 0
    """Its node's index among the places."""
    incarnation: int = -1
    spawn_epoch: int = NO_EPOCH
    """The epoch this process was started for; it may have written store keys of it before any barrier."""
    epoch: int = NO_EPOCH
    """The last epoch this process ran in; NO_EPOCH for a new process."""
    abort_timeout: float | None = None
    call: int = 0
    step: int = 0
    healthy: bool = True
    holding: Holding | None = None
    """What its CheckpointManager said it holds; None where the script has none."""
    spawned_at: float = 0.0
    waits: int = 0
    """So many others had returned from the wrapped function when it was seen to wait in torch.distributed; 0: it does
    not wait, or has not been asked."""
    left: str = ""
    """How it left the function's loop before its end; empty where it did not, or that is not known."""
    former_ranks: tuple[int, ...] = ()
    """Ranks that this same process had in larger worlds."""
    due: float | None = None
    """When this process must have reached the barrier, or be gone if it was killed."""
    killed_for: str = ""
    """Why this process was killed, once it has been."""

    @property
    def gone(self) -> bool:
        return self.state in GONE

    @property
    def fresh(self) -> bool:
        """The process has not run in any epoch: it holds no state."""
        return self.epoch == NO_EPOCH

    def leave(self, state: SlotState) -> None:
        """The process is gone."""
        self.state = state
        self.due = None


class Held(msgspec.Struct, frozen=True):
    """What the first rank of a replica group has said that it holds. `at`: epoch and step."""

    at: tuple[int, int]
    rank: int
    digest: str


class JobState(msgspec.Struct):
    """All that decisions depend on. Two jobs that are equal here answer the same events the same way."""

    config: JobConfig
    slots: list[Slot]
    phase: Phase = Phase.NEW
    epoch: int = NO_EPOCH
    """The epoch that runs or ran last."""
    next_epoch: int = 0
    """The epoch that starts when every rank waits. It grows also when that attempt fails before it began."""
    opened: int = NO_EPOCH
    """The epoch the store serves."""
    incarnations: int = 0
    """Processes started so far."""
    nodes: dict[int, NodeState] = msgspec.field(default_factory=dict)
    places: list[Place] = msgspec.field(default_factory=list)
    quorum: int = 0
    """How many nodes must have confirmed an epoch before it starts; 0 where there is only one."""
    agreed: bool = True
    """The members are those that a majority agreed on."""
    dues_moved: int = 0
    """Counts the deadlines that were set without any command."""
    hole_due: float | None = None
    """When the world shrinks, because nobody has taken a lost node's place."""
    hooks: set[int] = msgspec.field(default_factory=set)
    """The nodes on which the pre-train or post-train script runs."""
    wrapped: bool = False
    """Some process has come to a wrapped function since all were started: a lost one can be replaced alone."""
    finished_calls: int = 0
    """Wrapped functions that have returned everywhere, since all processes were started."""
    slowest_start: float = 0.0
    """From the start of a process to its first barrier, the longest seen."""

    restarts: int = 0
    inprocess_restarts: int = 0
    fault: Cause | None = None
    """Why the recovery under way is under way."""
    stalled: dict[int, Cause] = msgspec.field(default_factory=dict)
    """The epochs that failed in a row without a completed step, and why; the first is the one to show."""
    progress: int = NO_EPOCH
    """The last epoch in which an optimizer step completed."""
    newest_step: int = 0
    """The most steps of training that any rank is known to have completed, in the wrapped function under way."""
    shards: dict[int, str] = msgspec.field(default_factory=dict)
    """The shard of every rank that has ever registered its state, since all processes were started."""

    returned_due: float | None = None
    """When those who still run in the function are told that others have returned from it."""
    collectives: dict[str, int] = msgspec.field(default_factory=dict)
    """By process group: the fewest collectives that a rank had begun when it returned, where they are counted."""
    deserted: bool = False
    """In this function ranks have waited in vain for one that had returned."""
    after_return: bool = False
    """The fault under way is a broken connection, after somebody had returned."""

    digests: dict[str, Held] = msgspec.field(default_factory=dict)
    """By replica group: what its tensors held after the first step of an epoch."""

    outcome: End | None = None
    """How the job will end, once that is known."""
    stop_asked: tuple[int, float] | None = None
    """The first signal that asked the launcher to stop, and when."""
    stop_due: float | None = None
    """When the processes that are being stopped must be gone, or be killed."""
    released: bool = False
    """Who returns from the function while processes are being stopped need not wait for the others."""
    killing: bool = False
    """They have been sent SIGKILL."""

    dropped: Counter[str] = msgspec.field(default_factory=Counter)
    """Events that changed nothing, by name."""

    @classmethod
    def new(cls, config: JobConfig, nodes: Mapping[int, NodeState] | None = None) -> JobState:
        """`nodes`: the members, in the order of their ranks; None: one node."""
        members = {0: NodeState(config.world_size)} if nodes is None else dict(nodes)
        held = list(members)[: config.max_nodes]
        job = cls(config, [], nodes=members)
        job.places = [Place(node, members[node].workers, members[node].role) for node in held]
        for index, node in enumerate(held):
            for local_rank in range(members[node].workers):
                job.slots.append(Slot(len(job.slots), node=node, local_rank=local_rank, place=index))
        return job

    @property
    def everything_gone(self) -> bool:
        return not self.hooks and all(slot.gone for slot in self.slots)

    @property
    def has_holes(self) -> bool:
        return any(place.node is None for place in self.places)

    def spares(self) -> list[int]:
        """The members that hold no ranks, in the order of their numbers."""
        placed = {place.node for place in self.places}
        return sorted(node for node in self.nodes if node not in placed)

    def find(self, rank: int, incarnation: int) -> Slot | None:
        """The slot whose present process this is, under its present rank or one that it had before."""
        if 0 <= rank < len(self.slots) and self.slots[rank].incarnation == incarnation:
            return self.slots[rank]
        moved = (slot for slot in self.slots if slot.incarnation == incarnation and rank in slot.former_ranks)
        return next(moved, None)

    def ranks(self, *states: SlotState) -> list[int]:
        """The ranks in one of these states, ascending."""
        return [slot.rank for slot in self.slots if slot.state in states]
