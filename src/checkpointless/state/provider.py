"""What a source of state must be able to say: the seam for other frameworks than plain PyTorch, and several as one.

`manager.register(megatron=provider)` takes any object with the methods of `StateProvider`; plain modules and
optimizers become a `tensors.TorchState`. An update that no torch optimizer makes is stated by `with manager.update()`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ...protocol.values import layout_of
from ..errors import RestoreError

TensorSpec: TypeAlias = tuple[str, str, tuple[int, ...], str]
"""Name, dtype without `torch.`, local shape, type of the device."""
Skeleton: TypeAlias = Sequence[TensorSpec]
Layouts: TypeAlias = Mapping[str, tuple[int, ...]]
"""Strides in elements of the dense tensors whose memory is in another order than row-major (channels last, transposed).
All others travel in row-major order, also those whose memory has holes."""


class StateProvider(abc.ABC):
    """The large part of a rank's state: named tensors, which move between ranks bucket by bucket.

    A receiver builds what it lacks from the *source's* skeleton: a new process has no optimizer state yet. The order on
    a receiver: `materialise`, `load_host_state`, the bytes of `named_tensors`, `arrived`. A class need not inherit from
    this one; of an object that does not, what has a default here may be missing.
    """

    @abc.abstractmethod
    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's own tensors by name, always in the same order: views whose memory is the state itself."""

    @abc.abstractmethod
    def materialise(self, skeleton: Skeleton) -> None:
        """Makes the tensors that are in the skeleton and not here, and drops optimizer state that is not in it.

        Raises RestoreError where the skeleton cannot be this rank's: another model, another shape.
        """

    @abc.abstractmethod
    def versions(self) -> int:
        """A number that changes when the trained tensors do. Asked for at every step."""

    def skeleton(self) -> list[TensorSpec]:
        """The spec of every tensor of `named_tensors`, in that order."""
        return specify(self.named_tensors())

    def shard(self) -> str:
        """Which part of the state this rank holds: ranks that say the same hold the same bytes. "": the whole."""
        return ""

    def parts(self) -> Mapping[str, str]:
        """By tensor: the name of its replica group, for tensors that other ranks hold than the rest (experts).

        Ranks for which a name stands for the same bytes give it the same group. Tensors that are not named here belong
        to `shard()`.
        """
        return {}

    def frozen(self) -> frozenset[str]:
        """Names of tensors that training never changes (base weights under LoRA): they move to who has lost them, and
        are not copied for rollbacks and snapshots again and again."""
        return frozenset()

    def host_state(self) -> dict[str, Any]:
        """State that moves with the tensors and is none: plain values, of which `protocol/values/` has the list."""
        return {}

    def load_host_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to do
        """What `host_state` gave on the source. Raises RestoreError when it cannot be this rank's."""

    def rank_state(self) -> dict[str, Any]:
        """Plain values that are this rank's own, as of now: noted at every step, given back to this rank only."""
        return {}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to do
        """What `rank_state` gave when the step to go on with began."""

    def arrived(self) -> None:  # noqa: B027 - most have nothing to do
        """Tensors and host state are those of the step to go on with: remake what follows from them (bf16 weights from
        main parameters). Called on every rank in every restart, also where nothing was received: an update may have
        been left in the part that can be made again (see `CheckpointManager.update`)."""

    def quiesce(self) -> None:  # noqa: B027 - most have nothing to do
        """Ends what still writes to the tensors: kernels, gathers of parameters."""

    def reset(self) -> None:  # noqa: B027 - most have nothing to do
        """Drops what an interrupted step leaves behind: gradients."""

    def drop(self) -> None:  # noqa: B027 - most have nothing to do
        """Lets go of everything large, for `enable_offload`: the state is elsewhere, other objects will take over."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Whoever has the methods that have no default is one, and no module or optimizer is."""
        plain = cls is StateProvider and not issubclass(other, torch.nn.Module | torch.optim.Optimizer)
        has = plain and all(callable(getattr(other, name, None)) for name in cls.__abstractmethods__)
        return True if has else NotImplemented


