"""Point to point between two ranks, over a process group that exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist

from ..errors import RestoreError

_MAX_HEADER = 1 << 30
_LENGTH_BYTES = 8
_FRAME_BYTES = 32 << 10
"""Of a message's first part, which has its length and its beginning: one trip is enough for most."""
_ROOM = _FRAME_BYTES - _LENGTH_BYTES


class Link:
    """Point to point to the ranks of a process group. Small things are rows of bytes, large ones tensors in place."""

    def __init__(self, group: Any = None) -> None:
        self._group: Any = group if group is not None else dist.group.WORLD
        backends = {kind: self._backend(kind) for kind in ("cpu", "cuda")}
        self._devices = {kind: name is not None for kind, name in backends.items()}
        self._nccl = (backends["cuda"] or "").startswith("nccl")
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
        """Sends a message of up to 1 GB: a frame of fixed size and, where that is too small, the rest."""
        device = self.wire_device("cpu")
        frame = bytearray(len(data).to_bytes(_LENGTH_BYTES, "little") + data[:_ROOM])
        frame += bytes(_FRAME_BYTES - len(frame))
        for part in (frame, bytearray(data[_ROOM:])):
            if part:
                self.isend(torch.frombuffer(part, dtype=torch.uint8).to(device), to).wait()

    def receive_bytes(self, source: int) -> bytes:
        """The peer's next message. Raises RestoreError for one of an absurd length."""
        return self.expect_bytes(source)()

    def expect_bytes(self, source: int) -> Callable[[], bytes]:
        """`receive_bytes` in two parts: gloo sends at once what the other side has said that it waits for, else it
        asks first. Nothing else may be received from that rank in between."""
        device = self.wire_device("cpu")
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8, device=device)
        early = None if device.type == "cuda" else self.irecv(frame, source)  # NCCL would run it before what is sent

        def wait() -> bytes:
            (early or self.irecv(frame, source)).wait()
            head = _to_bytes(frame)
            length = int.from_bytes(head[:_LENGTH_BYTES], "little")
            if length > _MAX_HEADER:
                raise RestoreError(f"rank {source} announces {length} bytes, more than {_MAX_HEADER}")
            if length <= _ROOM:
                return head[_LENGTH_BYTES : _LENGTH_BYTES + length]
            rest = torch.empty(length - _ROOM, dtype=torch.uint8, device=device)
            self.irecv(rest, source).wait()
            return head[_LENGTH_BYTES:] + _to_bytes(rest)

        return wait

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


def _to_bytes(row: torch.Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
