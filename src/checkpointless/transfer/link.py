"""Point to point between two ranks, over a process group that exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from ..errors import RestoreError

_MAX_HEADER = 1 << 30


class Link:
    """Point to point to the ranks of a process group. Small things are rows of bytes, large ones tensors in place."""

    def __init__(self, group: Any = None) -> None:
        self._group: Any = group if group is not None else dist.group.WORLD
        backends = {kind: self._backend(kind) for kind in ("cpu", "cuda")}
        self._devices = {kind: name is not None for kind, name in backends.items()}
        self._nccl = backends["cuda"] == "nccl"
        if not any(self._devices.values()):
            raise RestoreError("the process group can send neither CPU nor CUDA tensors")

    def wire_device(self, kind: str) -> torch.device:
        """Where bytes of a device must be to travel: there if the group can, else on the other one."""
        if self._devices.get(kind, False):
            return torch.device(kind)
        return torch.device("cpu" if self._devices["cpu"] else "cuda")

    def connect(self) -> None:
        """To be called on all ranks of the group before any of them sends: with NCCL the communicator of the whole
        group must exist, or every pair would make one of its own."""
        if self._nccl:
            dist.all_reduce(torch.zeros(1, device="cuda"), group=self._group)

    def send_bytes(self, data: bytes, to: int) -> None:
        device = self.wire_device("cpu")
        self.isend(torch.tensor([len(data)], dtype=torch.int64, device=device), to).wait()
        if data:
            self.isend(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device), to).wait()

    def receive_bytes(self, source: int) -> bytes:
        device = self.wire_device("cpu")
        size = torch.zeros(1, dtype=torch.int64, device=device)
        self.irecv(size, source).wait()
        length = int(size.item())
        if not 0 <= length <= _MAX_HEADER:
            raise RestoreError(f"rank {source} announces {length} bytes, more than {_MAX_HEADER}")
        if not length:
            return b""
        row = torch.empty(length, dtype=torch.uint8, device=device)
        self.irecv(row, source).wait()
        return row.cpu().numpy().tobytes()

    def isend(self, row: torch.Tensor, to: int) -> Any:
        return self._begin(dist.isend, [row], to)[0]

    def irecv(self, row: torch.Tensor, source: int) -> Any:
        return self._begin(dist.irecv, [row], source)[0]

    def isend_all(self, rows: Sequence[torch.Tensor], to: int) -> list[Any]:
        """What to wait for; with NCCL all rows are one operation."""
        return self._begin(dist.isend, rows, to)

    def irecv_all(self, rows: Sequence[torch.Tensor], source: int) -> list[Any]:
        return self._begin(dist.irecv, rows, source)

    def joins(self, device: str) -> bool:
        """Whether rows of that device type are better sent many at once: every operation of NCCL's is a kernel, which
        begins and ends together with the peer's."""
        return self._nccl and self.wire_device(device).type == "cuda"

    def _begin(self, operation: Any, rows: Sequence[torch.Tensor], peer: int) -> list[Any]:
        if not (self._nccl and rows[0].is_cuda):
            return [operation(row, peer, self._group) for row in rows]
        # NCCL sends single operations through a communicator of the two ranks alone, batches through the group's.
        return dist.batch_isend_irecv([dist.P2POp(operation, row, peer, self._group) for row in rows])

    def _backend(self, kind: str) -> str | None:
        """The name of the backend that moves tensors of this device type."""
        try:
            return str(self._group._get_backend(torch.device(kind)).name())
        except (RuntimeError, AttributeError):
            return None
