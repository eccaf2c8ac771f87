"""What the stores of different nodes say to each other: requests for keys that another node owns, and the answers.

`job` in each: the incarnation of the job that the epoch is of, as a number; the node's shell writes and checks it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..protocol.messages import MessageError
from . import requests as rq

MAX_SHARED_BYTES = 31 << 20
"""Keys and values of one request or answer between nodes, a little less than a connection between agents takes."""

Shared: TypeAlias = (
    rq.Set | rq.CompareSet | rq.Get | rq.Add | rq.Check | rq.Wait | rq.NumKeys | rq.DeleteKey | rq.Append | rq.MultiGet
    | rq.MultiSet | rq.QueuePush | rq.QueuePop | rq.QueueLen | rq.ListKeys | rq.Barrier
)  # fmt: skip


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Apply this to your keys of `epoch`, once, however often you are asked. Keys are without their prefix.

    `serial` counts the asks of one node. Answers to asks before `settled` need not be kept.
    """

    serial: int
    epoch: int
    settled: int
    request: Shared
    job: int = 0


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The store's answer as its client would get it; for a wait that was granted also the values, None for a queue.

    `refused`: the request cannot be carried out, which its client pays for. The sentence says why.
    """

    serial: int
    reply: bytes
    values: tuple[bytes | None, ...] = ()
    refused: str = ""
    job: int = 0


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for the answer to this ask any more."""

    serial: int
    job: int = 0


StoreMessage: TypeAlias = Ask | Answer | Forget
_decoder: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(StoreMessage)
encode = msgspec.msgpack.encode


def decode(data: bytes) -> StoreMessage:
    """Raises MessageError for what is not a store's message."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None
