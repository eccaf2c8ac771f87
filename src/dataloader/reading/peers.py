"""Batches on their way from one rank to another, over the process group that the user's configuration names.

Every rank of the group comes here once for each loader, before its first batch: first all tell what they have, then
those that the plan (`warming.py`) names give and take. A rank that is lost meanwhile breaks the group, as anywhere in
training. What arrives is checked like a file from the cache; nothing is pickled.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import distributed as dist

from ...protocol.dataloader import Position
from ..errors import CacheCorruptError, ProducerError
from ..storing import format
from .warming import MOST_BATCHES, MOST_BYTES, Report, Transfer

_ROW_BYTES = 1024
_LENGTH_BYTES = 4
_LABEL = "peer"
_SLACK_BYTES = 1 << 20
"""A batch may be larger on its way than on disk by what its label takes."""


class Peers:
    """The ranks of one process group, for as long as it exists."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank: int = dist.get_rank(group)
        self._device = _device(group)

    def exchange(self, report: Report) -> list[Report]:
        """What every rank of the group has to say, in their order. Raises ProducerError for what is no report."""
        data = msgspec.msgpack.encode(report)
        if len(data) > _ROW_BYTES - _LENGTH_BYTES:
            raise ProducerError(f"a report of {len(data)} bytes on stream {report.stream!r}")
        data = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        row = torch.frombuffer(bytearray(data.ljust(_ROW_BYTES, b"\0")), dtype=torch.uint8).to(self._device)
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(rows, row, group=self._group)
        return [_report(rank, row.cpu().numpy().tobytes()) for rank, row in enumerate(rows)]

    def carry(
        self, transfers: Sequence[Transfer], load: Callable[[Position], format.Loaded]
    ) -> tuple[Transfer, list[format.Loaded]] | None:
        """Carries out a plan, in its order; what was given to this rank, and by which of its transfers.

        `load` gives a batch of this rank's cache, or raises FileNotFoundError or CacheCorruptError: those from there on
        are then not given.
        """
        taken = None
        for transfer in transfers:
            places = [(transfer.place[0], transfer.place[1] + i) for i in range(transfer.count)]
            if transfer.source == self.rank:
                self._give(transfer.target, places, load)
            elif transfer.target == self.rank:
                taken = (transfer, self._take(transfer.source, places))
        return taken

    def _give(self, target: int, places: list[Position], load: Callable[[Position], format.Loaded]) -> None:
        rows: list[torch.Tensor] = []
        for place in places:
            try:
                rows.append(_packed(place, load(place)))
            except (FileNotFoundError, CacheCorruptError):  # it will be made again for whoever reads it here
                break
        sizes = [len(row) for row in rows] + [0] * (len(places) - len(rows))
        to = dist.get_global_rank(self._group, target)
        dist.send(torch.tensor(sizes, dtype=torch.int64, device=self._device), to, self._group)
        for row in rows:
            dist.send(row.to(self._device), to, self._group)

    def _take(self, source: int, places: list[Position]) -> list[format.Loaded]:
        sender = dist.get_global_rank(self._group, source)
        sizes = torch.zeros(len(places), dtype=torch.int64, device=self._device)
        dist.recv(sizes, sender, self._group)
        taken: list[format.Loaded] = []
        for place, size in zip(places, sizes.tolist(), strict=True):
            if size == 0:
                break
            if not 0 < size <= MOST_BYTES + _SLACK_BYTES:
                raise ProducerError(f"rank {source} of the model-parallel group announces a batch of {size} bytes")
            row = torch.empty(size, dtype=torch.uint8, device=self._device)
            dist.recv(row, sender, self._group)
            taken.append(_unpacked(place, row.cpu()))
        return taken


def _device(group: Any) -> torch.device:
    """Where the group's tensors must be."""
    backend = dist.get_backend_config(group)
    if "cpu:" in str(backend):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _report(rank: int, data: bytes) -> Report:
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        report = msgspec.msgpack.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + length], type=Report)
    except msgspec.MsgspecError as error:
        raise ProducerError(
            f"rank {rank} of the model-parallel group does not say what it reads ({error}): every rank of "
            "model_parallel_group must make and iterate its loaders in the same order"
        ) from None
    if len(report.sizes) > MOST_BATCHES:
        raise ProducerError(f"rank {rank} of the model-parallel group reports {len(report.sizes)} batches")
    return report


def _packed(place: Position, loaded: format.Loaded) -> torch.Tensor:
    """A batch as bytes, whatever its file looks like: encryption is of the disk, and each cache has its own label."""
    fd = os.memfd_create("batch", os.MFD_CLOEXEC)
    try:
        size = format.write(fd, format.Label(_LABEL, *place), loaded.batch(), loaded.state())
        memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _unpacked(place: Position, row: torch.Tensor) -> format.Loaded:
    fd = os.memfd_create("batch", os.MFD_CLOEXEC)
    try:
        format.write_all(fd, [row.numpy()])
        return format.read(fd, format.Label(_LABEL, *place))
    except CacheCorruptError as error:
        raise CacheCorruptError(f"batch {place} of another rank did not arrive as it was sent: {error}") from None
    finally:
        os.close(fd)


def make(group: Any) -> Peers | None:
    """None without a group, or where this process is not in it."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("model_parallel_group is given, but torch.distributed is not initialised")
    return Peers(group) if dist.get_rank(group) >= 0 else None


__all__ = ["Peers", "make"]
