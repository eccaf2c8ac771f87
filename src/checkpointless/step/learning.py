"""What is learned of a training loop by looking: what changes in a step, and when.

Version counters show most of it. What they do not show (a write through `.data`) is found by comparing contents at four
moments of a pass, in those passes that `tracker.StepTracker.checks` names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from ..state.fingerprint import different, fingerprints
from ..state.registry import Registry
from ..state.small import SmallState, differing
from .history import History
from .tracker import StepTracker

_log = logging.getLogger("hyperpodrun.checkpointless")


class Learning:
    """Fills `tracker.learned`. Used by `update.Update` between a pass's beginning and its end."""

    def __init__(self, tracker: StepTracker, history: History) -> None:
        self._tracker = tracker
        self._history = history
        self._registry: Registry | None = None
        self._contents: dict[str, dict[str, int]] = {}
        """Fingerprints of everything at the moments of this pass, if it is looked at closely."""
        self._said = False

    def watch(self, registry: Registry) -> None:
        self._registry = registry

    def begin(self) -> None:
        """A pass begins: the first moment of one that is looked at closely."""
        self._contents.clear()
        if self._tracker.checks:
            self._contents["begin"] = self._registry_contents()

    def forget(self) -> None:
        """The pass was left."""
        self._contents.clear()

    def opens(self) -> None:
        """Something is about to say that it moves: what has changed before that is learned."""
        if self._contents:
            self.look("open")
            self._tracker.learned.early |= self._changed_between("begin", "open")

    def look(self, moment: str) -> None:
        """Another moment: `open`, `moved` or `end`."""
        if self._contents:
            self._contents[moment] = self._registry_contents()

    def _registry_contents(self) -> dict[str, int]:
        assert self._registry is not None
        return fingerprints(self._registry.state.named_tensors() | _large_buffers(self._registry))

    def _changed_between(self, one: str, other: str) -> set[str]:
        """The names of the registered objects whose tensors have changed."""
        assert self._registry is not None
        if one not in self._contents or other not in self._contents:
            return set()
        changed = different(self._contents[one], self._contents[other])
        return {self._registry.owner(name) for name in changed if not name.startswith("buffer ")}

    def invisibly_changed(self) -> bool:
        """Whether tensors have changed that no version counter shows, and no optimizer moves."""
        if not self._contents:
            return "invisible" in self._tracker.learned.early
        self.look("end")
        changed = self._changed_between("begin", "end")
        if changed and not self._tracker.opened and not self._tracker.presumed:
            self._tracker.learned.early.add("invisible")
        return bool(changed)

    def contents(self) -> None:
        """At the end of a pass that was looked at closely: what has changed, and what of it after the update."""
        if not self._contents:
            return
        assert self._registry is not None
        self._contents.setdefault("end", self._registry_contents())
        self._tracker.learned.changed |= self._changed_between("begin", "end")
        if self._tracker.all_moved:
            late = self._changed_between("moved", "end")
            if late:
                self.tail(late)
                self._tracker.torn()
        names = different(self._contents["begin"], self._contents["end"])
        self._registry.torch_state.moved |= frozenset(names)
        silent = {name.removeprefix("buffer ") for name in names if name.startswith("buffer ")}
        if silent:
            self._tracker.learned.untracked |= silent
            self._registry.taker.distrust(frozenset(silent))

    def objects(self) -> None:
        """Which objects of the local part have changed, as long as there are some that have not been seen to."""
        unseen = self._tracker.unseen
        small = self._history.get(self._tracker.point if not self._tracker.presumed else self._tracker.previous)
        if unseen and small is not None:
            assert self._registry is not None
            self._tracker.learned.changed |= self._registry.taker.changed_local(small) & unseen

    def tail(self, names: set[str]) -> None:
        tracker = self._tracker
        if not self._said and not names <= tracker.learned.tail:
            self._said = True
            _log.warning(
                "step %d: %s changed after the optimizer's update, so a step counts as complete at its end only; "
                "`with manager.update():` around all that belongs to an update, or rollback=True, keeps a fault in "
                "between from losing the state",
                tracker.index,
                listed(names),
            )
        tracker.learned.tail |= names

    def late(self, seen: SmallState | None) -> None:
        """What has changed between the last backward pass and the end: a successor cannot know it from its record.
        `seen`: what there was at that pass."""
        final = self._history.get(self._tracker.point)
        learned = self._tracker.learned
        if seen is None or final is None or (final.generators is seen.generators and not (seen.buffers or seen.local)):
            return
        learned.late |= differing(final, seen, frozenset(learned.late))


def _large_buffers(registry: Registry) -> dict[str, torch.Tensor]:
    return {f"buffer {name}": value for name, value in registry.taker.large_buffers().items()}


def listed(names: Iterable[str]) -> str:
    """Some names for a sentence."""
    found = sorted(f"'{name}'" for name in names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
