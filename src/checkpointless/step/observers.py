"""Who is told of every pass of the loop beside the manager itself. Usually nobody."""

from __future__ import annotations

import os
from typing import Any, Protocol


class Observer(Protocol):
    """Of one manager."""

    def begin(self) -> None:
        """A pass has begun."""

    def end(self) -> None:
        """A pass is about to end; its update may last until then."""

    def ended(self) -> None:
        """A pass has ended, and what it did counts."""


def observers_of(manager: Any) -> list[Observer]:
    """Those that the environment asks for (`testing/settings.py`)."""
    if not (os.environ.get("HYPERPODRUN_INJECT") or os.environ.get("HYPERPODRUN_TRACE")):
        return []
    from ...testing.observer import EnvironmentObserver

    return [EnvironmentObserver(manager)]


def watch_unregistered(
    manager: Any, observers: list[Observer], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Observer]:
    """The observers, and one that names what the function changes without having registered it."""
    from .unregistered import UnregisteredWatch

    before = next((observer for observer in observers if isinstance(observer, UnregisteredWatch)), None)
    others = [observer for observer in observers if observer is not before]
    return [*others, UnregisteredWatch(manager, function, args, kwargs, before.named if before is not None else None)]
