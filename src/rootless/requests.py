"""What a TCPStore client can ask for, as values.

Owns the nineteen request types and nothing else: no bytes, no store. `wire.py` makes them, `keyspace.py`
answers them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Validate:
    """First request of every connection, and only the first."""


@dataclass(frozen=True, slots=True)
class Set:
    """Give a key a value."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class CompareSet:
    """Give a key a value if it has the expected one; an absent key matches an empty expectation."""

    key: bytes
    expected: bytes
    desired: bytes


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key now; the torch client has always waited for it just before."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """Add to a decimal counter, absent is 0."""

    key: bytes
    delta: int


@dataclass(frozen=True, slots=True)
class Check:
    """Are all of these present?"""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Answer when all of these are present."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NumKeys:
    """How many keys?"""


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Forget a key."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Append:
    """Add bytes to the end of a value, absent is empty."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class MultiGet:
    """Several `Get` in one."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class MultiSet:
    """Several `Set` in one."""

    items: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class CancelWait:
    """The client's own deadline passed while it waited."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Send this number back."""

    nonce: int


@dataclass(frozen=True, slots=True)
class QueuePush:
    """Add an element to the end of a queue."""

    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class QueuePop:
    """Take the first element; a client that wants to block has sent a `Wait` for the queue before."""

    key: bytes


@dataclass(frozen=True, slots=True)
class QueueLen:
    """How many elements?"""

    key: bytes


@dataclass(frozen=True, slots=True)
class ListKeys:
    """Which keys?"""


@dataclass(frozen=True, slots=True)
class Barrier:
    """Count this arrival and answer when `world_size` have arrived."""

    key: bytes
    world_size: int


Request = (
    Validate | Set | CompareSet | Get | Add | Check | Wait | NumKeys | DeleteKey | Append | MultiGet
    | MultiSet | CancelWait | Ping | QueuePush | QueuePop | QueueLen | ListKeys | Barrier
)  # fmt: skip
