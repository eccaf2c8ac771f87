"""Tells loader factories apart: what they are called with, and what the objects in that hold.

Two data modules of one class need not be of one fold. A description, not the pickle: that of one and the same object
may differ from process to process. As far as objects hold plain data, paths, tensors, arrays, or objects of these;
whatever else there is, is told by its class.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from typing import Any

import torch
import xxhash

from ...protocol import values

_MOST_VALUES = 20_000
_MOST_BYTES = 64 << 20
"""What exceeds these is told by its type and size: to describe it must take no time that a restart would notice."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def of_recipe(factory: Any) -> str:
    """Tells factories apart that must not share a stream: by their functions and plain arguments, in full."""
    return _digest(_Description(sys.maxsize, objects=False).of(factory))


def of_contents(factory: Any) -> str:
    """The same for factories, in any process, whose objects hold the same."""
    return _digest(_Description(_MOST_VALUES, objects=True).of(factory))


def _digest(description: str) -> str:
    return hashlib.sha256(description.encode(errors="surrogatepass")).hexdigest()[:32]


class _Description:
    """With `objects`, of what they hold; without, they are told by their class."""

    def __init__(self, most_values: int, *, objects: bool) -> None:
        self._values = most_values
        self._bytes = _MOST_BYTES
        self._objects = objects
        self._under_way: set[int] = set()

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, type) or (hasattr(value, "__qualname__") and hasattr(value, "__module__")):
            return f"{_module(value.__module__)}:{value.__qualname__}"
        name = f"<{_module(type(value).__module__)}:{type(value).__qualname__}>"
        size = len(value) if isinstance(value, list | tuple | dict | set | frozenset) else 1
        self._values -= size
        if self._values < 0 or id(value) in self._under_way:
            return f"{name} of {size}"
        self._under_way.add(id(value))
        try:
            return f"{name}{self._inside(value)}"
        finally:
            self._under_way.discard(id(value))

    def _inside(self, value: Any) -> str:
        if isinstance(value, functools.partial):
            return ", ".join(map(self.of, (value.func, value.args, value.keywords)))
        if isinstance(value, list | tuple):
            return str([self.of(item) for item in value])
        if isinstance(value, set | frozenset):
            return str(sorted(map(self.of, value)))
        if isinstance(value, dict):
            return str(sorted((self.of(key), self.of(item)) for key, item in value.items()))
        return self._inside_object(value) if self._objects else ""

    def _inside_object(self, value: Any) -> str:
        if isinstance(value, os.PathLike):
            return repr(os.fspath(value))
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {tuple(value.shape)} {self._tensor(value)}"
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            known = not value.dtype.hasobject and self._have_room(value.nbytes)
            return f"{value.dtype} {value.shape} {xxhash.xxh3_64_hexdigest(value.tobytes()) if known else ''}"
        held = getattr(value, "__dict__", None)
        return self._inside(held) if isinstance(held, dict) else ""

    def _tensor(self, tensor: torch.Tensor) -> str:
        plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_nested
        if not plain or tensor.is_quantized or not self._have_room(tensor.nbytes):
            return ""
        return xxhash.xxh3_64_hexdigest(values.encode(tensor.contiguous()))

    def _have_room(self, nbytes: int) -> bool:
        self._bytes -= nbytes
        return self._bytes >= 0


def _module(name: str) -> str:
    return "__main__" if name == "__mp_main__" else name
