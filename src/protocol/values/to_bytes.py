"""Values on their way to bytes: in msgpack's own types where it has them, else as its extensions."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from . import codes
from .codes import NotPlainError

if TYPE_CHECKING:
    import torch

    Apart: TypeAlias = list[torch.Tensor] | None
    """Where tensors go that are not to be in the bytes; None: they are in the bytes."""

_PLAIN = frozenset((type(None), bool, float, str, bytes))
_INT64 = range(-(2**63), 2**64)


def pack(value: Any, apart: Apart) -> bytes:
    """Raises NotPlainError."""
    try:
        return msgspec.msgpack.encode(_lower(value, apart))
    except RecursionError:
        raise NotPlainError("what refers to itself, or is nested too deeply,") from None


def _lower(value: Any, apart: Apart) -> Any:
    """The value in msgpack's own types and extensions."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if value in _INT64 else msgspec.msgpack.Ext(codes.BIG_INT, str(value).encode())
    if kind is dict:
        return _lower_dict(value, apart)
    if kind is list:
        return _lower_items(value, apart)
    if kind is tuple:
        return _ext(codes.TUPLE, _lower_items(value, apart))
    if kind is Counter or kind is OrderedDict:
        return _ext(codes.COUNTER if kind is Counter else codes.ORDERED, _lower_pairs(value, apart))
    if kind is set or kind is frozenset:
        return _ext(codes.SET, [kind is frozenset, [_lower(item, apart) for item in sorted(value, key=repr)]])
    if kind is deque:
        return _ext(codes.DEQUE, [value.maxlen, _lower_items(list(value), apart)])
    if kind is complex:
        return _ext(codes.COMPLEX, [value.real, value.imag])
    if kind is defaultdict and value.default_factory in codes.FACTORIES.values():
        factory = next(name for name, known in codes.FACTORIES.items() if known is value.default_factory)
        return _ext(codes.DEFAULT, [factory, _lower_pairs(value, apart)])
    if apart is not None and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _ext(codes.NAMED, [kind.__name__, list(kind._fields), _lower_items(value, apart)])
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _lower_tensor(value, apart)
    if torch is not None and kind in (torch.Size, torch.dtype, torch.device):
        return _ext(codes.TORCH, [kind.__name__, list(value) if kind is torch.Size else str(value)])
    numpy = sys.modules.get("numpy")
    if numpy is not None and (kind in (numpy.ndarray, numpy.memmap) or isinstance(value, numpy.generic)):
        return _lower_array(value, apart)
    raise NotPlainError(_name(kind))


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lower_items(value: Sequence[Any], apart: Apart) -> list[Any]:
    """A row of strings or of small numbers, such as the state of a random generator, needs no look at each."""
    kinds = set(map(type, value))
    if kinds <= _PLAIN or (kinds == {int} and min(value) in _INT64 and max(value) in _INT64):
        return list(value)
    lowered: list[Any] = []
    for item in value:
        try:
            lowered.append(_lower(item, apart))
        except NotPlainError as error:
            raise error.inside(len(lowered)) from None
    return lowered


def _lower_dict(value: dict[Any, Any], apart: Apart) -> Any:
    if not all(type(key) in _PLAIN or (type(key) is int and key in _INT64) for key in value):
        return _ext(codes.PAIRS, _lower_pairs(value, apart))
    lowered: dict[Any, Any] = {}
    for key, item in value.items():
        try:
            lowered[key] = _lower(item, apart)
        except NotPlainError as error:
            raise error.inside(key) from None
    return lowered


def _lower_pairs(value: dict[Any, Any], apart: Apart) -> list[list[Any]]:
    lowered: list[list[Any]] = []
    for key, item in value.items():
        name = _lower_key(key)
        try:
            lowered.append([name, _lower(item, apart)])
        except NotPlainError as error:
            raise error.inside(key) from None
    return lowered


def _lower_key(key: Any) -> Any:
    """A tensor is found under itself only, and what comes back is another one."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(key, torch.Tensor):
        try:
            return _lower(key, None)
        except NotPlainError:
            pass
    raise NotPlainError(f"a key of type {_name(type(key))}")


def _lower_tensor(value: torch.Tensor, apart: Apart) -> msgspec.msgpack.Ext:
    import torch

    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        raise NotPlainError("a sparse, nested or quantized tensor")
    if value.device.type != "cpu" and (apart is not None or value.device.type == "meta"):
        raise NotPlainError(f"a tensor on {value.device}")
    dense = value.detach().resolve_conj().resolve_neg()
    if apart is not None:
        if type(value) is not torch.Tensor:
            raise NotPlainError(_name(type(value)))
        return _lay_apart(codes.APART_TENSOR, dense.contiguous(), apart)
    layout = layout_of(dense)
    if layout:  # its memory in the order in which it lies
        dense = dense.permute(sorted(range(dense.dim()), key=dense.stride, reverse=True))
    dense = dense.cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # a single element may have any stride
    fields = [str(value.dtype).removeprefix("torch."), list(value.shape), flat.numpy().tobytes()]
    return _ext(codes.TENSOR, [*fields, value.device.type, list(layout)])


def _lower_array(value: Any, apart: Apart) -> msgspec.msgpack.Ext:
    if value.dtype.hasobject:
        raise NotPlainError("a numpy array that holds objects")
    if value.dtype.names is not None:
        raise NotPlainError("a numpy array of records")
    import numpy

    is_scalar = isinstance(value, numpy.generic)
    if apart is not None:
        import torch

        try:
            tensor = torch.from_numpy(numpy.require(value, requirements=["C", "W"]).reshape(value.shape))
        except (TypeError, ValueError):  # torch has no such numbers: text, dates, another order of bytes
            pass
        else:
            return _lay_apart(codes.APART_SCALAR if is_scalar else codes.APART_ARRAY, tensor, apart)
    return _ext(codes.ARRAY, [value.dtype.str, list(value.shape), value.tobytes(), is_scalar])


def _lay_apart(kind: int, tensor: torch.Tensor, apart: list[torch.Tensor]) -> msgspec.msgpack.Ext:
    apart.append(tensor)
    return _ext(codes.APART, [kind, len(apart) - 1])


def _ext(code: int, value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(value))


def layout_of(value: torch.Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor that is not row-major, () for every other."""
    if value.is_contiguous() or not _is_dense(value):
        return ()
    return tuple(value.stride())


def _is_dense(value: torch.Tensor) -> bool:
    """Whether its elements fill its memory, each once, in whatever order of dimensions."""
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    return value.permute(order).is_contiguous()
