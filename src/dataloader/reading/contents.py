"""Tells apart what the objects in a loader factory hold: two data modules of one class need not be of one fold.

A description, not the pickle: that of one and the same object may differ from process to process. As far as objects
hold plain data, paths, tensors, arrays, or objects of these; whatever else there is, is told by its class.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from typing import Any

import torch
import xxhash

_MOST_VALUES = 20_000
_MOST_BYTES = 64 << 20
"""What exceeds these is told by its type and size: to describe it must take no time that a restart would notice."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def fingerprint(factory: Any) -> str:
    """The same for factories, in any process, whose objects hold the same."""
    return hashlib.sha256(_Description().of(factory).encode(errors="surrogatepass")).hexdigest()[:32]


class _Description:
    def __init__(self) -> None:
        self._values = _MOST_VALUES
        self._bytes = _MOST_BYTES
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
        if isinstance(value, os.PathLike):
            return repr(os.fspath(value))
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {tuple(value.shape)} {self._tensor(value)}"
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return f"{value.dtype} {value.shape} {'' if value.dtype.hasobject else self._checksum(value)}"
        held = getattr(value, "__dict__", None)
        return self._inside(held) if isinstance(held, dict) else ""

    def _tensor(self, tensor: torch.Tensor) -> str:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            return ""
        return self._checksum(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())

    def _checksum(self, array: Any) -> str:
        self._bytes -= array.nbytes
        return "" if self._bytes < 0 else xxhash.xxh3_64_hexdigest(array.tobytes())


def _module(name: str) -> str:
    return "__main__" if name == "__mp_main__" else name
