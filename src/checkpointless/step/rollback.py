"""The state before the last update, kept on the host: the way back when the update is not complete everywhere."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from ..errors import RestoreError
from ..state.provider import StateProvider, TensorSpec
from ..transfer.buckets import Memory

_SHARE_OF_MEMORY = 4
"""Of what is available on the node to one rank, a copy that nobody has asked for takes at most one part in so many."""


def affordable(state: StateProvider) -> bool:
    """Whether there is host memory to spare for a copy of the state that lasts two steps."""
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = sum(tensor.nbytes for tensor in state.named_tensors().values())
    return size * ranks * _SHARE_OF_MEMORY <= int(psutil.virtual_memory().available)


class KeptState:
    """A second buffer of the whole state. Costs one copy of it per step, and as much host memory."""

    def __init__(self) -> None:
        self.step: int | None = None
        """The step whose beginning is kept; None while nothing whole is."""
        self._skeleton: list[TensorSpec] = []
        self._rows: dict[str, torch.Tensor] = {}
        self._host_state: dict[str, Any] = {}

    def keep(self, step: int, state: StateProvider) -> None:
        """Copies the state; to be called right before it changes."""
        self.step = None
        state.quiesce()
        rows = Memory(state.named_tensors()).rows
        for name, row in rows.items():
            kept = self._rows.get(name)
            if kept is None or kept.numel() != row.numel():
                kept = self._rows[name] = torch.empty(
                    row.numel(), dtype=torch.uint8, pin_memory=row.device.type == "cuda"
                )
            kept.copy_(row, non_blocking=True)
        for name in self._rows.keys() - rows.keys():
            del self._rows[name]
        state.quiesce()
        self._skeleton, self._host_state = state.skeleton(), copy.deepcopy(state.host_state())
        self.step = step

    def go_back(self, step: int, state: StateProvider) -> None:
        """Brings the state to what was kept. Raises RestoreError when that is another step's."""
        if self.step != step:
            raise RestoreError(f"the kept state is of step {self.step}, not of step {step}")
        state.materialise(self._skeleton)
        for name, row in Memory(state.named_tensors()).rows.items():
            row.copy_(self._rows[name])
        state.load_host_state(self._host_state)
