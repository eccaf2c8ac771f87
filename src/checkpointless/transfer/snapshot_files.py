"""Snapshots as files in a memory file system that belongs to the job on this node: they outlive the processes.

`snapshot-<rank>-<step>`: a prefix, the encoded header, then the bytes of every tensor in the header's order. A file
appears under its name only when it is whole.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ...protocol.values import decode, encode
from ..errors import RestoreError
from .buckets import Memory
from .header import Header

CHUNK_BYTES = 16 << 20

_MAGIC = b"HPSNAP01"
_PREFIX = struct.Struct("<8sQI")  # magic, length of the header in bytes, its CRC-32
_NAME = re.compile(r"snapshot-(\d+)-(\d+)")
_KEPT = 2
"""Steps of which snapshots are kept: the newest may not be complete everywhere."""


class SnapshotFiles:
    """The snapshots in `directory`. `writer`: the rank of this process, the only one that writes under its name."""

    def __init__(self, directory: Path, writer: int) -> None:
        self._directory = directory
        self._writer = writer

    def publish(self, owner: int, step: int, chunks: Iterable[bytes | memoryview]) -> Path:
        """Writes a snapshot of rank `owner`. Raises OSError, such as when memory is full; then nothing is left."""
        path = self._directory / f"snapshot-{owner}-{step}"
        unfinished = self._directory / f".unfinished-{self._writer}-{owner}"
        try:
            with open(unfinished, "wb", buffering=0, opener=_private) as file:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    while view:
                        view = view[file.write(view) :]
            os.rename(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._prune(owner, step)
        return path

    def remove_unfinished(self) -> None:
        """Clears away what a process of this rank was writing when it was killed: it is as large as a shard."""
        for path in self._directory.glob(f".unfinished-{self._writer}-*"):
            path.unlink(missing_ok=True)

    def load(self, owner: int, step: int) -> tuple[Header, Memory]:
        """A snapshot of this node. Its memory is the file's own, for reading.

        Raises RestoreError; a file that is none then goes, so that the next plan is made without it.
        """
        path = self._directory / f"snapshot-{owner}-{step}"
        try:
            return _load(path)
        except RestoreError:
            path.unlink(missing_ok=True)
            raise

    def _prune(self, owner: int, newest: int) -> None:
        """Of this owner only the last ones stay; those of a later step are of before a rollback."""
        mine = sorted((step, path) for who, step, path in _files(self._directory) if who == owner)
        stale = [path for step, path in mine if step > newest]
        current = [path for step, path in mine if step <= newest]
        for path in [*stale, *current[:-_KEPT]]:
            path.unlink(missing_ok=True)


def inventory(directory: Path) -> list[tuple[int, int]]:
    """(rank, step) of every snapshot on this node, the newest first."""
    found = sorted(_files(directory), key=lambda item: (-item[1], item[0]))
    return [(owner, step) for owner, step, _ in found]


def contents(header: Header, memory: Memory) -> Iterator[bytes | memoryview]:
    """What is in the file of a state, in chunks of at most CHUNK_BYTES; tensors of a GPU are copied chunk by chunk."""
    described = encode(header.as_dict())
    yield _PREFIX.pack(_MAGIC, len(described), zlib.crc32(described))
    yield described
    for row in memory.rows.values():
        for begin in range(0, row.numel(), CHUNK_BYTES):
            yield row[begin : begin + CHUNK_BYTES].cpu().numpy().data


def _files(directory: Path) -> list[tuple[int, int, Path]]:
    """(rank, step, path) of every snapshot."""
    matches = [(_NAME.fullmatch(name), name) for name in os.listdir(directory)]
    return [(int(match[1]), int(match[2]), directory / name) for match, name in matches if match]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _load(path: Path) -> tuple[Header, Memory]:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise RestoreError(f"the snapshot {path.name} cannot be read: {error}") from error
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    if len(data) < _PREFIX.size:
        raise RestoreError(f"the snapshot {path.name} is cut short")
    magic, length, checksum = _PREFIX.unpack(mapped[: _PREFIX.size])
    described = mapped[_PREFIX.size : _PREFIX.size + length]
    if magic != _MAGIC or zlib.crc32(described) != checksum:
        raise RestoreError(f"the snapshot {path.name} is damaged")
    header = Header.from_dict(decode(described))
    rows: dict[str, torch.Tensor] = {}
    at = _PREFIX.size + length
    for name, dtype, shape, _ in header.skeleton:
        nbytes = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        rows[name] = data[at : at + nbytes]
        at += nbytes
    if at != len(data):
        raise RestoreError(f"the snapshot {path.name} has {len(data)} bytes instead of {at}")
    return header, Memory.of_rows(rows)
