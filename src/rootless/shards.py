"""One store over many nodes: each key of an epoch has one owner, chosen by the key's hash.

Theory of operation. A client talks to the store of its own node. A request for keys that this node owns is dealt with
here; for others their owners are asked, and the client's next request waits until all of them have answered. So every
client sees its own writes, and what it wrote before it told somebody else, as with one store. A WAIT is registered at
the owners and answered by them once, never polled; the answer brings the values, so that the GET which a client of
torch sends next is answered here.

When an epoch fails, everything that is asked for in it is answered at once: waits with a cancel, the rest as the
keyspace answers for an epoch that has gone. What a broken connection has swallowed is asked again.

What cannot be carried out costs the client that asked for it; an answer that does not fit its question costs the node
that gave it; an answer of another node than was asked is not taken.

The values that pass by are searched for addresses of gloo's listeners: those that this node's workers are connected
with have all been published, or read, through here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import requests as rq
from . import wire
from .gloo_addresses import listeners_in
from .keyspace import Keyspace
from .namespace import EpochKey, Session
from .shard_answers import check_answer
from .shard_messages import MAX_SHARED_BYTES, Answer, Ask, Forget, Shared, StoreMessage
from .shard_owner import Receiver, ShardOwner

_MANY = rq.MultiGet | rq.MultiSet | rq.Check | rq.Wait
_ALL = rq.NumKeys | rq.ListKeys
_READS = rq.Get | rq.MultiGet


@dataclass
class _Part:
    """What one owner is asked."""

    node: int
    request: Shared
    indices: tuple[int, ...]
    answer: Answer | None = None


@dataclass
class _Pending:
    """A client's request that others must answer."""

    session: Session
    request: rq.Request
    epoch: int
    places: tuple[EpochKey, ...]
    parts: dict[int, _Part] = field(default_factory=dict)


