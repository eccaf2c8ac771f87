"""The state before the last update, kept on the host: the way back when the update is not complete everywhere.

Asked for with `rollback=True` it is kept always. Not asked for, it is kept where a loop needs it (`tracker.needs_kept`)
and it costs little: in the first passes, of which nothing is known, if there is memory to spare; later if it is small.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch

from ..errors import RestoreError
from ..state.provider import StateProvider, TensorSpec, specify

_log = logging.getLogger("hyperpodrun.checkpointless")

_SHARE_OF_MEMORY = 4
"""Of what is available on the node to one rank, a copy that nobody has asked for takes at most one part in so many."""
_SMALL_BYTES = 64 << 20
"""A state up to this size is kept at every step of a loop that needs it: about 10 ms a step, and it is said."""


class Rollback:
    """Whether the state is kept, and where. `asked`: True always, None where the loop needs it, False in its
    first passes only."""

    def __init__(self, asked: bool | None) -> None:
        self._asked = asked
        self.kept: KeptState | None = KeptState() if asked else None

    def keeps(self, state: StateProvider, *, known: bool, needed: bool) -> bool:
        """Whether it is to be kept in this step. `known`: a pass of the loop has been seen to its end."""
        wanted = self._asked is True
        if not wanted and not known:
            wanted = needed and affordable(state)
        elif self._asked is None:
            wanted = needed and _is_small(state)
        self.kept = (self.kept or KeptState()) if wanted else None
        return wanted

    def forget(self) -> None:
        """What is kept is of another function."""
        if self.kept is not None:
            self.kept.step = None

    def keep(self, step: int, state: StateProvider) -> None:
        assert self.kept is not None
        self.kept.keep(step, state)

    def say(self, state: StateProvider, why: str) -> None:
        """Once, when it is known what the loop needs. `why`: the middle of a sentence."""
        size = _size(state)
        if self._asked:
            return
        if self._asked is None and _is_small(state):
            _log.warning(
                "in this loop %s: the state before each update is kept, %.1f MB a step, so that a fault in between "
                "costs no more than that step (rollback=False turns it off)",
                why,
                size / 1e6,
            )
        else:
            _log.warning(
                "in this loop %s: a fault that finds every rank in between ends the job; rollback=True keeps the state "
                "before each update, %.1f MB a step",
                why,
                size / 1e6,
            )


def affordable(state: StateProvider) -> bool:
    """Whether there is host memory to spare for a copy of the state that lasts two steps."""
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _size(state) * ranks * _SHARE_OF_MEMORY <= int(psutil.virtual_memory().available)


def _is_small(state: StateProvider) -> bool:
    return _size(state) <= _SMALL_BYTES


def _size(state: StateProvider) -> int:
    return sum(tensor.nbytes for tensor in state.named_tensors().values())


class KeptState:
    """A second buffer of the whole state. Costs one copy of it per step, and as much host memory."""

    def __init__(self) -> None:
        self.step: int | None = None
        """The step whose beginning is kept; None while nothing whole is."""
        self._skeleton: list[TensorSpec] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._copied: dict[str, tuple[int, int]] = {}
        """By name: where a tensor was when it was copied, and its version."""
        self._host_state: dict[str, Any] = {}

    def keep(self, step: int, state: StateProvider) -> None:
        """Copies the state; to be called right before it changes. What never changes is copied once."""
        self.step = None
        state.quiesce()
        tensors = state.named_tensors()
        frozen = state.frozen()
        for name, value in tensors.items():
            kept = self._tensors.get(name)
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = self._tensors[name] = torch.empty_like(
                    value, device="cpu", pin_memory=value.device.type == "cuda", memory_format=torch.preserve_format
                )
            elif name in frozen and self._copied.get(name) == (value.data_ptr(), value._version):
                continue
            self._copied[name] = value.data_ptr(), value._version
            kept.copy_(value, non_blocking=True)
        for name in self._tensors.keys() - tensors.keys():
            del self._tensors[name]
        state.quiesce()
        self._skeleton, self._host_state = specify(tensors), copy.deepcopy(state.host_state())
        self.step = step

    def go_back(self, step: int, state: StateProvider) -> None:
        """Brings the state to what was kept. Raises RestoreError when that is another step's."""
        if self.step != step:
            raise RestoreError(f"the kept state is of step {self.step}, not of step {step}")
        state.materialise(self._skeleton)
        state.load_host_state(self._host_state)
        with torch.no_grad():
            for name, value in state.named_tensors().items():
                value.copy_(self._tensors[name])
