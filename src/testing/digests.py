"""Digests of state: equal exactly where the bytes are equal. Torch is imported by whoever has tensors."""

from __future__ import annotations

import ctypes
import pickle
from typing import Any

import torch
import xxhash

_NESTED = (torch.Tensor, dict, list, tuple)


def digests(name: str, value: Any) -> dict[str, str]:
    """By dotted name: the digest of every tensor and plain value in it."""
    found: dict[str, str] = {}
    _add(found, name, value)
    return found


def of_tensor(tensor: torch.Tensor) -> str:
    """Of what this rank holds: type, shape and bytes."""
    local: Any = tensor.detach()
    if hasattr(local, "to_local"):  # a DTensor
        local = local.to_local()
        local = local.wait() if hasattr(local, "wait") else local
    if hasattr(local, "__tensor_flatten__"):
        names, _ = local.__tensor_flatten__()
        return _hex(repr((type(local).__name__, [of_tensor(getattr(local, part)) for part in names])).encode())
    hashed = xxhash.xxh3_64(repr((str(local.dtype), tuple(local.shape))).encode())
    if local.layout is not torch.strided:
        hashed.update(repr(local.layout).encode())
        local = local.to_dense()
    if local.is_quantized:
        local = local.int_repr()
    if local.device.type != "meta":
        dense = local.resolve_conj().resolve_neg().cpu().contiguous()
        row = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # a single element may have any stride
        if row.numel():
            hashed.update((ctypes.c_char * row.numel()).from_address(row.data_ptr()))
    return hashed.hexdigest()


def _add(found: dict[str, str], name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = of_tensor(value)
    elif isinstance(value, dict):
        found[name] = _hex(repr(sorted(map(_key, value))).encode())  # their order is no state
        for key, item in value.items():
            _add(found, f"{name}.{_key(key)}", item)
    elif isinstance(value, list | tuple) and any(isinstance(item, _NESTED) for item in value):
        found[name] = _hex(repr(len(value)).encode())
        for number, item in enumerate(value):
            _add(found, f"{name}.{number}", item)
    else:
        found[name] = _hex(_bytes(value))


def _key(key: Any) -> str:
    return str(key) if isinstance(key, str | int) else type(key).__name__


def _bytes(value: Any) -> bytes:
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return repr((type(value).__name__, value)).encode()
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return repr((str(value.dtype), value.shape)).encode() + bytes(value.tobytes())
    if isinstance(value, list | tuple):
        return b"".join(len(part).to_bytes(8, "little") + part for part in map(_bytes, value))
    try:
        return pickle.dumps(value)
    except Exception:  # what cannot be carried is refused when it is registered; here it is only not looked into
        return type(value).__qualname__.encode()


def _hex(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)
