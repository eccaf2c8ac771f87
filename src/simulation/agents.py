"""A simulated agent: the real `control.membership.node.Node`, whose actions are carried out by the simulated world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..control.job import commands as cmd
from ..control.job import events as ev
from ..control.membership import messages as msg
from ..control.membership.follower import Follower
from ..control.membership.leading.leader import Leader
from ..control.membership.node import Node
from ..control.membership.roles import NodeConfig
from .workers import SimulatedWorker, WorldOfWorkers


class WorldOfAgents(WorldOfWorkers, Protocol):
    """What an agent knows of the world."""

    now: float

    def at(self, when: float, action: Callable[..., None], *arguments: object) -> None: ...

    def measured(self, node: Node, event: msg.NodeEvent) -> list[msg.Action]: ...

    def send(self, sender: SimulatedAgent, address: str, message: msg.PeerMessage) -> None: ...

    def connections_close(self, gone: SimulatedAgent) -> None: ...

    def check_order(self, agent: SimulatedAgent, command: cmd.Command) -> None: ...

    def check_end(self, agent: SimulatedAgent, end: cmd.End) -> None: ...


class SimulatedAgent:
    """One agent process. A restarted one is another object at the same address."""

    def __init__(self, world: WorldOfAgents, index: int, config: NodeConfig) -> None:
        self.world = world
        self.index = index
        self.config = config
        self.node = Node(config)
        self.alive = True
        self.end: cmd.End | None = None
        self.workers: dict[int, SimulatedWorker] = {}
        self.layout: cmd.Layout | None = None
        self.notes: list[tuple[float, str, dict[str, object]]] = []
        self.started_epoch = -1
        self.failed_epoch = -1
        self._timer_at: float | None = None
        self.frozen_until = 0.0
        self.asked_to_leave = False

    @property
    def address(self) -> str:
        return self.config.address

    @property
    def key(self) -> str:
        return self.config.key

    def handle(self, event: msg.NodeEvent) -> None:
        """Something happens to it, now."""
        if not self.alive or self.end is not None:
            return
        if self.world.now < self.frozen_until:
            self.world.at(self.frozen_until, self.handle, event)
            return
        for action in self.world.measured(self.node, event):
            self._do(action)
        self._set_timer()

    def die(self) -> None:
        """SIGKILL: its workers die with it, and the kernel closes its connections."""
        if self.alive:
            self.alive = False
            for worker in list(self.workers.values()):
                worker.abandoned = True
                self.world.after(self.world.dice.uniform(0.0, 0.01), worker.die, -9)
            self.world.connections_close(self)

    @property
    def founder(self) -> str:
        """Which job this agent is in."""
        return self.node.context.configurations.proposed.founder

    @property
    def leader(self) -> tuple[int, str] | None:
        """The term and the controller that this agent obeys."""
        role = self.node.role
        if isinstance(role, Follower):
            return role.term, role.leader_key
        return (role.term, self.key) if isinstance(role, Leader) else None

    def _set_timer(self) -> None:
        due = self.node.next_deadline()
        if due is None or self.end is not None:
            self._timer_at = None
        elif self._timer_at is None or due < self._timer_at:
            self._timer_at = due
            self.world.at(due, self._on_timer, due)

    def _on_timer(self, due: float) -> None:
        if self._timer_at == due:
            self._timer_at = None
            self.handle(ev.TimePassed())

    def _do(self, action: msg.Action) -> None:
        match action:
            case msg.Send():
                self.world.send(self, action.address, action.message)
            case msg.Execute():
                self._execute(action.command)
            case msg.Note():
                self.notes.append((self.world.now, action.event, action.fields))
            case msg.Ended():
                self.world.check_end(self, action.end)
                self.end = action.end
                for worker in list(self.workers.values()):
                    worker.abandoned = True
                    worker.die(-9)
                self.world.after(0.05, self.world.connections_close, self)

    def _execute(self, command: cmd.Command) -> None:
        self.world.check_order(self, command)
        match command:
            case cmd.Spawn():
                self.layout = command.layout
                self.workers[command.incarnation] = SimulatedWorker(self.world, self, command)
            case cmd.Kill():
                if command.incarnation in self.workers:
                    self.workers[command.incarnation].kill(9)
            case cmd.StopWorkers():
                for worker in list(self.workers.values()):
                    worker.kill(command.signum or 15)
            case cmd.FailEpoch():
                self.failed_epoch = max(self.failed_epoch, command.epoch)
                for worker in list(self.workers.values()):
                    worker.fail_epoch(command.epoch)
            case cmd.StartEpoch():
                self.layout = command.layout
                self.started_epoch = command.epoch
                for slot in command.slots:
                    if slot.incarnation in self.workers:
                        self.workers[slot.incarnation].start(command, slot.rank)
            case cmd.FinishEpoch():
                for worker in list(self.workers.values()):
                    worker.finish(command.epoch)
