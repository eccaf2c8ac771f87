"""The named tensors of modules and optimizers, for plain PyTorch, DDP, FSDP2 and ZeroRedundancyOptimizer.

Names come from the modules' own parameter names; optimizer state is found through the parameter it belongs to. With
sharded parameters (DTensor) only this rank's local part is meant, everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import RestoreError
from .provider import Skeleton, TensorSpec, dtype_name, specify
from .replicas import shard_of

_version = operator.attrgetter("_version")


class TorchState:
    """Modules and optimizers as a `StateProvider`. References to parameters are taken once, at registration.

    (While FSDP2 computes, a module shows its gathered parameters instead of the shards that are the state.)
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            own = unwrap(module)
            self.parameters |= {f"{name}.{key}": value for key, value in own.named_parameters()}
            self.buffers |= {f"{name}.{key}": local(value) for key, value in own.named_buffers()}
        self._registered_optimizers = dict(optimizers)
        self._optimizers = {name: inner_optimizer(optimizer) for name, optimizer in optimizers.items()}
        names = {id(value): name for name, value in self.parameters.items()}
        self._owned: dict[str, tuple[torch.optim.Optimizer, torch.Tensor]] = {}
        """By `<optimizer>/<parameter>`: where the optimizer keeps that parameter's state."""
        for prefix, optimizer in self._optimizers.items():
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    key = names.get(id(parameter), f"{group_index}.{index}")
                    self._owned[f"{prefix}/{key}"] = (optimizer, parameter)
                    if id(parameter) not in names:  # trained, but of no registered module
                        self.parameters[f"{prefix}.{key}"] = parameter

    def shard(self) -> str:
        return shard_of(self.parameters, self._registered_optimizers)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: local(value) for name, value in self.parameters.items()}
        for name, (optimizer, parameter) in self._owned.items():
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{key}"] = local(value)
        return tensors

    def skeleton(self) -> list[TensorSpec]:
        return specify(self.named_tensors())

    def host_state(self) -> dict[str, Any]:
        """Optimizer state that is no tensor (old optimizers count their steps in Python)."""
        return {
            f"{name}/{key}": value
            for name, (optimizer, parameter) in self._owned.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if not isinstance(value, torch.Tensor)
        }

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            owner, _, key = name.rpartition("/")
            optimizer, parameter = self._owner(owner, name)
            optimizer.state[parameter][key] = value

    def materialise(self, skeleton: Skeleton) -> None:
        wanted = {name: (dtype, tuple(shape), device) for name, dtype, shape, device in skeleton}
        self._check_parameters(wanted)
        for name, (optimizer, parameter) in self._owned.items():
            state = optimizer.state.get(parameter)
            for key in [key for key in state or () if f"{name}/{key}" not in wanted]:
                del optimizer.state[parameter][key]
            if state is not None and not state:
                del optimizer.state[parameter]
        for name, (dtype, shape, device) in wanted.items():
            if name not in self.parameters:
                self._make(name, dtype, shape, device)

    def quiesce(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def reset(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def versions(self) -> int:
        """A number that changes with every change of a parameter in place."""
        return sum(map(_version, self.parameters.values()))

    def drop(self) -> None:
        for optimizer in {*self._optimizers.values(), *self._registered_optimizers.values()}:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = []
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.parameters.clear()
        self._owned.clear()

    def _check_parameters(self, wanted: Mapping[str, tuple[str, tuple[int, ...], str]]) -> None:
        for name, value in self.parameters.items():
            if name not in wanted:
                raise RestoreError(f"the source has no parameter {name}: it trains another model")
            here = local(value)
            if wanted[name][:2] != (dtype_name(here), tuple(here.shape)):
                raise RestoreError(
                    f"parameter {name} is {dtype_name(here)} {list(here.shape)} here and {wanted[name][0]} "
                    f"{list(wanted[name][1])} on the source: they are not replicas of each other"
                )

    def _make(self, name: str, dtype: str, shape: tuple[int, ...], device: str) -> None:
        """One tensor of optimizer state, with the parameter's layout where it has its shape."""
        owner, _, key = name.rpartition("/")
        optimizer, parameter = self._owner(owner, name)
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise RestoreError(f"{name} is of an unknown dtype, {dtype!r}")
        present = optimizer.state.get(parameter, {}).get(key)
        if present is not None and (dtype_name(local(present)), tuple(local(present).shape)) == (dtype, shape):
            return
        own = local(parameter)
        if tuple(own.shape) == shape and own.device.type == device:
            made = torch.zeros_like(parameter, dtype=kind, requires_grad=False)
        else:  # such as the step counter, which some optimizers keep on the CPU
            made = torch.zeros(shape, dtype=kind, device=own.device if own.device.type == device else "cpu")
        optimizer.state[parameter][key] = made

    def _owner(self, owner: str, name: str) -> tuple[torch.optim.Optimizer, torch.Tensor]:
        if owner not in self._owned:
            raise RestoreError(f"{name} of the source belongs to nothing that is registered here")
        return self._owned[owner]


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside DistributedDataParallel or torch.compile."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module.__dict__["_modules"]["_orig_mod"]
        else:
            return module


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's part, inside a ZeroRedundancyOptimizer."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        inner: torch.optim.Optimizer = optimizer.optim  # type: ignore[attr-defined]
        return inner
    return optimizer


def local(value: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is in this process, detached: a view of the same memory."""
    value = value.detach()
    to_local = getattr(value, "to_local", None)
    return to_local() if to_local is not None else value
