"""Where in a step of training this process is, and which step it can go back to: pure bookkeeping.

A step is one pass of the loop. It is complete once everything that an update moves (optimizers, schedulers, the
gradient scaler) has moved. What moves in this loop is learned from the passes before, so that the update can be
declared complete right after the last of them instead of at the end of the pass: a fault in the logging that follows
must not make everybody look torn. As long as that is not known, and for good where something else is seen to change
after the update, the update lasts until the end of the pass.

Passes in which nothing moves (gradient accumulation) do not advance the point that can be gone back to: the gradients
they gathered are lost with a fault, so the whole window is repeated.
"""

from __future__ import annotations


class StepTracker:
    """The state of the loop. `point`: the pass that can be begun anew; `index`: the pass under way."""

    def __init__(self) -> None:
        self.index = 0
        self.point = 0
        self.previous = 0
        """The point before this one."""
        self.updating = False
        """Something has begun to move and the update is not complete: the state is not whole."""
        self._moved: set[str] = set()
        self._expected: frozenset[str] = frozenset()
        self._tail_known = False
        self._quiet_tail = False
        """Nothing changes between the last move and the end of the pass."""

    def go_to(self, step: int) -> None:
        """The state is that before pass `step`."""
        self.index = self.point = self.previous = step
        self.updating = False
        self._moved.clear()

    def begin(self) -> None:
        """A pass begins."""
        self.updating = False
        self._moved.clear()

    def opens(self) -> bool:
        """An optimizer is about to step: whether that begins an update."""
        if self.updating:
            return False
        self.updating = True
        return True

    def moved(self, name: str) -> bool:
        """A part has moved. Whether all that are expected to have, inside an update."""
        self._moved.add(name)
        return self.updating and bool(self._expected) and self._moved >= self._expected

    @property
    def completed(self) -> bool:
        """Whether the update of this pass is complete while the pass goes on."""
        return self.point == self.index + 1 and not self.updating

    @property
    def tail_known(self) -> bool:
        """Whether it has been seen what happens after an update in this loop."""
        return self._tail_known

    @property
    def may_complete(self) -> bool:
        """Whether the update may be declared complete when all have moved, before the end of the pass."""
        return self._tail_known and self._quiet_tail

    def complete(self) -> None:
        """The update is complete: the next pass can be begun, whatever happens to the rest of this one."""
        if self.point != self.index + 1:
            self.previous, self.point = self.point, self.index + 1
        self.updating = False

    def end(self, changed_since_move: bool | None) -> bool:
        """The pass is over; whether it completed an update.

        `changed_since_move`: whether anything but what is expected to move has changed after all had moved; None when
        that was not observed in this pass.
        """
        updated = bool(self._moved)
        if updated:
            self.complete()
            self._expected = frozenset(self._moved)
            if changed_since_move is not None:
                self._quiet_tail = not changed_since_move and (self._quiet_tail or not self._tail_known)
                self._tail_known = True
        self.index += 1
        self.begin()
        return updated

    def learned(self) -> tuple[list[str], bool, bool]:
        """What is known of the loop, for a process that has not seen it."""
        return sorted(self._expected), self._tail_known, self._quiet_tail

    def learn(self, expected: list[str], tail_known: bool, quiet_tail: bool) -> None:
        self._expected, self._tail_known, self._quiet_tail = frozenset(expected), tail_known, quiet_tail
