"""Saying what an exception is: its one-line description, its traceback, and whether it is somebody else's fault.

The text of an exception is anybody's: it can be long, have several lines, hold what cannot be encoded, or raise when it
is asked for. None of that may hurt whoever tells of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import Any

from ..protocol.messages import shorten
from ..protocol.text import printable

_LONGEST_MESSAGE = 10_000
"""Characters that are looked at for the first line of a message."""
_BY_USERS = (Exception, SystemExit, GeneratorExit)
"""What code of an exception's own class may raise when it is asked about itself."""
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep


def describe(error: BaseException) -> str:
    """`ValueError: boom (train.py:12 in step)`: type, first line of the message, innermost line of the user's code."""
    name = name_of(error)
    message = next((line.strip() for line in text_of(error)[:_LONGEST_MESSAGE].splitlines() if line.strip()), "")
    text = printable(f"{name}: {message}" if message else name)
    frames = traceback.extract_tb(slot(error, "__traceback__"), limit=-200)
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


def name_of(error: BaseException) -> str:
    """Of its class; asks nothing of the class itself."""
    kind = type(error)
    name = type.__dict__["__qualname__"].__get__(kind)
    module = vars(kind).get("__module__", "builtins")
    return name if module in ("builtins", "__main__") or not isinstance(module, str) else f"{module}.{name}"


def slot(error: BaseException, name: str) -> Any:
    """`error.name` as Python itself has it, whatever the class of `error` says instead."""
    return BaseException.__dict__[name].__get__(error)


def parts_of(error: BaseException) -> list[BaseException]:
    """Of an ExceptionGroup; others may have an attribute of that name, too."""
    try:
        parts = getattr(error, "exceptions", ())
        return [part for part in parts if isinstance(part, BaseException)] if isinstance(parts, list | tuple) else []
    except _BY_USERS:
        return []


def text_of(error: BaseException) -> str:
    """`str(error)`, also where that raises."""
    try:
        return str.__str__(str(error))
    except _BY_USERS as failure:
        return f"<its text cannot be had: {name_of(failure)}>"


def format_traceback(error: BaseException) -> str:
    """As Python shows it, from the user's first frame on: ours, through which the function was entered, say nothing."""
    trace = slot(error, "__traceback__")
    while trace is not None and trace.tb_next is not None and _is_ours(trace):
        trace = trace.tb_next
    try:
        return printable(shorten("".join(traceback.format_exception(type(error), error, trace))), lines=True)
    except _BY_USERS as failure:  # of an object that the traceback module asks for its text
        return f"{describe(error)}\n<its traceback cannot be shown: {name_of(failure)}>\n"


def _is_ours(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(_OURS)


def reason_of_exit(exit_: BaseException) -> BaseException | None:
    """What a SystemExit was raised on account of: the exception that was being handled, or that it names."""
    named = exit_.code if isinstance(exit_, SystemExit) else None  # `sys.exit(error)`, which has no context
    for reason in (slot(exit_, "__cause__"), slot(exit_, "__context__"), named):
        if reason is not None:
            return reason if isinstance(reason, Exception) else None
    return None


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
        cause = slot(current, "__cause__")
        if cause is None and not slot(current, "__suppress_context__"):
            cause = slot(current, "__context__")
        current = cause
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
    except _BY_USERS:  # an attribute that raises something else than AttributeError
        return False
