"""The job as one value: its configuration, its phase, one slot per rank, and what is known of its faults.

Must never: decide anything. The transitions change these values; `transitions.py` says which one does when.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping

import msgspec

from ...protocol.plan import NO_EPOCH
from .commands import Cause, End
from .places import Nodes, Place, Places
from .places import NodeState as NodeState
from .shard_table import ShardTable
from .slots import Slot, Slots


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


class Held(msgspec.Struct, frozen=True):
    """What the first rank of a replica group has said that it holds. `at`: epoch and step."""

    at: tuple[int, int]
    rank: int
    digest: str


class JobState(msgspec.Struct):
    """All that decisions depend on. Two jobs that are equal here answer the same events the same way."""

    config: JobConfig
    slots: Slots
    phase: Phase = Phase.NEW
    epoch: int = NO_EPOCH
    """The epoch that runs or ran last."""
    next_epoch: int = 0
    """The epoch that starts when every rank waits. It grows also when that attempt fails before it began."""
    opened: int = NO_EPOCH
    """The epoch the store serves."""
    incarnations: int = 0
    """Processes started so far."""
    nodes: Nodes = msgspec.field(default_factory=Nodes)
    places: Places = msgspec.field(default_factory=Places)
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
    shards: ShardTable = msgspec.field(default_factory=ShardTable)
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
        job = cls(config, Slots(), nodes=Nodes(members))
        for node in list(members)[: config.max_nodes]:
            job.add_place(Place(node, members[node].workers, members[node].role))
        return job

    def add_place(self, place: Place) -> list[Slot]:
        """At the end of the world; its slots."""
        index, first = len(self.places), len(self.slots)
        self.places.append(place)
        for local_rank in range(place.workers):
            self.slots.append(Slot(first + local_rank, node=place.node, local_rank=local_rank, place=index))
        return self.slots[first:]

    def slots_of(self, index: int) -> list[Slot]:
        """The slots of one place."""
        ranks = self.places.ranks_of(index)
        return self.slots[ranks.start : ranks.stop]

    @property
    def everything_gone(self) -> bool:
        return not self.hooks and self.slots.all_gone

    @property
    def has_spares(self) -> bool:
        return len(self.nodes) > self.places.held

    def spares(self) -> list[int]:
        """The members that hold no ranks, in the order of their numbers."""
        return sorted(self.nodes.numbers - self.places.holding) if self.has_spares else []

    def find(self, rank: int, incarnation: int) -> Slot | None:
        """The slot whose present process this is, under its present rank or one that it had before."""
        slot = self.slots.of_process(incarnation)
        return slot if slot is not None and (slot.rank == rank or rank in slot.former_ranks) else None
