"""Buddy snapshots: every N steps a copy of each rank's state in host memory, here and on another node.

For the loss of everybody who holds a shard. A copy is a file in a memory file system that belongs to the job, not to
a process. It is made by a thread, while the next step computes; only the next *update* waits for it. With several
nodes the thread then sends it to the buddy: the rank with the same place on the next node.
Idea: Gemini's checkpoints in peer memory (Wang et al., SOSP 2023).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ..protocol.plan import MAX_SNAPSHOTS
from .bucketing import Memory
from .encoding import decode, encode
from .errors import RestoreError
from .parcel import Header
from .provider import StateProvider
from .transfer import Link

_log = logging.getLogger("hyperpodrun.checkpointless")

_MAGIC = b"HPSNAP01"
_PREFIX = struct.Struct("<8sQI")  # magic, length of the header, its checksum
_NAME = re.compile(r"snapshot-(\d+)-(\d+)")
_KEPT = 2
"""Steps of which snapshots are kept: the newest may not be complete everywhere."""
_COPY_LIMIT_S = 600.0
_SEND_BYTES = 16 << 20


class Snapshots:
    """The snapshots this rank makes, and those it can read. `every`: steps between two."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._directory: Path | None = None
        self._rank = 0
        self._group: Any = None
        self._buddy: tuple[int, int] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self, directory: Path | None, rank: int) -> None:
        """An epoch begins; on all ranks together, when there are several nodes."""
        self._directory, self._rank, self._stopping = directory, rank, False
        nodes, local = (int(os.environ.get(name, "1")) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self._group = self._buddy = None
        if nodes > 1 and dist.is_initialized():
            world = dist.get_world_size()
            self._group = dist.new_group(backend="gloo")
            self._buddy = ((rank + local) % world, (rank - local) % world)

    def due(self, step: int) -> bool:
        return self._directory is not None and step % self._every == 0

    def make(self, header: Header, state: StateProvider) -> None:
        """Begins a snapshot. Nothing may change the state before `wait_copied` has returned.

        One that is still on its way to the buddy makes this one be left out: the network is slower than training.
        """
        if self._thread is not None and self._thread.is_alive():
            _log.warning("snapshot of step %d left out: the one before it is still on its way", header.step)
            return
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._run, args=(header, state), name="hyperpodrun-snapshot", daemon=True
        )
        self._thread.start()

    def wait_copied(self) -> None:
        """Until the state may change again. Raises RestoreError when the copy has taken ten minutes."""
        if not self._copied.wait(_COPY_LIMIT_S):
            raise RestoreError(f"a snapshot was not copied within {_COPY_LIMIT_S:g} s")

    def stop(self) -> None:
        """The epoch has failed: no snapshot is finished any more."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(_COPY_LIMIT_S)
            self._thread = None

    def inventory(self, directory: Path | None) -> tuple[tuple[int, int], ...]:
        """(rank, step) of every complete snapshot in this node's directory, the newest first."""
        if directory is None:
            return ()
        found = sorted(_files(directory), key=lambda item: (-item[1], item[0]))
        return tuple((owner, step) for owner, step, _ in found)[:MAX_SNAPSHOTS]

    def load(self, owner: int, step: int) -> tuple[Header, Memory]:
        """A snapshot of this node. Its memory is the file's own, for reading."""
        if self._directory is None:
            raise RestoreError("there is no directory for snapshots")
        return _load(self._directory / f"snapshot-{owner}-{step}")

    def _run(self, header: Header, state: StateProvider) -> None:
        try:
            try:
                path = self._write(header, Memory(state.named_tensors()))
            finally:
                self._copied.set()
            self._prune(self._rank, header.step)
            if self._buddy is not None:
                self._exchange(path, header.step)
        except (OSError, RuntimeError, ValueError) as error:
            if not self._stopping:
                _log.warning("snapshot of step %d of rank %d failed: %s", header.step, self._rank, error)

    def _write(self, header: Header, memory: Memory) -> Path:
        assert self._directory is not None
        described = encode(header.as_dict())
        chunks = (row.cpu().numpy().data for row in memory.rows.values() if row.numel())
        prefix = _PREFIX.pack(_MAGIC, len(described), zlib.crc32(described))
        return _publish(self._directory, self._rank, header.step, [prefix, described], chunks)

    def _exchange(self, path: Path, step: int) -> None:
        """Ours to the buddy, and that of the rank whose buddy we are."""
        assert self._buddy is not None
        assert self._directory is not None
        to, source = self._buddy
        link = Link(self._group)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            size = torch.tensor([len(mapped)], dtype=torch.int64)
            theirs = torch.zeros(1, dtype=torch.int64)
            sending = [link.isend(size, to)]
            link.irecv(theirs, source).wait()
            incoming = torch.empty(int(theirs.item()), dtype=torch.uint8)
            outgoing = torch.frombuffer(mapped, dtype=torch.uint8)
            for begin in range(0, max(outgoing.numel(), incoming.numel()), _SEND_BYTES):
                if self._stopping:
                    return
                if begin < outgoing.numel():
                    sending.append(link.isend(outgoing[begin : begin + _SEND_BYTES], to))
                if begin < incoming.numel():
                    link.irecv(incoming[begin : begin + _SEND_BYTES], source).wait()
            for work in sending:
                work.wait()
            del outgoing, sending
        _publish(self._directory, source, step, [], iter([incoming.numpy().data]))
        self._prune(source, step)

    def _prune(self, owner: int, newest: int) -> None:
        """Of this owner only the last ones stay; those of a later step are of before a rollback."""
        assert self._directory is not None
        mine = sorted((step, path) for who, step, path in _files(self._directory) if who == owner)
        stale = [path for step, path in mine if step > newest]
        current = [path for step, path in mine if step <= newest]
        for path in [*stale, *current[:-_KEPT]]:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _files(directory: Path) -> list[tuple[int, int, Path]]:
    """(rank, step, path) of every snapshot."""
    matches = [(_NAME.fullmatch(name), name) for name in os.listdir(directory)]
    return [(int(match[1]), int(match[2]), directory / name) for match, name in matches if match]


def _publish(directory: Path, owner: int, step: int, first: list[bytes], chunks: Any) -> Path:
    """Writes a file that appears under its name only when it is whole."""
    path = directory / f"snapshot-{owner}-{step}"
    unfinished = directory / f".unfinished-{owner}-{os.getpid()}"
    try:
        with open(unfinished, "wb", buffering=0, opener=_private) as file:
            for chunk in (*first, *chunks):
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[file.write(view) :]
        os.rename(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


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