class Shards:
    """The asking side of one node's store. `send(node, message)` may lose messages; `lost` tells when."""

    def __init__(
        self,
        keyspace: Keyspace,
        receivers: dict[Session, Receiver],
        send: Callable[[int, StoreMessage], None],
        own: Callable[[], int],
    ) -> None:
        self._keyspace = keyspace
        self._receivers = receivers
        self._send = send
        self._own = own
        self.owner = ShardOwner(keyspace, receivers)
        self._owners: dict[int, tuple[int, ...]] = {}
        self._failed: set[int] = set()
        self._serial = 0
        self._pending: dict[int, _Pending] = {}
        """By the serial of each part."""
        self._of_session: dict[Session, _Pending] = {}
        self._kept: dict[Session, dict[EpochKey, bytes]] = {}
        """What the last WAIT of a client has brought along."""
        self._listeners: dict[int, dict[tuple[str, int], None]] = {}
        self._last_write_ns: dict[int, int] = {}

    # ---- epochs ----------------------------------------------------------------------------------------------------

    def open(self, epoch: int, owners: Sequence[int]) -> None:
        """An epoch is shared by these nodes, in this order. Older ones have gone."""
        self._owners[epoch] = tuple(owners)
        for old in [old for old in self._owners if old < epoch]:
            self.fail(old)
            for table in (self._owners, self._listeners, self._last_write_ns):
                table.pop(old, None)
            self._failed.discard(old)
        self.owner.advance(epoch)

    def fail(self, epoch: int) -> int:
        """Everything that is asked for in an epoch is answered now; how many waits that frees."""
        self._failed.add(epoch)
        freed = 0
        for pending in [p for p in self._of_session.values() if p.epoch == epoch]:
            freed += isinstance(pending.request, rq.Wait | rq.Barrier)
            self._abandon(pending)
        return freed

    def lost(self, node: int) -> None:
        """A connection is gone, with what was under way: it is asked again."""
        for serial, pending in list(self._pending.items()):
            part = pending.parts[serial]
            if part.node == node and part.answer is None:
                self._send(node, self._ask(serial, pending.epoch, part.request))

    def listeners(self, epoch: int) -> tuple[tuple[str, int], ...]:
        """The gloo listeners that have passed by in an epoch."""
        return tuple(self._listeners.get(epoch, ()))

    def last_write_ns(self, epoch: int) -> int | None:
        return self._last_write_ns.get(epoch)

    # ---- this node's clients ---------------------------------------------------------------------------------------

    def take(self, session: Session, request: rq.Request, now_ns: int) -> bool:
        """Whether others are asked for this; the answer is then sent to the session's receiver."""
        before = self._of_session.get(session)
        if isinstance(request, rq.CancelWait):
            if before is None:
                return False
            self._drop(before)
            self._answer(session, [wire.WAIT_CANCELED])
            return True
        if before is not None:  # its client has given the wait up
            self._drop(before)
        places = tuple(self._keyspace.place(session, key) for key in _keys_of(request))
        epoch = places[0][0] if places else (session.epoch if session.named is None else session.named)
        owners = self._owners.get(epoch, ())
        shared = any(node != self._own() for node in owners) and not isinstance(request, rq.Validate | rq.Ping)
        if shared:
            self._observe(epoch, request, now_ns)
        if isinstance(request, _READS) and self._answer_kept(session, request, places):
            return True
        if not isinstance(request, _READS):
            self._kept.pop(session, None)
        if not shared:
            return False
        if any(place[0] != epoch for place in places):
            raise wire.WireError("one request for keys of two epochs")
        if (size := _size_of(request)) > MAX_SHARED_BYTES:  # whoever owns it: what works must not depend on a hash
            raise wire.WireError(f"a request of {size} bytes is over the limit of {MAX_SHARED_BYTES} on several nodes")
        nodes = owners if isinstance(request, _ALL) else [self._owner_of(place) for place in places]
        if all(node == self._own() for node in nodes):
            return False
        pending = _Pending(session, request, epoch, places)
        self._of_session[session] = pending
        if epoch in self._failed or epoch < self._keyspace.epoch:
            self._abandon(pending)
            return True
        for node in dict.fromkeys(nodes):
            indices = tuple(index for index, other in enumerate(nodes) if other == node)
            self._serial += 1
            pending.parts[self._serial] = _Part(node, _part_of(request, places, indices), indices)
            self._pending[self._serial] = pending
        for serial, part in list(pending.parts.items()):
            if self._of_session.get(session) is not pending:  # one part has decided it
                break
            self._dispatch(serial, pending, part, now_ns)
        return True

    def holds(self, session: Session) -> bool:
        """Whether the session's next request must wait. One that blocks can be given up, so it does not count."""
        pending = self._of_session.get(session)
        return pending is not None and not isinstance(pending.request, rq.Wait | rq.Barrier)

    def close(self, session: Session) -> None:
        """A client is gone."""
        self._kept.pop(session, None)
        pending = self._of_session.get(session)
        if pending is not None:
            self._drop(pending)

    # ---- other nodes -----------------------------------------------------------------------------------------------

    def receive(self, node: int, asker: str, message: StoreMessage, now_ns: int) -> None:
        """Another store speaks. Raises WireError for an answer that does not fit its question."""
        match message:
            case Ask():
                self.owner.serve(asker, message, lambda answer: self._send(node, answer), now_ns)
            case Forget():
                self.owner.forget(asker, message.serial)
            case Answer():
                self._answered(node, message)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _owner_of(self, place: EpochKey) -> int:
        owners = self._owners[place[0]]
        return owners[zlib.crc32(place[1]) % len(owners)]

    def _ask(self, serial: int, epoch: int, request: Shared) -> Ask:
        return Ask(serial, epoch, min(self._pending, default=serial), request)

    def _dispatch(self, serial: int, pending: _Pending, part: _Part, now_ns: int) -> None:
        ask = self._ask(serial, pending.epoch, part.request)
        if part.node == self._own():
            self.owner.serve("", ask, lambda answer: self._answered(part.node, answer), now_ns)
        else:
            self._send(part.node, ask)

    def _answered(self, node: int, answer: Answer) -> None:
        pending = self._pending.get(answer.serial)
        if pending is None:
            return
        part = pending.parts[answer.serial]
        if part.answer is not None or part.node != node:
            return
        if answer.refused:
            self._refuse(pending, answer.refused)
            return
        check_answer(part.request, answer)
        part.answer = answer
        waits = isinstance(pending.request, rq.Wait | rq.Barrier)
        if waits and answer.reply == wire.WAIT_CANCELED:
            self._abandon(pending)
        elif all(part.answer is not None for part in pending.parts.values()):
            self._forget(pending)
            self._complete(pending)

    def _complete(self, pending: _Pending) -> None:
        session, request = pending.session, pending.request
        answers = [(part, part.answer) for part in pending.parts.values() if part.answer is not None]
        if isinstance(request, rq.Wait):
            kept = self._kept.setdefault(session, {})
            for part, answer in answers:
                for index, value in zip(part.indices, answer.values, strict=True):
                    if value is not None:
                        kept[pending.places[index]] = value
                        self._note_listeners(pending.epoch, value)
            self._answer(session, [wire.STOP_WAITING])
        elif isinstance(request, rq.MultiGet):
            values: dict[int, bytes] = {}
            for part, answer in answers:
                values.update(zip(part.indices, wire.decode_blobs(answer.reply), strict=True))
            for value in values.values():
                self._note_listeners(pending.epoch, value)
            self._answer(session, wire.encode_blobs(values[index] for index in range(len(request.keys))))
        elif isinstance(request, rq.Check):
            ready = all(answer.reply == wire.READY for _, answer in answers)
            self._answer(session, [wire.READY if ready else wire.NOT_READY])
        elif isinstance(request, rq.NumKeys):
            self._answer(session, [wire.encode_i64(sum(wire.decode_i64(answer.reply) for _, answer in answers))])
        elif isinstance(request, rq.ListKeys):
            keys = [key for _, answer in answers for key in wire.decode_blobs(answer.reply[8:])]
            keys = [self._keyspace.full_key(session, pending.epoch, key) for key in keys]
            self._answer(session, [wire.encode_i64(len(keys)), *wire.encode_blobs(keys)])
        else:
            self._answer(session, [answer.reply for _, answer in answers if answer.reply])

    def _refuse(self, pending: _Pending, reason: str) -> None:
        """It was this client's mistake."""
        self._drop(pending)
        receiver = self._receivers.get(pending.session)
        if receiver is not None:
            receiver.refuse(reason)

    def _abandon(self, pending: _Pending) -> None:
        """It is answered as for an epoch that has gone."""
        self._drop(pending)
        if isinstance(pending.request, rq.Wait | rq.Barrier):
            pending.session.cancel_unasked = True
        self._answer(pending.session, _answer_of_the_past(pending.request))

    def _drop(self, pending: _Pending) -> None:
        self._forget(pending)
        for serial, part in pending.parts.items():
            if part.answer is not None:
                continue
            if part.node == self._own():
                self.owner.forget("", serial)
            else:
                self._send(part.node, Forget(serial))

    def _forget(self, pending: _Pending) -> None:
        if self._of_session.get(pending.session) is pending:
            del self._of_session[pending.session]
        for serial in pending.parts:
            self._pending.pop(serial, None)

    def _answer(self, session: Session, reply: list[bytes]) -> None:
        receiver = self._receivers.get(session)
        if receiver is not None:
            receiver.send(reply)

    def _answer_kept(self, session: Session, request: rq.Request, places: Sequence[EpochKey]) -> bool:
        kept = self._kept.get(session, {})
        if not kept or any(place not in kept for place in places):
            return False
        self._answer(session, wire.encode_blobs(kept[place] for place in places))
        return True

    def _observe(self, epoch: int, request: rq.Request, now_ns: int) -> None:
        match request:
            case rq.Set():
                self._note_listeners(epoch, request.value)
            case rq.MultiSet():
                for _, value in request.items:
                    self._note_listeners(epoch, value)
            case rq.Add() | rq.Append() | rq.CompareSet():
                pass
            case _:
                return
        self._last_write_ns[epoch] = now_ns

    def _note_listeners(self, epoch: int, value: bytes) -> None:
        for listener in listeners_in(value):
            self._listeners.setdefault(epoch, {})[listener] = None


