"""A rank's own record: what only this rank knows (its random generators, buffers, data position), in a file in memory.

The file belongs to the node, not to the process: SIGKILL does not take it away, and the process that replaces the
rank on the same node reads it. A note holds from its step on until there is a newer one, but not beyond the step that
the record says it reaches; so where nothing that is noted here changes, a step costs one word.

Slots hold the last few notes. A slot is a small header that names the area of the file its note is in. There is one
area more than slots, so a note is written where no header points to, and counts once its header does. A header that was
being written when the process died fails its checksum; then notes are believed of their very step only.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import xxhash

_MAGIC = b"HPRECRD4"
_FIELDS = struct.Struct("<8sQQQQI")  # magic, sequence, first step, area, length and checksum of the note
_CHECK = struct.Struct("<I")  # of the fields
_HEADER_BYTES = _FIELDS.size + _CHECK.size
_SLOTS = 4
"""For the two points that can be gone back to, for the step that is noted, and one to be written."""
_ALL_SLOTS = tuple(range(_SLOTS))
_SLOT_BYTES = 64
_REACH = _SLOTS * _SLOT_BYTES
"""Where the word is that says how far the notes reach: the last step, plus one."""
_FORWARD = _REACH + 8
"""And where the step is, plus one, whose first forward pass has found the generators as the step had."""
_AREAS = _SLOTS + 1
_AREAS_BEGIN = 4096
_AREA_BYTES = 1 << 30
"""Distance of the areas in the file; it is sparse, only what is written takes memory."""
_MAPPED_BYTES = 64 << 10
"""Notes up to this size are written without a call to the kernel."""


@dataclass(frozen=True)
class _Slot:
    """What a whole slot holds."""

    sequence: int
    since: int
    area: int
    payload: bytes


class RankRecord:
    """The record of one rank, open for writing. Not for more than one process at a time."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._fd, 0, _AREAS_BEGIN)  # or a header could meet a full disk, as SIGBUS
        except OSError:
            os.close(self._fd)
            raise
        self._memory = mmap.mmap(self._fd, _AREAS_BEGIN)
        """Of the headers: in the midst of a step a call to the kernel takes 15 us."""
        self._words = memoryview(self._memory).cast("Q")
        self._mapped: dict[int, mmap.mmap] = {}
        """The beginning of each area, where small notes are written."""
        found = _read_slots(self._fd)
        self._since = [slot.since if slot else -1 for slot in found]
        self._sequences = [slot.sequence if slot else 0 for slot in found]
        self._areas = [slot.area if slot else -1 for slot in found]
        self._sequence = max(self._sequences)
        self._last: tuple[bytes, int, int] = (b"", 0, -1)
        """The last note, its checksum, and the area it is in."""

    def write(self, step: int, payload: bytes, keep: tuple[int, ...] = ()) -> None:
        """Records a note that holds from `step` on. What was noted of the steps in `keep`, and of `step`, stays.

        The very object that was written last is not written again. Raises ValueError when the note is larger than an
        area, OSError when memory is full.
        """
        if len(payload) > _AREA_BYTES:
            raise ValueError(f"a note of {len(payload)} bytes does not fit into the record")
        slot = self._choose([self._slot_of(kept) for kept in (*keep, step)])
        if payload is not self._last[0] or self._last[2] not in self._areas:
            self._write_note(payload)
        _, checksum, area = self._last
        self._sequence = sequence = self._sequence + 1
        fields = _FIELDS.pack(_MAGIC, sequence, step, area, len(payload), checksum)
        begin = slot * _SLOT_BYTES
        self._memory[begin : begin + _HEADER_BYTES] = fields + _CHECK.pack(zlib.crc32(fields))
        self._since[slot], self._sequences[slot], self._areas[slot] = step, sequence, area
        self.reach(step)

    def reach(self, step: int) -> None:
        """What was noted last holds for `step`, too, and nothing is noted beyond."""
        self._words[_REACH // 8] = step + 1

    def forward(self, step: int) -> None:
        """The first forward pass of `step` begins with the generators that the step began with."""
        self._words[_FORWARD // 8] = step + 1

    def close(self) -> None:
        self._words.release()
        for memory in (self._memory, *self._mapped.values()):
            memory.close()
        os.close(self._fd)

    def _slot_of(self, step: int) -> int:
        """Where the note is that holds for `step`; -1: there is none."""
        best, newest = -1, -1
        for slot in _ALL_SLOTS:
            if 0 <= self._since[slot] <= step and self._sequences[slot] > newest:
                best, newest = slot, self._sequences[slot]
        return best

    def _choose(self, kept: list[int]) -> int:
        """The slot with the oldest note of those that are not kept."""
        best, oldest = -1, self._sequence + 1
        for slot in _ALL_SLOTS:
            if self._sequences[slot] < oldest and slot not in kept:
                best, oldest = slot, self._sequences[slot]
        return best

    def _write_note(self, payload: bytes) -> None:
        """Into an area that no slot's note is in."""
        area = next(number for number in range(_AREAS) if number not in self._areas)
        self._last = (b"", 0, -1)
        if len(payload) <= _MAPPED_BYTES:
            self._mapped_area(area)[: len(payload)] = payload
        else:
            written = os.pwrite(self._fd, payload, _begin_of(area))
            if written != len(payload):
                raise OSError(errno.ENOSPC, f"only {written} of {len(payload)} bytes of a note could be written")
        self._last = (payload, _checksum(payload), area)

    def _mapped_area(self, area: int) -> mmap.mmap:
        mapped = self._mapped.get(area)
        if mapped is None:
            os.posix_fallocate(self._fd, _begin_of(area), _MAPPED_BYTES)
            mapped = self._mapped[area] = mmap.mmap(self._fd, _MAPPED_BYTES, offset=_begin_of(area))
        return mapped


def read_record(path: Path, step: int) -> bytes | None:
    """What holds for `step` in the record of a rank; None when nothing is known to."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found, damaged = _read_slots(fd), _is_damaged(fd)
            reach = int.from_bytes(os.pread(fd, 8, _REACH), sys.byteorder)
        finally:
            os.close(fd)
        slots = [slot for slot in found if slot and (slot.since == step or (slot.since < step and not damaged))]
        if slots and step < reach:
            return max(slots, key=lambda slot: slot.sequence).payload
    return None


def read_reach(path: Path) -> int:
    """The last step that the notes of a rank's record hold for; -1: none."""
    with contextlib.suppress(FileNotFoundError):
        return int.from_bytes(_pread(path, 8, _REACH), sys.byteorder) - 1
    return -1


def read_forward(path: Path) -> int | None:
    """The step whose first forward pass has last been seen to find the generators as the step had; None: unknown."""
    with contextlib.suppress(FileNotFoundError):
        step = int.from_bytes(_pread(path, 8, _FORWARD), sys.byteorder) - 1
        return step if step >= 0 else None
    return None


def _pread(path: Path, length: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def _begin_of(area: int) -> int:
    """Its place in the file."""
    return _AREAS_BEGIN + area * _AREA_BYTES


def _checksum(payload: bytes) -> int:
    """Of a note, 32 bits."""
    return xxhash.xxh32_intdigest(payload)


def _read_slots(fd: int) -> list[_Slot | None]:
    """Every slot that is whole."""
    return [_read_slot(fd, number) for number in range(_SLOTS)]


def _is_damaged(fd: int) -> bool:
    """Whether a slot has been written that is not whole: what it held is not known."""
    return any(
        _read_slot(fd, number) is None and any(os.pread(fd, _HEADER_BYTES, number * _SLOT_BYTES))
        for number in range(_SLOTS)
    )


def _read_slot(fd: int, number: int) -> _Slot | None:
    header = os.pread(fd, _HEADER_BYTES, number * _SLOT_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    fields = header[: _FIELDS.size]
    magic, sequence, since, area, length, checksum = _FIELDS.unpack(fields)
    if (zlib.crc32(fields),) != _CHECK.unpack_from(header, _FIELDS.size) or magic != _MAGIC:
        return None
    if area >= _AREAS or length > _AREA_BYTES:
        return None
    payload = os.pread(fd, length, _begin_of(area))
    if len(payload) != length or _checksum(payload) != checksum:
        return None
    return _Slot(sequence, since, area, payload)
