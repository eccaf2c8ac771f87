"""The keys of all epochs: what each request means, and what it may still touch.

Theory of operation. Each epoch has a namespace of its own, made once and never used again. A key that
begins with `hyperpodrun-epoch-<n>/` belongs to epoch n and the rest is the key inside it; any other key belongs to the
epoch that was current when its connection was opened. So a worker that keeps one connection for life uses
`PrefixStore("hyperpodrun-epoch-<n>", store)`, a stock script opens a connection for each `init_process_group()`, and
both reach the same keys.

| epoch n is           | writes             | reads         | a wait that would block |
|----------------------|--------------------|---------------|-------------------------|
| current              | kept               | answered      | blocks                  |
| current, cancelled   | kept, freed later  | answered      | cancelled at once       |
| newer than current   | kept for its time  | answered      | blocks until its time   |
| older than current   | dropped, counted   | find nothing  | cancelled at once       |

Three details keep a torch client safe and its stream in step:
- It reads a key by WAIT, then GET, and gloo dies of SIGSEGV on an empty answer. So what a WAIT has granted
  to a connection stays readable for it, even if the epoch ends between the two.
- A wait may be cancelled in the moment when the client's own deadline sends CANCEL_WAIT. Each side's word
  is then the answer to the other's: a CANCEL_WAIT right after a cancel that nobody asked for gets no second
  answer.
- A request from a connection that waits means that its client gave the wait up; the wait is forgotten.

No I/O, no clock: requests in, answers out. `connection.py` delivers them; `server.py` says when epochs
change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..protocol.names import epoch_prefix
from . import requests as rq
from . import wire
from .namespace import EpochKey, Namespace, Placed, Session
from .room import Room
from .waits import Answer, Epochs

_MARKS = (b"/hyperpodrun-epoch-", b"hyperpodrun-epoch-")
_EPOCH_KEY = re.compile(rb"(/?)hyperpodrun-epoch-(0|[1-9][0-9]{0,17})/")
_LARGEST_ANSWER = wire.Limits().request
_MANY, _MOST, _PLACED = 8, 1 << 14, 8
"""Requests for so many keys are looked at as a whole, as all ranks ask for the same, and so many are remembered."""
_LARGEST_KEPT = 1 << 20
"""Bytes of what is remembered: no client's request takes memory that the store's room does not know of."""
_NOTHING: tuple[Answer, ...] = ()


class Keyspace:
    """Applies the requests of sessions to epoch-fenced keys."""

    def __init__(self, epoch: int = 0, room: Room | None = None) -> None:
        self.dropped_stale_writes = 0
        self._epochs = Epochs(epoch, Room() if room is None else room)
        self._sessions: set[Session] = set()
        self._placed: dict[tuple[int, tuple[bytes, ...]], Placed] = {}
        self._now_ns = 0
        self._handlers: dict[type, Callable[[Session, Any], Sequence[Answer]]] = {
            rq.Validate: lambda session, request: _NOTHING,
            rq.Ping: lambda session, request: [(session, [wire.encode_u32(request.nonce)])],
            rq.Set: self._set,
            rq.MultiSet: self._multi_set,
            rq.CompareSet: self._compare_set,
            rq.Add: self._add,
            rq.Append: self._append,
            rq.DeleteKey: self._delete_key,
            rq.Get: self._get,
            rq.MultiGet: self._multi_get,
            rq.Check: self._check,
            rq.NumKeys: self._num_keys,
            rq.ListKeys: self._list_keys,
            rq.Wait: self._wait,
            rq.Barrier: self._barrier,
            rq.QueuePush: self._queue_push,
            rq.QueuePop: self._queue_pop,
            rq.QueueLen: self._queue_len,
        }

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epochs.current

    @property
    def cancelled_waits(self) -> int:
        """How many waits were answered with a cancel that the client had not asked for."""
        return self._epochs.cancelled_waits

    def open(self) -> Session:
        """A connection was opened."""
        session = Session(self.epoch)
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        """A connection is gone, and its wait with it."""
        self._epochs.forget(session)
        self._sessions.discard(session)

    def apply(self, session: Session, request: rq.Request, now_ns: int) -> Sequence[Answer]:
        """Carry out one request; the answers are in the order in which they must be sent.

        Raises WireError for a request that cannot be carried out.

        """
        self._now_ns = now_ns
        cancel_was_answered, session.cancel_unasked = session.cancel_unasked, False
        if session.waiter is not None:
            self._epochs.forget(session)
        kind = type(request)
        if kind is rq.CancelWait:
            return _NOTHING if cancel_was_answered else [(session, [wire.WAIT_CANCELED])]
        if kind is not rq.Get and kind is not rq.MultiGet:
            session.granted = ()
            session.kept.clear()
        return self._handlers[kind](session, request)

    def advance(self, epoch: int) -> list[Answer]:
        """Make an epoch the current one; older keys are freed and their waits cancelled.

        Raises ValueError if that would go back.

        """
        gone = {space.epoch: space for space in self._epochs.advance(epoch)}
        for session in self._sessions:
            for place in session.granted:
                space = gone.get(place[0])
                if space is not None and place[1] in space.values:
                    session.kept[place] = space.values[place[1]]
        return self._epochs.cancel_all(gone.values())

    def cancel(self, epoch: int) -> list[Answer]:
        """An epoch faulted: free its waits, and let none block in it any more."""
        space = self._epochs.open(epoch)
        if space is None:
            return []
        space.cancelled = True
        return self._epochs.cancel_all([space])

    def values(self, epoch: int) -> Iterable[bytes | bytearray]:
        """Every value of an epoch; none once it is older than the current one."""
        space = self._epochs.peek(epoch)
        return space.values.values() if space is not None else ()

    def last_write_ns(self, epoch: int) -> int | None:
        """The time given with the last write in an epoch, if it had one and has not gone."""
        space = self._epochs.peek(epoch)
        return space.last_write_ns if space is not None else None

    def value(self, epoch: int, key: bytes) -> bytes | bytearray | None:
        """One value of an epoch, if it has it."""
        space = self._epochs.peek(epoch)
        return None if space is None else space.values.get(key)

    def has(self, epoch: int, key: bytes) -> bool:
        """Whether a key of an epoch has a value."""
        return self.value(epoch, key) is not None

    def is_queue(self, epoch: int, key: bytes) -> bool:
        """Whether a key of an epoch is a queue that is not empty."""
        space = self._epochs.peek(epoch)
        return space is not None and key in space.queues

    def full_key(self, session: Session, epoch: int, key: bytes) -> bytes:
        """A key of an epoch as this session would write it."""
        if session.named is None:
            return key
        prefix = epoch_prefix(epoch).encode()
        return b"/" + prefix + key if key.startswith(b"/") else prefix + b"/" + key

    def place(self, session: Session, key: bytes) -> EpochKey:
        """Which epoch a key belongs to, and its name there."""
        if key.startswith(_MARKS):
            match = _EPOCH_KEY.match(key)
            if match is not None:
                session.named = int(match[2])
                return session.named, match[1] + key[match.end() :]
        return session.epoch, key

    def places(self, session: Session, keys: tuple[bytes, ...]) -> Placed:
        """Of several keys, as `place`. Of the last few long requests it is known: all ranks ask for the same."""
        many = _MANY <= len(keys) <= _MOST
        known = self._placed.get((session.epoch, keys)) if many else None
        if known is None:
            before, session.named = session.named, None
            places = tuple([self.place(session, key) for key in keys])
            named, session.named = session.named, before
            epochs = {epoch for epoch, _ in places}
            known = Placed(places, epochs.pop() if len(epochs) == 1 else None, tuple([key for _, key in places]), named)
            if many and sum(map(len, keys)) <= _LARGEST_KEPT:
                self._placed[session.epoch, keys] = known
                if len(self._placed) > _PLACED:
                    del self._placed[next(iter(self._placed))]
        if known.named is not None:
            session.named = known.named
        return known

    def _find(self, session: Session, key: bytes) -> tuple[Namespace | None, bytes]:
        epoch, key = self.place(session, key)
        return self._epochs.open(epoch), key

    def _find_to_write(self, session: Session, key: bytes) -> tuple[Namespace | None, bytes]:
        space, key = self._find(session, key)
        if space is None:
            self.dropped_stale_writes += 1
        else:
            space.last_write_ns = self._now_ns
        return space, key

    # One handler for each request. The answer to a stale write is none that a client takes for success.

    def _set(self, session: Session, request: rq.Set) -> Sequence[Answer]:
        return self._store(session, request.key, request.value)

    def _multi_set(self, session: Session, request: rq.MultiSet) -> Sequence[Answer]:
        return [answer for key, value in request.items for answer in self._store(session, key, value)]

    def _store(self, session: Session, key: bytes, value: bytes) -> Sequence[Answer]:
        space, key = self._find_to_write(session, key)
        if space is None:
            return _NOTHING
        space.put(key, value)
        return self._epochs.wake(space, key) if key in space.waiting else _NOTHING

    def _compare_set(self, session: Session, request: rq.CompareSet) -> Sequence[Answer]:
        space, key = self._find_to_write(session, request.key)
        if space is None:
            return [(session, wire.encode_blobs([b""]))]
        held = space.values.get(key)
        if held is None and request.expected:
            return [(session, wire.encode_blobs([request.expected]))]  # what torch's own server answers
        if held is None or held == request.expected:
            space.put(key, request.desired)
            held = request.desired
        return [*self._epochs.wake(space, key), (session, wire.encode_blobs([held]))]

    def _add(self, session: Session, request: rq.Add) -> Sequence[Answer]:
        space, key = self._find_to_write(session, request.key)
        if space is None:
            return [(session, [wire.encode_i64(0)])]
        try:
            total = space.add(key, request.delta)
        except ValueError as error:
            raise wire.WireError(f"ADD: {error}") from None
        return [*self._epochs.wake(space, key), (session, [wire.encode_i64(total)])]

    def _append(self, session: Session, request: rq.Append) -> Sequence[Answer]:
        space, key = self._find_to_write(session, request.key)
        if space is None:
            return _NOTHING
        space.append(key, request.value)
        return self._epochs.wake(space, key)

    def _delete_key(self, session: Session, request: rq.DeleteKey) -> Sequence[Answer]:
        space, key = self._find_to_write(session, request.key)
        deleted = space is not None and space.remove(key)
        return [(session, [wire.encode_i64(deleted)])]

    def _read(self, session: Session, place: EpochKey) -> bytes | bytearray:
        space = self._epochs.peek(place[0])
        return space.values.get(place[1], b"") if space is not None else session.kept.get(place, b"")

    def _get(self, session: Session, request: rq.Get) -> Sequence[Answer]:
        return [(session, wire.encode_blobs([self._read(session, self.place(session, request.key))]))]

    def _multi_get(self, session: Session, request: rq.MultiGet) -> Sequence[Answer]:
        placed = self.places(session, request.keys)
        space = None if placed.epoch is None else self._epochs.peek(placed.epoch)
        if space is not None and (known := space.answer(placed.keys)) is not None:
            return [(session, [known])]
        values = [self._read(session, place) for place in placed.places]
        if (size := sum(map(len, values))) > _LARGEST_ANSWER:
            raise wire.WireError(f"an answer of {size} bytes is over the limit of {_LARGEST_ANSWER}")
        answer = wire.encode_blobs(values)
        if space is not None and len(values) >= _MANY and size + sum(map(len, placed.keys)) <= _LARGEST_KEPT:
            answer = [b"".join(answer)]
            space.note_answer(placed.keys, answer[0])
        return [(session, answer)]

    def _check(self, session: Session, request: rq.Check) -> Sequence[Answer]:
        for key in request.keys:
            space, key = self._find(session, key)
            if space is None or not space.has(key):
                return [(session, [wire.NOT_READY])]
        return [(session, [wire.READY])]

    def _num_keys(self, session: Session, request: rq.NumKeys) -> Sequence[Answer]:
        space = self._epochs.peek(session.epoch if session.named is None else session.named)
        return [(session, [wire.encode_i64(0 if space is None else len(space.values))])]

    def _list_keys(self, session: Session, request: rq.ListKeys) -> Sequence[Answer]:
        space = self._epochs.peek(session.epoch if session.named is None else session.named)
        keys: list[bytes] = [] if space is None else list(space.values)
        if session.named is not None:
            keys = [self.full_key(session, session.named, key) for key in keys]
        return [(session, [wire.encode_i64(len(keys)), *wire.encode_blobs(keys)])]

    def _wait(self, session: Session, request: rq.Wait) -> Sequence[Answer]:
        return self._epochs.wait(session, self.places(session, request.keys).places)

    def _barrier(self, session: Session, request: rq.Barrier) -> Sequence[Answer]:
        space, key = self._find(session, request.key)
        if space is None:
            return self._epochs.wait(session, (self.place(session, request.key),))
        try:
            return self._epochs.arrive(session, space, key, request.world_size)
        except ValueError as error:
            raise wire.WireError(f"BARRIER: {error}") from None

    def _queue_push(self, session: Session, request: rq.QueuePush) -> Sequence[Answer]:
        space, key = self._find_to_write(session, request.key)
        if space is None:
            return _NOTHING
        space.push(key, request.value)
        return self._epochs.wake_one(space, key)

    def _queue_pop(self, session: Session, request: rq.QueuePop) -> Sequence[Answer]:
        space, key = self._find(session, request.key)
        count, value = (0, b"") if space is None else space.pop(key)
        return [(session, [wire.encode_i64(count), *(wire.encode_blobs([value]) if count else ())])]

    def _queue_len(self, session: Session, request: rq.QueueLen) -> Sequence[Answer]:
        space, key = self._find(session, request.key)
        return [(session, [wire.encode_i64(0 if space is None else len(space.queues.get(key, ())))])]
