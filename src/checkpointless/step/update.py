"""The update of a step, as it is watched: from an optimizer's first move to the last of all that moves with it.

While it lasts the state is not whole, so an interrupt waits for its end as long as it makes progress. The decisions
are `tracker.StepTracker`'s; here are the hooks, the notes and the critical section.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..caller import Caller, NoCaller
from ..state.registry import Registry
from ..state.small import SmallState
from ..transfer.snapshots import Snapshots
from .history import History
from .rollback import KeptState, affordable
from .tracker import StepTracker

_log = logging.getLogger("hyperpodrun.checkpointless")


class Update:
    """One per manager. Does nothing between `pause` and `resume`."""

    def __init__(
        self, tracker: StepTracker, journal: History, kept: KeptState | None, snapshots: Snapshots | None
    ) -> None:
        self.caller: Caller = NoCaller()
        self._tracker = tracker
        self._journal = journal
        self.kept = kept
        self._keeps_always = kept is not None
        self._snapshots = snapshots
        self._registry: Registry | None = None
        self._watching = False
        self._in_section = False
        self._in_block = False
        self._first_pass = self._anew = False
        self._seen: tuple[SmallState, int] | None = None
        """What everything looked like when all that was expected to move had moved."""

    def watch(self, registry: Registry) -> None:
        """These objects are trained from now on."""
        self._registry = registry
        registry.watch(self._open, self._moved, self.backward_begins)

    def pause(self) -> None:
        self._watching = False

    def resume(self, *, anew: bool) -> None:
        """The state is that before the next pass. `anew`: it is the script's own, nothing was restored."""
        self._watching = True
        self._first_pass, self._anew = True, anew

    def begin(self) -> None:
        """A pass of the loop begins."""
        self._tracker.begin()
        self._seen = None
        if self._first_pass:
            self._first_pass = False
            self._begin_first()

    def _begin_first(self) -> None:
        """Between the restore and the loop the script may have drawn random numbers (`iter(loader)` does). In a run
        without the fault it had not, here; in one that begins they are part of what the loop finds."""
        assert self._registry is not None
        taker, step = self._registry.notes, self._tracker.point
        if self._anew:
            self._journal.begin_with(taker.take(step), taker)
        else:
            taker.put_back(self._journal[step])

    def end(self) -> bool:
        """A pass of the loop is over; whether it completed an update."""
        assert self._registry is not None
        step = self._tracker.index + 1
        quiet = self._tracker.may_complete
        changed = self._changed_since_seen()
        updated = self._tracker.end(changed)
        if quiet and not self._tracker.may_complete:
            _log.warning(
                "step %d: something changed after the optimizer's update (weights, buffers, random numbers). From now "
                "on a step counts as complete at its end only; `with manager.update():` around all that belongs to "
                "an update, or rollback=True, keeps a fault in between from losing the state",
                self._tracker.index - 1,
            )
        if updated and (changed is not False or not quiet):
            self._note(step)
        self._leave_section()
        return updated

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """An update whose extent the user states. Before the first restore it is no update: nothing is carried yet."""
        if not self._watching:
            yield
            return
        self.caller.finish_gradients()  # may leave the step: nothing has changed yet
        self._open()
        self._in_block = True
        try:
            yield
        finally:
            self._in_block = False
        self._tracker.moved("update")
        self._complete()

    def abandon(self) -> None:
        """User code was left by an exception: an update that was open stays incomplete."""
        self._in_section = self._in_block = self._watching = False
        self._seen = None

    def _open(self) -> None:
        """Parameters are about to change. The gradients are there: HPWrapper has every optimizer wait for them."""
        if not self._watching or self._tracker.updating:
            return
        self.caller.enter_update()  # may leave the step; from here on an interrupt waits
        self._in_section = True
        self._tracker.opens()
        if self._snapshots is not None:
            self._snapshots.wait_copied()
        self._keep_previous()

    def _keep_previous(self) -> None:
        """Until it is known when an update is complete in this loop, a fault after the optimizer's step could find
        everybody in the middle of one: for that long the state before it is kept, if there is room."""
        assert self._registry is not None
        if not self._keeps_always:
            wanted = not self._tracker.tail_known and affordable(self._registry.state)
            self.kept = (self.kept or KeptState()) if wanted else None
        if self.kept is not None:
            self.kept.keep(self._tracker.point, self._registry.state)

    def _moved(self, name: str) -> None:
        if not self._watching:
            return
        if self._tracker.completed:  # one that does not move in every step: it belongs to this one
            self._tracker.moved(name)
            self._note(self._tracker.point)
            self._seen = self._look()
            return
        if not self._tracker.moved(name) or self._in_block:
            return
        if self._tracker.may_complete:
            self._complete()
        else:
            self._seen = self._look()

    def _complete(self) -> None:
        """The update is complete; the pass may go on."""
        assert self._registry is not None
        self._note(self._tracker.index + 1)
        self._tracker.complete()
        self._seen = self._journal[self._tracker.point], self._registry.state.versions()
        self._leave_section()

    def _leave_section(self) -> None:
        if self._in_section:
            self._in_section = False
            self.caller.leave_update()

    def backward_begins(self) -> None:
        """The last moment at which the other ranks cannot have completed this step without this one.

        From here on its gradients are on their way; if it dies now, its successor needs the generators as the *next*
        step will find them.
        """
        tracker = self._tracker
        if self._watching and not tracker.updating:
            assert self._registry is not None
            self._journal.foresee(tracker.index + 1, self._registry.notes, (tracker.point, tracker.previous))

    def _note(self, step: int) -> None:
        assert self._registry is not None
        self._journal.take(step, self._registry.notes, (self._tracker.point, self._tracker.previous))

    def _look(self) -> tuple[SmallState, int]:
        assert self._registry is not None
        return (
            self._registry.notes.take(self._tracker.index + 1, self._journal.latest),
            self._registry.state.versions(),
        )

    def _changed_since_seen(self) -> bool | None:
        if self._seen is None:
            return None
        assert self._registry is not None
        note, versions = self._seen
        return versions != self._registry.state.versions() or self._registry.notes.changed(note)
