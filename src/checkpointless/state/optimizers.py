"""Which optimizers a registered one is made of, and what each of them keeps.

torch's own is one. A container (torchtitan's) or a wrapper (accelerate's, SAM, Lookahead) has others inside, which
hold the state and do the stepping; the wrapper may keep some of its own beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import UnsupportedStateError

Optimizer = torch.optim.Optimizer


def parts_of(name: str, optimizer: Optimizer) -> dict[str, Optimizer]:
    """The optimizers that hold state, by name: `name` for itself, `name.<attribute>` for one inside.

    One that only shows the state of another (accelerate's `state` is its inner one's) is left out.
    """
    parts: dict[str, Optimizer] = {}
    _collect(name, optimizer, parts, set())
    states = {key: part.state for key, part in parts.items()}
    groups = {key: part.param_groups for key, part in parts.items()}
    return {
        key: part
        for key, part in parts.items()
        if not any(
            other != key
            and other.startswith(f"{key}.")
            and states[other] is states[key]
            and groups[other] is groups[key]
            for other in parts
        )
    }


def _collect(name: str, optimizer: Optimizer, found: dict[str, Optimizer], seen: set[int]) -> None:
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":  # it is this rank's part that is kept and stepped
        found[name] = optimizer.optim  # type: ignore[attr-defined]
        return
    found[name] = optimizer
    for attribute, inner in _inside(optimizer):
        _collect(f"{name}.{attribute}", inner, found, seen)


def _inside(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers among its attributes, also in a list or a dict."""
    for attribute, value in vars(optimizer).items():
        if attribute in ("state", "param_groups", "defaults"):
            continue
        if isinstance(value, Optimizer):
            yield attribute, value
        elif isinstance(value, list | tuple):
            yield from ((f"{attribute}.{i}", item) for i, item in enumerate(value) if isinstance(item, Optimizer))
        elif isinstance(value, Mapping):
            yield from ((f"{attribute}.{key}", item) for key, item in value.items() if isinstance(item, Optimizer))


def can_be_hooked(optimizer: Optimizer) -> bool:
    """Whether torch calls hooks around its `step`: not where its class has left out torch's constructor."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(type(optimizer).step, "hooked")


def extras_of(optimizer: Optimizer) -> dict[str, Any]:
    """What its `state_dict()` has beside torch's two entries. {} for one that gives something else altogether, whose
    tensors `TorchState.prove` looks for among those of the optimizers inside."""
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    if not hooks and type(optimizer).state_dict is Optimizer.state_dict:
        return {}
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":  # gives nothing before it has been consolidated
        return {}
    told = optimizer.state_dict()
    if not {"state", "param_groups"} <= told.keys():
        return {}
    return {key: value for key, value in told.items() if key not in ("state", "param_groups")}


def load_extras(optimizer: Optimizer, extras: Mapping[str, Any]) -> None:
    """Puts back what `extras_of` gave; the rest of its state stays what it is."""
    optimizer.load_state_dict({**optimizer.state_dict(), **extras})


def check_keys(name: str, optimizer: Optimizer) -> None:
    """Raises UnsupportedStateError for state that is kept under a tensor that is none of its parameters."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key in optimizer.state:
        if isinstance(key, torch.Tensor) and id(key) not in own:
            raise UnsupportedStateError(
                f"register({name}=...): {type(optimizer).__name__} keeps state for a tensor of shape "
                f"{list(key.shape)} that is in none of its parameter groups; keep it under a name instead"
            )
