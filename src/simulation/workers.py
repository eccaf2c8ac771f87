"""A worker process of a simulated node: starts, waits at the barrier, trains in step with the others, dies.

A step completes only while every rank of the epoch is there, as a collective does. Who is told that the epoch has
failed unwinds and comes back to the barrier.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Protocol

from ..control.job import commands as cmd
from ..control.job import events as ev
from .schedule import Schedule

_START_S = 0.3
_UNWIND_S = 0.02
_SEES_IT_FIRST = 0.2


class WorldOfWorkers(Protocol):
    """What a worker knows of the world."""

    schedule: Schedule
    dice: random.Random
    stepped: Counter[tuple[str, int]]
    completed: defaultdict[tuple[str, int], set[int]]
    trained_alone: set[str]

    def after(self, seconds: float, action: Callable[..., None], *arguments: object) -> None: ...

    def runs(self, worker: SimulatedWorker, more: int) -> None: ...

    def live_workers(self) -> Iterator[SimulatedWorker]: ...

    def everybody_in(self, founder: str, epoch: int) -> bool: ...

    def everybody_up(self, layout: cmd.Layout | None) -> bool: ...


class AgentOfWorkers(Protocol):
    """What a worker knows of its agent."""

    workers: dict[int, SimulatedWorker]
    layout: cmd.Layout | None

    @property
    def founder(self) -> str: ...

    def handle(self, event: ev.Event) -> None: ...


class SimulatedWorker:
    """One process. Everything it does is an event of the world's queue."""

    def __init__(self, world: WorldOfWorkers, agent: AgentOfWorkers, spawn: cmd.Spawn) -> None:
        self.agent = agent
        self.world = world
        self.rank = spawn.rank
        self.local_rank = spawn.local_rank
        self.incarnation = spawn.incarnation
        self.founder = agent.founder
        """Which incarnation of the job it is in."""
        self.epoch = -1
        self.step = 0
        self.running = False
        self.alive = True
        self.abandoned = False
        """The agent has died; the kernel kills the process a moment later."""
        self._after(_START_S * self.world.dice.uniform(0.8, 1.2), self._come_up)

    def _after(self, seconds: float, action: Callable[..., None], *arguments: object) -> None:
        def act() -> None:
            if self.alive:
                action(*arguments)

        self.world.after(seconds, act)

    def _say(self, event: ev.Event) -> None:
        if not self.abandoned:
            self.agent.handle(event)

    def _come_up(self) -> None:
        if self.world.schedule.in_process:
            self._say(ev.Attached(self.rank, self.incarnation, None))
            self._arrive()
        else:
            self._train_alone()

    def _set_running(self, running: bool) -> None:
        if running != self.running:
            self.running = running
            self.world.runs(self, 1 if running else -1)

    def _arrive(self) -> None:
        self._set_running(False)
        self._say(ev.Arrived(self.rank, self.incarnation, self.epoch, 1, self.step, True))

    # ---- with HPWrapper --------------------------------------------------------------------------------------------

    def start(self, command: cmd.StartEpoch, rank: int) -> None:
        self._set_running(False)
        self.rank, self.epoch, self.founder = rank, command.epoch, self.agent.founder
        self._set_running(True)
        if command.plan is not None:
            self.step = command.plan.target_step
        self._after(self.world.schedule.step_time, self._train, self.epoch, True)

    def _train(self, epoch: int, first: bool) -> None:
        if not self.running or self.epoch != epoch:
            return
        if not self.world.everybody_in(self.founder, epoch):
            self._after(self.world.schedule.step_time, self._train, epoch, first)
            return
        self.step += 1
        if first:
            self.world.stepped[self.founder, epoch] += 1
            self._say(ev.Stepped(self.rank, self.incarnation, epoch, self.step))
        if self.step >= self.world.schedule.steps:
            self.world.completed[self.founder, epoch].add(self.rank)
            self._say(ev.Completed(self.rank, self.incarnation, epoch))
        else:
            self._after(self.world.schedule.step_time, self._train, epoch, False)

    def fault(self, summary: str) -> None:
        """User code raises."""
        if self.alive and self.running:
            self._say(ev.Faulted(self.rank, self.incarnation, self.epoch, summary))

    def _break_connections(self) -> None:
        """Some of the others see that before anybody is told of this end."""
        for other in self.world.live_workers():
            same = other.founder == self.founder and other.epoch == self.epoch and other is not self
            if same and other.running and self.world.dice.random() < _SEES_IT_FIRST:
                other._after(self.world.dice.uniform(0.0, 0.003), other._fault_of_a_connection, self.epoch)

    def _fault_of_a_connection(self, epoch: int) -> None:
        if self.running and self.epoch == epoch:
            event = ev.Faulted(self.rank, self.incarnation, epoch, "connection closed by peer", consequence=True)
            self._say(event)

    def fail_epoch(self, epoch: int) -> None:
        if self.running and self.epoch == epoch:
            self._set_running(False)
            self._after(_UNWIND_S * self.world.dice.uniform(0.5, 1.5), self._arrive)

    def finish(self, epoch: int) -> None:
        if self.epoch == epoch:
            self._set_running(False)
            self._after(0.01, self.die, 0)

    # ---- without ---------------------------------------------------------------------------------------------------

    def _train_alone(self) -> None:
        self._after(self.world.schedule.step_time * self.world.schedule.steps, self._done_alone)

    def _done_alone(self) -> None:
        """A collective of a world with a hole in it never ends."""
        if self.world.everybody_up(self.agent.layout):
            self.world.trained_alone.add(self.founder)
            self.die(0)
        else:
            self._after(self.world.schedule.step_time, self._done_alone)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def kill(self, signum: int) -> None:
        self._after(0.005, self.die, -signum)

    def die(self, exit_code: int) -> None:
        if self.alive:
            if self.running and self.step < self.world.schedule.steps:
                self._break_connections()
            self.alive = False
            self._set_running(False)
            self.agent.workers.pop(self.incarnation, None)
            self._say(ev.Exited(self.rank, self.incarnation, exit_code))
