"""Objects built anew in every epoch: what the old ones held goes over to the new ones."""

from __future__ import annotations

import torch

from ..state.provider import Layouts, TensorSpec, layouts_of
from ..state.registry import Registry
from ..step.tracker import Learned
from .buckets import Memory
from .header import Header, build


class Handover:
    """Keeps the state of registered objects until others are registered in their place.

    With `offload` it waits in host memory, so that the accelerator never holds the old and the new one together.
    """

    def __init__(self, *, offload: bool) -> None:
        self._offload = offload
        self._old: Registry | None = None
        self._skeleton: list[TensorSpec] = []
        self._layouts: Layouts = {}
        self._rows: dict[str, torch.Tensor] | None = None
        self._host_state: dict[str, object] = {}

    def offload(self, registry: Registry, *, whole: bool) -> None:
        """After a fault: copies the state to the host, if that is asked for, and lets go of the objects' tensors."""
        if not self._offload:
            return
        holder = self._old or registry
        if whole and self._rows is None:  # else it waits already, or there is none
            tensors = self._describe(holder)
            self._rows = {
                name: row.cpu().clone() if row.device.type == "cpu" else row.cpu()
                for name, row in Memory(tensors).rows.items()
            }
        for one in (holder, registry):
            one.drop_tensors()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def replaces(self, old: Registry) -> None:
        """Other objects are registered now. Of several registrations before a restore the first holds the state."""
        if self._old is None:
            self._old = old

    def hand_over(self, registry: Registry, *, whole: bool) -> None:
        """Copies the old state into the new objects, if there is one worth having, and then forgets it.

        Left half way it can be done again: the old state is not touched.
        """
        old, rows = self._old, self._rows
        if registry.dropped:
            raise RuntimeError(
                "CheckpointManager(enable_offload=True) has let go of the registered objects: build and register "
                "them anew inside the wrapped function"
            )
        if old is not None and whole:
            if rows is None:
                rows = Memory(self._describe(old)).rows
            header = Header(0, list(self._skeleton), self._layouts, self._host_state, b"", (0, b""), Learned(), {})
            build(registry, header, 0).fill_from(Memory.of_rows(rows))
        self._old = self._rows = None

    def _describe(self, registry: Registry) -> dict[str, torch.Tensor]:
        tensors = registry.state.named_tensors()
        self._skeleton, self._layouts = registry.state.skeleton(), layouts_of(tensors)
        self._host_state = registry.state.host_state()
        return tensors
