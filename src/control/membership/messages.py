"""What agents say to each other, and what the pure `node.Node` asks its shell to do.

Owns: the fields, the encoding (msgpack through msgspec, checked against the types while decoding) and the size limit.
Within a term a controller and each of its followers have a link (`link.py`): `Order` and `Tell` arrive once and in
order. `link` is the follower's number as a member: who was removed and came back has another, and another link.
Everything else may be lost, late or doubled.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ...protocol.messages import MessageError
from ..job import commands as cmd
from ..job import events as ev
from ..job.shard_table import Packed
from .identity import Identity
from .members import ConfigurationChange, Configurations

MAX_PEER_MESSAGE_BYTES = 8 << 20
VERSION = 4


class Join(msgspec.Struct, frozen=True, tag=True):
    """An agent asks to become a member. `order`: where it wants to stand, -1: in the order of arrival."""

    run_id: str
    key: str
    host: str
    address: str
    workers: int
    order: int = -1
    epoch: int = -1
    """The highest epoch number it has seen: the job goes on above it."""
    attempt: int = 0
    """How often this agent has begun to look for the job: a late copy of an earlier one changes nothing."""
    role: str = "default"
    """Of its workers."""
    identity: Identity = Identity()
    """What it was started to run."""
    job: str = ""
    """The incarnation of the job that it was in last."""
    term: int = 0
    """The highest in which it has promised to follow somebody: it follows nobody of an earlier one in that job."""
    voted: str = ""
    """Whom it has voted for in that term."""
    version: int = VERSION


class Hold(msgspec.Struct, frozen=True, tag=True):
    """To an agent that joins: you are on the list. To a controller: I do not know the base of your change."""


class Redirect(msgspec.Struct, frozen=True, tag=True):
    """Ask there: that agent leads the job, or did when this was sent."""

    address: str


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """You can never be a member; the sentence says why."""

    reason: str


class RequestVote(msgspec.Struct, frozen=True, tag=True):
    """A member without a controller asks for votes. `pre`: whether it would get them, which changes nobody's term
    (the PreVote of Raft: Ongaro, "Consensus: Bridging Theory and Practice", 9.6).

    `job`: the incarnation of the job that it is a member of (`Configuration.founder`).
    """

    term: int
    configuration: tuple[int, int]
    pre: bool
    job: str = ""


class Vote(msgspec.Struct, frozen=True, tag=True):
    """The answer; `pre` as in the question. `leader`: the address of a live controller, if the voter has one."""

    term: int
    pre: bool
    granted: bool
    leader: str = ""
    join: Join | None = None
    """From an agent that is in no job: it was started again where a member has been, and can replace it."""


class JobMemory(msgspec.Struct, frozen=True):
    """What a controller knows of the job that no worker can tell its successor. `at`: (term, serial), by age."""

    at: tuple[int, int] = (0, 0)
    phase: str = "new"
    next_epoch: int = 0
    incarnations: int = 0
    restarts: int = 0
    inprocess_restarts: int = 0
    finished_calls: int = 0
    progress: int = -1
    slowest_start: float = 0.0
    wrapped: bool = False
    stalled: tuple[tuple[int, cmd.Cause], ...] = ()
    newest_step: int = 0
    shards: Packed | None = ()
    """Which ranks have registered which shard; None: as at `shards_at`, which the receiver has been told before."""
    shards_at: tuple[int, int] = (0, 0)
    outcome: cmd.End | None = None


class Lead(msgspec.Struct, frozen=True, tag=True):
    """The sender is the controller of `term`: members follow and report.

    `configurations` are its own, for who does not know the base of `change`, and says so with `Hold`.
    """

    term: int
    change: ConfigurationChange
    configurations: Configurations | None = None
    memory: JobMemory | None = None
    """Who confirms a membership also knows what was decided under the one before."""
    job: str = ""
    """The incarnation that the change is of."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """The sender does not lead the receiver (any more)."""

    term: int
    link: int
    reason: str
    removed: bool = False
    """The receiver is no member; otherwise there is no controller."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life of a link: how many messages this end has sent and received."""

    term: int
    link: int
    sent: int
    received: int
    memory: JobMemory | None = None
    """From a controller that knows something new since its last command."""


class Propose(msgspec.Struct, frozen=True, tag=True):
    """In a link: the next membership, on the base of an agreed one."""

    change: ConfigurationChange


