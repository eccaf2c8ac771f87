"""Saying what an exception is: its one-line description, its traceback, and whether it is somebody else's fault.

The text of an exception is anybody's: it can be long, have several lines, hold what cannot be encoded, or raise when it
is asked for. None of that may hurt whoever tells of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType

from ..protocol.messages import shorten
from ..protocol.text import printable

_LONGEST_MESSAGE = 10_000
"""Characters that are looked at for the first line of a message."""
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep


def describe(error: BaseException) -> str:
    """`ValueError: boom (train.py:12 in step)`: type, first line of the message, innermost line of the user's code."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    message = next((line.strip() for line in text_of(error)[:_LONGEST_MESSAGE].splitlines() if line.strip()), "")
    text = printable(f"{name}: {message}" if message else name)
    frames = traceback.extract_tb(error.__traceback__, limit=-200)
    inner = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and "hyperpodrun" not in frame.name
        and not frame.filename.startswith(_OURS)
    ]
    if not inner:
        return text
    frame = inner[-1]
    return printable(f"{text} ({frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name})")


def text_of(error: BaseException) -> str:
    """`str(error)`, also where that raises."""
    try:
        return str(error)
    except Exception as failure:
        return f"<its text cannot be had: {type(failure).__name__}>"


def format_traceback(error: BaseException) -> str:
    """As Python shows it, from the user's first frame on: ours, through which the function was entered, say nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _is_ours(trace):
        trace = trace.tb_next
    try:
        return printable(shorten("".join(traceback.format_exception(type(error), error, trace))), lines=True)
    except Exception as failure:  # of an object that the traceback module asks for its text
        return f"{describe(error)}\n<its traceback cannot be shown: {type(failure).__name__}>\n"


def _is_ours(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(_OURS)


def reason_of_exit(exit_: BaseException) -> BaseException | None:
    """What a SystemExit was raised on account of: the exception that was being handled, or that it names."""
    reason = exit_.__cause__ or exit_.__context__
    return reason if isinstance(reason, Exception) else None


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
    """Whether this is what a rank sees when another one has gone: a connection of torch.distributed that broke, or what
    the script has raised on account of that."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if _is_broken_connection(current):
            return True
        seen.add(id(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


def _is_broken_connection(error: BaseException) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available():
        kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
        if isinstance(error, kinds):
            return True
    if isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(sign in text_of(error) for sign in _BROKEN_CONNECTION)


def ends_job(error: BaseException) -> bool:
    """Whether the error says that no restart would change it."""
    try:
        return bool(getattr(error, "ends_job", False))
    except Exception:  # an attribute that raises something else than AttributeError
        return False
