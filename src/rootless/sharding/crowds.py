"""Nodes that wait for the same keys, each for its clients together: one session in the keyspace, one answer for all.

With the answer every member has copies of the keys. So this is also the table of who has copies of what: `take_out`
says whom a change of a key concerns. A wait costs O(keys) once, and O(1) for each node that joins it. Called by:
`owner.py`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from .. import requests as rq
from .. import wire
from ..keyspace import Keyspace
from ..namespace import Session
from ..room import OVERHEAD, Room
from ..shard_messages import MAX_COPIED_BYTES, MAX_SHARED_BYTES, Answer, PassOn, Relay, Tell
from .parts import digest_of
from .receiver import Receiver
from .relays import BRANCHES, branches
from .values import values_of

Give = Callable[[int, Answer | Tell | Relay | PassOn], None]
_MANY, _MUCH = 32, 64 << 10
"""So many nodes pass an answer of so many bytes in all on to each other,"""
_WORTH = 1 << 10
"""if that is an answer of so many."""


class _Crowd:
    """The nodes that ask for the same keys."""

    def __init__(self, crowds: Crowds, keys: tuple[bytes, ...]) -> None:
        self._crowds = crowds
        self.keys = keys
        self.digest = digest_of(keys)
        self.session: Session | None = None
        self.members: dict[int, list[int]] = {}
        """By node: its asks that wait."""
        self.values: tuple[bytes | None, ...] | None = None
        """Once they are all there; then every member has copies."""
        self.size = 0
        self.helpers: deque[list[int]] = deque()
        """Nodes that others may get the answer from, the serial of each's ask, and how many more times."""

    def send(self, reply: list[bytes]) -> None:
        """The keyspace has an answer: all keys are there, or the epoch has failed."""
        self._crowds.answer(self, b"".join(reply))

    def refuse(self, reason: str) -> None:
        """Nobody's mistake: its wait has been taken."""

    def abort(self) -> None:
        """The store closes."""


