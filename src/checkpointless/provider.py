"""What a source of state for others must be able to say: the seam for other frameworks than plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch

TensorSpec: TypeAlias = tuple[str, str, tuple[int, ...], str]
"""Name, dtype without `torch.`, local shape, type of the device."""
Skeleton: TypeAlias = Sequence[TensorSpec]


class StateProvider(Protocol):
    """The large part of a rank's state: named tensors, which move between ranks bucket by bucket.

    A receiver builds what it lacks from the *source's* skeleton: a new process has no optimizer state yet.
    """

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's own tensors by name, always in the same order: views whose memory is the state itself."""

    def skeleton(self) -> list[TensorSpec]:
        """Name, dtype, shape and device type of every tensor of `named_tensors`, in that order."""

    def materialise(self, skeleton: Skeleton) -> None:
        """Makes the tensors that are in the skeleton and not here, and drops optimizer state that is not in it.

        Raises RestoreError where the skeleton cannot be this rank's: another model, another shape.
        """

    def quiesce(self) -> None:
        """Ends what still writes to the tensors: kernels, gathers of parameters."""

    def reset(self) -> None:
        """Drops what an interrupted step leaves behind: gradients."""