class Settled(msgspec.Struct, frozen=True, tag=True):
    """In a link: the proposed membership has been agreed on."""

    configuration: tuple[int, int]


class Acknowledge(msgspec.Struct, frozen=True, tag=True):
    """In a link: the proposed membership is known here."""

    configuration: tuple[int, int]


class Leave(msgspec.Struct, frozen=True, tag=True):
    """In a link: this node goes, of its own accord."""

    reason: str


class LocalWorker(msgspec.Struct, frozen=True):
    """One live process, as its agent knows it. `doing`: starting, waiting, running, completed, unwinding, between."""

    rank: int
    local_rank: int
    incarnation: int
    spawn_epoch: int
    doing: str = "starting"
    epoch: int = -1
    abort_timeout: float | None = None
    arrival: ev.Arrived | None = None
    fault: ev.Faulted | None = None
    stepped: int = -1
    """The last epoch in which it completed a step."""
    shard: str | None = None
    """The one that it has registered."""


class Report(msgspec.Struct, frozen=True, tag=True):
    """The first thing that a follower tells a new controller: all that it knows of the job."""

    configuration: tuple[int, int]
    epoch: int = -1
    """The highest epoch number seen here."""
    layout: cmd.Layout | None = None
    """The place of this node; None for a spare."""
    layout_at: tuple[int, int] = (0, 0)
    workers: tuple[LocalWorker, ...] = ()
    completed: tuple[int, ...] = ()
    """Local ranks whose process has ended with exit code 0."""
    hook: str = ""
    """`running` or nothing."""
    memory: JobMemory = JobMemory()


Ordered: TypeAlias = cmd.Command | Propose | Settled
Told: TypeAlias = (
    ev.Attached | ev.Arrived | ev.Registered | ev.Faulted | ev.Stepped | ev.Holds | ev.Completed
    | ev.Waits | ev.Exited | ev.Condemned | ev.HookEnded | ev.Opened | Report | Acknowledge | Leave
)  # fmt: skip


def number_in(command: Ordered) -> int | None:
    """The epoch number that a command makes known, which its receiver confirms."""
    match command:
        case cmd.OpenEpoch():
            return command.epoch
        case cmd.FailEpoch():
            return command.next_epoch
    return None


class Order(msgspec.Struct, frozen=True, tag=True):
    """Controller to follower. `received`: how many of the follower's messages have come."""

    term: int
    link: int
    serial: int
    received: int
    command: Ordered
    memory: JobMemory | None = None


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Follower to controller."""

    term: int
    link: int
    serial: int
    received: int
    event: Told


PeerMessage: TypeAlias = (
    Join | Hold | Redirect | Refuse | RequestVote | Vote | Lead | Release | Heartbeat | Order | Tell
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[PeerMessage] = msgspec.msgpack.Decoder(PeerMessage)


def encode(message: PeerMessage) -> bytes:
    """The message as bytes. Raises MessageError when it exceeds MAX_PEER_MESSAGE_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_PEER_MESSAGE_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(data)} bytes exceeds {MAX_PEER_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> PeerMessage:
    """What another agent said. Raises MessageError for anything that is not an agent's message."""
    if len(data) > MAX_PEER_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes exceeds {MAX_PEER_MESSAGE_BYTES}")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None


# ---- what happens to a node, beside its own workers' events ------------------------------------------------------


class Received(msgspec.Struct, frozen=True):
    """A message has come. `key` and `address` are the sender's."""

    key: str
    address: str
    message: PeerMessage


class Closed(msgspec.Struct, frozen=True):
    """The connection with an agent has closed, or it refused one. `key` is empty where it is not known."""

    address: str
    key: str = ""


# ---- what its shell must do --------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Say this to the agent at `address`; it may be gone."""

    address: str
    message: PeerMessage


class Execute(msgspec.Struct, frozen=True):
    """Carry this out on this node."""

    command: cmd.Command


class Note(msgspec.Struct, frozen=True):
    """A line for people."""

    event: str
    fields: dict[str, object]


class Members(msgspec.Struct, frozen=True):
    """Who is in the job, and the number of this agent: the store asks for the others' addresses."""

    configurations: Configurations
    own: int | None


class Ended(msgspec.Struct, frozen=True):
    """This agent is done."""

    end: cmd.End


Action: TypeAlias = Send | Execute | Note | Members | Ended
NodeEvent: TypeAlias = ev.Event | Received | Closed
