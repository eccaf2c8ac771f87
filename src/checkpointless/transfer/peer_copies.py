"""The way of a snapshot to another node: each rank sends its own to its buddy and keeps that of the rank before it.

The buddy is the rank with the same place on the next node. One exchange for every snapshot that is due, on every rank
in the same order: a rank that has none to give (it is slow, its memory is full) says so and receives all the same.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ..errors import RestoreError
from .link import Link
from .snapshot_files import CHUNK_BYTES, SnapshotFiles

_IN_FLIGHT = 4
_MAX_BYTES = 1 << 42


class Stopped(Exception):
    """The epoch has failed, so the exchange has, too."""


class PeerCopies:
    """Made by all ranks together. `stopping` is asked between two chunks."""

    def __init__(self, rank: int, local_world_size: int, files: SnapshotFiles, stopping: Callable[[], bool]) -> None:
        world = dist.get_world_size()
        self._to = (rank + local_world_size) % world
        self._source = (rank - local_world_size) % world
        self._link = Link(dist.new_group(backend="gloo"))
        self._files = files
        self._stopping = stopping

    @staticmethod
    def wanted() -> bool:
        """Whether there is another node to send to."""
        return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and dist.is_initialized()

    def exchange(self, path: Path | None, step: int) -> None:
        """Ours to the buddy (None: there is none of this step), and that of the rank whose buddy we are.

        Raises Stopped, RestoreError for a size that makes no sense, OSError when there is no room for the other's
        (which has been received to its end: the next exchange can go on), what the process group raises.
        """
        row = torch.empty(0, dtype=torch.uint8)
        if path is not None:
            with path.open("rb") as file:  # the mapping ends with the tensor
                row = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        theirs = torch.zeros(2, dtype=torch.int64)
        said = self._link.isend(torch.tensor([step, row.numel()], dtype=torch.int64), self._to)
        self._link.irecv(theirs, self._source).wait()
        said.wait()
        their_step, incoming = theirs.tolist()
        if their_step < 0 or not 0 <= incoming <= _MAX_BYTES:
            raise RestoreError(f"rank {self._source} announces a snapshot of step {their_step}, {incoming} bytes")
        chunks = self._chunks(row, incoming)
        try:
            if incoming:
                self._files.publish(self._source, their_step, chunks)
        finally:
            for _ in chunks:  # what is left: our own, if it is the longer one, or what did not find room here
                pass

    def _chunks(self, outgoing: torch.Tensor, incoming: int) -> Iterator[memoryview]:
        """The other's snapshot as it arrives, while ours leaves."""
        sending: deque[Any] = deque()
        landing = torch.empty(min(incoming, CHUNK_BYTES), dtype=torch.uint8)
        for begin in range(0, max(outgoing.numel(), incoming), CHUNK_BYTES):
            if self._stopping():
                raise Stopped
            if begin < outgoing.numel():
                sending.append(self._link.isend(outgoing[begin : begin + CHUNK_BYTES], self._to))
            if begin < incoming:
                part = landing[: incoming - begin]
                self._link.irecv(part, self._source).wait()
                yield part.numpy().data
            if len(sending) > _IN_FLIGHT:
                sending.popleft().wait()
        for work in sending:
            work.wait()
