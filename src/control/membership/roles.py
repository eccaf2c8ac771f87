"""What the roles of an agent have in common: its configuration, what it knows, and what it has to do next."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

import msgspec

from ..job import commands as cmd
from ..job import events as ev
from ..job.state import JobConfig
from .becoming import Next
from .identity import Identity
from .local_state import LocalState
from .members import Configurations
from .messages import Action, Execute, Members, Note, PeerMessage, Send


class NodeConfig(msgspec.Struct, frozen=True):
    """One agent of a job on many nodes. Times in seconds."""

    key: str
    """Random, of this process."""
    host: str
    address: str
    workers: int
    run_id: str
    job: JobConfig
    seeds: tuple[str, ...] = ()
    """Where the job may be found."""
    founder: bool = False
    """This agent is at one of the seeds and may begin the job."""
    deputy: float | None = None
    """After so many seconds without an answer it founds the job: those at the seeds before its own are not there."""
    order: int = -1
    role: str = "default"
    """Of its workers."""
    identity: Identity = Identity()
    """What it was started to run."""
    min_quorum: int | None = None
    """So many nodes may go on without a majority."""
    heartbeat_interval: float = 1.0
    heartbeat_limit: float = 5.0
    join_timeout: float = 600.0
    last_call_timeout: float = 30.0
    close_timeout: float = 5.0
    """How long a controller waits until everybody has confirmed that the job is over."""
    shutdown_timeout: float = 30.0
    explain_after: float = 5.0
    """Who waits for so long for the job to begin says for whom; later now and then."""
    takeover_grace: float = 1.0
    """How long a new controller waits for the reports of nodes that neither answer nor refuse."""


class Context:
    """What outlives a role."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.local = LocalState()
        self.configurations = Configurations()
        self.number: int | None = None
        """This agent's, once it is a member."""
        self.term = 0
        """The highest that it has voted in or followed."""
        self.voted = ""
        self.pledged = 0
        """The highest term whose controller it followed, or another agent's that it voted for: none of an earlier term
        may count on it any more."""
        self.now = 0.0
        self.actions: list[Action] = []
        self.attempt = 0
        self.met: dict[str, None] = {}
        """Where the members have been that it has ever known of."""
        self.promise = ("", 0, "")
        """In which incarnation and term this agent, in no job, has voted for whom."""
        self.dice = random.Random(config.key)
        """The key is random, and what is decided depends on nothing but what comes in."""

    @property
    def job(self) -> str:
        """The incarnation of the job that it is in, or was; empty if none."""
        return self.configurations.proposed.founder

    def pledge(self, term: int, key: str, *, another_job: bool = False) -> None:
        """To follow a controller, or to vote for one. What was promised for later terms of the same job holds."""
        if another_job or term >= self.term:
            self.term, self.voted = term, key
        if another_job or key != self.config.key:
            self.pledged = term

    def send(self, address: str, message: PeerMessage) -> None:
        self.actions.append(Send(address, message))

    def note(self, event: str, **fields: object) -> None:
        self.actions.append(Note(event, fields))

    def execute(self, command: cmd.Command, at: tuple[int, int]) -> None:
        """Here and now."""
        self.local.ordered(command, at)
        self.actions.append(Execute(command))

    def change_configurations(self, configurations: Configurations) -> None:
        self.configurations = configurations
        own = configurations.find(self.config.key)
        self.met.update(dict.fromkeys(member.address for member in configurations.everybody().values()))
        self.number = None if own is None else own.number
        self.actions.append(Members(configurations, self.number))

    def kill_workers(self, reason: str) -> None:
        """They belong to an epoch that goes on without them."""
        if self.local.workers:
            self.note("workers-stopped", reason=reason, workers=len(self.local.workers))
        self.actions.append(Execute(cmd.StopWorkers(9)))


class Role(ABC):
    """What an agent is at the moment. Every method may return what it becomes."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def begin(self) -> Next | None:
        """The role is taken on. `Node` makes it of the value that says so."""
        return None

    @abstractmethod
    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        """Another agent speaks."""

    def closed(self, address: str, key: str) -> Next | None:
        """A connection is gone, or was refused."""
        return None

    def happened(self, event: ev.Event) -> Next | None:
        """Something of this node's own processes; what is known of them has been brought up to date."""
        return None

    @abstractmethod
    def tick(self) -> Next | None:
        """`next_deadline` has come, or not yet."""

    @abstractmethod
    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""

    def leave(self, reason: str) -> None:
        """This agent goes; its workers are being stopped."""
        return
