"""The steps of training, as they are watched: what each began with, from the first change to the end of the pass.

The decisions are `tracker.StepTracker`'s; here are the notes, the copy for a rollback and the critical
sections. While an optimizer steps, and within `manager.update()`, an interrupt waits; from the first change on until
the pass ends a rank that only hears of a fault finishes the pass, if it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..caller import Caller, NoCaller
from ..errors import UnsupportedStateError
from ..state.generators import States, read_generators, write_generators
from ..state.registry import Registry, names_of_movers
from ..state.small import SmallState
from ..state.stateful import is_generator, is_scaler
from ..transfer.snapshots import Snapshots
from .history import History
from .learning import Learning
from .load_guard import ScriptWrites
from .loaders import STARTS
from .rollback import KeptState, Rollback
from .tracker import UPDATE, StepTracker, listed
from .watch import Watch


class Update:
    """One per manager. Does nothing between `pause` and `resume`."""

    def __init__(self, tracker: StepTracker, history: History, rollback: Rollback, snapshots: Snapshots | None) -> None:
        self.caller: Caller = NoCaller()
        self._tracker = tracker
        self._history = history
        self._rollback = rollback
        self._snapshots = snapshots
        self._registry: Registry | None = None
        self._watch: Watch | None = None
        self._watching = False
        self._in_block = False
        self._first_pass = self._anew = False
        self._versions = 0
        """Of the trained tensors at the point that can be gone back to."""
        self._seen: tuple[SmallState, int] | None = None
        """What everything looked like when all that moves in an update had moved."""
        self._forward_seen = False
        self._inside = False
        """A pass is under way."""
        self._resumed: SmallState | None = None
        """In the first pass after a restart: what that step began with before."""
        self._at_backward: SmallState | None = None
        self._begun = False
        self._kept_said = False
        self._learning = Learning(tracker, history)
        self.writes = ScriptWrites()
        self._scalers: list[str] = []

    @property
    def first_pass(self) -> bool:
        """The next pass is the first one since the last restore."""
        return self._first_pass

    @property
    def kept(self) -> KeptState | None:
        return self._rollback.kept

    def listen(self) -> None:
        """Objects are about to be registered: what a loader begins when it is asked for its position is under way."""
        STARTS.listen()

    def watch(self, registry: Registry) -> None:
        """These objects are trained from now on."""
        if self._watch is not None:
            self._watch.remove()
        self._registry = registry
        self.writes.watch(registry)
        self._learning.watch(registry)
        self._scalers = [name for name, mover in registry.movers.items() if is_scaler(mover)]
        registry.taker.starts = STARTS.under_way
        others = {name for name, target in registry.taker.local.items() if not is_generator(target)}
        others |= {name for name, module in registry.modules.items() if not _is_trained(registry, name)}
        others |= {name for name, provider in registry.providers.items() if provider.named_tensors()}
        self._tracker.trains(frozenset(names_of_movers(registry)), frozenset(others))
        self._watch = Watch(registry, self)

    def release(self) -> None:
        """Takes the hooks away."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def forget(self) -> None:
        """Another function: what was kept is of the one before it."""
        self._rollback.forget()
        self._begun = False
        self.writes.forget()

    def pause(self) -> None:
        self._watching = False

    @property
    def begun(self) -> bool:
        """A step of this function has begun in this process."""
        return self._begun

    def resume(self, small: SmallState, *, anew: bool) -> None:
        """The state is that before the next pass. `anew`: it is the script's own, nothing was restored."""
        assert self._registry is not None
        self.writes.forget()
        self._watching = True
        self._first_pass, self._anew = True, anew
        self._resumed = None if anew else small
        STARTS.listen()
        if not anew:
            STARTS.repeats(small.starts)
            if self._draws_between(small):
                STARTS.in_step(small.generators["torch"])
        self._versions = self._registry.state.versions()
        if not anew and small.step > 0:
            self.writes.restored()

    # ---- a pass ----------------------------------------------------------------------------------------------------

    def begin(self, *, settled: bool = False) -> None:
        """A pass of the loop begins. `settled`: all is as it should be here, whatever was noted before."""
        assert self._registry is not None
        self._tracker.begin()
        self._seen = self._at_backward = None
        self._forward_seen = False
        self._inside = True
        if self._first_pass:
            self._first_pass = False
            if settled:
                self._begin_first_settled(self._registry)
            else:
                self._begin_first(self._registry)
        elif settled:
            self._note_settled(self._registry)
        else:
            self._note_draws(self._registry)
            if self._resumed is not None:  # no forward pass of a registered module was seen
                self._resumed = None
                STARTS.arrived()
        self._learning.begin()
        if self._tracker.learned.early and self._keeps():
            self._keep()

    def _draws_between(self, small: SmallState) -> bool:
        """Whether the state is that in which the step before ended, and the loop may draw before this one begins."""
        return self._tracker.learned.external and not small.begun

    def _note_draws(self, registry: Registry) -> None:
        """Between two passes a loop of somebody else's may have drawn random numbers (a new epoch's order). A restarted
        script draws them again on its way, and finds in the step what it found here."""
        step = self._tracker.point
        small = self._history.get(step)
        if small is None or self._tracker.index != step:
            return
        small.begun = True
        if small.generators is read_generators():
            return
        small.generators, small.starts = read_generators(), registry.taker.starts()
        self._history.rewrite(small, registry.taker, (step, self._tracker.previous))

    def _note_settled(self, registry: Registry) -> None:
        """Between two passes the loop may have moved anything that is noted of each rank. A window of passes is begun
        once."""
        step = self._tracker.point
        small = self._history.get(step)
        if small is None or self._tracker.index != step:
            return
        small.begun = True
        if registry.taker.changed(small):
            self._settle(registry, None)

    def _begin_first_settled(self, registry: Registry) -> None:
        """After a restore the loop itself has brought all to where it was when the step began."""
        self._begun = True
        small = self._history[self._tracker.point]
        self.writes.loop_begins()
        settled = self._settle(registry, small.forward if small.begun and not self._anew else None)
        if not self._anew:
            self._resumed = settled
            STARTS.in_step(read_generators()["torch"])
        self._versions = registry.state.versions()

    def _settle(self, registry: Registry, forward: States | None) -> SmallState:
        """Notes the state now as that with which the step begins."""
        step = self._tracker.point
        small = registry.taker.take(step)
        small.begun, small.forward = True, forward
        self._history.settle(small, registry.taker, (step, self._tracker.previous))
        return small

    def _begin_first(self, registry: Registry) -> None:
        """Between the restore and the loop the script may have drawn random numbers (`iter(loader)` does). In a run
        without the fault it had not, here; in one that begins they are part of what the loop finds."""
        self._begun = True
        step = self._tracker.point
        small = self._history[step]
        targets = registry.taker.local
        moved = {name for name in registry.taker.changed_local(small) if not is_generator(targets.get(name))}
        if moved:
            raise UnsupportedStateError(
                f"{listed(moved)} moved between restore() and the first step, so what it gave then (a batch fetched "
                "ahead?) is in variables of the script, and a restart would take the next one: let it move within the "
                "steps only, or do not register it and begin it at restore()'s step"
            )
        self.writes.loop_begins()
        if self._anew:
            self._history.begin_with(registry.taker.take(step), registry.taker)
        else:
            drawn = self._draws_between(small) and STARTS.fresh > 0
            registry.taker.put_back(small, objects=False, generators=not drawn)
            STARTS.in_step(read_generators()["torch"])
        self._versions = registry.state.versions()

    def nothing_left(self) -> None:
        """The loop has no pass left after a restart: what follows finds the generators as the last pass left them."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            assert self._registry is not None
            self._registry.taker.put_back(resumed, objects=False)
            STARTS.arrived()

    def settle(self) -> None:
        """The generators are what this step found, and nothing that is begun from here on was under way."""
        self._resumed = None
        STARTS.arrived()

    def forward_begins(self) -> None:
        """A registered module is called. In a restarted step the generators are as they were here before: on the way
        the script may have made iterators, or skipped batches, that draw from them."""
        if not self._inside or self._forward_seen or not self._watching or self._tracker.index != self._tracker.point:
            return  # of no pass, an evaluation between two: or not its first
        self._forward_seen = True
        assert self._registry is not None
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            if resumed.forward is not None:
                write_generators(resumed.forward)
            elif STARTS.begun and resumed.starts:  # what was under way has begun again, and drawn; it had not, here
                write_generators(resumed.generators)
            STARTS.arrived()
        keep = (self._tracker.point, self._tracker.previous)
        self._history.note_forward(self._tracker.point, self._registry.taker, read_generators(), keep)

    def backward_begins(self) -> None:
        """The last moment at which the other ranks cannot have completed this step without this one.

        From here on its gradients are on their way; if it dies now, its successor needs the generators as the *next*
        step will find them.
        """
        if not self._watching:
            return
        assert self._registry is not None
        tracker = self._tracker
        tracker.divides()
        keep, late = (tracker.point, tracker.previous), frozenset(tracker.learned.late)
        if not tracker.presumed:
            self._at_backward = self._history.foresee(tracker.index + 1, self._registry.taker, keep, late)

    def opens(self) -> None:
        """Parameters are about to change. The gradients are there: HPWrapper has every optimizer wait for them."""
        if not self._watching or self._tracker.opened:
            return
        if self._tracker.presumed:  # and here it moves once more
            self._tracker.learned.tail |= {"an optimizer that steps again"}
            self._tracker.torn()
            return
        assert self._registry is not None
        if self._registry.state.versions() != self._versions:
            self._tracker.learned.early.add("a parameter")
        self._learning.opens()
        self.caller.open_pass()  # may leave the step; from here on it is finished if it can be
        self._tracker.opens()
        if self._snapshots is not None:
            self._snapshots.wait_copied()
        if not self._tracker.learned.early and self._keeps():
            self._keep()

    def enter_section(self) -> None:
        if self._watching:
            self.caller.enter_update()

    def leave_section(self) -> None:
        if self._watching:
            self.caller.leave_update()

    def moved(self, name: str) -> None:
        if not self._watching:
            return
        tracker = self._tracker
        if tracker.presumed:  # so it was not complete, and is not in steps like this one
            tracker.learned.tail.add(name)
            tracker.torn()
        if tracker.moved(name) and not self._in_block:
            self._all_moved()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """An update whose extent the user states. Before the first restore it is no update: nothing is carried yet."""
        if not self._watching:
            yield
            return
        self.caller.finish_gradients()  # may leave the step: nothing has changed yet
        self.opens()
        self.caller.enter_update()
        self._in_block = True
        try:
            yield
        finally:
            self._in_block = False
        self._tracker.moved(UPDATE)
        self._all_moved()
        self.caller.leave_update()

    def _all_moved(self) -> None:
        """All that moves in an update has moved; the pass may go on."""
        assert self._registry is not None
        tracker, registry = self._tracker, self._registry
        self._learning.look("moved")
        if tracker.may_presume:
            small = self._note(tracker.index + 1)
            tracker.presume()
            self.caller.presume_pass()
        else:
            small = registry.taker.take(tracker.index + 1, self._history.latest)
        self._seen = small, registry.state.versions()

    def end(self) -> bool:
        """A pass of the loop is over; whether it completed an update."""
        assert self._registry is not None
        self._inside = False
        tracker, registry = self._tracker, self._registry
        versions = registry.state.versions()
        tail = self._changed_since_seen(versions)
        updated = self._has_changed(versions)
        self._learning.contents()
        self._learning.objects()
        known = tracker.learned.known
        if tail:
            self._learning.tail(tail)
        presumed = tracker.presumed and not tail
        closely = tracker.checks
        left_out = not updated and tracker.has_moved(self._scalers)
        tracker.end(updated=updated, left_out=left_out)
        if updated or left_out:
            self._versions = versions
            if not presumed:
                self._note(tracker.point)
            self._learning.late(self._at_backward, closely=closely)
            if known or tracker.learned.known:
                self._say_what_is_kept()
        self.caller.close_pass()
        return updated or left_out

    def abandon(self) -> None:
        """User code was left by an exception: an update that was open stays incomplete."""
        STARTS.leave()
        if self._watching and self._registry is not None and not self._registry.dropped:
            self._judge()
            self.writes.forget()
            if self._begun and not self._tracker.opened:
                self.writes.left()
        self._in_block = self._watching = self._inside = False
        self._seen = self._at_backward = self._resumed = None
        self._learning.forget()

    def _judge(self) -> None:
        """Whether this pass, left before its end, has changed what it says it has not."""
        assert self._registry is not None
        tracker = self._tracker
        versions = self._registry.state.versions()
        if tracker.presumed:
            if self._changed_since_seen(versions):
                tracker.torn()
        elif not tracker.opened and not self._first_pass and versions != self._versions:
            tracker.opened = True
        elif not tracker.opened and tracker.learned.early and not self._first_pass:
            tracker.opened = True  # how much of it, the version counters may not show

    # ---- what is seen, and learned ---------------------------------------------------------------------------------

    def _note(self, step: int) -> SmallState:
        assert self._registry is not None
        return self._history.take(step, self._registry.taker, (self._tracker.point, self._tracker.previous))

    def _changed_since_seen(self, versions: int) -> set[str]:
        """What has changed since all had moved: nothing where that was not seen in this pass."""
        if self._seen is None:
            return set()
        assert self._registry is not None
        small, before = self._seen
        found = set(self._registry.taker.changed(small))
        if versions != before:
            found.add("a parameter")
        return found

    def _has_changed(self, versions: int) -> bool:
        """Whether anything beside the small state has changed in this pass."""
        tracker = self._tracker
        return tracker.opened or tracker.presumed or versions != self._versions or self._learning.invisibly_changed()

    # ---- the state before, kept ------------------------------------------------------------------------------------

    def _keeps(self) -> bool:
        assert self._registry is not None
        return self._rollback.keeps(
            self._registry.state, known=self._tracker.learned.known, needed=self._tracker.needs_kept
        )

    def _keep(self) -> None:
        assert self._registry is not None
        self._rollback.keep(self._tracker.point, self._registry.state)

    def _say_what_is_kept(self) -> None:
        tracker = self._tracker
        if tracker.needs_kept and not self._kept_said:
            assert self._registry is not None
            self._kept_said = True
            self._rollback.say(self._registry.state, tracker.why_kept())


def _is_trained(registry: Registry, name: str) -> bool:
    """Whether some parameter of a registered module is one of a registered optimizer's, or it has none."""
    owned = {
        id(parameter)
        for optimizer in registry.torch_state.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = list(registry.modules[name].parameters())
    return not parameters or any(id(parameter) in owned for parameter in parameters)
