"""What the environment adds to a CheckpointManager: faults, and a trace of every step."""

from __future__ import annotations

import sys
from typing import Any

from .injector import Injector
from .settings import announcement, trace_directory, wanted_faults
from .trace import of_objects, write_line


class EnvironmentObserver:
    """Told of every pass by the manager. Raises ValueError for faults that must not be or cannot be."""

    def __init__(self, manager: Any) -> None:
        faults = wanted_faults()
        if faults:
            print(f"hyperpodrun: rank {manager._caller.rank}: {announcement(faults)}", file=sys.stderr, flush=True)
        self._manager = manager
        self._trace = trace_directory()
        self._injector = Injector(manager, faults)

    def begin(self) -> None:
        """A pass begins."""
        self._injector.begin()

    def end(self) -> None:
        """A pass is about to end."""
        self._injector.end()

    def ended(self) -> None:
        """A pass has ended, and what it did counts."""
        if self._trace is None:
            return
        caller = self._manager._caller
        row = {
            "step": self._manager._tracker.index - 1,
            "epoch": getattr(caller, "epoch", 0),
            "digests": of_objects(self._manager._registry.objects),
            "places": self._injector.places,
        }
        write_line(self._trace, caller.rank, row)
