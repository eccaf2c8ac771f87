"""Which batches of a stream there should be: decided here, with no file, socket, clock or process.

The producer tells what happens (a reader moved, a batch is ready, there is no room) and asks what to do: the next
batch to make (`next_wanted`), the batches to remove (`take_removals`), how far readers may read (`until`).

Batches are kept in the order of the stream, without a gap from the oldest one that readers may still want:

    removed | lookback | slowest reader ... ready | being made | not yet
                       ^ anchor                   ^ until
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import dataclass, field

from ...protocol.dataloader import Position

_ATTEMPTS = 3
"""So often a batch is tried whose maker dies, or whose file turns out corrupt."""


@dataclass
class _Batch:
    ready: bool = False
    asked: bool = False
    """It is being made."""
    attempts: int = 0


@dataclass(frozen=True)
class Limits:
    """All in batches."""

    prefetch: int
    lookback: int
    checkpoint_frequency: int | None = None
    stop_at_failure: bool = False
    """Of an iterable source: what comes after a batch that cannot be made cannot be made either."""


@dataclass
class Window:
    """The batches of one stream. `length`: batches per epoch if the loader knows it, for numbering only."""

    limits: Limits
    length: int | None = None
    lengths: dict[int, int] = field(default_factory=dict)
    """Of the epochs whose end has been seen."""
    anchor: Position = (0, 0)
    """The slowest reader; where the last one was when there is none."""
    until: Position = (0, 0)
    """Every batch from the anchor to here, not including, is ready or has failed."""

    def __post_init__(self) -> None:
        self._order: list[Position] = []
        self._batches: dict[Position, _Batch] = {}
        self._next: Position = (0, 0)
        self._readers: dict[int, Position] = {}
        self._failed: set[Position] = set()
        self._retry: set[Position] = set()
        """Asked once, and to be asked again."""
        self._pinned: set[Position] = set()
        self._removals: list[Position] = []
        self._no_room = False

    # ---- what happens ------------------------------------------------------------------------------------------

    def begin(self, position: Position, present: Collection[Position]) -> None:
        """A producer starts: `present` are the files it found. Those that form a run with `position` are used."""
        self._restart(position)
        before = (position[0], position[1] - 1)
        lookback: list[Position] = []
        while before in present and len(lookback) < self.limits.lookback:
            lookback.append(before)
            before = (before[0], before[1] - 1)
        for there in reversed(lookback):
            self._add(there, ready=True)
        while self._next in present and len(self._order) - len(lookback) < self.limits.prefetch:
            self._add(self._next, ready=True)
            self._next = self._after(self._next)
        self._removals = [there for there in present if there not in self._batches]
        self._settle()

    def seek(self, reader: int, position: Position) -> None:
        """A reader begins, or goes elsewhere. What does not lead on from there is given up."""
        self._readers[reader] = self._normal(position)
        self._align()
        for failed in [failed for failed in self._failed if failed >= position]:
            self._forget_failure(failed)
        self._settle()

    def advance(self, reader: int, position: Position) -> None:
        """A reader has taken what is before `position`."""
        position = self._normal(position)
        if reader in self._readers and position >= self._readers[reader]:
            self._readers[reader] = position
            self._settle()

    def leave(self, reader: int) -> None:
        """A reader is gone, or does not read for now. What it was to read next stays until others move on."""
        if self._readers.pop(reader, None) is not None:
            if self._readers:
                self._align()
            self._settle()

    def ready(self, position: Position) -> bool:
        """A batch was made. False: nobody wants it any more, remove it."""
        batch = self._batches.get(position)
        if batch is None:
            return False
        batch.ready, batch.asked = True, False
        self._settle()
        return True

    def failed(self, position: Position) -> bool:
        """A batch cannot be made; readers that come to it are to be told so. False: nobody wants it any more."""
        batch = self._batches.get(position)
        if batch is None:
            return False
        batch.asked = False
        self._retry.discard(position)
        self._failed.add(position)
        self._settle()
        return True

    def ended(self, epoch: int, length: int) -> None:
        """An epoch has `length` batches; what was asked for beyond its end does not exist."""
        self.lengths[epoch] = length
        for position in [p for p in self._order if p[0] == epoch and p[1] >= length]:
            self._drop(position)
        if self._next[0] == epoch and self._next[1] >= length:
            self._next = (epoch + 1, 0)
        for reader, position in self._readers.items():
            self._readers[reader] = self._normal(position)
        self.anchor, self.until = self._normal(self.anchor), self._normal(self.until)
        self._settle()

    def lost(self, position: Position) -> bool:
        """Whoever was making it has died. False: it has been tried too often."""
        batch = self._batches.get(position)
        if batch is None or batch.ready:
            return True
        self._repeat(position)
        batch.attempts += 1
        return batch.attempts < _ATTEMPTS

    def given_back(self, position: Position) -> None:
        """It was asked for and not begun."""
        batch = self._batches.get(position)
        if batch is not None and not batch.ready:
            self._repeat(position)

    def again(self, position: Position) -> bool:
        """Its file is of no use. False: it has been made too often."""
        batch = self._batches.get(position)
        if batch is None or not batch.ready:
            self._forget_failure(position)
            return True
        batch.ready = False
        batch.attempts += 1
        self._repeat(position)
        return batch.attempts < _ATTEMPTS

    def no_room(self, position: Position) -> Position | None:
        """There was no space to write it. Gives the batch that has to be given up, if nothing else makes some.

        Nothing is made until there is room: while readers still have what they need, they will make some.
        """
        batch = self._batches.get(position)
        if batch is None:
            return None
        self._repeat(position)
        self._no_room = True
        if self.until > self.anchor or any(other.asked for other in self._batches.values()):
            return None
        spare = [p for p in self._order if p < self.anchor]
        if not spare and any(p > self.until and other.ready for p, other in self._batches.items()):
            # Later ones, made out of order, are where the one that is waited for should be.
            spare = [p for p in self._order if p > self.until]
            self._next = self._after(self.until)
        for there in spare:
            self._remove(there)
        return None if spare else self.until

    # ---- what to do --------------------------------------------------------------------------------------------

    def next_wanted(self) -> Position | None:
        """The next batch to make; the caller then calls `asked`, or `ended` if the epoch has no such batch."""
        if self._no_room or (self.limits.stop_at_failure and any(there >= self.anchor for there in self._failed)):
            return None
        if self._retry:
            return min(self._retry)
        ahead = len(self._order) - bisect.bisect_left(self._order, self.anchor)
        if ahead >= self.limits.prefetch:
            return None
        return self._next

    def asked(self, position: Position) -> None:
        """It is being made."""
        if position == self._next and position not in self._batches:
            self._add(position, ready=False)
            self._next = self._after(position)
        self._retry.discard(position)
        self._batches[position].asked = True

    def take_removals(self) -> list[Position]:
        """The batches whose files are to go."""
        removals, self._removals = self._removals, []
        return removals

    # ---- inside ------------------------------------------------------------------------------------------------

    def _normal(self, position: Position) -> Position:
        """The end of an epoch is the beginning of the next."""
        length = self.lengths.get(position[0])
        return (position[0] + 1, 0) if length is not None and position[1] >= length else position

    def _after(self, position: Position) -> Position:
        return self._normal((position[0], position[1] + 1))

    def _add(self, position: Position, *, ready: bool) -> None:
        bisect.insort(self._order, position)
        self._batches[position] = _Batch(ready)

    def _drop(self, position: Position) -> None:
        del self._batches[position]
        self._order.remove(position)
        self._failed.discard(position)
        self._retry.discard(position)
        self._pinned.discard(position)

    def _remove(self, position: Position) -> None:
        self._drop(position)
        self._removals.append(position)
        self._no_room = False

    def _forget_failure(self, position: Position) -> None:
        """It may be tried again: what went wrong may have passed."""
        if position in self._failed:
            self._failed.discard(position)
            self._no_room = False
            self._batches[position].attempts = 0
            self._repeat(position)

    def _repeat(self, position: Position) -> None:
        self._batches[position].asked = False
        self._retry.add(position)
        self.until = min(self.until, position)

    def _align(self) -> None:
        """Sees to it that what is there, and what will be made next, leads on from the slowest reader."""
        position = min(self._readers.values())
        if position not in self._batches and position != self._next:
            self._restart(position)
        elif position < self._next:
            self._cut_after_run(position)

    def _restart(self, position: Position) -> None:
        for there in list(self._order):
            self._remove(there)
        self._next = position
        self.anchor = self.until = position
        self._no_room = False

    def _cut_after_run(self, position: Position) -> None:
        """Gives up what is behind a gap after `position`: going on from there will fill it."""
        end = position
        while end in self._batches:
            end = self._after(end)
        for there in [there for there in self._order if there >= end]:
            self._remove(there)
        self._next = end
        self.until = min(self.until, position)

    def _settle(self) -> None:
        if self._readers:
            self.anchor = min(self._readers.values())
        self.until = max(self.until, self.anchor)
        while True:
            batch = self._batches.get(self.until)
            if batch is not None and (batch.ready or self.until in self._failed):
                self.until = self._after(self.until)
            elif self.lengths.get(self.until[0]) == self.until[1]:
                self.until = (self.until[0] + 1, 0)
            else:
                break
        if self._no_room and self.until == self.anchor and not any(batch.asked for batch in self._batches.values()):
            self._no_room = False  # nobody will make room; `no_room` must find that out
        self._prune()

    def _prune(self) -> None:
        self._pin()
        behind = bisect.bisect_left(self._order, self.anchor) - self.limits.lookback
        for position in self._order[: max(0, behind)]:
            if position not in self._pinned and not self._batches[position].asked:
                self._remove(position)

    def _pin(self) -> None:
        """The first batches after the last checkpoint stay."""
        frequency = self.limits.checkpoint_frequency
        if frequency is None or frequency <= self.limits.lookback:
            return
        self._pinned = {p for p in self._order if p < self.anchor and self._after_checkpoint(p, frequency)}

    def _after_checkpoint(self, position: Position, frequency: int) -> bool:
        last = self._number(self.anchor) // frequency * frequency
        return 0 <= self._number(position) - last < self.limits.lookback

    def _number(self, position: Position) -> int:
        """Of a batch in the whole stream; within the epoch where epochs have no known length."""
        length = self.length or self.lengths.get(0, 0)
        return position[0] * length + position[1]
