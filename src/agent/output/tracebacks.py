"""The tracebacks of this node's workers in full: the job, and with it every other node, gets their last frames only."""

from __future__ import annotations

from typing import TypeVar

from msgspec.structs import replace

from ...control.job import commands as cmd
from ...protocol.text import last_frames

_KEPT = 64
"""The latest; each is 64 KB at most."""

_C = TypeVar("_C", bound=cmd.Command)


class Tracebacks:
    """What happened here is shown in full here."""

    def __init__(self) -> None:
        self._full: dict[str, str] = {}

    def keep(self, text: str) -> str:
        """What is told of a traceback."""
        short = last_frames(text)
        if short != text:
            self._full.pop(short, None)
            self._full[short] = text
            if len(self._full) > _KEPT:
                del self._full[next(iter(self._full))]
        return short

    def in_full(self, command: _C) -> _C:
        """The command with the whole traceback of its cause, if that happened here."""
        cause: cmd.Cause | None = getattr(command, "cause", None)
        text = None if cause is None else self._full.get(cause.traceback)
        return command if cause is None or text is None else replace(command, cause=replace(cause, traceback=text))
