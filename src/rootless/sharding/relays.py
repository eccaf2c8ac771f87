"""Answers that nodes pass on to each other, because many wait for the same: an owner sends each of them a few times.

Where all wait when the answer is there, it goes down a tree of them; who comes later gets it from one who came before.
It is kept for the epoch by whoever has it, which the copies of the same values are, too. What comes this way can be
older than what the owner says itself: `Asks.revoked` keeps that from becoming a copy. Called by: `shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..shard_messages import Answer, Item, PassOn, Relay

BRANCHES = 4
"""Each passes it on to so many at once, and to so many who come later."""

Put = Callable[[int, int, Item], None]
"""(epoch, node, what it is told)."""
_Values = tuple[bytes | None, ...]


class Relays:
    """What this node has, or is to have, for others."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self._kept: dict[int, dict[int, tuple[int, bytes, _Values]]] = {}
        """By epoch and serial: the owner, and its answer."""
        self._wanted: dict[int, dict[int, list[tuple[int, int]]]] = {}

    def answered(self, epoch: int, owner: int, answer: Answer) -> None:
        """An answer that others may get from here has come."""
        self._kept.setdefault(epoch, {})[answer.serial] = owner, answer.reply, answer.values
        for target in self._wanted.get(epoch, {}).pop(answer.serial, ()):
            self._put(epoch, target[0], Relay(owner, (target,), answer.reply, answer.values))

    def take(self, epoch: int, relay: Relay) -> Answer:
        """The answer for this node; the others get theirs."""
        (_, serial), rest = relay.targets[0], relay.targets[1:]
        for onward in branches(relay.owner, rest, relay.reply, relay.values):
            self._put(epoch, onward.targets[0][0], onward)
        answer = Answer(serial, relay.reply, relay.values)
        self.answered(epoch, relay.owner, answer)
        return answer

    def pass_on(self, epoch: int, owner: int, order: PassOn) -> None:
        """One more waits for what this node has asked."""
        target = order.node, order.asked
        kept = self._kept.get(epoch, {}).get(order.serial)
        if kept is None:
            self._wanted.setdefault(epoch, {}).setdefault(order.serial, []).append(target)
        elif kept[0] == owner:
            self._put(epoch, order.node, Relay(owner, (target,), kept[1], kept[2]))

    def advance(self, epoch: int) -> None:
        """Older epochs have gone."""
        for table in (self._kept, self._wanted):
            for old in [old for old in table if old < epoch]:
                del table[old]

    def close(self) -> None:
        self._kept.clear()
        self._wanted.clear()


def branches(owner: int, targets: tuple[tuple[int, int], ...], reply: bytes, values: _Values) -> list[Relay]:
    """An answer to many nodes, for those who get it next: each its part, itself first."""
    step = max(-(-len(targets) // BRANCHES), 1)
    return [Relay(owner, targets[first : first + step], reply, values) for first in range(0, len(targets), step)]
