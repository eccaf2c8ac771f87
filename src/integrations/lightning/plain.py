"""State of other people's objects as plain values, which can be written into the rank's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpointless.errors import UnsupportedStateError
from ...protocol.values import EncodingError, encode

_AT_ONCE = (type(None), bool, int, float, str)


def plain(value: Any, whose: str) -> Any:
    """The value itself if it can be carried. Raises UnsupportedStateError that names whose it is."""
    if not isinstance(value, _AT_ONCE):
        try:
            encode(value)
        except EncodingError as error:
            raise UnsupportedStateError(
                f"{whose}: {error}; let its state_dict() give plain values and tensors"
            ) from None
    return value


def relocated(value: Any, old: str, new: str) -> Any:
    """The value, its paths below the directory `old` as paths below `new`."""
    if isinstance(value, str):
        return new + value[len(old) :] if value.startswith(old) else value
    if isinstance(value, Path):
        return relocated(str(value), old, new)
    if isinstance(value, Mapping):
        return {relocated(key, old, new): relocated(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(relocated(item, old, new) for item in value)
    return value
