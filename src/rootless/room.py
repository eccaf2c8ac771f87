"""How much memory a store may hold: keys, values, waits and requests that are not complete, all together.

Called by: `namespace.py` and `waits.py` for what is kept, `connection.py` for what is on its way, `sharding/` for
copies of other nodes' keys and messages that are not acknowledged.
"""

from __future__ import annotations

from . import wire

OVERHEAD = 128
"""Bytes that a key, an element or a wait costs beside its own."""


class Room:
    """Counts bytes against a limit."""

    def __init__(self, limit: int = wire.Limits().store) -> None:
        self._limit = limit
        self.held = 0

    def has(self, size: int) -> bool:
        """Whether so many bytes more are within the limit."""
        return self.held + size <= self._limit

    def take(self, size: int) -> None:
        """Holds so many bytes more. Raises WireError if that is over the limit: whoever asks for them is refused."""
        if size > 0 and not self.has(size):
            raise wire.WireError(
                f"{size} bytes more than the {self.held} that the store holds are over its limit of {self._limit}"
            )
        self.held += size

    def hold(self, size: int) -> None:
        """Holds what must be held, whatever the limit: until it is free again, others are refused sooner."""
        self.held += size

    def give(self, size: int) -> None:
        """So many bytes are free again."""
        self.held -= size
