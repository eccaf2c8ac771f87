"""Bytes on their way back to values: data only, whatever they are."""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from . import codes
from .codes import EncodingError

if TYPE_CHECKING:
    import torch


def unpack(data: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """`tensors`: those that were laid apart. Raises EncodingError."""
    if len(data) > codes.MAX_BYTES:
        raise EncodingError(f"{len(data)} bytes exceed {codes.MAX_BYTES}")
    try:
        return msgspec.msgpack.decode(data, ext_hook=functools.partial(_raise_to, tensors), strict=True)
    except EncodingError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise EncodingError(f"not an encoded value: {error}") from None


def _raise_to(tensors: Sequence[torch.Tensor], code: int, data: memoryview) -> Any:
    """The extension's value."""
    if code == codes.BIG_INT:
        return int(bytes(data))
    parts = msgspec.msgpack.decode(data, ext_hook=functools.partial(_raise_to, tensors), strict=True)
    if code == codes.APART:
        kind, number = parts
        return tensors[number] if kind == codes.APART_TENSOR else _array_on(tensors[number], kind)
    maker = _MAKERS.get(code)
    if maker is None:
        raise EncodingError(f"unknown extension {code}")
    return maker(parts)


def _pairs(parts: Iterable[Any]) -> dict[Any, Any]:
    return dict(map(tuple, parts))


def _array_on(tensor: torch.Tensor, kind: int) -> Any:
    array = tensor.numpy()
    return array[()] if kind == codes.APART_SCALAR else array


@functools.lru_cache(maxsize=256)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


def _of_torch(kind: str, value: Any) -> Any:
    import torch

    if kind == "Size":
        return torch.Size(value)
    if kind == "device":
        return torch.device(value)
    return _dtype(value.removeprefix("torch."))


def _dtype(name: str) -> torch.dtype:
    import torch

    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise EncodingError(f"{name!r} is no dtype of torch")
    return kind


def _tensor(dtype: str, shape: list[int], data: bytes, device: str, layout: list[int]) -> torch.Tensor:
    import torch

    kind = _dtype(dtype)
    if not data and 0 in shape:
        return torch.empty(shape, dtype=kind)
    value = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind)
    if not layout:
        value = value.view(shape)
    elif len(layout) == len(shape):
        order = sorted(range(len(shape)), key=layout.__getitem__, reverse=True)
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        value = value.view([shape[dim] for dim in order]).permute(inverse)
    else:
        raise EncodingError(f"a tensor of shape {shape} with strides {layout}")
    return value.cuda() if device == "cuda" and torch.cuda.is_available() else value


def _array(dtype: str, shape: list[int], data: bytes, scalar: bool) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise EncodingError("a numpy array of objects")
    array = numpy.frombuffer(bytearray(data), dtype=kind).reshape(shape)
    return array[()] if scalar else array


_MAKERS: dict[int, Callable[[Any], Any]] = {
    codes.TUPLE: tuple,
    codes.TENSOR: lambda parts: _tensor(*parts),
    codes.ARRAY: lambda parts: _array(*parts),
    codes.COUNTER: lambda parts: Counter(_pairs(parts)),
    codes.ORDERED: lambda parts: OrderedDict(map(tuple, parts)),
    codes.SET: lambda parts: frozenset(parts[1]) if parts[0] else set(parts[1]),
    codes.DEQUE: lambda parts: deque(parts[1], maxlen=parts[0]),
    codes.COMPLEX: lambda parts: complex(*parts),
    codes.TORCH: lambda parts: _of_torch(*parts),
    codes.DEFAULT: lambda parts: defaultdict(codes.FACTORIES[parts[0]], map(tuple, parts[1])),
    codes.PAIRS: _pairs,
    codes.NAMED: lambda parts: _namedtuple(parts[0], tuple(parts[1]))(*parts[2]),
}
