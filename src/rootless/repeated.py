"""The last few long requests for keys, as they were sent: all ranks of a node ask for the same, one after the other.

One that is known is not read key by key. Called by: `wire.py`; shared by the parsers of one store.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from . import requests as rq

_SHORTEST, _LONGEST = 256, 4 << 20
_REMEMBERED = 4
_U64 = struct.Struct("<Q")
_BEGIN = 1 + _U64.size


@dataclass(frozen=True)
class Known:
    """A request, and its bytes."""

    raw: bytes
    request: rq.Request

    @property
    def size(self) -> int:
        return len(self.raw)


class Repeated:
    """Those that were read last."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        """By how they begin: query type and count."""

    def find(self, buffer: bytearray, at: int) -> Known | None:
        """Which of them it is that begins here, as far as its bytes have come."""
        if not self._known:
            return None
        known = self._known.get(bytes(buffer[at : at + _BEGIN]))
        if known is None:
            return None
        if len(buffer) - at >= known.size:
            return known if buffer.startswith(known.raw, at) else None
        return known if known.raw.startswith(buffer[at:]) else None

    def note(self, code: int, keys: list[bytes], size: int, request: rq.Request) -> None:
        """It was read key by key, and will most often come again. `size`: of all keys."""
        if not _SHORTEST <= size <= _LONGEST:
            return
        begin = bytes((code,)) + _U64.pack(len(keys))
        raw = begin + b"".join([part for key in keys for part in (_U64.pack(len(key)), key)])
        known = self._known.pop(begin, None)
        if known is not None and known.raw == raw:  # it came in pieces too small to be known by
            request = known.request
        self._known[begin] = Known(raw, request)
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
