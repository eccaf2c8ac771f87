"""What the stores of different nodes say to each other, in batches that arrive once and in order (`sharding/link.py`).

`job` of a batch: the incarnation of the job that the epoch is of, as a number; the node's shell writes and checks it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..protocol.messages import MessageError
from . import requests as rq

MAX_SHARED_BYTES = 31 << 20
"""Keys and values of one request or answer between nodes, a little less than a connection between agents takes."""
MAX_COPIED_BYTES = 64 << 10
"""A larger value is read where it is: no other node keeps a copy."""

Shared: TypeAlias = (
    rq.Set | rq.CompareSet | rq.Get | rq.Add | rq.Check | rq.Wait | rq.NumKeys | rq.DeleteKey | rq.Append | rq.MultiGet
    | rq.MultiSet | rq.QueuePush | rq.QueuePop | rq.QueueLen | rq.ListKeys | rq.Barrier
)  # fmt: skip


class Ask(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To an owner: apply this to your keys. Keys are without the prefix of their epoch. `serial`: of one node's asks.

    `together`: a WAIT for any number of clients. With its answer the node has a copy of each key, until it is revoked.
    """

    serial: int
    request: Shared
    together: bool = False


class Join(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To an owner: an ask for the keys of this digest, together. It knows them, or has one node say them."""

    serial: int
    digest: bytes


class Forget(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To an owner: nobody waits for the answer to this ask any more."""

    serial: int


class Released(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """To an owner: here is no copy of this key any more, and whoever waits for it does so by an ask of his own."""

    key: bytes


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The store's answer as its client would get it; for a wait that was granted also the values, None for a queue and
    for what is too large.

    `refused`: the request cannot be carried out, which its client pays for. The sentence says why. `kept`: others may
    get it from there.
    """

    serial: int
    reply: bytes
    values: tuple[bytes | None, ...] = ()
    refused: str = ""
    kept: bool = False


class Tell(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From an owner: say the keys of this ask, whose digest is not known."""

    serial: int


class Relay(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From an owner, by way of others: the answer to asks of many nodes, of which the first is whoever gets this. The
    rest is passed on, in parts."""

    owner: int
    targets: tuple[tuple[int, int], ...]
    """Nodes, and the serial of each's ask."""
    reply: bytes
    values: tuple[bytes | None, ...]


class PassOn(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From an owner: the answer to your ask `serial` is also that to one of this node. Pass it on when it is there."""

    serial: int
    node: int
    asked: int


class Revoke(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From an owner: use no copy of this key any more, and say that it is released. These asks were for many together
    and get no answer: each client must ask for itself."""

    key: bytes
    serials: tuple[int, ...] = ()


Item: TypeAlias = Ask | Join | Forget | Released | Answer | Tell | Relay | PassOn | Revoke


class Batch(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All that one node has to say to another in one turn of its event loop; a later turn's has the next number.

    `received`: the last that has arrived here; numbers begin with 1, and 0 only acknowledges. `again`: what comes after
    `received` is missing. `over`: the epoch has gone here.
    """

    epoch: int
    number: int
    received: int
    items: tuple[Item, ...] = ()
    again: bool = False
    over: bool = False
    job: int = 0


StoreMessage: TypeAlias = Batch
_decoder: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(Batch)
encode = msgspec.msgpack.encode


def decode(data: bytes) -> StoreMessage:
    """Raises MessageError for what is not a store's message."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None
