"""The timer of who decides: it knows when the next deadline is, and asks again after everything that has happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Timer:
    """Of one head. Without a loop yet, and after `stop`, it does nothing."""

    def __init__(self, next_deadline: Callable[[], float | None], on_due: Callable[[], None]) -> None:
        self._next_deadline = next_deadline
        self._on_due = on_due
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.set()

    def set(self) -> None:
        """Something has happened: the deadline may be another."""
        if self._loop is None:
            return
        if self._handle is not None:
            self._handle.cancel()
        deadline = self._next_deadline()
        self._handle = None if deadline is None else self._loop.call_at(deadline, self._on_due)

    def stop(self) -> None:
        """The job is over; no deadline counts any more."""
        self._loop = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
