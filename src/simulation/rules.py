"""What must hold after every step of a simulated job, and at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Protocol

from ..control.job import commands as cmd
from ..control.membership.leading.leader import Leader
from .agents import SimulatedAgent
from .schedule import Schedule
from .workers import SimulatedWorker

_AGAIN_S = 13.0
"""After the last fault, silence is noticed, there is a leader, and who was lost has joined."""


class Violation(AssertionError):
    """A rule was broken."""


class World(Protocol):
    """What the rules look at."""

    schedule: Schedule
    checks: bool
    agents: list[SimulatedAgent]
    by_address: dict[str, SimulatedAgent]
    running: Counter[tuple[str, int]]
    completed: defaultdict[tuple[str, int], set[int]]
    trained_alone: set[str]

    def live(self) -> Iterator[SimulatedAgent]: ...


class Rules:
    """One controller acts in an epoch; nothing starts in an epoch that was failed or left; no rank has two processes in
    one epoch; every world is whole; a controller forgets no deadline; nobody floods the network; nobody ends with
    success unless every rank of an epoch has trained to the end; and when the faults are over, the job ends, on every
    live agent, with success or with a reason: with success where a majority is alive and connected in time.

    Terms and epochs are those of one incarnation of the job: its founder's name is written before them here.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.worlds: dict[tuple[str, int], int] = {}
        """How many ranks each epoch has."""
        self._acted: dict[tuple[str, int], tuple[int, str]] = {}
        self._before: dict[str, str] = {}
        """The incarnation that each one goes on with."""
        self._controllers: dict[tuple[str, int], str] = {}
        self._runners: Counter[tuple[str, int, int]] = Counter()

    def check_order(self, agent: SimulatedAgent, command: cmd.Command) -> None:
        """An agent is about to carry out a command."""
        if not isinstance(command, cmd.StartEpoch):
            return
        leader = agent.leader
        if leader is None:
            raise Violation(f"{agent.address} starts epoch {command.epoch} and obeys nobody")
        attempt = agent.founder, command.epoch
        if self._acted.setdefault(attempt, leader) != leader:
            raise Violation(f"epoch {command.epoch} is started by {self._acted[attempt]} and by {leader}")
        if command.epoch <= max(agent.started_epoch, agent.failed_epoch):
            raise Violation(f"{agent.address} starts epoch {command.epoch} after {agent.started_epoch}")
        size = self.worlds.setdefault(attempt, command.layout.world_size)
        ranks = [slot.rank for slot in command.slots]
        if size != command.layout.world_size or any(not 0 <= rank < size for rank in ranks):
            raise Violation(f"epoch {command.epoch}: ranks {ranks} of {command.layout.world_size}, others have {size}")

    def check_end(self, agent: SimulatedAgent, end: cmd.End) -> None:
        """An agent is about to end."""
        if end.exit_code != 0:
            if not end.reason:
                raise Violation(f"{agent.address} ends without a reason")
            return
        jobs = self._incarnations(agent)
        whole = (
            self.worlds.get(attempt) == len(ranks)
            for attempt, ranks in self._world.completed.items()
            if attempt[0] in jobs
        )
        if not any(whole) and not jobs & self._world.trained_alone:
            raise Violation(f"{agent.address} ends with success, and nobody has trained to the end")

    def _incarnations(self, agent: SimulatedAgent) -> set[str]:
        """The one that an agent is in, and those before: who has trained to the end in one has done so for all."""
        jobs, job = set(), agent.founder
        while job and job not in jobs:
            jobs.add(job)
            job = self._before.get(job, "")
        return jobs

    def check(self, agent: SimulatedAgent) -> None:
        """Of who has just heard something."""
        role = agent.node.role
        self._before[agent.founder] = agent.node.context.configurations.proposed.succeeds
        if agent.alive and isinstance(role, Leader):
            other = self._controllers.setdefault((agent.founder, role.term), agent.key)
            if other != agent.key:
                raise Violation(f"two controllers in term {role.term}")
            if agent.end is None and not role.has_its_timer:
                raise Violation(f"{agent.address} leads, and has forgotten a deadline")

    def runs(self, worker: SimulatedWorker, more: int) -> None:
        """A worker is in an epoch now, or not any more."""
        self._world.running[worker.founder, worker.epoch] += more
        runner = worker.founder, worker.epoch, worker.rank
        self._runners[runner] += more
        if self._world.checks and self._runners[runner] > 1:
            raise Violation(f"rank {worker.rank} runs twice in epoch {worker.epoch}")

    def majority_is_there(self, faults_over: float) -> bool:
        """When all faults have healed: whether the job must go on to its good end, since nobody's time is up.

        Who is connected speaks for its place among the members, also where it was started again.
        """
        schedule, live = self._world.schedule, [agent for agent in self._world.live() if agent.end is None]
        began = min((fault.at for fault in schedule.faults), default=0.0)
        time_is_up = faults_over + _AGAIN_S > began + min(schedule.hole_timeout, schedule.join_timeout)
        failed = any(agent.end is not None and not agent.asked_to_leave for agent in self._world.agents)
        if time_is_up or failed or len(live) < (schedule.min_nodes or schedule.nodes):
            return False
        addresses = {agent.address for agent in live}
        known = [agent.node.context.configurations for agent in live if agent.founder]
        if not known:
            return self._world.by_address["n0:17000"] in live
        return all(
            configurations.has_quorum(
                {n for n, member in configurations.everybody().items() if member.address in addresses}, None
            )
            for configurations in known
        )
