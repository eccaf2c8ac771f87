"""A rank's buffers on a GPU, as each step finds them, in a file in memory that outlives the process.

What `record.py` is for what the host knows. The host must not wait for the device in every step, so it never sees the
bytes: the device copies them into the file's memory itself, in the order of the stream on which forward and backward
run. A gradient is behind them in that order; once another rank can have it, the buffers are in the file.

The file: a description, then two slots for each of the last steps, used in turn. A slot is two numbers and the
bytes. The numbers, sequence and step plus one, are zero while the bytes are being copied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...protocol.values import EncodingError, decode, encode
from ..state.provider import dtype_name

_MAGIC = b"HPDEVBF1"
_HEAD = struct.Struct("<8sQ")
"""Magic and length of the description."""
_STEPS = 4
"""The last three steps can be asked for."""
_SLOTS = 2 * _STEPS
"""A step may be noted many times; one note of it is always whole."""
_NUMBERS_BYTES = 16
"""At the beginning of a slot, and what everything in it is aligned to."""


@dataclass(frozen=True)
class _Layout:
    """Where everything is. `places`: by name, dtype, shape and first byte in a slot."""

    places: dict[str, tuple[str, tuple[int, ...], int]]
    slot_bytes: int

    @staticmethod
    def of(buffers: Mapping[str, torch.Tensor]) -> _Layout:
        places, at = {}, _NUMBERS_BYTES
        for name, buffer in buffers.items():
            places[name] = (dtype_name(buffer), tuple(buffer.shape), at)
            at += -(-buffer.nbytes // _NUMBERS_BYTES) * _NUMBERS_BYTES
        return _Layout(places, _pages(at))

    @staticmethod
    def read(data: bytes | bytearray) -> _Layout | None:
        """That of a file; None for one that is not whole."""
        try:
            magic, length = _HEAD.unpack_from(data)
            places, slot_bytes = decode(bytes(data[_HEAD.size : _HEAD.size + length]))
        except (struct.error, EncodingError, TypeError, ValueError):
            return None
        layout = _Layout(places, slot_bytes)
        return layout if magic == _MAGIC and len(data) == layout.file_bytes else None

    @cached_property
    def head(self) -> bytes:
        """The file's beginning."""
        description = encode((self.places, self.slot_bytes))
        return _HEAD.pack(_MAGIC, len(description)) + description

    @property
    def slots_begin(self) -> int:
        return _pages(len(self.head))

    @property
    def file_bytes(self) -> int:
        return self.slots_begin + _SLOTS * self.slot_bytes

    def slots(self, file: torch.Tensor) -> torch.Tensor:
        """uint8 of shape (slots, bytes of a slot), from a file's bytes."""
        return file[self.slots_begin :].view(_SLOTS, self.slot_bytes)

    def view(self, slot: torch.Tensor, name: str) -> torch.Tensor:
        """A buffer's place in the bytes of a slot."""
        dtype, shape, at = self.places[name]
        kind: torch.dtype = getattr(torch, dtype)
        nbytes = torch.Size(shape).numel() * kind.itemsize
        return slot[at : at + nbytes].view(kind).view(shape)


class DeviceRecord:
    """Open for writing. Not for more than one process at a time."""

    def __init__(self, path: Path, buffers: Mapping[str, torch.Tensor]) -> None:
        """`buffers`: of one device. Raises OSError when memory is full, or cannot be shared with the device."""
        self._layout = _Layout.of(buffers)
        self._device = next(iter(buffers.values())).device
        fd = _open(path, self._layout)
        try:
            self._memory = mmap.mmap(fd, self._layout.file_bytes)
        finally:
            os.close(fd)
        self._file = torch.frombuffer(self._memory, dtype=torch.uint8)
        if self._device.type == "cuda":
            _share_with_device(self._file)
        self._slots = self._layout.slots(self._file)
        self._sequence = max(sequence for sequence, _ in _numbers(self._slots))
        self._staging = torch.zeros(self._layout.slot_bytes, dtype=torch.uint8, device=self._device)
        self._nothing = torch.zeros(_NUMBERS_BYTES, dtype=torch.uint8, device=self._device)
        self._copies = self._by_dtype(buffers)
        self._last: Any = None
        """The event after the last note: the next one, on whatever stream, uses the staging again."""

    def note(self, step: int) -> None:
        """Has the buffers copied as they are at this point of the current stream; waits for nothing."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # what a graph repeats would be this very step
        self._sequence += 1
        slot = self._slots[step % _STEPS * 2 + self._sequence % 2]
        end = _NUMBERS_BYTES
        with torch.no_grad(), self._in_order():
            numbers = self._staging[:end].view(torch.int64)
            numbers[0].fill_(self._sequence)
            numbers[1].fill_(step + 1)
            for places, buffers in self._copies:
                torch._foreach_copy_(places, buffers)
            slot[:end].copy_(self._nothing, non_blocking=True)
            slot[end:].copy_(self._staging[end:], non_blocking=True)
            slot[:end].copy_(self._staging[:end], non_blocking=True)

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._file.data_ptr())

    def _by_dtype(self, buffers: Mapping[str, torch.Tensor]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """(places in the staging, buffers), of one dtype each, which one kernel copies."""
        groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        for name, buffer in buffers.items():
            places, sources = groups[buffer.dtype]
            places.append(self._layout.view(self._staging, name))
            sources.append(buffer.detach())
        return list(groups.values())

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """After the note before."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            yield
            self._last = stream.record_event(self._last)


def read_device_record(path: Path, step: int) -> dict[str, torch.Tensor]:
    """The buffers that `step` found, on the CPU; empty when they are not known."""
    try:
        data = bytearray(path.read_bytes())
    except FileNotFoundError:
        return {}
    layout = _Layout.read(data)
    if layout is None:
        return {}
    slots = layout.slots(torch.frombuffer(data, dtype=torch.uint8))
    found = [
        (sequence, slot) for slot, (sequence, after) in zip(slots, _numbers(slots), strict=True) if after == step + 1
    ]
    if not found:
        return {}
    _, newest = max(found, key=lambda item: item[0])
    return {name: layout.view(newest, name).clone() for name in layout.places}


def _numbers(slots: torch.Tensor) -> list[tuple[int, int]]:
    """Sequence and step plus one of every slot; zero in one that is empty or was being written."""
    return [(int(sequence), int(after)) for sequence, after in slots[:, :_NUMBERS_BYTES].view(torch.int64).tolist()]


def _pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _open(path: Path, layout: _Layout) -> int:
    """The file of the process before, if it was made for the same buffers, or a new one."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        same = os.fstat(fd).st_size == layout.file_bytes and os.pread(fd, len(layout.head), 0) == layout.head
        if same:
            return fd
        os.close(fd)
    new = path.with_name(f"{path.name}.new")
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, layout.file_bytes)  # or a copy could meet a full disk
        os.pwrite(fd, layout.head, 0)
        new.replace(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _share_with_device(memory: torch.Tensor) -> None:
    """The device can copy into this memory while the host goes on. Raises OSError."""
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    except RuntimeError as error:
        raise OSError(f"CUDA cannot use the memory of a rank's record: {error}") from error
