"""Virtual time, the network and the faults of one simulated job. What must hold after every step is in `rules.py`."""

from __future__ import annotations

import contextlib
import heapq
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from ..control.job import commands as cmd
from ..control.job.events import Begin, StopRequested
from ..control.job.state import JobConfig
from ..control.membership import messages as msg
from ..control.membership.leading.leader import Leader
from ..control.membership.node import Node
from ..control.membership.roles import NodeConfig
from .agents import SimulatedAgent
from .rules import Rules, Violation
from .schedule import COMES_LATER_S, Fault, Schedule
from .workers import SimulatedWorker

_DEPUTY_S = 5.0
_MESSAGES = 100_000
"""In one schedule of few nodes; a long one needs a tenth of it."""
_COMES_BACK_S = 0.5
_SLOW_PERIOD_S, _SLOW_AWAKE_S = 1.3, 0.02


class World:
    """One simulated job."""

    def __init__(self, schedule: Schedule, *, check: bool = True) -> None:
        """`check`: the rules are checked after every message, which takes time on thousands of nodes."""
        self.schedule = schedule
        self.dice = random.Random(schedule.seed)
        self.now = 0.0
        self.messages = 0
        self.bytes = 0
        self.cpu_s: dict[str, float] = {}
        """Processor time of every agent, by address, decisions, encoding and decoding; kept where bytes are counted."""
        self.count_bytes = False
        self.running: Counter[tuple[str, int]] = Counter()
        """How many workers are in an epoch."""
        self.stepped: Counter[tuple[str, int]] = Counter()
        """How many ranks have completed a step in it."""
        self.completed: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
        """Which ranks have trained to the end in it."""
        self.trained_alone: set[str] = set()
        """The jobs without wrapped function of which a worker has trained to the end."""
        self.checks = check
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self.agents: list[SimulatedAgent] = []
        self.by_address: dict[str, SimulatedAgent] = {}
        self._cut: set[str] = set()
        self._deaf: set[str] = set()
        self._halves: set[str] = set()
        self._talked: set[tuple[str, str]] = set()
        self.rules = Rules(self)
        self.check_order, self.check_end, self.runs = self.rules.check_order, self.rules.check_end, self.rules.runs
        total = schedule.nodes + schedule.spares
        for index in range(total):
            self._start_agent(index, at=0.0 if index < schedule.nodes else 0.5)
        for fault in schedule.faults:
            self.at(fault.at, self._strike, fault)

    # ---- time ------------------------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(when, self.now), self._count, action, arguments))

    def after(self, seconds: float, action: Callable[..., None], *arguments: object) -> None:
        self.at(self.now + seconds, action, *arguments)

    def run(self, until: float, done: Callable[[], bool] | None = None) -> None:
        """Until this time, or until `done`."""
        while self._queue and self._queue[0][0] <= until and not (done and done()):
            self.now, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)

    def play(self) -> None:
        """The whole schedule. Raises Violation."""
        faults_over = self.schedule.faults_over
        enough = faults_over + 60.0 + 4 * self.schedule.join_timeout
        self.run(faults_over + _COMES_BACK_S, self.over)
        must_train = self.rules.majority_is_there(faults_over)
        self.run(enough, self.over)
        if not self.over():
            roles = {agent.address: type(agent.node.role).__name__ for agent in self.live()}
            raise Violation(f"not over {enough:.0f} s after the beginning: {roles}")
        ends = [agent.end for agent in self.live() if agent.end is not None and not agent.asked_to_leave]
        if must_train and not any(end.exit_code == 0 for end in ends):
            raise Violation(f"a majority was there, and nobody has trained to the end: {ends[0].reason}")

    def over(self) -> bool:
        return all(agent.end is not None for agent in self.live())

    def live(self) -> Iterator[SimulatedAgent]:
        return (agent for agent in self.agents if agent.alive)

    def live_workers(self) -> Iterator[SimulatedWorker]:
        return (worker for agent in self.live() for worker in agent.workers.values())

    # ---- agents ----------------------------------------------------------------------------------------------------

    def _start_agent(self, index: int, at: float) -> None:
        schedule, total = self.schedule, self.schedule.nodes + self.schedule.spares
        address = f"n{index}:17000"
        config = NodeConfig(
            key=f"{index}-{self.dice.randrange(1 << 30)}",
            host=f"n{index}",
            address=address,
            workers=schedule.workers,
            run_id="simulated",
            job=JobConfig(
                world_size=0,
                in_process=schedule.in_process,
                max_restarts=schedule.max_restarts,
                min_nodes=schedule.min_nodes or schedule.nodes,
                max_nodes=schedule.nodes,
                join_timeout=schedule.hole_timeout,
                stall_limit=20,
            ),
            seeds=tuple(f"n{seed}:17000" for seed in range(min(2, total))),
            founder=index == 0,
            deputy=_DEPUTY_S if index == 1 else None,
            join_timeout=schedule.join_timeout,
            last_call_timeout=1.0,
            min_quorum=1 if schedule.nodes + schedule.spares == 1 else None,
        )
        agent = SimulatedAgent(self, index, config)
        self.agents.append(agent)
        self.by_address[address] = agent
        self.at(at, agent.handle, Begin())

    def measured(self, node: Node, event: msg.NodeEvent) -> list[msg.Action]:
        """What the node does because of the event, its processor time counted."""
        with self._counted(node.context.config.address):
            return node.handle(event, self.now)

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        began = time.process_time() if self.count_bytes else 0.0
        yield
        if self.count_bytes:
            self.cpu_s[address] = self.cpu_s.get(address, 0.0) + time.process_time() - began

    # ---- the network -----------------------------------------------------------------------------------------------

    def send(self, sender: SimulatedAgent, address: str, message: msg.PeerMessage) -> None:
        self.messages += 1
        if self.checks and self.messages > _MESSAGES * max(1.0, len(self.agents) / 10):
            raise Violation(f"{self.messages} messages: the agents flood the network")
        if self.count_bytes:
            with self._counted(sender.address):
                data = msg.encode(message)
            self.bytes += len(data)
            with self._counted(address):
                message = msg.decode(data)
        if not self._connected(sender.address, address):
            return
        receiver = self.by_address.get(address)
        if receiver is None or not receiver.alive or receiver.end is not None:
            self.after(self._delay(), self._tell_refused, sender, address)
            return
        self._talked |= {(sender.address, address), (address, sender.address)}
        copies = 1 + (self.dice.random() < self.schedule.duplicates)
        for _ in range(copies):
            if self.dice.random() >= self.schedule.loss:
                self.after(self._delay(), self._deliver, sender, receiver, message)

    def _deliver(self, sender: SimulatedAgent, receiver: SimulatedAgent, message: msg.PeerMessage) -> None:
        if self._connected(sender.address, receiver.address) and receiver.address not in self._deaf:
            receiver.handle(msg.Received(sender.key, sender.address, message))
            if self.checks:
                self.rules.check(receiver)

    def _tell_refused(self, sender: SimulatedAgent, address: str) -> None:
        if sender.address not in self._deaf:
            sender.handle(msg.Closed(address))

    def _delay(self) -> float:
        return 0.0002 + self.dice.random() * self.schedule.jitter

    def _connected(self, one: str, other: str) -> bool:
        if one in self._cut or other in self._cut:
            return False
        return (one in self._halves) == (other in self._halves)

    def connections_close(self, gone: SimulatedAgent) -> None:
        """The kernel says so to everybody it can reach."""
        for one, other in sorted(self._talked):
            if one == gone.address and self._connected(one, other):
                self.after(self._delay(), self._tell_closed, other, gone)
        self._talked = {pair for pair in self._talked if gone.address not in pair}

    def _tell_closed(self, address: str, gone: SimulatedAgent) -> None:
        listener = self.by_address.get(address)
        if listener is not None and address not in self._deaf:
            listener.handle(msg.Closed(gone.address, gone.key))

    # ---- faults ----------------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        agent = self.agents[fault.target % len(self.agents)]
        match fault.kind:
            case "raise" | "kill-worker":
                workers = list(self.live_workers())
                if workers:
                    worker = sorted(workers, key=lambda w: (w.rank, w.incarnation))[fault.target % len(workers)]
                    worker.fault("boom") if fault.kind == "raise" else worker.die(-9)
            case "kill-agent" | "restart-agent":
                self._kill(agent, fault)
            case "kill-leader":
                for leader in [a for a in self.live() if isinstance(a.node.role, Leader)]:
                    self._kill(leader, fault)
            case "cut":
                self._cut.add(agent.address)
                self.after(fault.seconds, self._cut.discard, agent.address)
            case "deaf":
                self._deaf.add(agent.address)
                self.after(fault.seconds, self._deaf.discard, agent.address)
            case "freeze":
                agent.frozen_until = self.now + fault.seconds
            case "slow":
                self._slow_down(agent, self.now + fault.seconds)
            case "restart-many":
                for index in range(1 + fault.target % len(self.by_address)):
                    many = self.by_address[f"n{index}:17000"]
                    self._kill(many, fault, later=COMES_LATER_S * index)
            case "cut-many":
                lowest = {f"n{index}:17000" for index in range(1 + fault.target % len(self.by_address))}
                self.cut_off(lowest)
                self.after(fault.seconds, self._cut.difference_update, lowest)
            case "halve":
                self._halves = {a.address for a in self.agents[: max(1, len(self.agents) // 2)]}
                self.after(fault.seconds, self._halves.clear)
            case "reset":
                for other in list(self.live()):
                    if other is not agent and self._connected(agent.address, other.address):
                        self.after(self._delay(), agent.handle, msg.Closed(other.address, other.key))
                        self.after(self._delay(), other.handle, msg.Closed(agent.address, agent.key))
            case "signal":
                agent.asked_to_leave = True
                agent.handle(StopRequested(15))

    def cut_off(self, addresses: set[str]) -> None:
        """Nothing reaches these nodes, nor comes from them, until they are heard again."""
        self._cut |= addresses

    def _slow_down(self, agent: SimulatedAgent, until: float) -> None:
        if self.now < until:
            agent.frozen_until = max(agent.frozen_until, self.now + _SLOW_PERIOD_S - _SLOW_AWAKE_S)
            self.after(_SLOW_PERIOD_S, self._slow_down, agent, until)

    def _kill(self, agent: SimulatedAgent, fault: Fault, later: float = 0.0) -> None:
        if agent.alive and agent.end is None:
            agent.die()
            if fault.seconds:
                self._start_agent(agent.index, at=self.now + fault.seconds + later)

    # ---- what workers ask ------------------------------------------------------------------------------------------

    def everybody_in(self, founder: str, epoch: int) -> bool:
        """Whether a collective of this epoch can complete."""
        if not self._cut and not self._deaf and not self._halves:
            return self.running[founder, epoch] == self.rules.worlds.get((founder, epoch), -1)
        ranks = {
            worker.rank
            for agent in self.agents
            for worker in agent.workers.values()
            if worker.founder == founder and worker.running and worker.epoch == epoch and self._reachable(agent)
        }
        return len(ranks) == self.rules.worlds.get((founder, epoch), -1)

    def everybody_up(self, layout: cmd.Layout | None) -> bool:
        """The same for scripts that know no epochs."""
        size = layout.world_size if layout is not None else 0
        ranks = {w.rank for agent in self.live() for w in agent.workers.values() if self._reachable(agent)}
        ended = {rank for agent in self.agents for rank in agent.node.context.local.completed}
        return len(ranks) >= 1 and (len(ranks) == size or bool(ended))

    def _reachable(self, agent: SimulatedAgent) -> bool:
        return agent.address not in self._cut | self._deaf and not self._halves


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """The same failure with fewer faults and a calmer network."""
    again = True
    while again:
        again = False
        candidates = [
            replace(schedule, faults=schedule.faults[:i] + schedule.faults[i + 1 :])
            for i in range(len(schedule.faults))
        ]
        calmer: list[dict[str, float]] = [{"loss": 0.0}, {"duplicates": 0.0}, {"spares": 0}, {"workers": 1}]
        candidates += [
            replace(schedule, **change)
            for change in calmer
            if any(getattr(schedule, k) != v for k, v in change.items())
        ]
        for candidate in candidates:
            if fails(candidate):
                schedule, again = candidate, True
                break
    return schedule
