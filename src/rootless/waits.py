"""The namespaces of all epochs, and the waits that block in them.

Owns which epochs still live, and every WAIT and BARRIER without an answer: it registers, wakes, cancels and
forgets them. It never reads a request and never sends. Only `keyspace.py` uses it, whose docstring tells
the rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from . import wire
from .namespace import EpochKey, Namespace, Session, Waiter
from .room import OVERHEAD, Room

Answer = tuple[Session, list[bytes]]
"""A reply, as buffers, and whom it is for: the one who asked, or one who waited."""


class Epochs:
    """Living namespaces by epoch; the oldest is the current one."""

    def __init__(self, epoch: int, room: Room) -> None:
        self.current = epoch
        self.cancelled_waits = 0
        self._room = room
        self._spaces = {epoch: Namespace(epoch, room)}

    def peek(self, epoch: int) -> Namespace | None:
        """The namespace of an epoch, if there is one."""
        return self._spaces.get(epoch)

    def open(self, epoch: int) -> Namespace | None:
        """The namespace of an epoch, made on first use; None for an epoch that has gone."""
        space = self._spaces.get(epoch)
        if space is None and epoch >= self.current:
            space = self._spaces[epoch] = Namespace(epoch, self._room)
        return space

    def advance(self, epoch: int) -> list[Namespace]:
        """Make an epoch current; the namespaces that are older have gone and are returned."""
        if epoch < self.current:
            raise ValueError(f"epoch {epoch} is older than the current epoch {self.current}")
        self.current = epoch
        self.open(epoch)
        gone = [self._spaces.pop(old) for old in sorted(self._spaces) if old < epoch]
        for space in gone:
            space.free()
        return gone

    def wait(self, session: Session, places: tuple[EpochKey, ...]) -> list[Answer]:
        """Wait for keys: answered now if all are there, or if one of them cannot come any more."""
        missing: set[EpochKey] = set()
        hopeless = False
        space: Namespace | None = None
        for place in places:
            if space is None or space.epoch != place[0]:
                space = self.open(place[0])
            if space is None:
                hopeless = True
            elif not space.has(place[1]):
                missing.add(place)
                hopeless |= space.cancelled
        waiter = Waiter(session, places, missing)
        if hopeless:
            return self.cancel(waiter)
        if not missing:
            return self._release(waiter)
        cost = sum(len(key) + OVERHEAD for _, key in missing)
        self._room.take(cost)
        waiter.cost = cost
        session.waiter = waiter
        for epoch, key in missing:
            self._spaces[epoch].enlist(key, waiter)
        return []

    def arrive(self, session: Session, space: Namespace, key: bytes, world_size: int) -> list[Answer]:
        """Arrive at a barrier; the last one releases all. Raises ValueError as `Namespace.add` does."""
        complete = space.add(key, 1) >= world_size
        answers = self.wake(space, key)
        waiter = Waiter(session, (), {(space.epoch, key)}, barrier=True)
        if complete:
            for other in (*space.arrived.pop(key, ()), waiter):
                answers += self._release(other)
        elif space.cancelled:
            answers += self.cancel(waiter)
        else:
            session.waiter = waiter
            space.enlist(key, waiter)
        return answers

    def wake(self, space: Namespace, key: bytes) -> list[Answer]:
        """A key has got a value: everyone who waited for nothing else goes on."""
        answers: list[Answer] = []
        for waiter in space.waiting.pop(key, ()):
            waiter.missing.discard((space.epoch, key))
            if not waiter.missing or (space.queues and self._all_there(waiter)):
                answers += self._release(waiter)
        return answers

    def wake_one(self, space: Namespace, key: bytes) -> list[Answer]:
        """A queue has got an element: the first who waited for nothing else goes on."""
        for waiter in space.waiting.get(key, ()):
            if self._all_there(waiter):
                return self._release(waiter)
        return []

    def cancel(self, waiter: Waiter) -> list[Answer]:
        """Answer a wait with a cancel; who arrived at a barrier has not arrived."""
        self.forget(waiter.session)
        if waiter.barrier:
            for epoch, key in waiter.missing:
                if epoch in self._spaces:
                    with suppress(ValueError):
                        self._spaces[epoch].add(key, -1)
        self.cancelled_waits += 1
        waiter.session.cancel_unasked = True
        return [(waiter.session, [wire.WAIT_CANCELED])]

    def cancel_all(self, spaces: Iterable[Namespace]) -> list[Answer]:
        """Cancel every wait that blocks in these namespaces."""
        blocked = dict.fromkeys(waiter for space in spaces for waiter in space.blocked())
        return [answer for waiter in blocked for answer in self.cancel(waiter)]

    def forget(self, session: Session) -> None:
        """A session's wait, if it has one, needs no answer any more."""
        waiter, session.waiter = session.waiter, None
        if waiter is not None:
            self._room.give(waiter.cost)
            waiter.cost = 0
            for epoch, key in waiter.missing:
                if epoch in self._spaces:
                    self._spaces[epoch].strike(key, waiter)

    def _release(self, waiter: Waiter) -> list[Answer]:
        self.forget(waiter.session)
        waiter.session.granted = waiter.places
        return [(waiter.session, [wire.STOP_WAITING])]

    def _all_there(self, waiter: Waiter) -> bool:
        return all(self._spaces[epoch].has(key) for epoch, key in waiter.missing)
