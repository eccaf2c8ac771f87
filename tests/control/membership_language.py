"""The language of `tests/scenarios/membership/*.txt`: what happens to the agents of a job, and below it what they do.

    # Lines like this are comments.
    config nodes=3 [min-quorum=1] [max-restarts=2]      # first; so many nodes form the job, named a, b, c, ...

    a b c start                 their agents are started, a (and then b) at the rendezvous endpoint
    d starts                    another agent: it joins the job
    a dies / a b die            agents are killed, and their workers with them; their connections close
    a b restart                 the same, and others are started there at once: a2 and b2
    a b cut off                 nothing reaches them or comes from them, not even from one to the other
    apart a b                   a and b reach each other, and not the others
    all connected               and everybody is heard again
    a leaves                    its launcher is told to stop
    time passes 5               seconds
    state                       what everybody is, follows and knows

Every message takes a millisecond. A line is over when 50 ms have passed, or so many as it says: `a dies (2.5 ms)`.
Below it stands what is done, `time who: what`, and what is said, `time who -> whom: what`; who does the same within a
millisecond shares a line, and what comes again is counted. Heartbeats and what workers tell are left out. `1.2` is a
membership: the second that was proposed in term 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.candidate import Candidate
from hyperpodrun.control.membership.follower import Follower
from hyperpodrun.control.membership.leading.leader import Leader
from hyperpodrun.control.membership.members import Configuration
from hyperpodrun.control.membership.node import Node
from hyperpodrun.control.membership.roles import NodeConfig
from scenario_language import ScenarioError, replay

_HOP_S = 0.001
_LINE_S = 0.05


def play(text: str) -> str:
    """The scenario with what the agents do now."""
    return replay(text, Scenario)


class Agent:
    """One agent process, and workers that come to the barrier at once and never end by themselves."""

    def __init__(self, name: str, config: NodeConfig) -> None:
        self.name = name
        self.node = Node(config)
        self.address = config.address
        self.alive = True
        self.timer: float | None = None
        self.ranks: dict[int, int] = {}
        """Of its workers, by incarnation."""


@dataclass
class Line:
    at: float
    who: set[str]
    to: set[str]
    text: str


class Scenario:
    """The agents, the network between them, the time."""

    def __init__(self, line: str) -> None:
        word, *items = line.partition("#")[0].split()
        if word != "config":
            raise ScenarioError("the first line must be `config nodes=N ...`")
        values = {name: int(value) for name, value in (item.split("=") for item in items)}
        self._nodes = values.pop("nodes")
        self._min_quorum = values.pop("min-quorum", None)
        self._max_restarts = values.pop("max-restarts", 3)
        if values:
            raise ScenarioError(f"there is no {', '.join(values)}")
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._at: dict[str, Agent] = {}
        self._talked: set[tuple[str, str]] = set()
        self._parts: dict[str, int] = {}
        """Who is in which part of the network, by address; 0 if in none of them."""
        self._lines: list[Line] = []

    def answer(self, line: str) -> list[str]:
        line, _, takes = line.removesuffix(" ms)").partition(" (")
        words = line.split()
        self._lines = []
        match words:
            case [*names, "start" | "starts"]:
                for name in names:
                    self._start(name, name)
            case [*names, "die" | "dies"]:
                for name in names:
                    self._die(self._at[f"{name}:1"])
            case [*names, "restart" | "restarts"]:
                for name in names:
                    self._die(self._at[f"{name}:1"])
                for name in names:
                    self._start(f"{name}{int(self._at[f'{name}:1'].name[1:] or 1) + 1}", name)
            case [*names, "cut", "off"]:
                self._parts.update({f"{name}:1": -number for number, name in enumerate(names, 1)})
            case ["apart", *names]:
                part = 1 + max([0, *self._parts.values()])
                self._parts.update({f"{name}:1": part for name in names})
            case ["all", "connected"]:
                self._parts.clear()
            case [name, "leaves"]:
                self._tell(self._at[f"{name}:1"], ev.StopRequested(15))
            case ["time", "passes", seconds]:
                self._run(self.now + float(seconds))
                return list(self._shown())
            case ["state"]:
                return [self._state(agent) for agent in self._at.values() if agent.alive]
            case _:
                raise ScenarioError("not in the language (see membership_language.py)")
        self._run(self.now + (float(takes) / 1000 if takes else _LINE_S))
        return list(self._shown())

    # ---- agents ----------------------------------------------------------------------------------------------------

    def _start(self, name: str, host: str) -> None:
        job = JobConfig(
            world_size=0, in_process=True, max_restarts=self._max_restarts, min_nodes=self._nodes, max_nodes=self._nodes
        )
        config = NodeConfig(
            key=name, host=host, address=f"{host}:1", workers=1, run_id="job", job=job, seeds=("a:1", "b:1"),
            founder=host == "a", deputy=5.0 if host == "b" else None, order=ord(host) - ord("a"),
            last_call_timeout=0.1, min_quorum=self._min_quorum, join_timeout=100.0,
        )  # fmt: skip
        agent = self._at[config.address] = Agent(name, config)
        self._tell(agent, ev.Begin())

    def _die(self, agent: Agent) -> None:
        agent.alive = False
        self._close(agent)

    def _close(self, agent: Agent) -> None:
        for one, other in sorted(self._talked):
            if one == agent.address and self._connected(one, other):
                self._after(_HOP_S, self._closed, other, agent)
        self._talked = {pair for pair in self._talked if agent.address not in pair}

    def _closed(self, address: str, gone: Agent) -> None:
        self._tell(self._at[address], msg.Closed(gone.address, gone.name))

    def _tell(self, agent: Agent, event: msg.NodeEvent) -> None:
        if not agent.alive:
            return
        actions = agent.node.handle(event, self.now)
        for action in actions:
            if isinstance(action, msg.Note) and action.event in _NOTES:
                self._write(agent, _NOTES[action.event].format_map(action.fields))
        for action in actions:
            match action:
                case msg.Send():
                    text = _said(action.message)
                    if text and not (isinstance(action.message, msg.Redirect) and isinstance(event, ev.TimePassed)):
                        self._write(agent, text, to=self._name(action.address))
                    self._send(agent, action.address, action.message)
                case msg.Execute():
                    self._execute(agent, action.command)
                case msg.Ended():
                    self._write(agent, f"end with exit code {action.end.exit_code}: {action.end.reason}")
                    self._die(agent)
        self._set_timer(agent)

    def _set_timer(self, agent: Agent) -> None:
        due = agent.node.next_deadline()
        if agent.alive and due is not None and (agent.timer is None or due < agent.timer):
            agent.timer = due
            self._at_time(due, self._on_timer, agent, due)

    def _on_timer(self, agent: Agent, due: float) -> None:
        if agent.timer == due:
            agent.timer = None
            self._tell(agent, ev.TimePassed())

    def _execute(self, agent: Agent, command: cmd.Command) -> None:
        match command:
            case cmd.Spawn(rank, process, epoch):
                self._write(agent, f"process {process} for rank {rank}")
                agent.ranks[process] = rank
                self._after(0.0, self._tell, agent, ev.Attached(rank, process, None))
                self._after(0.0, self._tell, agent, ev.Arrived(rank, process, -1, 1, 0, True))
            case cmd.StartEpoch(epoch):
                self._write(agent, f"epoch {epoch} starts")
                agent.ranks.update({slot.incarnation: slot.rank for slot in command.slots})
            case cmd.FailEpoch(epoch):
                self._write(agent, f"epoch {epoch} has failed")
                for process, rank in agent.ranks.items():
                    self._after(_HOP_S, self._tell, agent, ev.Arrived(rank, process, epoch, 1, 0, True))
            case cmd.StopWorkers() | cmd.Kill():
                gone = [p for p in agent.ranks if not isinstance(command, cmd.Kill) or p == command.incarnation]
                if gone:
                    self._write(agent, "workers are stopped")
                for process in gone:
                    self._after(_HOP_S, self._tell, agent, ev.Exited(agent.ranks.pop(process), process, -9))

    # ---- the network and the time ----------------------------------------------------------------------------------

    def _send(self, sender: Agent, address: str, message: msg.PeerMessage) -> None:
        if not self._connected(sender.address, address):
            return
        receiver = self._at.get(address)
        if receiver is None or not receiver.alive:
            self._after(_HOP_S, self._tell, sender, msg.Closed(address))
            return
        self._talked |= {(sender.address, address), (address, sender.address)}
        self._after(_HOP_S, self._deliver, sender, receiver, message)

    def _deliver(self, sender: Agent, receiver: Agent, message: msg.PeerMessage) -> None:
        if self._connected(sender.address, receiver.address):
            self._tell(receiver, msg.Received(sender.name, sender.address, message))

    def _connected(self, one: str, other: str) -> bool:
        return self._parts.get(one, 0) == self._parts.get(other, 0)

    def _after(self, seconds: float, action: Callable[..., None], *arguments: object) -> None:
        self._at_time(self.now + seconds, action, *arguments)

    def _at_time(self, when: float, action: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(when, self.now), self._count, action, arguments))

    def _run(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)
        self.now = until

    # ---- sentences -------------------------------------------------------------------------------------------------

    def _name(self, address: str) -> str:
        return self._at[address].name if address in self._at else address.partition(":")[0]

    def _write(self, agent: Agent, text: str, to: str = "") -> None:
        """Who does the same within a hop shares a line, and so does to whom one says the same."""
        for line in reversed(self._lines):
            if self.now - line.at > _HOP_S:
                break
            if line.text != text or bool(line.to) != bool(to):
                continue
            if line.who == {agent.name} or (line.to == {to} - {""} and agent.name not in line.who):
                line.who.add(agent.name)
                line.to |= {to} - {""}
                return
        self._lines.append(Line(self.now, {agent.name}, {to} - {""}, text))

    def _shown(self) -> Iterator[str]:
        if not self._lines:
            yield "nothing"
        shown: dict[tuple[str, str], list[float]] = {}
        for line in self._lines:
            to = f" -> {' '.join(sorted(line.to))}" if line.to else ""
            shown.setdefault((f"{' '.join(sorted(line.who))}{to}", line.text), []).append(line.at)
        for (who, text), times in shown.items():
            again = f" (and {len(times) - 1} times more until {times[-1]:.3f})" if len(times) > 1 else ""
            yield f"{times[0]:.3f} {who}: {text}{again}"

    def _state(self, agent: Agent) -> str:
        role, context = agent.node.role, agent.node.context
        what = {Leader: "leads", Candidate: "is a candidate"}.get(type(role), f"is {type(role).__name__.lower()}")
        if isinstance(role, Follower):
            what = f"follows {role.leader_key}"
        agreed, proposed = context.configurations.agreed, context.configurations.proposed
        knows = _members(agreed) + (f", proposed {_members(proposed)}" if proposed.id != agreed.id else "")
        job = f", job {context.job}" if context.job else ""
        return f"{agent.name} {what}, term {context.term}{job}: {knows or 'no members'}"


def _members(configuration: Configuration) -> str:
    names = " ".join(sorted(member.key for member in configuration.members))
    return f"{_id(configuration.id)} of {names}" if names else ""


def _id(id: tuple[int, int]) -> str:
    return f"{id[0]}.{id[1]}"


_NOTES = {
    "controller-lost": "my controller {node} {reason}",
    "leads": "leader of term {term}",
    "node-lost": "node {node} ({host}) {reason}",
    "minority": "no majority",
    "removed": "member no more: {reason}",
    "began-again": "the job goes on in its next incarnation, with {nodes}",
}


def _said(message: msg.PeerMessage) -> str:
    """In words; nothing for what is left out."""
    match message:
        case msg.Join():
            return "may I join?"
        case msg.Hold():
            return "hold"
        case msg.Redirect():
            return f"ask {message.address.partition(':')[0]}"
        case msg.Refuse(reason):
            return f"never: {reason}"
        case msg.RequestVote(term, configuration, pre):
            return f"would you vote for me in term {term}?" if pre else f"vote for me in term {term}"
        case msg.Vote(term, pre, granted, leader):
            why = f", I follow {leader.partition(':')[0]}" if leader else ""
            took = ", and I was started again" if message.join is not None else ""
            return (("I would" if pre else f"my vote in term {term}") if granted else f"no{why}") + took
        case msg.Lead(term, change):
            return f"I lead term {term}, membership {_change(change)}"
        case msg.Release(_, _, reason, removed):
            return f"you are no member: {reason}" if removed else f"I do not lead any more: {reason}"
        case msg.Order():
            match message.command:
                case msg.Propose(change):
                    return f"membership {_change(change)}"
                case msg.Settled(configuration):
                    return f"{_id(configuration)} is agreed on"
        case msg.Tell():
            match message.event:
                case msg.Report(configuration):
                    return f"I follow, and know {_id(configuration)}"
                case msg.Acknowledge(configuration):
                    return f"I know {_id(configuration)}"
                case msg.Leave():
                    return "I leave"
    return ""


def _change(change: msg.ConfigurationChange) -> str:
    if change.base == change.id:
        return _id(change.id)
    parts = [f"without {' '.join(map(str, change.removed))}"] if change.removed else []
    if change.added:
        parts.append(f"with {' '.join(f'{member.number} ({member.key})' for member in change.added)}")
    return f"{_id(change.id)}: {_id(change.base)} {' and '.join(parts) or 'as it is'}"
