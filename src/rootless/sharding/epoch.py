"""What a node's store knows of an epoch that it shares with others: who owns which key, and what has passed by.

A key belongs to one of at most 32 nodes, by its hash: the same ones wherever that is worked out, spread over all that
the epoch was opened with. So a node talks to 32 others however many there are, and each of them serves all.

The values that pass by are searched for addresses of gloo's listeners: those that this node's workers are connected
with have all been published, or read, through here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .. import requests as rq
from ..gloo_addresses import listeners_in
from .copies import Copies
from .parts import Pending, values_in

MAX_OWNERS = 32


def owners_among(nodes: Sequence[int]) -> tuple[int, ...]:
    """Which of an epoch's nodes own its keys. `nodes` are the same, in the same order, on all of them."""
    count = len(nodes)
    if count <= MAX_OWNERS:
        return tuple(nodes)
    return tuple(nodes[(2 * index + 1) * count // (2 * MAX_OWNERS)] for index in range(MAX_OWNERS))


@dataclass(eq=False)
class SharedEpoch:
    """One epoch, as the asking side sees it."""

    number: int
    nodes: tuple[int, ...]
    copies: Copies
    failed: bool = False
    last_write_ns: int | None = None
    waits: dict[tuple[bytes, ...], Pending] = field(default_factory=dict)
    """Those that more clients can join, by their keys."""
    listeners: dict[tuple[str, int], None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = owners_among(self.nodes)

    def owner_of(self, key: bytes) -> int:
        return self.owners[zlib.crc32(key) % len(self.owners)]

    def by_owner(self, keys: Iterable[tuple[int, bytes]]) -> dict[int, list[int]]:
        """Numbers of keys by who owns them, in the order in which the owners come up."""
        found: dict[int, list[int]] = {}
        for number, key in keys:
            found.setdefault(self.owner_of(key), []).append(number)
        return found

    def note_listeners(self, values: Iterable[bytes | bytearray | None]) -> None:
        for value in values:
            for listener in () if value is None else listeners_in(value):
                self.listeners[listener] = None

    def observe(self, request: rq.Request, now_ns: int) -> None:
        """A client here asks for this."""
        if isinstance(request, rq.Set | rq.MultiSet | rq.Add | rq.Append | rq.CompareSet):
            self.note_listeners(values_in(request))
            self.last_write_ns = now_ns
