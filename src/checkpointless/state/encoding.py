"""State that is not a large tensor, as bytes: typed, without pickle, refusing what it does not know.

None, bool, int, float, complex, str, bytes, list, tuple, dict (also Counter, OrderedDict and defaultdict), deque, set,
torch.Size, dtype and device, tensors and numpy arrays.
What comes from a wire can thus only be data, never code. A tensor comes back on the type of device it was on, its
memory in the order it had.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch

MAX_BYTES = 1 << 30

_TUPLE, _TENSOR, _ARRAY, _COUNTER, _ORDERED, _SET, _BIG_INT, _DEQUE, _COMPLEX, _TORCH, _DEFAULT = range(1, 12)
_FACTORIES: dict[str, Any] = {"": None, "int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}
"""Of a defaultdict: by name, those that are known."""
_PLAIN = (type(None), bool, float, str, bytes)
_INT64 = range(-(2**63), 2**64)


class EncodingError(ValueError):
    """A value that has no encoding, or bytes that are none; the sentence says which and where."""


def encode(value: Any) -> bytes:
    """The value as bytes. Raises EncodingError that names the type and the place of what cannot be encoded."""
    return msgspec.msgpack.encode(_lower(value, ""))


def encode_bytes(value: torch.Tensor) -> bytes:
    """What `encode` gives for a tensor of bytes on the host, of one dimension and without gaps: in a few microseconds,
    as a generator's state is encoded in the midst of a step."""
    content = ["uint8", [value.shape[0]], value.numpy().data, "cpu", ()]
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode(content)))


def decode(data: bytes) -> Any:
    """What `encode` was given; tensors are on the CPU. Raises EncodingError."""
    if len(data) > MAX_BYTES:
        raise EncodingError(f"{len(data)} bytes exceed {MAX_BYTES}")
    try:
        return msgspec.msgpack.decode(data, ext_hook=_raise_to, strict=True)
    except EncodingError:
        raise
    except (
        msgspec.MsgspecError,
        ValueError,
        TypeError,
        RuntimeError,
        RecursionError,
        AttributeError,
        KeyError,
    ) as error:
        raise EncodingError(f"not encoded state: {error}") from None


def _lower(value: Any, where: str) -> Any:
    """The value in msgpack's own types and extensions."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if value in _INT64 else msgspec.msgpack.Ext(_BIG_INT, str(value).encode())
    if kind is dict:
        return _lower_dict(value, where)
    if kind is list:
        return _lower_items(value, where)
    if kind is tuple:
        return _ext(_TUPLE, _lower_items(value, where))
    if kind is Counter or kind is OrderedDict:
        code = _COUNTER if kind is Counter else _ORDERED
        return _ext(code, [[_lower(k, where), _lower(v, f"{where}[{k!r}]")] for k, v in value.items()])
    if kind is set or kind is frozenset:
        return _ext(_SET, [kind is frozenset, [_lower(item, where) for item in sorted(value, key=repr)]])
    if kind is deque:
        return _ext(_DEQUE, [value.maxlen, _lower_items(list(value), where)])
    if kind is complex:
        return _ext(_COMPLEX, [value.real, value.imag])
    if kind is defaultdict and value.default_factory in _FACTORIES.values():
        factory = next(name for name, known in _FACTORIES.items() if known is value.default_factory)
        return _ext(_DEFAULT, [factory, [[_lower(k, where), _lower(v, f"{where}[{k!r}]")] for k, v in value.items()]])
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _lower_tensor(value, where)
    if torch is not None and kind in (torch.Size, torch.dtype, torch.device):
        return _ext(_TORCH, [kind.__name__, list(value) if kind is torch.Size else str(value)])
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _lower_array(value, where)
    raise EncodingError(
        f"{kind.__module__}.{kind.__qualname__} at {where or 'the top'} cannot be carried to another rank"
    )


def _lower_items(value: list[Any] | tuple[Any, ...], where: str) -> list[Any]:
    """A row of small numbers, such as the state of a random generator, needs no look at each."""
    if value and set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**64:
        return list(value)
    return [_lower(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _lower_dict(value: dict[Any, Any], where: str) -> dict[Any, Any]:
    for key in value:
        if type(key) not in (str, int, bool, float, bytes, type(None)):
            raise EncodingError(f"a key of type {type(key).__name__} at {where or 'the top'}: use str or int")
    return {key: _lower(item, f"{where}[{key!r}]") for key, item in value.items()}


def _lower_tensor(value: torch.Tensor, where: str) -> msgspec.msgpack.Ext:
    import torch

    if value.layout is not torch.strided or value.is_quantized:
        raise EncodingError(f"the tensor at {where or 'the top'} is sparse or quantized")
    from .provider import layout_of

    layout = layout_of(value)
    dense = value.detach()
    if layout:  # its memory in the order in which it lies
        dense = dense.permute(sorted(range(value.dim()), key=value.stride, reverse=True))
    flat = dense.cpu().contiguous().view(-1).view(torch.uint8)
    fields = [str(value.dtype).removeprefix("torch."), list(value.shape), flat.numpy().tobytes()]
    return _ext(_TENSOR, [*fields, value.device.type, list(layout)])


def _lower_array(value: Any, where: str) -> msgspec.msgpack.Ext:
    if value.dtype.hasobject:
        raise EncodingError(f"the numpy array at {where or 'the top'} holds objects")
    return _ext(_ARRAY, [value.dtype.str, list(value.shape), value.tobytes(), type(value).__name__ != "ndarray"])


def _ext(code: int, value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(value))


def _raise_to(code: int, data: memoryview) -> Any:
    """The extension's value."""
    if code == _BIG_INT:
        return int(bytes(data))
    parts = msgspec.msgpack.decode(bytes(data), ext_hook=_raise_to, strict=True)
    match code:
        case 1:
            return tuple(parts)
        case 2:
            return _tensor(*parts)
        case 3:
            return _array(*parts)
        case 4:
            return Counter(dict(map(tuple, parts)))
        case 5:
            return OrderedDict(map(tuple, parts))
        case 6:
            return frozenset(parts[1]) if parts[0] else set(parts[1])
        case 8:
            return deque(parts[1], maxlen=parts[0])
        case 9:
            return complex(*parts)
        case 10:
            return _of_torch(*parts)
        case 11:
            return defaultdict(_FACTORIES[parts[0]], map(tuple, parts[1]))
    raise EncodingError(f"unknown extension {code}")


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
    if not data:
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
