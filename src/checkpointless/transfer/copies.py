"""The older copies of the state: snapshots in memory and checkpoints on disk, as they fall due and as they end.

Owns when they are begun; what they are is `snapshots.py`'s and `disk.py`'s. Called by: the manager.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...protocol.names import STATE_DIRECTORY
from ..arrivals import ArrivalOrders
from ..state.registry import Registry
from ..step.history import History
from ..step.tracker import StepTracker
from .disk import DiskCheckpoints
from .header import describe
from .snapshots import Snapshots


@dataclass(frozen=True)
class Copies:
    """Those that the user asked for; None: not asked for."""

    snapshots: Snapshots | None
    disk: DiskCheckpoints | None

    def start(self, rank: int) -> None:
        if self.snapshots is not None:
            self.snapshots.start(state_directory(), rank)
        if self.disk is not None:
            self.disk.start()

    def due(self, step: int) -> bool:
        return self._to_memory(step) or self._to_disk(step)

    def make(
        self, registry: Registry, history: History, tracker: StepTracker, orders: ArrivalOrders, shard: str, rank: int
    ) -> None:
        """A step is complete: begins the copies of it that are due."""
        step = tracker.point
        header = describe(registry, history[step], tracker.learned, orders.told(step))
        if self.snapshots is not None and self._to_memory(step):
            self.snapshots.make(header, registry.state)
        if self.disk is not None and self._to_disk(step):
            self.disk.save(header, shard, rank, registry.state)

    def finish(self) -> None:
        """The loop is over: those that were begun are completed."""
        if self.snapshots is not None:
            self.snapshots.finish()
        if self.disk is not None:
            self.disk.finish()

    def stop(self) -> None:
        """There was a fault: nothing more is begun."""
        if self.snapshots is not None:
            self.snapshots.stop()
        if self.disk is not None:
            self.disk.stop()

    def _to_memory(self, step: int) -> bool:
        return self.snapshots is not None and self.snapshots.due(step)

    def _to_disk(self, step: int) -> bool:
        return self.disk is not None and self.disk.due(step)


def state_directory() -> Path | None:
    """The job's directory in memory on this node; None under another launcher."""
    path = os.environ.get(STATE_DIRECTORY)
    return Path(path) if path else None
