"""Saying what an exception is: its one-line description, and whether it is somebody else's fault."""

from __future__ import annotations

import sys
import traceback


def describe(error: BaseException) -> str:
    """`ValueError: boom (train.py:12 in step)`: type, message and the innermost line of the user's code."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "site-packages" not in frame.filename and "hyperpodrun" not in frame.name]
    if not inner:
        return text
    frame = inner[-1]
    return f"{text} ({frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name})"


_BROKEN_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "connectFullMesh",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "Socket Timeout",
)


def is_consequence(error: BaseException) -> bool:
    """Whether this is what a rank sees when another one has gone: a connection of torch.distributed that broke."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available():
        kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
        if isinstance(error, kinds):
            return True
    if isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _BROKEN_CONNECTION)
