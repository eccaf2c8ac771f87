"""Whether an object has changed since it was looked at: by version counters, without reading a tensor."""

from __future__ import annotations

import random
import weakref
from dataclasses import dataclass
from typing import Any

import torch

SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
_MOST_TENSORS = 20_000


@dataclass(frozen=True)
class Fingerprint:
    """Of one object at one moment."""

    tensors: dict[str, tuple[weakref.ref[torch.Tensor], int]]
    """By name: each with its version."""
    value: Any = None
    """What else tells."""

    def changed(self, later: Fingerprint) -> list[torch.Tensor] | None:
        """None: no. Otherwise the tensors that have changed; none when it is seen from something else."""
        found = []
        for name, (reference, version) in later.tensors.items():
            tensor, before = reference(), self.tensors.get(name)
            if tensor is not None and (before is None or before[0]() is not tensor or before[1] != version):
                found.append(tensor)
        if found:
            return found
        return None if self.value == later.value else []


def kind_of(target: Any) -> str | None:
    """What a person calls it; None for what is not looked at."""
    if isinstance(target, torch.Tensor):
        return "tensor"
    if isinstance(target, torch.optim.Optimizer):
        return "optimizer"
    if isinstance(target, torch.nn.Module):
        return "module"
    if isinstance(target, SCHEDULERS):
        return "scheduler"
    if isinstance(target, torch.amp.GradScaler):
        return "gradient scaler"
    if isinstance(target, torch.Generator | random.Random) or _is_numpys(target):
        return None if _is_global(target) else "generator"
    return None


def fingerprint(target: Any) -> Fingerprint:
    """Of an object that `kind_of` knows."""
    if isinstance(target, torch.Tensor):
        return Fingerprint(_versions([("", target)]))
    if isinstance(target, torch.nn.Module):
        return Fingerprint(_versions([*target.named_parameters(), *target.named_buffers()]))
    if isinstance(target, torch.optim.Optimizer):
        states = [(f"{number}.{key}", value) for number, state in enumerate(target.state.values())
                  for key, value in state.items()]  # fmt: skip
        return Fingerprint(_versions(states), len(states))
    if isinstance(target, SCHEDULERS):
        return Fingerprint({}, target.last_epoch)
    if isinstance(target, torch.amp.GradScaler):
        return Fingerprint(_versions([("scale", target._scale)]))
    if isinstance(target, torch.Generator):
        return Fingerprint({}, bytes(target.get_state().tolist()))
    if isinstance(target, random.Random):
        return Fingerprint({}, target.getstate())
    return Fingerprint({}, repr(getattr(target, "bit_generator", None) and target.bit_generator.state))


def _versions(named: list[tuple[str, Any]]) -> dict[str, tuple[weakref.ref[torch.Tensor], int]]:
    return {
        name: (weakref.ref(tensor), tensor._version)
        for name, tensor in named[:_MOST_TENSORS]
        if isinstance(tensor, torch.Tensor) and not tensor.is_inference()
    }


def _is_numpys(target: Any) -> bool:
    return type(target).__module__.startswith("numpy.random") and hasattr(target, "bit_generator")


def _is_global(target: Any) -> bool:
    return target is torch.default_generator or target is getattr(random.getstate, "__self__", None)
