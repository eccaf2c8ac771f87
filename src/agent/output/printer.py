"""The launcher's stdout and stderr, written by a thread of its own: a console that does not drain (Ctrl-S, a full pipe)
stops this thread only.

Owns: the thread and the bytes that wait for it. Called by: `console.py`.
"""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from typing import Any, Protocol

_BACKLOG_BYTES = 16 << 20
_PATIENCE_S = 5.0
"""So long whoever writes waits for a console that takes nothing; then it is stuck, until it has caught up."""


class Target(Protocol):
    """Where bytes are shown."""

    def write(self, data: bytes, /) -> object:
        """Shows them."""

    def flush(self) -> object:
        """And does not keep them."""


class _Replaced:
    """A `sys.stdout` that a notebook or a program has put in the place of Python's own: it takes text."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = data.decode(errors="replace")
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        flush = getattr(self._stream, "flush", None)
        if flush is not None:
            flush()


def standard_stream(name: str) -> Target:
    """`stdout` or `stderr` for bytes: what `sys` has now, or the descriptor where a closed one has left nothing."""
    stream = getattr(sys, name)
    if stream is None:
        return open({"stdout": 1, "stderr": 2}[name], "wb", closefd=False)
    # A stream of another class can show text elsewhere than in its buffer, which is often that of the one it replaces.
    return stream.buffer if type(stream) is io.TextIOWrapper else _Replaced(stream)


class Printer:
    """Everything is written in the order in which it was put."""

    def __init__(self, backlog_bytes: int = _BACKLOG_BYTES, patience: float = _PATIENCE_S) -> None:
        self._backlog_bytes = backlog_bytes
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Target, bytes]] = deque()
        self._bytes = 0
        self._written = 0
        self._stuck = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, target: Target, data: bytes) -> None:
        """Never waits."""
        with self._changed:
            self._waiting.append((target, data))
            self._bytes += len(data)
            if self._thread is None:  # started late: a launch that says nothing needs no thread
                self._thread = threading.Thread(target=self._run, name="hyperpodrun-console", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def has_room(self) -> bool:
        """Waits for a slow console, and not for a stuck one."""
        with self._changed:
            while self._bytes > self._backlog_bytes and not self._stuck:
                before = self._written
                self._changed.wait(self._patience)
                self._stuck = self._written == before
            return not self._stuck

    def close(self, timeout: float) -> None:
        """Writes out everything. `timeout` bounds a console that does not take it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing:
                        return
                    self._changed.wait()
                target, data = self._waiting.popleft()
            try:
                target.write(data)
                target.flush()
            except Exception:  # a closed terminal, a broken pipe, whatever a program's own stream raises
                pass  # training must not end because of it
            with self._changed:
                self._bytes -= len(data)
                self._written += 1
                if self._bytes <= self._backlog_bytes:
                    self._stuck = False
                self._changed.notify_all()
