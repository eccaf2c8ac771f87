"""Batches as plain data: what may be in one, and how it is told to another process without pickle.

A batch is taken apart into its tensors and a structure, and put together again. The structure is msgpack: None, bool,
int (64 bits), float, str and bytes stand for themselves; everything else is a list that begins with a letter:

    ["t", i]            tensor i                       ["a", i]           tensor i, as a numpy array
    ["s", i]            tensor i, as a numpy scalar    ["l", [...]]       list
    ["u", [...]]        tuple                          ["d", [k, v, ...]] dict
    ["o", [k, v, ...]]  OrderedDict                    ["n", name, [field, ...], [...]] namedtuple

Anything else is refused with its type and its place in the batch.
"""

from __future__ import annotations

import collections
import functools
import sys
from typing import Any, NoReturn

import msgspec
import torch

from ..errors import BatchTypeError

_INT_LIMITS = range(-(1 << 63), 1 << 64)
_MAX_DEPTH = 100
_PLAIN = (type(None), bool, float, str, bytes)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def take_apart(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """(structure, tensors). Raises BatchTypeError for what cannot be in a batch."""
    tensors: list[torch.Tensor] = []
    structure = _down(value, tensors, ())
    return _encode(structure), tensors


def put_together(structure: bytes, tensors: list[torch.Tensor]) -> Any:
    """The batch. Raises ValueError for bytes that `take_apart` did not write."""
    try:
        return _up(_decode(structure), tensors)
    except (msgspec.MsgspecError, IndexError, TypeError) as error:
        raise ValueError(f"not the structure of a batch: {error}") from None


def _down(value: Any, tensors: list[torch.Tensor], path: tuple[Any, ...]) -> Any:  # noqa: RET503
    kind = type(value)
    if kind is torch.Tensor:
        tensors.append(_plain_tensor(value, path))
        return ["t", len(tensors) - 1]
    if kind in _PLAIN:
        return value
    if kind is int:
        if value not in _INT_LIMITS:
            _refuse("an int of more than 64 bits", path)
        return value
    if len(path) > _MAX_DEPTH:
        _refuse(f"more than {_MAX_DEPTH} levels", path[:5])
    if kind is list:
        return ["l", [_down(item, tensors, (*path, i)) for i, item in enumerate(value)]]
    if kind is tuple:
        return ["u", [_down(item, tensors, (*path, i)) for i, item in enumerate(value)]]
    if kind is dict or kind is collections.OrderedDict:
        return ["d" if kind is dict else "o", _pairs(value, tensors, path)]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        items = [_down(item, tensors, (*path, field)) for field, item in zip(kind._fields, value, strict=True)]
        return ["n", kind.__name__, list(kind._fields), items]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray) and kind.__module__ == "numpy":
        tensors.append(_from_numpy(numpy, value, path))
        return ["a" if kind is numpy.ndarray else "s", len(tensors) - 1]
    _refuse(f"{kind.__module__}.{kind.__qualname__}", path)


def _pairs(value: dict[Any, Any], tensors: list[torch.Tensor], path: tuple[Any, ...]) -> list[Any]:
    pairs: list[Any] = []
    for key, item in value.items():
        if type(key) not in (str, int, bool, float, bytes, type(None), tuple):
            _refuse(f"a key of type {type(key).__module__}.{type(key).__qualname__}", path)
        pairs += [_down(key, tensors, path), _down(item, tensors, (*path, key))]
    return pairs


def _plain_tensor(tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        _refuse("a sparse, nested or quantized tensor", path)
    if tensor.device.type != "cpu":
        _refuse(f"a tensor on {tensor.device} (batches are made on the CPU)", path)
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()


def _from_numpy(numpy: Any, value: Any, path: tuple[Any, ...]) -> torch.Tensor:
    try:
        array = numpy.ascontiguousarray(value)
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).reshape(numpy.shape(value))
    except TypeError:
        _refuse(f"a numpy array of {value.dtype}", path)


def _refuse(what: str, path: tuple[Any, ...]) -> NoReturn:
    place = "".join(f"[{step!r}]" for step in path)
    raise BatchTypeError(
        f"batch{place} is {what}: a cached batch can hold tensors, numpy arrays, None, bool, int, float, str, bytes, "
        "and lists, tuples and dicts of these; make it one of them in the collate function"
    )


def _up(value: Any, tensors: list[torch.Tensor]) -> Any:
    if type(value) is not list:
        return value
    kind, argument = value[0], value[1]
    if kind == "t":
        return tensors[argument]
    if kind == "l":
        return [_up(item, tensors) for item in argument]
    if kind == "u":
        return tuple([_up(item, tensors) for item in argument])
    if kind == "d":
        return {_up(argument[i], tensors): _up(argument[i + 1], tensors) for i in range(0, len(argument), 2)}
    if kind == "o":
        pairs = [(_up(argument[i], tensors), _up(argument[i + 1], tensors)) for i in range(0, len(argument), 2)]
        return collections.OrderedDict(pairs)
    if kind == "n":
        return _namedtuple(argument, tuple(value[2]))(*[_up(item, tensors) for item in value[3]])
    if kind == "a":
        return tensors[argument].numpy()
    if kind == "s":
        return tensors[argument].numpy()[()]
    raise ValueError(f"not the structure of a batch: {str(kind)[:20]!r}")


@functools.lru_cache(maxsize=256)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    """A namedtuple like the one in the batch: to find the very class would mean to import what a file names."""
    return collections.namedtuple(name, fields)
