"""The keys of one epoch, and who waits for them.

Owns values, queues, barrier counts and the tables of waiters of one epoch. It knows nothing of other
epochs, of connections or of the wire. Only `keyspace.py` uses it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .room import OVERHEAD, Room

EpochKey = tuple[int, bytes]
"""An epoch and a key inside it."""

_OF_AN_EPOCH = 1 << 10
"""Bytes that the tables of an epoch cost."""
_ANSWERS = 2
_DECIMAL = re.compile(rb"\s*[+-]?[0-9]{1,19}")


@dataclass(eq=False, slots=True)
class Session:
    """One connection, as the keyspace sees it."""

    epoch: int  # current when the connection was opened: where its bare keys live
    named: int | None = None  # the epoch it named last, if its keys name epochs
    waiter: Waiter | None = None
    cancel_unasked: bool = False  # the last answer was a cancel that the client had not asked for
    granted: tuple[EpochKey, ...] = ()  # what its last WAIT promised
    kept: dict[EpochKey, bytes | bytearray] = field(default_factory=dict)  # promised, of an epoch that has gone


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the keys of one request are."""

    places: tuple[EpochKey, ...]
    epoch: int | None
    """Of all of them; None: of several epochs."""
    keys: tuple[bytes, ...]
    """Inside their epochs."""
    named: int | None
    """The epoch that the last of them to name one has named."""


@dataclass(eq=False, slots=True)
class Waiter:
    """One WAIT or BARRIER that has no answer yet."""

    session: Session
    places: tuple[EpochKey, ...]
    missing: set[EpochKey]
    barrier: bool = False
    cost: int = 0  # what the store's room has been told of


Waiters = dict[bytes, dict[Waiter, None]]


class Namespace:
    """One epoch's part of the store."""

    def __init__(self, epoch: int, room: Room) -> None:
        """Raises WireError if there is no room for it."""
        self._room = room
        self._held = 0
        self._charge(_OF_AN_EPOCH)
        self.epoch = epoch
        self.cancelled = False
        self.last_write_ns: int | None = None
        self.values: dict[bytes, bytes | bytearray] = {}
        self._answers: dict[tuple[bytes, ...], bytes] = {}
        """To reads of many keys, as long as nothing changes: the ranks of a node read the same."""
        self.queues: dict[bytes, deque[bytes]] = {}
        self.waiting: Waiters = {}
        self.arrived: Waiters = {}

    def _charge(self, size: int) -> None:
        """Raises WireError, before anything has changed, if there is no room for so much more."""
        self._room.take(size)
        self._held += size

    def free(self) -> None:
        """The epoch has gone, with all it held."""
        self._answers.clear()
        self._room.give(self._held)
        self._held = 0

    def answer(self, keys: tuple[bytes, ...]) -> bytes | None:
        """To a read of these, if it is known."""
        return self._answers.get(keys)

    def note_answer(self, keys: tuple[bytes, ...], answer: bytes) -> None:
        """Who reads these next is answered alike."""
        if len(self._answers) >= _ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._answers[keys] = answer

    def put(self, key: bytes, value: bytes) -> None:
        """Give a key a value."""
        if self._answers:
            self._answers.clear()
        held = self.values.get(key)
        self._charge(len(value) - len(held) if held is not None else len(key) + len(value) + OVERHEAD)
        self.values[key] = value

    def remove(self, key: bytes) -> bool:
        """Forget a key; whether it had a value."""
        self._answers.clear()
        held = self.values.pop(key, None)
        if held is None:
            return False
        self._charge(-(len(key) + len(held) + OVERHEAD))
        return True

    def has(self, key: bytes) -> bool:
        """A key is there if it has a value or is a queue that is not empty."""
        return key in self.values or key in self.queues

    def add(self, key: bytes, delta: int) -> int:
        """Add to a decimal counter; the sum wraps at 64 bits. Raises ValueError if the value is no number."""
        value = self.values.get(key, b"0")
        number = _DECIMAL.match(value)
        if number is None:
            raise ValueError(f"{key[:80]!r} holds a value that is not a number")
        total = (int(number[0]) + delta + (1 << 63)) % (1 << 64) - (1 << 63)
        self.put(key, b"%d" % total)
        return total

    def append(self, key: bytes, value: bytes) -> None:
        """Grow a value in place."""
        held = self.values.get(key)
        if held is None:
            self.put(key, value)
            return
        self._answers.clear()
        self._charge(len(value))
        if isinstance(held, bytearray):
            held += value
        else:
            self.values[key] = bytearray(held) + value

    def push(self, key: bytes, value: bytes) -> None:
        """Add an element to the end of a queue."""
        self._charge(len(value) + OVERHEAD + (0 if key in self.queues else len(key)))
        self.queues.setdefault(key, deque()).append(value)

    def pop(self, key: bytes) -> tuple[int, bytes]:
        """How many elements there were, and the first of them; 0 if it was empty."""
        queue = self.queues.get(key)
        if queue is None:
            return 0, b""
        count, value = len(queue), queue.popleft()
        if not queue:
            del self.queues[key]
        self._charge(-(len(value) + OVERHEAD + (0 if queue else len(key))))
        return count, value

    def enlist(self, key: bytes, waiter: Waiter) -> None:
        """Add a waiter for one key."""
        table = self.arrived if waiter.barrier else self.waiting
        table.setdefault(key, {})[waiter] = None

    def strike(self, key: bytes, waiter: Waiter) -> None:
        """Take a waiter off one key, if it is there."""
        table = self.arrived if waiter.barrier else self.waiting
        row = table.get(key, {})
        row.pop(waiter, None)
        if not row:
            table.pop(key, None)

    def blocked(self) -> Iterator[Waiter]:
        """Everyone who waits for something of this epoch, once for each key."""
        return (waiter for table in (self.waiting, self.arrived) for row in table.values() for waiter in row)
