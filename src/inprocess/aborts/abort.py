"""Breaking what the main thread can be stuck in, from another thread.

Each piece is an `Abort`, called on the monitor thread with what it needs to know; `Compose` puts several together.
After them the main thread can be interrupted: no collective (`gloo.py`, `nccl.py`) and no data loader
(`data_loaders.py`) holds it in a call that never returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class AbortState:
    """What an Abort knows of the fault. `timeout` in seconds is for all of them together."""

    epoch: int
    gloo_listeners: frozenset[tuple[str, int]]
    timeout: float
    finishing: bool = False
    """The main thread finishes a pass of its loop, for moments: what that needs, and cannot block it, is left alone."""


class Abort(ABC):
    """Called on the monitor thread while the main thread is anywhere. An error is logged and the others still run."""

    @abstractmethod
    def __call__(self, state: AbortState) -> None: ...

    def again(self, state: AbortState) -> None:  # noqa: B027 - most have nothing to do
        """Called every now and then until the main thread has left user code: for what has come up since."""


class Compose(Abort):
    """Several aborts as one. As in a composition of functions, and in HyperPod, the last one listed runs first."""

    def __init__(self, *aborts: Abort) -> None:
        self.aborts = aborts

    def __call__(self, state: AbortState) -> None:
        self._each(lambda abort: abort(state))

    def again(self, state: AbortState) -> None:
        self._each(lambda abort: abort.again(state))

    def _each(self, call: Callable[[Abort], None]) -> None:
        errors: list[str] = []
        for abort in reversed(self.aborts):
            try:
                call(abort)
            except Exception as error:
                errors.append(f"{type(abort).__name__}: {error!r}")
        if errors:
            raise RuntimeError("; ".join(errors))
