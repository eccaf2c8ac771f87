"""What keys hold, as the answer to a wait brings it along."""

from __future__ import annotations

from collections.abc import Sequence

from ..keyspace import Keyspace


def values_of(
    keyspace: Keyspace, epoch: int, keys: Sequence[bytes], room: int, largest: int
) -> tuple[bytes | None, ...]:
    """What keys hold; None for a queue, and for what is too large to come along with others."""
    found: list[bytes | None] = []
    for key in keys:
        held = keyspace.value(epoch, key)
        if held is not None and len(held) <= min(room, largest):
            room -= len(held)
            found.append(bytes(held))
        else:
            found.append(None)
    return tuple(found)
