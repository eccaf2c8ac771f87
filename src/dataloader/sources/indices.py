"""The dataset indices of a batch on their way from the order of batches to whoever makes it."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from ...protocol import values

_MANY, _ONE, _OTHER_MANY, _OTHER_ONE = b"I", b"i", b"O", b"o"


def pack_indices(indices: Any, batched: bool) -> bytes:
    """Indices as bytes: whole numbers fast, other plain keys (tuples, strings, ...) as what they are."""
    try:
        return (_MANY if batched else _ONE) + array("q", indices if batched else (indices,)).tobytes()
    except (TypeError, OverflowError):
        tensors: list[torch.Tensor] = []
        structure = values.take_apart(indices, tensors)
        return (_OTHER_MANY if batched else _OTHER_ONE) + values.encode((structure, tensors))


def unpack_indices(packed: bytes) -> tuple[Any, bool]:
    """(indices, whether they are those of a batch or the index of one sample)."""
    kind = packed[:1]
    if kind in (_MANY, _ONE):
        numbers = array("q", packed[1:]).tolist()
        return (numbers, True) if kind == _MANY else (numbers[0], False)
    structure, tensors = values.decode(packed[1:])
    return values.put_together(structure, tensors), kind == _OTHER_MANY
