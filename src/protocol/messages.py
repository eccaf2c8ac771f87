"""The messages between a worker and its agent.

Owns: their fields, their encoding (msgpack through msgspec, checked against the types while decoding) and their size
limits. Must never: do I/O or know who sends what when; `control/` and `inprocess/` decide that.
Called by: `agent/node/channel.py` on one side, `inprocess/connection.py` on the other.

Every message names the epoch it belongs to, so that a late one can be told from a current one. Times are
`time.monotonic_ns()` values: that clock is one and the same for all processes of a host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, TypeVar

import msgspec

from .plan import MAX_GROUPS, MAX_SHARD_NAME, MAX_SNAPSHOTS, MAX_TORN, NO_EPOCH, Holding, RestorePlan, Transfer

MAX_MESSAGE_BYTES = 1 << 20
_LARGEST = (1 << 63) - 1
MAX_TEXT = 64 << 10
"""Longest traceback or reason that is sent, in characters; the middle of a longer one is cut out."""


MAX_LEFT = 300
"""Characters."""
MAX_SUMMARY = 2000
"""Characters of what a worker is told of a fault."""
MAX_TRANSFERS = 8192
"""In one message; a rank that has more to give than that gets several."""
MAX_LISTENERS = 8192
"""Of one node. With the longest address each they are less than half a message."""
MAX_COLLECTIVES = 1024
"""Groups in one message."""


class MessageError(ValueError):
    """Bytes that are not a message of this protocol; the sentence says why."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


# ---- worker to agent -------------------------------------------------------------------------------------------


class Attach(_Message, frozen=True):
    """A process has reached its first wrapped function: it can be restarted in process."""

    pid: int
    abort_timeout_s: float | None


class Arrive(_Message, frozen=True):
    """The worker waits at the barrier. `epoch` is the last one it ran in, NO_EPOCH for a new process.

    `call` counts the wrapped functions entered by this process, 1 for the first. `step` is the number of optimizer
    steps completed; `healthy` is False when the process was interrupted inside one and cannot be a source of state.
    `holding` is what a CheckpointManager can give, None where the script has none: then `step` and `healthy` count.
    """

    epoch: int
    call: int
    step: int
    healthy: bool
    notified_ns: int = 0
    aborted_ns: int = 0
    unwound_ns: int = 0
    holding: Holding | None = None


class Registered(_Message, frozen=True):
    """This rank has registered its state in `epoch`: who is of the same shard holds the same bytes."""

    epoch: int
    shard: str


class Fault(_Message, frozen=True):
    """User code raised in `epoch`. `consequence`: the error is a broken connection, most likely another's fault."""

    epoch: int
    summary: str
    traceback: str
    consequence: bool
    caught_ns: int
    ends_job: bool = False
    """No restart would change it: what the script does cannot be carried over a fault."""


class Stepped(_Message, frozen=True):
    """The first optimizer step of `epoch` completed on this rank. Restore times are 0 where nothing was restored."""

    epoch: int
    step: int
    restore_begin_ns: int
    restore_end_ns: int
    stepped_ns: int


class Holds(_Message, frozen=True):
    """What this rank's tensors hold after the first step of `epoch`: by replica group, a digest of 16 characters. Ranks
    of one group hold the same bytes, or were wrong to say so."""

    epoch: int
    step: int
    digests: dict[str, str]


class Completed(_Message, frozen=True):
    """The wrapped function returned on this rank; it waits until that is so on every rank.

    `left`: how it left the loop of training before its end, if it did. `collectives`: for each NCCL group, by its name,
    how many collectives this rank has begun.
    """

    epoch: int
    left: str = ""
    collectives: dict[str, int] = msgspec.field(default_factory=dict)


class Waits(_Message, frozen=True):
    """The answer to a `Returned`, whose number it repeats: the main thread waits in torch.distributed and nothing
    moves, or it has gone on."""

    epoch: int
    returned: int
    waiting: bool


# ---- agent to worker -------------------------------------------------------------------------------------------


class Transfers(_Message, frozen=True):
    """Before a `Start` whose plan has more of them than one message holds: the first, in order."""

    epoch: int
    transfers: tuple[Transfer, ...]


class Start(_Message, frozen=True):
    """Leave the barrier and run `epoch` with these environment variables. `plan` is None when nothing was lost; it has
    what this rank has to do."""

    epoch: int
    environ: dict[str, str]
    plan: RestorePlan | None


class FaultNotice(_Message, frozen=True):
    """`epoch` has failed: stop what you do and come to the barrier.

    `gloo_listeners` are the (address, port) pairs on which the ranks of this node accept gloo connections; every
    connected socket with one of them at either end, or watched together with one, belongs to a communicator of the
    epoch.
    """

    epoch: int
    summary: str
    gloo_listeners: tuple[tuple[str, int], ...]


class Finish(_Message, frozen=True):
    """The wrapped function has returned on every rank of `epoch`."""

    epoch: int


class Returned(_Message, frozen=True):
    """So many ranks have returned from the wrapped function and begin nothing any more: say when you wait.
    `collectives`: the fewest that any of them has begun, by group."""

    epoch: int
    returned: int
    collectives: dict[str, int]


