"""What training changes and nobody has registered: an optimizer, a generator, a tensor that a fault would leave behind.

Looked for in what the wrapped function can reach: its arguments, its closure, the globals it names, and the local
variables of the frames between it and the loop; from there two levels into plain objects and containers. What is found
is looked at when a pass begins and when it ends. In an ordinary run that is done in the first two passes, by version
counters, and said in one warning; in a traced one (`testing/trace.py`) in all of them.

Never the reason that training fails: what cannot be looked at is left out. Only weak references last over a pass, so
that nothing lives longer for it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..state.reachable import Reached, reach_from
from ..state.tree import tensors_in
from ..state.versions import Fingerprint, fingerprint

_log = logging.getLogger("hyperpodrun.checkpointless")
_PASSES = 2
"""In an ordinary run: the first one makes state, the second one changes it."""


@dataclass(frozen=True)
class Finding:
    """One thing that changed in a step and is not registered."""

    path: str
    kind: str
    step: int

    def __str__(self) -> str:
        name = self.path.rpartition(".")[2].strip("[]'\"") or "it"
        name = name if name.isidentifier() else "name"
        if self.kind == "tensor":
            remedy = f"make it a buffer of a registered module, or register({name}=...) what has it in its state_dict"
        else:
            remedy = f"register({name}={self.path})"
        return f"step {self.step} changed the {self.kind} {self.path}, which is not registered: {remedy}"


class UnregisteredWatch:
    """An observer of the manager's passes. `named`: what has been said before, by path; nothing is said twice."""

    def __init__(
        self, manager: Any, function: Callable[..., Any], args: Any, kwargs: Any, named: set[str] | None = None
    ) -> None:
        self._manager = manager
        self._wrapped: tuple[Callable[..., Any], Any, Any] | None = (function, args, kwargs)
        self._traced = os.environ.get("HYPERPODRUN_TRACE")
        self._before: list[tuple[Reached, Fingerprint]] = []
        self._passes = 0
        self.named = set() if named is None else named

    def begin(self) -> None:
        self._before = []
        if self._wrapped is None:
            return
        try:
            registered = {id(target) for target in self._manager._registry.objects.values()}
            for reached in reach_from(*self._wrapped, sys._getframe(1)):
                if id(reached.target) not in registered:
                    self._before.append((reached.weak(), fingerprint(reached.target)))
        except Exception as error:  # objects are other people's code
            _log.debug("what is not registered is not looked for: %r", error)
            self._finish()

    def end(self) -> None:
        if self._wrapped is None:
            return
        try:
            findings = self._changed()
        except Exception as error:
            _log.debug("what is not registered is not looked for: %r", error)
            self._finish()
            return
        self._before = []
        self._passes += 1
        if findings:
            self._report(findings)
        if self._passes >= _PASSES and not self._traced:
            self._finish()

    def ended(self) -> None:
        pass

    def _changed(self) -> list[Finding]:
        changed = []
        for reached, before in self._before:
            target = reached.target
            if target is None or reached.path in self.named:
                continue
            tensors = before.changed(fingerprint(target))
            if tensors is not None:
                changed.append((reached, tensors))
        if not changed:
            return []
        carried = _storages(self._manager._registry.objects)
        found = []
        for reached, tensors in changed:
            if tensors and all(_storage(tensor) in carried for tensor in tensors):
                continue  # another view of what is registered, or a gradient of it
            self.named.add(reached.path)
            found.append(Finding(reached.path, reached.kind, self._manager._tracker.index))
        return found

    def _report(self, findings: list[Finding]) -> None:
        caller = self._manager._caller
        if self._traced:
            from pathlib import Path

            from ...testing.trace import write_line

            for finding in findings:
                write_line(Path(self._traced), caller.rank, {"unregistered": str(finding), "path": finding.path})
        elif caller.rank == 0 and getattr(caller, "epoch", 0) == 0:
            for finding in findings:
                _log.warning("%s. A fault leaves it as it is, which is wrong if a later step depends on it", finding)

    def _finish(self) -> None:
        self._before, self._wrapped = [], None


def _storages(objects: dict[str, Any]) -> set[int]:
    """Of all tensors that are carried, and of their gradients."""
    found: set[int] = set()
    for target in objects.values():
        tensors: list[Any] = []
        if isinstance(target, torch.nn.Module):
            parameters = list(target.parameters())
            tensors = [*parameters, *target.buffers(), *(parameter.grad for parameter in parameters)]
        elif isinstance(target, torch.optim.Optimizer):
            tensors = [value for _, value in tensors_in(dict(enumerate(target.state.values())), "")]
        elif hasattr(target, "state_dict"):
            tensors = [value for _, value in tensors_in(target.state_dict(), "")]
        found.update(_storage(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
    return found - {0}


def _storage(tensor: torch.Tensor) -> int:
    """Where its memory is; 0 when it has none."""
    local: Any = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    try:
        return int(local.untyped_storage().data_ptr())
    except RuntimeError:  # a tensor without storage
        return 0
