"""Plain values as bytes: typed, without pickle, refusing what it does not know.

None, bool, int, float, complex, str, bytes, list, tuple, dict (also Counter, OrderedDict and defaultdict), deque, set,
torch.Size, dtype and device, tensors, numpy arrays and scalars: they come back as what they were, and what comes from a
wire or a file can only be data, never code. A tensor comes back on the type of device it was on, its memory in the
order it had. State that is carried over a fault is such a value.

So is a batch of data. Its tensors and arrays are to be mapped from a file, not copied, so it is taken apart into them
and a structure, the bytes of all the rest, and put together again.

Imports torch and numpy only where a value is of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .codes import TENSOR, EncodingError, NotPlainError
from .from_bytes import unpack
from .to_bytes import layout_of, pack

if TYPE_CHECKING:
    import torch

__all__ = [
    "EncodingError",
    "NotPlainError",
    "decode",
    "encode",
    "encode_bytes",
    "layout_of",
    "put_together",
    "take_apart",
]


def encode(value: Any) -> bytes:
    """The value as bytes. Raises NotPlainError that names the type and the place of what cannot be encoded."""
    return pack(value, None)


def decode(data: bytes) -> Any:
    """What `encode` was given. Raises EncodingError."""
    return unpack(data, ())


def encode_bytes(value: torch.Tensor) -> bytes:
    """What `encode` gives for a tensor of bytes on the host, of one dimension and without gaps: in a few microseconds,
    as a generator's state is encoded in the midst of a step."""
    content = ["uint8", [value.shape[0]], value.numpy().data, "cpu", ()]
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(TENSOR, msgspec.msgpack.encode(content)))


def take_apart(value: Any, tensors: list[torch.Tensor]) -> bytes:
    """The structure; tensors and arrays, which must be on the CPU, are added to `tensors`. Raises NotPlainError.

    Here a namedtuple is plain, too. It comes back as one like it: to find the very class would be to import what a file
    names.
    """
    return pack(value, tensors)


def put_together(structure: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """The value, with these tensors and arrays on their memory. Raises EncodingError."""
    return unpack(structure, tensors)