def specify(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """The skeleton of these tensors."""
    return [(name, dtype_name(value), tuple(value.shape), value.device.type) for name, value in tensors.items()]


def layouts_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """By name: the strides of those that are not row-major."""
    return {name: layout for name, value in tensors.items() if (layout := layout_of(value))}


def dtype_name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def make_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: Sequence[int]) -> torch.Tensor:
    """A tensor of that layout, to be filled."""
    if not layout:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.empty_strided(tuple(shape), tuple(layout), dtype=dtype, device=device)


def check_skeleton(value: Any) -> Skeleton:
    """What has come over the wire, as a skeleton. Raises RestoreError."""
    if not isinstance(value, list):
        raise RestoreError("the source's skeleton is not a list")
    for item in value:
        match item:
            case (str(), str(), tuple() as shape, "cpu" | "cuda") if all(isinstance(n, int) and n >= 0 for n in shape):
                continue
        raise RestoreError(f"not the description of a tensor: {str(item)[:100]}")
    return value


def check_layouts(value: Any, skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
    """What has come over the wire, as the layouts of a skeleton's tensors. Raises RestoreError."""
    shapes = {name: shape for name, _, shape, _ in skeleton}
    if not isinstance(value, dict) or not value.keys() <= shapes.keys():
        raise RestoreError("the source's layouts are not those of its tensors")
    for name, layout in value.items():
        if not isinstance(layout, tuple) or not all(isinstance(n, int) and n >= 0 for n in layout):
            raise RestoreError(f"not the layout of a tensor: {str(layout)[:100]}")
        if len(layout) != len(shapes[name]) or not _is_layout(shapes[name], layout):
            raise RestoreError(f"{name} of shape {list(shapes[name])} cannot be dense with the strides {list(layout)}")
    return value


def _is_layout(shape: Sequence[int], layout: Sequence[int]) -> bool:
    """Whether the strides are those of a dense tensor: others would ask for memory without bound."""
    expected = 1
    for stride, size in sorted(zip(layout, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


class CombinedState(StateProvider):
    """Several providers as one. The first one's names stay as they are, the others' begin with `<name>::`."""

    def __init__(self, first: StateProvider, others: Mapping[str, Any]) -> None:
        providers = {f"{name}::": complete(part) for name, part in others.items()}
        self._parts: dict[str, StateProvider] = {"": first} | providers

    def shard(self) -> str:
        told = [f"{prefix}{shard}" for prefix, part in self._parts.items() if (shard := part.shard())]
        return ",".join(told)

    def parts(self) -> dict[str, str]:
        return {
            prefix + name: f"{prefix}{group}"
            for prefix, part in self._parts.items()
            for name, group in part.parts().items()
        }

    def frozen(self) -> frozenset[str]:
        return frozenset(prefix + name for prefix, part in self._parts.items() for name in part.frozen())

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
        for prefix, values in self._apart(state).items():
            self._parts[prefix].load_host_state(values)

    def rank_state(self) -> dict[str, Any]:
        return self._together(lambda part: part.rank_state())

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        for prefix, values in self._apart(state).items():
            if values:
                self._parts[prefix].load_rank_state(values)

    def versions(self) -> int:
        total = 0
        for part in self._parts.values():
            total += part.versions()
        return total

    def arrived(self) -> None:
        for part in self._parts.values():
            part.arrived()

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

    def _apart(self, named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        values: dict[str, dict[str, Any]] = {prefix: {} for prefix in self._parts}
        for full, value in named.items():
            prefix, name = self._divide(full)
            values[prefix][name] = value
        return values

    def _divide(self, full: str) -> tuple[str, str]:
        """Whose a name is, and what it is called there."""
        prefix = next((prefix for prefix in self._parts if prefix and full.startswith(prefix)), "")
        return prefix, full.removeprefix(prefix)


def complete(provider: Any) -> StateProvider:
    """The provider, with defaults for what a class that does not inherit from StateProvider leaves out."""
    if StateProvider in type(provider).__mro__:
        return provider  # type: ignore[no-any-return]
    missing = {
        name: getattr(StateProvider, name)
        for name, value in vars(StateProvider).items()
        if callable(value) and not name.startswith("_") and not hasattr(provider, name)
    }
    if missing:
        original = type(provider)
        provider.__class__ = type(original.__name__, (original,), {"__module__": original.__module__, **missing})
    return provider  # type: ignore[no-any-return]
