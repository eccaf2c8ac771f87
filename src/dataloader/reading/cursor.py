"""Where a reader stands in its stream: what the loader, its iterators and checkpoints agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...protocol.dataloader import Position
from ..storing import format


@dataclass
class Cursor:
    """The next batch to be read, and what leads there."""

    position: Position = (0, 0)
    counted: int | None = None
    """A number of batches over all epochs, whose epoch only the producer can tell: goes before `position`."""
    state: Any = None
    """The source's own state at the position, from a checkpoint."""
    last: format.Loaded | None = None
    """The batch before the position, where it carries the source's own state."""
    fresh: bool = True
    """Whether the next `iter` begins at the position, and not at the epoch after it."""
    iteration: int = 0
    """Counts iterators: an older one than the last cannot be used any more."""

    def move(self, position: Position, *, fresh: bool, counted: int | None = None, state: Any = None) -> None:
        """To anywhere."""
        self.position, self.counted, self.state, self.last, self.fresh = position, counted, state, None, fresh

    def advance(self, loaded: format.Loaded | None) -> None:
        """Past one batch; `loaded` is None where it was not read from a file."""
        self.position = (self.position[0], self.position[1] + 1)
        self.state = self.counted = None
        self.last = loaded if loaded is not None and loaded.has_state else None

    def source_state(self) -> Any:
        """The source's own state at the position; None if it has none, or it is not known."""
        return self.state if self.last is None else self.last.state()