WorkerMessage: TypeAlias = Attach | Arrive | Registered | Fault | Stepped | Holds | Completed | Waits
AgentMessage: TypeAlias = Transfers | Start | FaultNotice | Finish | Returned

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()
_worker_decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
_agent_decoder: msgspec.msgpack.Decoder[AgentMessage] = msgspec.msgpack.Decoder(AgentMessage)


def starting(epoch: int, environ: dict[str, str], plan: RestorePlan | None) -> list[Transfers | Start]:
    """What a worker is sent to start an epoch. No message exceeds the limit, whatever the plan of its rank."""
    parts: list[Transfers | Start] = []
    while plan is not None and len(plan.transfers) > MAX_TRANSFERS:
        parts.append(Transfers(epoch, plan.transfers[:MAX_TRANSFERS]))
        plan = msgspec.structs.replace(plan, transfers=plan.transfers[MAX_TRANSFERS:])
    return [*parts, Start(epoch, environ, plan)]


def joined(parts: Iterable[Transfers], start: Start) -> Start:
    """What `starting` has made several messages of."""
    transfers = tuple(transfer for part in parts if part.epoch == start.epoch for transfer in part.transfers)
    if start.plan is None or not transfers:
        return start
    plan = msgspec.structs.replace(start.plan, transfers=transfers + start.plan.transfers)
    return msgspec.structs.replace(start, plan=plan)


def encode(message: WorkerMessage | AgentMessage) -> bytes:
    """The message as bytes, a notice of a fault never too large. Raises MessageError when it exceeds
    MAX_MESSAGE_BYTES."""
    if isinstance(message, FaultNotice):
        summary, listeners = shorten(message.summary, MAX_SUMMARY), message.gloo_listeners[:MAX_LISTENERS]
        message = FaultNotice(message.epoch, summary, listeners)
    try:
        data = _encoder.encode(message)
    except UnicodeEncodeError:  # a name of the user's with a lone surrogate in it, as file names can have
        data = _encoder.encode(_encodable(msgspec.to_builtins(message)))
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return data


def decode_from_worker(data: bytes) -> WorkerMessage:
    """What a worker said. Raises MessageError for anything that is not a worker's message."""
    message = _decode(_worker_decoder, data)
    _check_numbers(message)
    if isinstance(message, Arrive) and message.holding is not None:
        _check_holding(message.holding)
    elif isinstance(message, Registered):
        _check_shard(message.shard)
    elif isinstance(message, Holds):
        _check_digests(message.digests)
    elif isinstance(message, Completed):
        _check_completed(message)
    return message


def decode_from_agent(data: bytes) -> AgentMessage:
    """What the agent said. Raises MessageError for anything that is not an agent's message."""
    return _decode(_agent_decoder, data)


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, its middle cut out when it is longer than `limit` characters: both ends of a traceback matter."""
    if len(text) <= limit:
        return text
    half = limit // 2
    end = "\n" if "\n" in text else ""  # one line stays one
    return f"{text[:half]}{end}... {len(text) - 2 * half} characters left out ...{end}{text[-half:]}"


def _encodable(value: object) -> object:
    """The same with a place for everything that UTF-8 has none for."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value


def _check_numbers(message: WorkerMessage) -> None:
    """No number is one that the agent cannot calculate with."""
    for name in message.__struct_fields__:
        value = getattr(message, name)
        lowest = NO_EPOCH if name == "epoch" else 0
        if isinstance(value, int | float) and not lowest <= value <= _LARGEST:  # not a number is neither
            raise MessageError(f"{name} of {type(message).__name__} is {value}")


def _check_holding(holding: Holding) -> None:
    if holding.shard is not None:
        _check_shard(holding.shard)
    if len(holding.snapshots) > MAX_SNAPSHOTS:
        raise MessageError(f"{len(holding.snapshots)} snapshots exceed {MAX_SNAPSHOTS}")
    if len(holding.torn) > MAX_TORN or len(holding.refused) > MAX_SNAPSHOTS:
        raise MessageError("what a holding says of a torn or refused step is too long")
    numbers = [
        *holding.steps,
        *holding.distrusted,
        *holding.refused,
        *(number for pair in holding.snapshots for number in pair),
    ]
    if any(number < 0 for number in numbers) or (holding.disk is not None and holding.disk < 0):
        raise MessageError("a rank or a step in a holding is negative")


def _check_digests(digests: dict[str, str]) -> None:
    if len(digests) > MAX_GROUPS:
        raise MessageError(f"{len(digests)} replica groups exceed {MAX_GROUPS}")
    for group, digest in digests.items():
        _check_shard(group)
        if len(digest) != 16:
            raise MessageError(f"a digest has {len(digest)} characters instead of 16")


def _check_completed(message: Completed) -> None:
    if len(message.left) > MAX_LEFT or len(message.collectives) > MAX_GROUPS:
        raise MessageError("what is said of a return is too long")
    for group in message.collectives:
        _check_shard(group)


def _check_shard(shard: str) -> None:
    if len(shard) > MAX_SHARD_NAME:
        raise MessageError(f"the name of a shard has {len(shard)} characters, more than {MAX_SHARD_NAME}")


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None
