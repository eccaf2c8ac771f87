"""What a TCPStore client can ask for, as values.

Owns the nineteen request types and nothing else: no bytes, no store. `wire.py` makes them, `keyspace.py`
answers them.
"""

from __future__ import annotations

import msgspec


class Validate(msgspec.Struct, frozen=True, tag=True):
    """First request of every connection, and only the first."""


class Set(msgspec.Struct, frozen=True, tag=True):
    """Give a key a value."""

    key: bytes
    value: bytes


class CompareSet(msgspec.Struct, frozen=True, tag=True):
    """Give a key a value if it has the expected one; an absent key matches an empty expectation."""

    key: bytes
    expected: bytes
    desired: bytes


class Get(msgspec.Struct, frozen=True, tag=True):
    """Read a key now; the torch client has always waited for it just before."""

    key: bytes


class Add(msgspec.Struct, frozen=True, tag=True):
    """Add to a decimal counter, absent is 0."""

    key: bytes
    delta: int


class Check(msgspec.Struct, frozen=True, tag=True):
    """Are all of these present?"""

    keys: tuple[bytes, ...]


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Answer when all of these are present."""

    keys: tuple[bytes, ...]


class NumKeys(msgspec.Struct, frozen=True, tag=True):
    """How many keys?"""


class DeleteKey(msgspec.Struct, frozen=True, tag=True):
    """Forget a key."""

    key: bytes


class Append(msgspec.Struct, frozen=True, tag=True):
    """Add bytes to the end of a value, absent is empty."""

    key: bytes
    value: bytes


class MultiGet(msgspec.Struct, frozen=True, tag=True):
    """Several `Get` in one."""

    keys: tuple[bytes, ...]


class MultiSet(msgspec.Struct, frozen=True, tag=True):
    """Several `Set` in one."""

    items: tuple[tuple[bytes, bytes], ...]


class CancelWait(msgspec.Struct, frozen=True, tag=True):
    """The client's own deadline passed while it waited."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Send this number back."""

    nonce: int


class QueuePush(msgspec.Struct, frozen=True, tag=True):
    """Add an element to the end of a queue."""

    key: bytes
    value: bytes


class QueuePop(msgspec.Struct, frozen=True, tag=True):
    """Take the first element; a client that wants to block has sent a `Wait` for the queue before."""

    key: bytes


class QueueLen(msgspec.Struct, frozen=True, tag=True):
    """How many elements?"""

    key: bytes


class ListKeys(msgspec.Struct, frozen=True, tag=True):
    """Which keys?"""


class Barrier(msgspec.Struct, frozen=True, tag=True):
    """Count this arrival and answer when `world_size` have arrived."""

    key: bytes
    world_size: int


Request = (
    Validate | Set | CompareSet | Get | Add | Check | Wait | NumKeys | DeleteKey | Append | MultiGet
    | MultiSet | CancelWait | Ping | QueuePush | QueuePop | QueueLen | ListKeys | Barrier
)  # fmt: skip
