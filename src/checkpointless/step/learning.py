"""What is learned of a training loop by looking: what changes in a step, and when.

Version counters show most of it. What they do not show (a write through `.data`) is found by comparing contents at four
moments of a pass, in those passes that `tracker.StepTracker.checks` names.
"""

from __future__ import annotations

import logging

import torch

from ..state.fingerprint import different, fingerprints
from ..state.optimizers import extras_of
from ..state.registry import Registry
from ..state.small import SmallState, differing
from ..state.tensors import local
from ..state.tree import tensors_in
from .history import History
from .tracker import StepTracker, listed

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
        self._attributes: dict[str, int] = {}
        """Fingerprints of tensors that optimizers have as attributes, before the first step."""
        self._named: set[str] = set()

    def watch(self, registry: Registry) -> None:
        self._registry = registry

    def begin(self) -> None:
        """A pass begins: the first moment of one that is looked at closely."""
        self._contents.clear()
        if self._tracker.checks:
            self._contents["begin"] = self._registry_contents()
            if not self._attributes and self._registry is not None:
                self._attributes = fingerprints(_attributes(self._registry))

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
        self._name_attributes()
        names = different(self._contents["begin"], self._contents["end"])
        self._registry.torch_state.moved |= frozenset(names)
        silent = {name.removeprefix("buffer ") for name in names if name.startswith("buffer ")}
        if silent:
            self._tracker.learned.untracked |= silent
            self._registry.taker.distrust(frozenset(silent))

    def _name_attributes(self) -> None:
        """An optimizer that keeps something beside its state, and does not say so in its state_dict(), loses it."""
        assert self._registry is not None
        found = _attributes(self._registry)
        changed = {name for name in different(self._attributes, fingerprints(found)) if name in found} - self._named
        if changed:
            self._named |= changed
            _log.warning(
                "%s changes in training, is an attribute of a registered optimizer and not in its state_dict(): a lost "
                "rank would not get it. Keep it in the optimizer's `state`, or give it in state_dict()",
                listed(changed),
            )

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

    def late(self, seen: SmallState | None, *, closely: bool) -> None:
        """What has changed between the last backward pass and the end: a successor cannot know it from its record.
        `seen`: what there was at that pass."""
        final = self._history.get(self._tracker.point)
        learned = self._tracker.learned
        if seen is None or final is None or (final.generators is seen.generators and not (seen.buffers or seen.local)):
            return
        known = frozenset(learned.late)
        if not closely:  # the host must not wait for the device in every step
            known |= {f"buffer {name}" for name, (_, contents) in final.buffers.items() if contents.is_cuda}
        learned.late |= differing(final, seen, known)


def _large_buffers(registry: Registry) -> dict[str, torch.Tensor]:
    return {f"buffer {name}": value for name, value in registry.taker.large_buffers().items()}


def _attributes(registry: Registry) -> dict[str, torch.Tensor]:
    """Tensors that registered optimizers have as attributes, less those that are carried and those that torch puts
    there for a moment."""
    carried = {value.untyped_storage().data_ptr() for value in registry.torch_state.named_tensors().values()}
    found: dict[str, torch.Tensor] = {}
    for name, optimizer in registry.torch_state.optimizers.items():
        for attribute, value in vars(optimizer).items():
            if attribute in ("state", "param_groups", "defaults", "grad_scale", "found_inf"):
                continue
            for path, tensor in tensors_in(value, f"{name}.{attribute}"):
                if tensor.layout is torch.strided and local(tensor).untyped_storage().data_ptr() not in carried:
                    found[path] = local(tensor)
    told = {place for optimizer in registry.torch_state.optimizers.values() for place in _told(optimizer)}
    return {path: tensor for path, tensor in found.items() if tensor.data_ptr() not in told}


def _told(optimizer: torch.optim.Optimizer) -> set[int]:
    """Where the tensors are that an optimizer gives in its state_dict() beside torch's two entries."""
    return {tensor.data_ptr() for _, tensor in tensors_in(extras_of(optimizer), "")}
