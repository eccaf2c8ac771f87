"""`recoverable`: a function that trains with Lightning, entered again after a fault."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ...checkpointless.manager import CheckpointManager
from ...inprocess.wrapper import HPWrapper

P = ParamSpec("P")
R = TypeVar("R")

_running: list[CheckpointManager] = []


def recoverable(function: Callable[P, R] | None = None, **settings: Any) -> Any:
    """Decorator of the function that makes the trainer and calls `fit`, once.

    `settings` are those of `CheckpointManager` (`snapshot_every`, `disk_path`, ...). A checkpointless strategy that is
    made in the function finds the manager by itself.
    """
    if function is None:
        return functools.partial(recoverable, **settings)

    @functools.cache
    def made() -> tuple[CheckpointManager, Callable[P, R]]:
        manager = CheckpointManager(**settings)
        return manager, HPWrapper(checkpoint_manager=manager)(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        manager, wrapped = made()
        _running.append(manager)
        try:
            return wrapped(*args, **kwargs)
        finally:
            _running.pop()

    return run


def running_manager() -> CheckpointManager | None:
    """That of the recoverable function that is being run."""
    return _running[-1] if _running else None
