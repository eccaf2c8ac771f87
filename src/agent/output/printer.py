"""The launcher's stdout and stderr, written by a thread of its own: a console that does not drain (Ctrl-S, a full pipe)
stops this thread only.

Owns: the thread and the bytes that wait for it. Called by: `console.py`.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import BinaryIO

_BACKLOG_BYTES = 16 << 20
_PATIENCE_S = 5.0
"""So long whoever writes waits for a console that takes nothing; then it is stuck, until it has caught up."""


def standard_stream(name: str) -> BinaryIO:
    """`stdout` or `stderr` for bytes, also where a notebook or a closed descriptor has left none in `sys`."""
    buffer: BinaryIO | None = getattr(getattr(sys, name), "buffer", None)
    return buffer if buffer is not None else open({"stdout": 1, "stderr": 2}[name], "wb", closefd=False)


class Printer:
    """Everything is written in the order in which it was put."""

    def __init__(self, backlog_bytes: int = _BACKLOG_BYTES, patience: float = _PATIENCE_S) -> None:
        self._backlog_bytes = backlog_bytes
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: deque[tuple[BinaryIO, bytes]] = deque()
        self._bytes = 0
        self._written = 0
        self._stuck = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, target: BinaryIO, data: bytes) -> None:
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
            except (OSError, ValueError):
                pass  # the console is gone (closed terminal, broken pipe): training must not end because of it
            with self._changed:
                self._bytes -= len(data)
                self._written += 1
                if self._bytes <= self._backlog_bytes:
                    self._stuck = False
                self._changed.notify_all()
