"""Whether another node's answer fits what it was asked. Nothing is trusted: torch's clients read answers as they are.

Called by: `shards.py`. No I/O.
"""

from __future__ import annotations

from . import requests as rq
from . import wire
from .shard_messages import Answer, Shared


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
