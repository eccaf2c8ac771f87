"""What this node's clients wait for at other nodes.

Clients that wait for the same keys wait together: their owners are asked once, and what they answer is copied for the
epoch. A key that is changed is asked for by each client, so that an owner sees who waits; also those that wait already
when it is revoked. A client that joins others gets what they get: until a copy is revoked it is as good for who came
later, and from then on nobody joins. Called by: `shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import requests as rq
from .. import wire
from ..namespace import Session
from ..shard_messages import Answer, Released, Revoke
from .asks import Asks
from .copies import Promise
from .epoch import SharedEpoch
from .parts import Part, Pending


class ClientWaits:
    """`pending_of`: who waits for what. `answer(session, reply)`."""

    def __init__(
        self, asks: Asks, pending_of: dict[Session, Pending], answer: Callable[[Session, list[bytes]], None]
    ) -> None:
        self._asks = asks
        self._pending_of = pending_of
        self._answer = answer
        self.promises: dict[Session, Promise] = {}
        """What the last WAIT of a client has granted it."""

    def join(self, session: Session, epoch: SharedEpoch, keys: tuple[bytes, ...]) -> bool:
        """Whether others wait for just these keys, or they are all here."""
        pending = epoch.waits.get(keys)
        if pending is not None:
            pending.sessions[session] = None
            self._pending_of[session] = pending
            return True
        if all(key in epoch.copies for key in keys):
            self._grant(session, epoch, keys, {})
            return True
        return False

    def begin(self, pending: Pending, epoch: SharedEpoch) -> None:
        """A client is the first to wait for these."""
        missing = [key for key in dict.fromkeys(pending.keys) if key not in epoch.copies]
        if not any(map(epoch.copies.is_changed, missing)):
            epoch.waits[pending.keys] = pending
        self._ask((pending,), epoch, missing)

    def answered(self, epoch: SharedEpoch, part: Part, answer: Answer) -> None:
        """An owner says that they are all there, for the sessions of each that has waited."""
        assert isinstance(part.request, rq.Wait)
        epoch.note_listeners(answer.values)
        single: dict[bytes, bytes] = {}
        for key, value in zip(part.request.keys, answer.values, strict=True):
            if part.together and key not in part.revoked:
                epoch.copies.keep(key, value)
            elif value is not None:
                single[key] = value
        for pending in list(part.waiting):
            pending.values.update(single)
            if not pending.parts:
                self._not_joinable(pending, epoch)
                for session in pending.sessions:
                    del self._pending_of[session]
                    self._grant(session, epoch, pending.keys, pending.values)

    def revoked(self, epoch: SharedEpoch, node: int, revoke: Revoke) -> None:
        """A key is changed next: no copy of it is used any more, and who waits for it asks for itself."""
        epoch.copies.revoke(revoke.key)
        self._asks.revoked(node, revoke.key)
        epoch.waits.clear()
        for serial in revoke.serials:
            part = self._asks.ended(node, serial)
            if part is not None and isinstance(part.request, rq.Wait):
                self._ask(tuple(part.waiting), epoch, part.request.keys)
        self._asks.put(epoch.number, node, Released(revoke.key))

    def drop(self, session: Session, pending: Pending, epoch: SharedEpoch | None) -> None:
        """A client does not wait any more."""
        pending.sessions.pop(session, None)
        if not pending.sessions:
            if epoch is not None:
                self._not_joinable(pending, epoch)
            self._asks.drop(pending)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _ask(self, waiting: Sequence[Pending], epoch: SharedEpoch, keys: Sequence[bytes]) -> None:
        single = [key for key in keys if epoch.copies.is_changed(key)]
        if single:
            waiting = [one for pending in waiting for one in self._apart(pending)]
        together = [key for key in keys if not epoch.copies.is_changed(key)]
        for node, numbers in epoch.by_owner(enumerate(together)).items():
            request = rq.Wait(tuple(together[number] for number in numbers))
            self._asks.ask(node, request, waiting, epoch=epoch.number, together=True)
        for node, numbers in epoch.by_owner(enumerate(single)).items():
            request = rq.Wait(tuple(single[number] for number in numbers))
            for pending in waiting:
                self._asks.ask(node, request, (pending,), epoch=epoch.number)

    def _apart(self, pending: Pending) -> Iterable[Pending]:
        """One for each of its clients. The parts that are under way are for all of them."""
        if len(pending.sessions) == 1:
            return (pending,)
        apart: list[Pending] = []
        for session in pending.sessions:
            values = dict(pending.values)
            one = Pending(
                {session: None}, pending.request, pending.epoch, pending.keys, dict(pending.parts), [], values
            )
            self._pending_of[session] = one
            apart.append(one)
        for part in pending.parts.values():
            del part.waiting[pending]
            part.waiting.update(dict.fromkeys(apart))
        return apart

    def _grant(self, session: Session, epoch: SharedEpoch, keys: tuple[bytes, ...], values: dict[bytes, bytes]) -> None:
        self.promises[session] = Promise(epoch.copies, keys, values, epoch.copies.revocations)
        self._answer(session, [wire.STOP_WAITING])

    def _not_joinable(self, pending: Pending, epoch: SharedEpoch) -> None:
        if epoch.waits.get(pending.keys) is pending:
            del epoch.waits[pending.keys]
