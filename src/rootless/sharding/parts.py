"""A client's request as parts, one for each owner that is asked, and their answers as the one that the client gets.

Also whether an answer fits its question: nothing is trusted, and torch's clients read answers as they are. Called by:
`shards.py`, `waits.py`. No I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from .. import requests as rq
from .. import wire
from ..namespace import Session
from ..shard_messages import Answer, Shared

SILENT = rq.Set | rq.MultiSet | rq.Append | rq.QueuePush
"""Requests that torch's clients get no answer to."""


@dataclass(eq=False)
class Part:
    """What one owner is asked, and for whom."""

    serial: int
    node: int
    request: Shared
    together: bool = False
    indices: Sequence[int] = ()
    """Which keys of the request they are."""
    waiting: dict[Pending, None] = field(default_factory=dict)
    revoked: set[bytes] = field(default_factory=set)
    """Keys that were changed meanwhile: what comes is no copy of them."""


@dataclass(eq=False)
class Pending:
    """A client's request that others must answer. A WAIT for the same keys is that of many clients."""

    sessions: dict[Session, None]
    request: rq.Request
    epoch: int
    keys: tuple[bytes, ...]
    parts: dict[int, Part] = field(default_factory=dict)
    """Those without an answer, by serial."""
    answers: list[tuple[Part, Answer]] = field(default_factory=list)
    values: dict[bytes, bytes] = field(default_factory=dict)
    """What is known beside the answers: of a wait what it has brought along, of a MULTI_GET what was here."""


def keys_of(request: rq.Request) -> tuple[bytes, ...]:
    match request:
        case rq.MultiGet() | rq.Check() | rq.Wait():
            return request.keys
        case rq.MultiSet():
            return tuple(key for key, _ in request.items)
        case rq.Validate() | rq.Ping() | rq.CancelWait() | rq.NumKeys() | rq.ListKeys():
            return ()
    return (request.key,)


def digest_of(keys: Sequence[bytes]) -> bytes:
    """Sixteen bytes that no other keys have."""
    lengths = b"".join(len(key).to_bytes(4, "little") for key in keys)
    return hashlib.blake2b(lengths + b"".join(keys), digest_size=16).digest()


def size_of(request: rq.Request) -> int:
    """Bytes of keys and values."""
    match request:
        case rq.Set() | rq.Append() | rq.QueuePush():
            return len(request.key) + len(request.value)
        case rq.CompareSet():
            return len(request.key) + len(request.expected) + len(request.desired)
        case rq.MultiSet():
            return sum(len(key) + len(value) + 16 for key, value in request.items)
    return sum(len(key) + 16 for key in keys_of(request))


def values_in(request: rq.Request) -> Iterable[bytes]:
    """What it writes."""
    match request:
        case rq.Set() | rq.Append():
            return (request.value,)
        case rq.MultiSet():
            return (value for _, value in request.items)
        case rq.CompareSet():
            return (request.desired,)
    return ()


def part_of(request: rq.Request, keys: Sequence[bytes], indices: Sequence[int]) -> Shared:
    """The request for some of its keys; `keys`: all of them, without the prefix of their epoch."""
    match request:
        case rq.MultiGet() | rq.Check() | rq.Wait():
            return replace(request, keys=tuple(keys[index] for index in indices))
        case rq.MultiSet():
            return rq.MultiSet(tuple((keys[index], request.items[index][1]) for index in indices))
        case rq.NumKeys() | rq.ListKeys():
            return request
        case rq.Validate() | rq.Ping() | rq.CancelWait():
            raise AssertionError("not shared")
    return replace(request, key=keys[0])


def one_answer(pending: Pending) -> list[bytes]:
    """What the client of a request gets that does not block, when every part is answered. Keys as their owners say."""
    request, answers = pending.request, pending.answers
    match request:
        case rq.MultiGet():
            values: dict[int, bytes] = {}
            for part, answer in answers:
                values.update(zip(part.indices, wire.decode_blobs(answer.reply), strict=True))
            keys = enumerate(pending.keys)
            return wire.encode_blobs(values[index] if index in values else pending.values[key] for index, key in keys)
        case rq.Check():
            ready = all(answer.reply == wire.READY for _, answer in answers)
            return [wire.READY if ready else wire.NOT_READY]
        case rq.NumKeys():
            return [wire.encode_i64(sum(wire.decode_i64(answer.reply) for _, answer in answers))]
    return [answer.reply for _, answer in answers if answer.reply]


def answer_of_the_past(request: rq.Request) -> list[bytes]:
    """What a request gets whose epoch has failed or gone."""
    match request:
        case rq.Wait() | rq.Barrier():
            return [wire.WAIT_CANCELED]
        case rq.Get() | rq.CompareSet():
            return wire.encode_blobs([b""])
        case rq.MultiGet():
            return wire.encode_blobs([b""] * len(request.keys))
        case rq.Check():
            return [wire.NOT_READY]
        case rq.Set() | rq.MultiSet() | rq.Append() | rq.QueuePush():
            return []
    return [wire.encode_i64(0)]


def check_answer(request: Shared, answer: Answer) -> None:
    """Raises WireError with one sentence for an answer that its client could not read."""
    if not _fits(request, answer):
        raise wire.WireError(f"an answer that does not fit a {type(request).__name__}: {answer.reply[:40]!r}")
    if isinstance(request, rq.Wait) and answer.reply == wire.STOP_WAITING:
        if len(answer.values) != len(request.keys):
            raise wire.WireError(f"{len(answer.values)} values for the {len(request.keys)} keys of a wait")
    elif answer.values:
        raise wire.WireError(f"{len(answer.values)} values that nobody has waited for")


def _fits(request: Shared, answer: Answer) -> bool:
    reply = answer.reply
    match request:
        case rq.Wait() | rq.Barrier():
            return reply in (wire.STOP_WAITING, wire.WAIT_CANCELED)
        case rq.Check():
            return reply in (wire.READY, wire.NOT_READY)
        case rq.Get() | rq.CompareSet():
            return len(wire.decode_blobs(reply)) == 1
        case rq.MultiGet():
            return len(wire.decode_blobs(reply)) == len(request.keys)
        case rq.QueuePop():
            return len(wire.decode_blobs(reply[8:])) == (1 if wire.decode_i64(reply[:8]) else 0)
        case rq.ListKeys():
            return len(wire.decode_blobs(reply[8:])) == wire.decode_i64(reply[:8])
        case rq.Set() | rq.MultiSet() | rq.Append() | rq.QueuePush():
            return not reply
    wire.decode_i64(reply)
    return True
