"""File operations that may hang, as on a network file system whose server is gone: on a thread of their own.

Whoever needs the result waits no longer than he says, and the event loop never. While an operation hangs, those after
it are given up at once. Called by: `logs.py`, and who writes or reads the files that it has named.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

_T = TypeVar("_T")


class DiskHangs(OSError):
    """An operation has not come back in time. It goes on, and can still succeed."""


class Task(Generic[_T]):
    """One operation. `result` or `error` once it is `over`."""

    def __init__(self, action: Callable[[], _T], then: Callable[[Task[_T]], None] | None) -> None:
        self._action = action
        self._then = then
        self.over = threading.Event()
        self.result: _T | None = None
        self.error: Exception | None = None

    def carry_out(self) -> None:
        try:
            self.result = self._action()
        except Exception as error:
            self.error = error
        self.over.set()
        if self._then is not None:
            self._then(self)


class Disk:
    """Carries operations out one after the other."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task[object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up: Task[object] | None = None

    @property
    def hangs(self) -> bool:
        """Whether an operation that was given up is still under way."""
        return self._given_up is not None and not self._given_up.over.is_set()

    def give_up(self, task: Task[object]) -> None:
        """Nobody waits for it, or for what comes after it, any more."""
        self._given_up = task

    def begin(self, action: Callable[[], _T], then: Callable[[Task[_T]], None] | None = None) -> Task[_T]:
        """Never waits. `then` is called on the thread, when it is over."""
        task: Task[_T] = Task(action, then)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hyperpodrun-disk", daemon=True)
            self._thread.start()
        self._tasks.put(task)  # type: ignore[arg-type]
        return task

    def call(self, action: Callable[[], _T], limit: float) -> _T:
        """Its result. Waits for `limit` seconds, never on the event loop. Raises DiskHangs, or as `action` does."""
        if self.hangs:
            raise DiskHangs("the file system does not answer")
        task = self.begin(action)
        if not task.over.wait(limit):
            self.give_up(task)  # type: ignore[arg-type]
            raise DiskHangs(f"the file system does not answer within {limit:g} s")
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def _run(self) -> None:
        while True:
            self._tasks.get().carry_out()
