"""The state of a registered object (a scheduler, an optimizer's hyperparameters, a sampler) as a plain value."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch

from .optimizers import extras_of, load_extras

_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes})


def read_object(target: Any) -> Any:
    """The state of a registered object, as a value of its own that does not change with it."""
    if isinstance(target, torch.optim.Optimizer):
        groups = [own_copy({**group, "params": None}) for group in target.param_groups]
        extras = extras_of(target)
        return {"groups": groups, "extras": own_copy(extras)} if extras else groups
    if hasattr(target, "state_dict"):
        return own_copy(target.state_dict())
    if isinstance(target, torch.Generator):
        return target.get_state()
    return target.getstate() if isinstance(target, random.Random) else own_copy(target.bit_generator.state)


def is_object_in(target: Any, state: Any) -> bool:
    """Whether a registered object is in that state; nothing is copied."""
    if isinstance(target, torch.optim.Optimizer):
        groups, extras = target.param_groups, extras_of(target)
        if extras or isinstance(state, dict):
            if not isinstance(state, dict) or not same(state["extras"], extras):
                return False
            state = state["groups"]
        return len(groups) == len(state) and all(map(_is_group_in, groups, state))
    return same(state, target.state_dict() if hasattr(target, "state_dict") else read_object(target))


def _is_group_in(group: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether a parameter group has these hyperparameters, and no others."""
    return same(values, {**group, "params": None})


def write_object(target: Any, state: Any) -> None:
    """Brings a registered object to that state."""
    if isinstance(target, torch.Generator):
        target.set_state(state)
    elif isinstance(target, random.Random):
        target.setstate(state)
    elif isinstance(target, torch.optim.Optimizer):
        if isinstance(state, dict):
            load_extras(target, own_copy(state["extras"]))
            state = state["groups"]
        _forget_groups(target, len(state))
        for group, values in zip(target.param_groups, state, strict=True):
            _update_group(group, values)
    elif hasattr(target, "state_dict"):
        target.load_state_dict(own_copy(state))
        if is_scaler(target):
            _forget_stage(target)
    else:
        target.bit_generator.state = state


def _forget_groups(target: torch.optim.Optimizer, count: int) -> None:
    """Parameter groups that were added since go, with what the optimizer keeps of them: the script adds them again."""
    for group in target.param_groups[count:]:
        for parameter in group["params"]:
            target.state.pop(parameter, None)
    del target.param_groups[count:]


def _update_group(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Hyperparameters into a parameter group; a tensor (a capturable learning rate) stays the same object. What the
    group has besides is of the interrupted step."""
    for key in group.keys() - values.keys():
        del group[key]
    for key, value in values.items():
        if key == "params":  # they are no hyperparameters
            continue
        if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
            group[key].copy_(value)
        else:
            group[key] = value


def is_generator(target: Any) -> bool:
    """Whether this is a random generator of torch, Python or numpy."""
    return isinstance(target, torch.Generator | random.Random) or hasattr(target, "bit_generator")


def is_scaler(target: Any) -> bool:
    """Whether this is one of torch's gradient scalers."""
    return isinstance(target, torch.amp.GradScaler) or type(target).__name__ == "ShardedGradScaler"


def _forget_stage(scaler: Any) -> None:
    """What the interrupted step has done with the scaler (`unscale_` once per step), which is not in its state."""
    getattr(scaler, "_per_optimizer_states", {}).clear()  # one that is disabled has none


def own_copy(value: Any) -> Any:
    """A deep copy; `copy.deepcopy` takes ten times as long for the plain values that states are made of."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is dict:
        return {key: item if type(item) in _IMMUTABLE else own_copy(item) for key, item in value.items()}
    if kind is list:
        return [item if type(item) in _IMMUTABLE else own_copy(item) for item in value]
    if kind is tuple:
        return tuple([item if type(item) in _IMMUTABLE else own_copy(item) for item in value])
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def same(one: Any, other: Any) -> bool:
    """Equality of states: dicts, lists and tuples of plain values, tensors and numpy arrays."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other.to(one.device))
    if isinstance(one, dict | list | tuple):
        try:
            return type(one) is type(other) and bool(one == other)
        except (RuntimeError, ValueError):  # tensors or arrays in it are not equal or different as a whole
            return _same_items(one, other)
    if type(one).__module__ == "numpy":
        return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
    return bool(one == other)


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other))
