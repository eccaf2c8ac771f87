"""The controller's core on many nodes, and what each event costs it: `Directing` and the job below it, no network.

The cost is counted in bytecode instructions, which are the same in every run. `sorted` and its like count as one, but
they take a hundredth of a loop's time for each element.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.job import Job
from hyperpodrun.control.job.places import NodeState
from hyperpodrun.control.job.slots import SlotState
from hyperpodrun.control.job.state import JobConfig, Phase
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.leading.directing import Directing, Progress
from hyperpodrun.control.membership.members import Member
from hyperpodrun.control.membership.roles import Context, NodeConfig, Role
from hyperpodrun.protocol.plan import Holding

WORKERS = 8
_ON_THEIR_WAY = (SlotState.STARTING, SlotState.UNWINDING, SlotState.BETWEEN)


@dataclass
class Cost:
    """Of one event: instructions, messages to other nodes, and the largest of those."""

    event: ev.Event
    instructions: int
    messages: int
    largest: int


@dataclass
class ManyNodes:
    """A job on many nodes. Node 0 is where its controller is."""

    nodes: int
    options: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        options = {"in_process": True, "max_restarts": 3, "min_nodes": 1, "max_nodes": self.nodes, **self.options}
        job = JobConfig(world_size=0, **options)
        context = Context(NodeConfig("k0", "h0", "h0:1", WORKERS, "run", job))
        context.number = 0
        self.core = _Core(context, self.nodes, job)

    @property
    def job(self) -> Job:
        assert self.core._job is not None
        return self.core._job

    def tell(self, event: ev.Event, label: str = "") -> list[cmd.Command]:
        """What this node carries out because of it. `label`: what it costs is remembered by that name."""
        context = self.core.context
        context.now = self.now
        context.actions = []
        if label:
            instructions = count(lambda: self.core.take(event))
            sent = [len(msg.encode(action.message)) for action in context.actions if isinstance(action, msg.Send)]
            assert label not in self.costs
            self.costs[label] = Cost(event, instructions, len(sent), max(sent, default=0))
        else:
            self.core.take(event)
        if len(context.actions) > 1:
            for follower in self.core._followers.values():
                follower.link.confirm(follower.link.sent)
        return [action.command for action in context.actions if isinstance(action, msg.Execute)]

    # ---- what ranks do -------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> range:
        return range(len(self.job.state.slots))

    def of(self, rank: int) -> tuple[int, int]:
        """The rank and its present process."""
        return rank, self.job.state.slots[rank].incarnation

    def arrive(self, *ranks: int, label: str = "", **more: Any) -> None:
        for rank in ranks:
            slot = self.job.state.slots[rank]
            holding = Holding("", 10 if slot.epoch >= 0 else None)
            call = self.job.state.finished_calls + 1
            self.tell(ev.Arrived(*self.of(rank), slot.epoch, **{"holding": holding, "call": call, **more}), label)

    def confirm(self, *nodes: int, label: str = "") -> None:
        for node in nodes:
            self.tell(ev.Opened(node, self.job.state.next_epoch), label)

    def run_barrier(self) -> None:
        """Who is on the way arrives."""
        self.arrive(*self.job.state.slots.ranks(*_ON_THEIR_WAY))

    def run_an_epoch(self) -> None:
        """From any point where processes are there, or are about to be started."""
        if self.job.phase is Phase.NEW:
            self.tell(ev.Begin())
        self.run_barrier()
        assert self.job.phase is Phase.RUNNING, self.job.phase


class _Core(Directing):
    """The controller's role, told of events directly."""

    def __init__(self, context: Context, nodes: int, config: JobConfig) -> None:
        super().__init__(context, 1)
        for node in range(1, nodes):
            self.joins(node)
        self._job = Job(config, {node: NodeState(WORKERS) for node in range(nodes)})

    def joins(self, node: int) -> None:
        """Another node is there."""
        member = Member(node, f"k{node}", f"h{node}", f"h{node}:1", WORKERS)
        self._followers[node] = Progress(member, self.context.now, 0)

    def take(self, event: ev.Event) -> None:
        if isinstance(event, ev.NodeLost):
            self._followers.pop(event.node, None)
        if isinstance(event, ev.WorkerEvent):
            assert self._holds(self._job.state.slots[event.rank].node or 0, event)
        self._run(event)
        self._finish_ending()
        self._news()
        self._job.next_deadline()

    def received(self, key: str, address: str, message: msg.PeerMessage) -> Role | None:
        raise NotImplementedError

    def tick(self) -> Role | None:
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        raise NotImplementedError


def count(action: Any) -> int:
    """How many bytecode instructions it takes."""
    instructions = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal instructions
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            instructions += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return instructions
