"""What plain values are told apart by in msgpack, and what is said of those that are none."""

from __future__ import annotations

from typing import Any

MAX_BYTES = 1 << 30

TUPLE, TENSOR, ARRAY, COUNTER, ORDERED, SET, BIG_INT, DEQUE, COMPLEX, TORCH, DEFAULT = range(1, 12)
PAIRS, NAMED, APART = range(12, 15)
"""Extensions of msgpack. PAIRS: a dict with keys that msgpack has no name for. APART: what lies beside the bytes."""
APART_TENSOR, APART_ARRAY, APART_SCALAR = range(3)
FACTORIES: dict[str, Any] = {"": None, "int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}
"""Of a defaultdict: by name, those that are known."""


class EncodingError(ValueError):
    """A value that has no encoding, or bytes that are none; the sentence says which and where."""


class NotPlainError(EncodingError):
    """A value that has no encoding. `what` and `where` are the sentence's two parts, for who has another one."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = ""

    def __str__(self) -> str:
        return f"{self.what} at {self.where or 'the top'} cannot be carried to another process"

    def inside(self, key: Any) -> NotPlainError:
        """The same, of what holds the value under `key`."""
        self.where = f"[{key!r}]{self.where}"
        return self
