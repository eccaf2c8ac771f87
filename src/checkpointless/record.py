"""A rank's own record: what only this rank knows (its random generators, buffers, data position), in a file in memory.

The file belongs to the node, not to the process: SIGKILL does not take it away, and the process that replaces the
rank on the same node reads it. Three slots hold the notes of the last steps; a slot that was being written when the
process died fails its checksum and is passed over, the other two are whole.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

_MAGIC = b"HPRECRD1"
_HEADER = struct.Struct("<8sQQQI")  # magic, sequence, step, length, checksum
_SLOTS = 3
_SLOT_BYTES = 1 << 30
"""Distance of the slots in the file; it is sparse, only what is written takes memory."""


class RankRecord:
    """The record of one rank, open for writing. Not for more than one process at a time."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        found = _read_slots(self._fd)
        self._steps: list[int | None] = [slot[1] if slot else None for slot in found]
        self._last: tuple[bytes, int] = (b"", 0)
        """The last payload, and its checksum."""
        self._sequence = max((slot[0] for slot in found if slot), default=0)

    def write(self, step: int, payload: bytes, keep: tuple[int, ...] = ()) -> None:
        """Records the note of `step`, over an older note of it or else over one whose step is not in `keep`.

        Raises ValueError when the note is larger than a slot, OSError when memory is full.
        """
        if len(payload) > _SLOT_BYTES - _HEADER.size:
            raise ValueError(f"a note of {len(payload)} bytes does not fit into the record")
        slot = self._choose(step, keep)
        self._sequence += 1
        self._steps[slot] = step
        if payload is not self._last[0]:
            self._last = (payload, zlib.crc32(payload))
        header = _HEADER.pack(_MAGIC, self._sequence, step, len(payload), self._last[1])
        os.pwritev(self._fd, [header, payload], slot * _SLOT_BYTES)

    def close(self) -> None:
        os.close(self._fd)

    def _choose(self, step: int, keep: tuple[int, ...]) -> int:
        if step in self._steps:
            return self._steps.index(step)
        if None in self._steps:
            return self._steps.index(None)
        free = [slot for slot in range(_SLOTS) if self._steps[slot] not in keep]
        # A later step than the present one is left over from before a rollback: it goes first.
        return max(free or range(_SLOTS), key=lambda slot: abs((self._steps[slot] or 0) - step))


def read_record(path: Path, step: int) -> bytes | None:
    """The newest whole note of `step` in the record of a rank; None when there is none."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            notes = [slot for slot in _read_slots(fd) if slot and slot[1] == step]
        finally:
            os.close(fd)
        if notes:
            return max(notes)[2]
    return None


def _read_slots(fd: int) -> list[tuple[int, int, bytes] | None]:
    """(sequence, step, payload) of every slot that is whole."""
    found: list[tuple[int, int, bytes] | None] = []
    for slot in range(_SLOTS):
        found.append(None)
        header = os.pread(fd, _HEADER.size, slot * _SLOT_BYTES)
        if len(header) < _HEADER.size:
            continue
        magic, sequence, step, length, checksum = _HEADER.unpack(header)
        if magic != _MAGIC or length > _SLOT_BYTES - _HEADER.size:
            continue
        payload = os.pread(fd, length, slot * _SLOT_BYTES + _HEADER.size)
        if len(payload) == length and zlib.crc32(payload) == checksum:
            found[slot] = (sequence, step, payload)
    return found
