"""What this node has asked of owners and not heard of yet, by serial.

An answer is taken from whom was asked only, and once. Called by: `shards.py`, `waits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import requests as rq
from ..shard_messages import Answer, Ask, Forget, Item, Join, Shared
from .parts import Part, Pending, check_answer, digest_of

_LONG = 1 << 10
"""Bytes of keys: so many are not said by every node."""

Put = Callable[[int, int, Item], None]
"""(epoch, node, what it is told)."""


class Asks:
    """The table of parts."""

    def __init__(self, put: Put) -> None:
        self.put = put
        self._serial = 0
        self._parts: dict[int, Part] = {}
        self._together: dict[int, Part] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def waits_for(self, node: int) -> bool:
        """Whether an answer of this node is to come."""
        return any(part.node == node for part in self._parts.values())

    def ask(
        self,
        node: int,
        request: Shared,
        waiting: Iterable[Pending],
        *,
        epoch: int,
        indices: Sequence[int] = (),
        together: bool = False,
    ) -> None:
        """Asks an owner, for these."""
        self._serial += 1
        part = self._parts[self._serial] = Part(self._serial, node, request, together, indices)
        for pending in waiting:
            part.waiting[pending] = None
            pending.parts[part.serial] = part
        if together:
            self._together[part.serial] = part
        if together and isinstance(request, rq.Wait) and sum(map(len, request.keys)) > _LONG:
            self.put(epoch, node, Join(part.serial, digest_of(request.keys)))
        else:
            self.put(epoch, node, Ask(part.serial, request, together))

    def tell(self, epoch: int, node: int, serial: int) -> None:
        """An owner wants to know the keys of a digest."""
        part = self._parts.get(serial)
        if part is not None and part.node == node:
            self.put(epoch, node, Ask(serial, part.request, part.together))

    def revoked(self, node: int, key: bytes) -> None:
        """What is under way may be by way of others, and older than this."""
        for part in self._together.values():
            if part.node == node:
                part.revoked.add(key)

    def answered(self, node: int, answer: Answer) -> Part | None:
        """What a node was asked; None if it was not, or nobody waits any more. Raises WireError if it does not fit."""
        part = self._parts.get(answer.serial)
        if part is None or part.node != node:
            return None
        if not answer.refused:
            check_answer(part.request, answer)
        return self._end(part)

    def ended(self, node: int, serial: int) -> Part | None:
        """An ask that gets no answer."""
        part = self._parts.get(serial)
        return None if part is None or part.node != node or not part.together else self._end(part)

    def drop(self, pending: Pending) -> None:
        """It waits for no answer any more. What nobody waits for is forgotten there."""
        for part in pending.parts.values():
            del part.waiting[pending]
            if not part.waiting:
                del self._parts[part.serial]
                self._together.pop(part.serial, None)
                self.put(pending.epoch, part.node, Forget(part.serial))
        pending.parts.clear()

    def _end(self, part: Part) -> Part:
        del self._parts[part.serial]
        self._together.pop(part.serial, None)
        for pending in part.waiting:
            del pending.parts[part.serial]
        return part