class Crowds:
    """The crowds of one epoch. `give(node, answer)`."""

    def __init__(
        self, epoch: int, keyspace: Keyspace, receivers: dict[Session, Receiver], room: Room, own: int, give: Give
    ) -> None:
        self._epoch = epoch
        self._own = own
        self._keyspace = keyspace
        self._receivers = receivers
        self._room = room
        self._give = give
        self._held = 0
        self._joinable: dict[tuple[bytes, ...], _Crowd] = {}
        self._of_key: dict[bytes, dict[_Crowd, None]] = {}
        self._waiting: dict[int, dict[int, _Crowd]] = defaultdict(dict)
        """Asks without an answer, by node and serial."""
        self._by_digest: dict[bytes, _Crowd] = {}
        self._unknown: dict[bytes, dict[tuple[int, int], None]] = {}
        """Asks by a digest that nobody has said the keys of; the first is asked for them."""
        self._digests: dict[tuple[int, int], bytes] = {}

    def __contains__(self, key: bytes) -> bool:
        """Whether somebody waits for it, or has a copy."""
        return key in self._of_key

    def has_copies(self, key: bytes) -> bool:
        return any(crowd.values is not None for crowd in self._of_key.get(key, ()))

    def waits(self, node: int, serial: int) -> bool:
        """Whether an ask is in a crowd, and has no answer."""
        return serial in self._waiting[node]

    def join(self, node: int, serial: int, request: rq.Wait) -> bool:
        """A node joins the crowd for these keys, if there is one."""
        crowd = self._joinable.get(request.keys)
        if crowd is not None:
            self._add(crowd, node, serial)
        return crowd is not None

    def join_by_digest(self, node: int, serial: int, digest: bytes) -> None:
        """A node joins the crowd for keys that it does not say, or waits for the first one to say them."""
        crowd = self._by_digest.get(digest)
        if crowd is not None:
            self._add(crowd, node, serial)
            return
        asks = self._unknown.setdefault(digest, {})
        asks[node, serial] = None
        self._digests[node, serial] = digest
        if len(asks) == 1:
            self._give(node, Tell(serial))

    def know(self, keys: tuple[bytes, ...], promised: bytes | None) -> None:
        """A node has said these, for the digest that it had promised: those who asked by their digest join, or say
        them, too, if nobody can."""
        if not self._unknown:
            return
        digest = digest_of(keys)
        for node, serial in self._unknown.pop(digest, ()):
            del self._digests[node, serial]
            crowd = self._by_digest.get(digest)
            if crowd is not None:
                self._add(crowd, node, serial)
            else:
                self._give(node, Tell(serial))
        if promised in self._unknown:  # it was another's
            self._give(*_tell(next(iter(self._unknown[promised]))))

    def said(self, node: int, serial: int) -> bytes | None:
        """This ask waits no more for somebody to say its keys; their digest, if it did."""
        digest = self._digests.pop((node, serial), None)
        if digest is not None:
            asks = self._unknown[digest]
            del asks[node, serial]
            if not asks:
                del self._unknown[digest]
        return digest

    def _add(self, crowd: _Crowd, node: int, serial: int) -> None:
        serials = crowd.members.setdefault(node, [])
        if crowd.values is None:
            serials.append(serial)
            self._waiting[node][serial] = crowd
        else:
            self._give_later(crowd, node, serial, crowd.values)

    def begin(self, node: int, serial: int, request: rq.Wait, now_ns: int) -> None:
        """A node is the first to wait for these keys. None of them has been changed."""
        keys = dict.fromkeys(request.keys)
        try:
            self._take(sum(map(len, keys)) + OVERHEAD * len(keys))
        except wire.WireError as error:
            self._give(node, Answer(serial, b"", refused=str(error)))
            return
        crowd = self._joinable[request.keys] = _Crowd(self, request.keys)
        self._by_digest[crowd.digest] = crowd
        for key in keys:
            self._of_key.setdefault(key, {})[crowd] = None
        crowd.members[node] = [serial]
        self._waiting[node][serial] = crowd
        session = crowd.session = self._keyspace.open()
        session.epoch, session.named = self._epoch, None
        self._receivers[session] = crowd
        try:
            answers = self._keyspace.apply(session, request, now_ns)
        except wire.WireError as error:
            refused = str(error)
            self._tell(crowd, lambda serial: Answer(serial, b"", refused=refused))
            self._dissolve(crowd)
            return
        for other, data in answers:
            self._receivers[other].send(data)

    def answer(self, crowd: _Crowd, reply: bytes) -> None:
        """Its wait is over."""
        self._close_session(crowd)
        if reply == wire.STOP_WAITING:
            values = crowd.values = values_of(
                self._keyspace, self._epoch, crowd.keys, MAX_SHARED_BYTES, MAX_COPIED_BYTES
            )
            crowd.size = sum(map(len, filter(None, values)))
            self._tell_values(crowd, reply, values)
        else:
            self._tell(crowd, lambda serial: Answer(serial, reply))
            self._dissolve(crowd)

    def forget(self, node: int, serial: int) -> None:
        """Nobody there waits any more. If it has been answered, the node is told of changes all the same."""
        digest = self._digests.get((node, serial))
        if digest is not None:
            first = next(iter(self._unknown[digest])) == (node, serial)
            self.said(node, serial)
            if first and digest in self._unknown:
                self._give(*_tell(next(iter(self._unknown[digest]))))
            return
        crowd = self._waiting[node].pop(serial, None)
        if crowd is None:
            return
        serials = crowd.members[node]
        serials.remove(serial)
        if not serials:
            del crowd.members[node]
        if not crowd.members:
            self._dissolve(crowd)

    def take_out(self, key: bytes) -> dict[int, list[int]]:
        """Nobody has this key any more: the nodes that must hear of it, and which of their asks have ended so."""
        told: dict[int, list[int]] = {}
        for crowd in list(self._of_key.get(key, ())):
            for node, serials in crowd.members.items():
                told.setdefault(node, []).extend(serials)
                for serial in serials:
                    del self._waiting[node][serial]
            if crowd.values is None:
                self._dissolve(crowd)
            else:
                self._leave(crowd, (key,))
        return told

    def end(self) -> None:
        """The epoch has gone, and who waited has been answered."""
        for crowds in self._of_key.values():
            for crowd in crowds:
                self._close_session(crowd)
        self._room.give(self._held)
        self._held = 0

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _tell(self, crowd: _Crowd, answer_to: Callable[[int], Answer]) -> None:
        for node, serials in crowd.members.items():
            crowd.members[node] = []
            for serial in serials:
                del self._waiting[node][serial]
                self._give(node, answer_to(serial))

    def _tell_values(self, crowd: _Crowd, reply: bytes, values: tuple[bytes | None, ...]) -> None:
        """Where that is much for many, they pass it on to each other."""
        targets: list[tuple[int, int]] = []
        for node in sorted(crowd.members):
            serials, crowd.members[node] = crowd.members[node], []
            targets += [(node, serial) for serial in serials]
            for serial in serials:
                del self._waiting[node][serial]
        kept = crowd.size >= _WORTH
        if kept:
            crowd.helpers.extend([*target, BRANCHES] for target in targets)
        if self._is_for_many(crowd):
            for relay in branches(self._own, tuple(targets), reply, values):
                self._give(relay.targets[0][0], relay)
        else:
            for node, serial in targets:
                self._give(node, Answer(serial, reply, values, kept=kept))

    def _give_later(self, crowd: _Crowd, node: int, serial: int, values: tuple[bytes | None, ...]) -> None:
        """One who came when all were there gets it from one who came before, where there are many."""
        if self._is_for_many(crowd) and crowd.helpers:
            helper = crowd.helpers[0]
            helper[2] -= 1
            if not helper[2]:
                crowd.helpers.popleft()
            self._give(helper[0], PassOn(helper[1], node, serial))
        else:
            self._give(node, Answer(serial, wire.STOP_WAITING, values, kept=crowd.size >= _WORTH))
        if crowd.size >= _WORTH:
            crowd.helpers.append([node, serial, BRANCHES])

    def _is_for_many(self, crowd: _Crowd) -> bool:
        many = len(crowd.members)
        return crowd.size >= _WORTH and many >= _MANY and crowd.size * many >= _MUCH

    def _dissolve(self, crowd: _Crowd) -> None:
        self._close_session(crowd)
        self._leave(crowd, crowd.keys)

    def _leave(self, crowd: _Crowd, keys: Iterable[bytes]) -> None:
        """It has these keys no more, and can be joined no more."""
        if self._joinable.get(crowd.keys) is crowd:
            del self._joinable[crowd.keys]
            del self._by_digest[crowd.digest]
        for key in keys:
            crowds = self._of_key.get(key)
            if crowds is not None and crowd in crowds:
                del crowds[crowd]
                self._take(-len(key) - OVERHEAD)
                if not crowds:
                    del self._of_key[key]

    def _close_session(self, crowd: _Crowd) -> None:
        session, crowd.session = crowd.session, None
        if session is not None:
            self._receivers.pop(session, None)
            self._keyspace.close(session)

    def _take(self, size: int) -> None:
        self._room.take(size)
        self._held += size


def _tell(ask: tuple[int, int]) -> tuple[int, Tell]:
    return ask[0], Tell(ask[1])
