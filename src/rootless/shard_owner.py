"""The owner's side of the shared store: what other nodes ask of the keys that this node owns.

Every ask is a session of its own in the keyspace, so that a wait blocks there like a local client's. An ask that comes
again, because a connection broke, is not applied again: its answer is kept until the asking node has it. An ask that
cannot be carried out is some client's mistake, so it is answered, with a refusal: it never costs the asking node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from . import requests as rq
from . import wire
from .keyspace import Keyspace
from .namespace import Session
from .shard_messages import MAX_SHARED_BYTES, Answer, Ask

Reply = Callable[[Answer], None]


class Receiver(Protocol):
    """Whoever gets the answers of a session: a client's connection, or another node."""

    def send(self, reply: list[bytes]) -> None: ...

    def refuse(self, reason: str) -> None:
        """Its request cannot be carried out: nothing more is answered."""

    def abort(self) -> None: ...


class _Asked:
    """One ask of one node."""

    def __init__(self, owner: ShardOwner, asker: str, ask: Ask, reply: Reply) -> None:
        self._owner = owner
        self.asker = asker
        self.ask = ask
        self.reply = reply
        self.session: Session | None = None
        self.answer: Answer | None = None

    def send(self, reply: list[bytes]) -> None:
        """The keyspace has an answer."""
        if self.answer is not None:
            return
        size = sum(map(len, reply))
        if size > MAX_SHARED_BYTES:
            self.refuse(f"an answer of {size} bytes is over the limit of {MAX_SHARED_BYTES} between nodes")
            return
        data = b"".join(reply)
        request = self.ask.request
        values: tuple[bytes | None, ...] = ()
        if isinstance(request, rq.Wait) and data == wire.STOP_WAITING:
            values = self._owner.values(self.ask.epoch, request.keys)
        self._give(Answer(self.ask.serial, data, values))

    def refuse(self, reason: str) -> None:
        """The asking node is told, and closes its client's connection."""
        if self.answer is None:
            self._give(Answer(self.ask.serial, b"", refused=reason))

    def _give(self, answer: Answer) -> None:
        self.answer = answer
        self._owner.close(self)
        self.reply(answer)

    def abort(self) -> None:
        """The store closes: the asking node will see that for itself."""


class ShardOwner:
    """Applies the asks of other nodes. `receivers` is the table by which the store delivers answers."""

    def __init__(self, keyspace: Keyspace, receivers: dict[Session, Receiver]) -> None:
        self._keyspace = keyspace
        self._receivers = receivers
        self._asked: dict[tuple[str, int], _Asked] = {}

    def serve(self, asker: str, ask: Ask, reply: Reply, now_ns: int) -> None:
        """Applies an ask, now; `reply` is called with its answer, now or when there is one."""
        known = self._asked.get((asker, ask.serial))
        if known is not None:
            known.reply = reply
            if known.answer is not None:
                reply(known.answer)
            return
        for old in [key for key in self._asked if key[0] == asker and key[1] < ask.settled]:
            self._drop(self._asked.pop(old))
        asked = self._asked[asker, ask.serial] = _Asked(self, asker, ask, reply)
        session = asked.session = self._keyspace.open()
        session.epoch = ask.epoch
        session.named = None
        self._receivers[session] = asked
        try:
            answers = self._keyspace.apply(session, ask.request, now_ns)
        except wire.WireError as error:
            asked.refuse(str(error))
            return
        except Exception as error:  # a fault in the store itself must cost one client, not a node
            asked.refuse(f"the store cannot carry it out: {error!r}")
            return
        for other, data in answers:
            self._receivers[other].send(data)
        if asked.answer is None and isinstance(ask.request, rq.Set | rq.MultiSet | rq.Append | rq.QueuePush):
            asked.send([])

    def forget(self, asker: str, serial: int) -> None:
        """The asking node's client has given up."""
        asked = self._asked.pop((asker, serial), None)
        if asked is not None:
            self._drop(asked)

    def advance(self, epoch: int) -> None:
        """Older epochs are gone, and who asked for them has been answered."""
        for key in [key for key, asked in self._asked.items() if asked.ask.epoch < epoch]:
            self._drop(self._asked.pop(key))

    def values(self, epoch: int, keys: Sequence[bytes]) -> tuple[bytes | None, ...]:
        """What keys hold; None for a queue, and for what is too large to come along with others."""
        found: list[bytes | None] = []
        room = MAX_SHARED_BYTES
        for key in keys:
            held = self._keyspace.value(epoch, key)
            if held is not None and len(held) <= room:
                room -= len(held)
                found.append(bytes(held))
            else:
                found.append(None)
        return tuple(found)

    def close(self, asked: _Asked) -> None:
        """Its session is not needed any more."""
        session, asked.session = asked.session, None
        if session is not None:
            self._receivers.pop(session, None)
            self._keyspace.close(session)

    def _drop(self, asked: _Asked) -> None:
        session = asked.session
        if session is not None and session.waiter is not None and asked.answer is None:
            self._keyspace.apply(session, rq.CancelWait(), 0)
        self.close(asked)
