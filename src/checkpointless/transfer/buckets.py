"""How the tensors of a state are cut into buckets for the way to another rank: the same on both sides.

A large tensor is cut into slices that are sent from, and received into, its own memory. Small ones are gathered in a
bucket of their own. Nothing is ever flattened as a whole: the extra memory is that of the buckets in flight, and of
copies of those tensors whose memory has holes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...protocol.values import layout_of
from ..errors import RestoreError
from ..state.provider import Layouts, make_tensor

BUCKET_BYTES = 16 << 20
_WORD = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By bytes of an element: a dtype that torch can copy in any layout, on any device, bit for bit."""


@dataclass
class Bucket:
    """Up to BUCKET_BYTES of one device type. `pieces`: (name of the tensor, first byte, end)."""

    device: str
    pieces: list[tuple[str, int, int]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, name: str, begin: int, end: int) -> None:
        self.pieces.append((name, begin, end))
        self.nbytes += end - begin


def cut(skeleton: Iterable[tuple[str, int, str]], limit: int = BUCKET_BYTES) -> list[Bucket]:
    """The buckets for tensors given as (name, bytes, device type)."""
    buckets: list[Bucket] = []
    gathering: dict[str, Bucket] = {}
    for name, nbytes, device in skeleton:
        if nbytes >= limit // 4:
            for begin in range(0, nbytes, limit):
                bucket = Bucket(device)
                bucket.add(name, begin, min(begin + limit, nbytes))
                buckets.append(bucket)
        elif nbytes:
            current = gathering.get(device)
            if current is None or current.nbytes + nbytes > limit:
                current = gathering[device] = Bucket(device)
                buckets.append(current)
            current.add(name, 0, nbytes)
    return buckets


class Memory:
    """The tensors of a state as rows of bytes.

    `rows`: by name, in the order given, a uint8 tensor of one dimension on the tensor's device. It is the tensor's own
    memory, in the order in which the elements lie there (column-major and channels-last tensors included), where that
    memory is the tensor's alone. Else, as for a slice of a larger tensor or an expanded one, it is a copy of all
    elements in row-major order: who writes to `rows` calls `land` afterwards.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], layouts: Layouts | None = None) -> None:
        """`layouts`: how the rows are to be laid out, as the source's are; None: as the tensors themselves are.

        Raises RestoreError, with its name, for a tensor that is not strided.
        """
        self.rows: dict[str, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The tensors whose rows are copies, and these: same shape, dtypes of `_BITS`."""
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided:
                raise RestoreError(f"{name} is {tensor.layout}: only strided tensors can be moved")
            row = flat_bytes(tensor)
            wanted = () if layouts is None else layouts.get(name, ())
            if row is None or (layouts is not None and layout_of(tensor) != wanted):
                row = self._copy(tensor, wanted)
            self.rows[name] = row

    def _copy(self, tensor: torch.Tensor, layout: tuple[int, ...]) -> torch.Tensor:
        """The row of a copy, in that layout."""
        places = _as_stored(tensor)
        places = places.view(_BITS[places.element_size()])
        copy = make_tensor(places.shape, places.dtype, places.device, layout).copy_(places)
        self._copies.append((places, copy))
        row = flat_bytes(copy)
        assert row is not None, "made dense"
        return row

    @classmethod
    def of_rows(cls, rows: Mapping[str, torch.Tensor]) -> Memory:
        """The same for memory that is rows of bytes already."""
        memory = cls({})
        memory.rows = dict(rows)
        return memory

    def land(self) -> None:
        """Brings what was written to `rows` to the tensors whose rows are copies. Harmless when repeated."""
        for tensor, copy in self._copies:
            places, values = tensor, copy
            for dimension, stride in enumerate(tensor.stride()):
                if stride == 0 and tensor.shape[dimension] > 1:  # expanded: all of it is one place
                    places, values = places.narrow(dimension, 0, 1), values.narrow(dimension, 0, 1)
            places.copy_(values)

    def fill_from(self, other: Memory) -> None:
        """Copies the bytes of another state of the same skeleton, and lands them."""
        for name, row in self.rows.items():
            if row.data_ptr() != other.rows[name].data_ptr():
                row.copy_(other.rows[name])
        self.land()

    def sizes(self) -> list[tuple[str, int, str]]:
        return [(name, row.numel(), row.device.type) for name, row in self.rows.items()]

    def view(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes where they lie; None when they are in several places."""
        if len(bucket.pieces) > 1:
            return None
        name, begin, end = bucket.pieces[0]
        return self.rows[name][begin:end]

    def gather(self, bucket: Bucket, out: torch.Tensor) -> None:
        """Copies the bucket's bytes into `out`."""
        torch.cat([self.rows[name][begin:end] for name, begin, end in bucket.pieces], out=out)

    def scatter(self, bucket: Bucket, data: torch.Tensor) -> None:
        """Copies `data` to where the bucket's bytes belong."""
        at = 0
        for name, begin, end in bucket.pieces:
            self.rows[name][begin:end].copy_(data[at : at + end - begin])
            at += end - begin

    def checksum(self, bucket: Bucket) -> torch.Tensor:
        """Two int64 sums over the bucket's 8-byte words, the second weighted by position (Fletcher's idea)."""
        data = self.view(bucket)
        if data is None:
            data = torch.cat([self.rows[name][begin:end] for name, begin, end in bucket.pieces])
        return checksum(data)


def checksum(data: torch.Tensor) -> torch.Tensor:
    """int64 tensor of two: the sum of the words, and that of the sums of blocks weighted by their position.

    Every flipped bit changes the first. Bytes that changed places change the second, unless within 64 words.
    """
    odd = data.numel() % _WORD
    if odd or data.storage_offset() % _WORD or data.data_ptr() % _WORD:
        data = torch.nn.functional.pad(data, (0, (_WORD - odd) % _WORD)).clone()
    words = data.view(torch.int64)
    whole = words[: words.numel() // 64 * 64].view(-1, 64).sum(dim=1)
    rest = words[words.numel() // 64 * 64 :].sum()
    weights = torch.arange(1, whole.numel() + 1, dtype=torch.int64, device=data.device)
    return torch.stack([whole.sum() + rest, (whole * weights).sum() + rest * (whole.numel() + 1)])


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor's own memory as a row of bytes (uint8, one dimension), in the order in which it lies there.

    None for a tensor that has holes or overlaps itself: its memory is not its alone.
    """
    tensor = _as_stored(tensor)
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(order)
        if not tensor.is_contiguous():
            return None
    # Not view(-1): a tensor of no or one element is contiguous with any stride, which that would keep.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Detached, and without what torch only does on reading: conjugation and negation."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if tensor.is_neg() else tensor
