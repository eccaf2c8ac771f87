"""What a source of state must be able to say: the seam for other frameworks than plain PyTorch, and several as one.

`manager.register(megatron=provider)` takes any object with the methods of `StateProvider`; plain modules and
optimizers become a `tensors.TorchState`. An update that no torch optimizer makes is stated by `with manager.update()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

TensorSpec: TypeAlias = tuple[str, str, tuple[int, ...], str]
"""Name, dtype without `torch.`, local shape, type of the device."""
Skeleton: TypeAlias = Sequence[TensorSpec]


@runtime_checkable
class StateProvider(Protocol):
    """The large part of a rank's state: named tensors, which move between ranks bucket by bucket.

    A receiver builds what it lacks from the *source's* skeleton: a new process has no optimizer state yet.
    """

    def shard(self) -> str:
        """Which part of the state this rank holds: ranks that say the same hold the same bytes. "": the whole."""

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's own tensors by name, always in the same order: views whose memory is the state itself."""

    def skeleton(self) -> list[TensorSpec]:
        """Name, dtype, shape and device type of every tensor of `named_tensors`, in that order."""

    def materialise(self, skeleton: Skeleton) -> None:
        """Makes the tensors that are in the skeleton and not here, and drops optimizer state that is not in it.

        Raises RestoreError where the skeleton cannot be this rank's: another model, another shape.
        """

    def host_state(self) -> dict[str, Any]:
        """State that moves with the tensors and is none: plain values, of which `encoding.py` has the list."""

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """What `host_state` gave on the source. Raises RestoreError when it cannot be this rank's."""

    def versions(self) -> int:
        """A number that changes when the trained tensors do. Asked for at every step."""

    def quiesce(self) -> None:
        """Ends what still writes to the tensors: kernels, gathers of parameters."""

    def reset(self) -> None:
        """Drops what an interrupted step leaves behind: gradients."""

    def drop(self) -> None:
        """Lets go of everything large, for `enable_offload`: the state is elsewhere, other objects will take over."""


def specify(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """The skeleton of these tensors."""
    return [(name, dtype_name(value), tuple(value.shape), value.device.type) for name, value in tensors.items()]


def dtype_name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


class CombinedState:
    """Several providers as one. The first one's names stay as they are, the others' begin with `<name>::`."""

    def __init__(self, first: StateProvider, others: Mapping[str, StateProvider]) -> None:
        self._parts: dict[str, StateProvider] = {"": first} | {f"{name}::": part for name, part in others.items()}

    def shard(self) -> str:
        told = [f"{prefix}{shard}" for prefix, part in self._parts.items() if (shard := part.shard())]
        return ",".join(told)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        return self._together(lambda part: part.named_tensors())

    def skeleton(self) -> list[TensorSpec]:
        parts = [(prefix, spec) for prefix, part in self._parts.items() for spec in part.skeleton()]
        return [(prefix + name, dtype, shape, device) for prefix, (name, dtype, shape, device) in parts]

    def materialise(self, skeleton: Skeleton) -> None:
        specs: dict[str, list[TensorSpec]] = {prefix: [] for prefix in self._parts}
        for full, dtype, shape, device in skeleton:
            prefix, name = self._divide(full)
            specs[prefix].append((name, dtype, shape, device))
        for prefix, part in self._parts.items():
            part.materialise(specs[prefix])

    def host_state(self) -> dict[str, Any]:
        return self._together(lambda part: part.host_state())

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        values: dict[str, dict[str, Any]] = {prefix: {} for prefix in self._parts}
        for full, value in state.items():
            prefix, name = self._divide(full)
            values[prefix][name] = value
        for prefix, part in self._parts.items():
            part.load_host_state(values[prefix])

    def versions(self) -> int:
        total = 0
        for part in self._parts.values():
            total += part.versions()
        return total

    def quiesce(self) -> None:
        for part in self._parts.values():
            part.quiesce()

    def reset(self) -> None:
        for part in self._parts.values():
            part.reset()

    def drop(self) -> None:
        for part in self._parts.values():
            part.drop()

    def _together(self, named: Callable[[StateProvider], Mapping[str, Any]]) -> dict[str, Any]:
        return {prefix + name: value for prefix, part in self._parts.items() for name, value in named(part).items()}

    def _divide(self, full: str) -> tuple[str, str]:
        """Whose a name is, and what it is called there."""
        prefix = next((prefix for prefix in self._parts if prefix and full.startswith(prefix)), "")
        return prefix, full.removeprefix(prefix)
