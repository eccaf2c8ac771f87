"""A value of dicts, lists and tuples, taken apart into its tensors, by path, and the structure that is left.

What an optimizer keeps for a parameter may be nested (LBFGS has lists of directions, Shampoo one of factors). The
tensors move between ranks as such; the structure travels as a plain value, with a mark where each tensor was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MARK = "\0tensor"
"""The only key of the dict that stands for a tensor in a structure; no dict of anybody's has such a key."""


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of every tensor in the value, in a fixed order; a path begins with `path`."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value, key=_sortable):
            yield from tensors_in(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from tensors_in(item, f"{path}/{number}")


def structure(value: Any, path: str) -> Any:
    """The value with a mark in the place of every tensor: its path, and whether it is one of many shards (DTensor)."""
    if isinstance(value, torch.Tensor):
        return {_MARK: (path, hasattr(value, "device_mesh"))}
    if isinstance(value, dict):
        items = {key: structure(item, f"{path}/{key}") for key, item in value.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple):
        return type(value)([structure(item, f"{path}/{number}") for number, item in enumerate(value)])
    return value


def rebuild(plain: Any, tensor: Callable[[str, bool], torch.Tensor]) -> Any:
    """The value that `structure` was given. `tensor(path, sharded)` gives what belongs where a mark is."""
    if isinstance(plain, dict):
        if len(plain) == 1 and _MARK in plain:
            path, sharded = plain[_MARK]
            return tensor(path, sharded)
        items = {key: rebuild(item, tensor) for key, item in plain.items()}
        return OrderedDict(items) if isinstance(plain, OrderedDict) else items
    if type(plain) in (list, tuple):
        return type(plain)([rebuild(item, tensor) for item in plain])
    return plain


def _sortable(key: Any) -> tuple[str, str]:
    return type(key).__name__, str(key)
