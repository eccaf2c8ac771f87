"""This node's copies of keys that other nodes own, of one epoch.

A key is there as long as nobody changes it after it was first set, which is what a bootstrap does: its owner knows who
has a copy, and has each of them released before it applies a change (`owner.py`). So what is read here is what
the owner has. A large value is known to be there, and read at its owner.

What a WAIT has promised stays readable for its client, after a change and after the epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import wire
from ..room import OVERHEAD, Room

_REVOKED = 10_000
"""So many changed keys are known here, which each client must ask for; of others their owner says so."""
_REMEMBERED_BYTES = 4 << 10
_REPLIES, _LARGEST_REPLY = 4, 4 << 20
_WHOLE = 64
"""Answers to reads of so many keys are kept whole: the ranks of a node read the same."""


class Copies:
    """The copies of one epoch."""

    def __init__(self, epoch: int, room: Room) -> None:
        self.epoch = epoch
        self.revocations = 0
        self._room = room
        self._held = 0
        self._values: dict[bytes, bytes | None] = {}
        self._revoked: OrderedDict[bytes, tuple[int, bytes | None]] = OrderedDict()
        """When, and what it was until then."""
        self._replies: OrderedDict[tuple[bytes, ...], bytes] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def keep(self, key: bytes, value: bytes | None) -> None:
        """The owner has given a copy. A value that there is no room for is read there."""
        if self._values.get(key) is not None:
            return
        self.drop(key)
        if value is not None and not self._room.has(_size(key, value)):
            value = None
        self._charge(_size(key, value))
        self._values[key] = value

    def drop(self, key: bytes) -> bytes | None:
        """It is not copied, and may be."""
        self._revoked.pop(key, None)
        if key not in self._values:
            return None
        value = self._values.pop(key)
        self._charge(-_size(key, value))
        return value

    def revoke(self, key: bytes) -> None:
        """From now on it is asked for, but by whom it was promised to before."""
        self.revocations += 1
        self._replies.clear()
        value = self.drop(key)
        small = value is not None and len(value) <= _REMEMBERED_BYTES
        self._revoked[key] = self.revocations, value if small else None
        if len(self._revoked) > _REVOKED:
            self._revoked.popitem(last=False)

    def is_changed(self, key: bytes) -> bool:
        """Whether it was revoked; no harm is done if that is not known any more."""
        return key in self._revoked

    def find(self, key: bytes, promise: Promise | None) -> bytes | None:
        """Its value, if it can be read here."""
        value = self._values.get(key)
        if value is not None or promise is None:
            return value
        if key in promise.values:
            return promise.values[key]
        at, value = self._revoked.get(key, (0, None))
        return value if at > promise.at and promise.is_of(key) else None

    def reply(self, keys: Sequence[bytes], promise: Promise | None) -> list[bytes] | None:
        """The values of all these, as their client gets them; None if one of them must be asked for."""
        whole = tuple(keys) if len(keys) >= _WHOLE else ()
        if whole in self._replies:
            return [self._replies[whole]]
        values: list[bytes] = []
        alive = True
        for key in keys:
            value = self.find(key, promise)
            if value is None:
                return None
            alive = alive and key in self._values
            values.append(value)
        reply = wire.encode_blobs(values)
        if not whole or not alive or sum(map(len, reply)) > _LARGEST_REPLY:
            return reply
        self._replies[whole] = b"".join(reply)
        if len(self._replies) > _REPLIES:
            self._replies.popitem(last=False)
        return [self._replies[whole]]

    def close(self) -> None:
        """The epoch has gone. Whoever still has a promise reads on."""
        self._charge(-self._held)

    def _charge(self, size: int) -> None:
        self._room.hold(size)
        self._held += size


def _size(key: bytes, value: bytes | None) -> int:
    return len(key) + OVERHEAD + (0 if value is None else len(value))


@dataclass(eq=False)
class Promise:
    """What the last WAIT of a client has granted it."""

    copies: Copies
    keys: tuple[bytes, ...]
    values: dict[bytes, bytes] = field(default_factory=dict)
    """Of keys that there is no copy of."""
    at: int = 0
    """How many copies had been revoked by then."""
    _keys: frozenset[bytes] | None = None

    def is_of(self, key: bytes) -> bool:
        if self._keys is None:
            self._keys = frozenset(self.keys)
        return key in self._keys
