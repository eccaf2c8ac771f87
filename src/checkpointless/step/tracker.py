"""Where in a step of training this process is, and which step it can go back to: pure bookkeeping.

A step is one pass of the loop, and it is complete when the pass has ended. Between the first change of anything
registered and that end the state is *torn*, with one exception: where every part that moves in an update (optimizers,
schedulers, the gradient scaler) has moved, and nothing registered has ever been seen to change after that in this
loop, the update is *presumed* complete. A fault in the logging that follows must not make everybody look torn. What a
pass that ended has found overrules what was presumed (`protocol.plan.Holding.presumed`).

What is known of the loop is learned from the passes before (`Learned`). In some of them everything is compared by
content (`checks`), since a write through `.data` shows nowhere else.

Passes in which nothing changes (gradient accumulation) do not advance the point that can be gone back to: the gradients
they gathered are lost with a fault, so the whole window is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

UPDATE = "update"
"""What has moved where the script states the extent of an update itself (`manager.update()`)."""
_UNSEEN_PASSES = 64
"""So many passes without any change of it, and a registered object is taken not to change."""
_FIRST_CHECKS = 3
"""Passes in a row that are looked at closely; after them those whose number is a power of two."""


class Learned(msgspec.Struct):
    """What is known of the loop, also for a process that has not seen it. Names are those of registered objects, or
    items of the small state."""

    passes: int = 0
    """Passes with an update that have been seen to their end."""
    whole: int = 0
    """Of these, those in which everything that can move has moved."""
    changed: set[str] = msgspec.field(default_factory=set)
    """Registered objects that have been seen to change."""
    tail: set[str] = msgspec.field(default_factory=set)
    """What has been seen to change after everything had moved."""
    early: set[str] = msgspec.field(default_factory=set)
    """What has been seen to change before anything had said that it moves."""
    late: set[str] = msgspec.field(default_factory=set)
    """Items of the small state that have been seen to change after the last backward pass of a step."""
    external: bool = False
    """The loop is not `steps()`: between two passes it may do something."""
    divided: bool = False
    """A backward pass has begun in the middle of an update: a fault can find every rank between two changes."""
    untracked: set[str] = msgspec.field(default_factory=set)
    """Large buffers that have been seen to change without a new version."""

    @property
    def quiet(self) -> bool:
        """Whether the end of an update has been seen, and nothing changed after it."""
        return self.whole > 0 and not self.tail

    @property
    def known(self) -> bool:
        """Whether it has been seen what happens after an update in this loop."""
        return self.passes > 0


class StepTracker:
    """The state of the loop. `point`: the pass that can be begun anew; `index`: the pass under way."""

    def __init__(self) -> None:
        self.index = 0
        self.point = 0
        self.previous = 0
        """The point before this one."""
        self.opened = False
        """Something has changed in this pass, and the update is neither complete nor presumed to be."""
        self.presumed = False
        """The update of this pass is presumed complete, the pass goes on."""
        self.learned = Learned()
        self.sharded = False
        """Other ranks hold other parts of the state."""
        self._movers: frozenset[str] = frozenset()
        self._objects: frozenset[str] = frozenset()
        self._moved: list[str] = []

    def trains(self, movers: frozenset[str], objects: frozenset[str]) -> None:
        """What can move in an update, and the registered objects without one among these that can change otherwise."""
        if (movers, objects) != (self._movers, self._objects) and self._movers:
            self.learned = Learned()  # of another loop
        self._movers, self._objects = movers, objects

    def go_to(self, step: int) -> None:
        """The state is that before pass `step`."""
        self.index = self.point = self.previous = step
        self.begin()

    def begin(self) -> None:
        """A pass begins."""
        self.opened = self.presumed = False
        self._moved.clear()

    @property
    def checks(self) -> bool:
        """Whether this pass is to be looked at closely."""
        seen = self.learned.passes
        return seen < _FIRST_CHECKS or seen & (seen - 1) == 0

    def opens(self) -> bool:
        """A part is about to move: whether that is the first change of the pass."""
        if self.opened or self.presumed:
            return False
        self.opened = True
        return True

    def divides(self) -> None:
        """A backward pass begins although something has moved."""
        if self.opened or self.presumed:
            self.learned.divided = True

    def moved(self, name: str) -> bool:
        """A part has moved. Whether everything that can move has."""
        if name not in self._moved:
            self._moved.append(name)
        return self.all_moved

    @property
    def all_moved(self) -> bool:
        """Whether everything that can move has, in this pass, or all that the script has said belongs to an update."""
        return bool(self._moved) and (UPDATE in self._moved or self._movers <= set(self._moved))

    def has_moved(self, names: Iterable[str]) -> bool:
        """Whether one of these has moved in this pass."""
        return any(name in self._moved for name in names)

    @property
    def unseen(self) -> frozenset[str]:
        """Registered objects that have not been seen to change: nobody knows when they do."""
        if self.learned.passes >= _UNSEEN_PASSES:
            return frozenset()
        return self._objects - self.learned.changed

    @property
    def may_presume(self) -> bool:
        """Whether an update is complete, as far as can be known, when everything has moved."""
        return self.learned.quiet and not self.unseen

    def presume(self) -> None:
        """The update is presumed complete: the next pass can be begun, whatever happens to the rest of this one."""
        self._advance()
        self.opened, self.presumed = False, True

    def torn(self) -> None:
        """What was presumed complete is not: something has changed since."""
        if self.presumed:
            self.point, self.presumed, self.opened = self.previous, False, True

    def end(self, *, updated: bool, left_out: bool = False) -> None:
        """The pass is over. `updated`: something registered beside the small state has changed in it. `left_out`: the
        scaler has found an overflow and moved alone."""
        if updated or left_out:
            self._advance()
        if updated:
            self.learned.passes += 1
            self.learned.whole += self.all_moved
        self.index += 1
        self.begin()

    def _advance(self) -> None:
        if self.point != self.index + 1:
            self.previous, self.point = self.point, self.index + 1

    # ---- what a person hears ---------------------------------------------------------------------------------------

    @property
    def needs_kept(self) -> bool:
        """Whether a fault can find every rank between two changes of a step, as far as is known: then only the state
        before the update, kept, saves the job."""
        learned = self.learned
        if self.sharded:
            return True
        unsure = learned.passes > learned.whole  # some parts do not move in every pass
        return (
            not learned.known
            or learned.divided
            or bool(learned.tail | learned.early | learned.late | self.unseen)
            or unsure
        )

    def why_kept(self) -> str:
        """What makes it necessary, as the middle of a sentence."""
        learned = self.learned
        if learned.divided:
            return "gradients are computed between two changes of one step"
        if learned.tail:
            return f"{listed(learned.tail)} changes after the update"
        if learned.early:
            return f"{listed(learned.early)} changes before the update"
        if self.sharded:
            return "a fault can find those who hold one shard a step ahead of those who hold another"
        if learned.late:
            return f"{listed(learned.late)} changes after the backward pass"
        if learned.passes > learned.whole:
            return "not everything registered moves in every step"
        return f"it has not been seen when {listed(self.unseen)} changes"

    def why_torn(self) -> str:
        """What had changed and what had not, for a rank that was found in the middle of a step; at most 200
        characters."""
        rest = sorted(self._movers - set(self._moved)) + sorted(self.learned.tail) + sorted(self.unseen)
        had = f"{listed(self._moved)} had changed" if self._moved else "something registered had changed"
        left = f", {listed(dict.fromkeys(rest))} was still to change" if rest else ", the update was not over"
        return f"in step {self.index} {had}{left}"[:200]


def listed(names: Iterable[str]) -> str:
    """Some names for a sentence, those of a set in alphabetical order. Items of the small state are called as they were
    registered."""
    found = [f"'{name.removeprefix('local ')}'" for name in names]
    if isinstance(names, set | frozenset):
        found.sort()
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