def _keys_of(request: rq.Request) -> tuple[bytes, ...]:
    match request:
        case rq.MultiGet() | rq.Check() | rq.Wait():
            return request.keys
        case rq.MultiSet():
            return tuple(key for key, _ in request.items)
        case rq.Validate() | rq.Ping() | rq.CancelWait() | rq.NumKeys() | rq.ListKeys():
            return ()
    return (request.key,)


def _size_of(request: rq.Request) -> int:
    """Bytes of keys and values."""
    match request:
        case rq.Set() | rq.Append() | rq.QueuePush():
            return len(request.key) + len(request.value)
        case rq.CompareSet():
            return len(request.key) + len(request.expected) + len(request.desired)
        case rq.MultiSet():
            return sum(len(key) + len(value) + 16 for key, value in request.items)
    return sum(len(key) + 16 for key in _keys_of(request))


def _part_of(request: rq.Request, places: Sequence[EpochKey], indices: Sequence[int]) -> Shared:
    """The request for one owner's keys, without the prefix of their epoch."""
    from msgspec.structs import replace

    keys = tuple(places[index][1] for index in indices) if places else ()
    match request:
        case rq.MultiGet() | rq.Check() | rq.Wait():
            return replace(request, keys=keys)
        case rq.MultiSet():
            values = [request.items[index][1] for index in indices]
            return rq.MultiSet(tuple(zip(keys, values, strict=True)))
        case rq.NumKeys() | rq.ListKeys():
            return request
        case rq.Validate() | rq.Ping() | rq.CancelWait():
            raise AssertionError("not shared")
    return replace(request, key=keys[0])


def _answer_of_the_past(request: rq.Request) -> list[bytes]:
    match request:
        case rq.Wait() | rq.Barrier():
            return [wire.WAIT_CANCELED]
        case rq.Get():
            return wire.encode_blobs([b""])
        case rq.CompareSet():
            return wire.encode_blobs([b""])
        case rq.MultiGet():
            return wire.encode_blobs([b""] * len(request.keys))
        case rq.Check():
            return [wire.NOT_READY]
        case rq.Set() | rq.MultiSet() | rq.Append() | rq.QueuePush():
            return []
        case rq.ListKeys():
            return [wire.encode_i64(0)]
    return [wire.encode_i64(0)]
