"""What a script writes to registered tensors in a restart, before its loop goes on: what is there is newer.

A checkpoint of its own that it loads, before `restore()` or after, is left out, and said. Weights that it makes anew
are refused: they cannot be told from those of another model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedStateError
from ..state.fingerprint import different, fingerprints
from ..state.registry import Registry
from ..state.stateful import same
from ..state.tree import tensors_in

_log = logging.getLogger("hyperpodrun.checkpointless")


class ScriptWrites:
    """From the moment a function is left by a fault until the loop goes on."""

    def __init__(self) -> None:
        self._registry: Registry | None = None
        self._guard: LoadGuard | None = None
        self._samples: dict[str, int] = {}
        self._versions = 0

    def watch(self, registry: Registry) -> None:
        """Other objects are registered, or these again."""
        self.forget()
        self._registry = registry

    def forget(self) -> None:
        """Nothing is protected any more."""
        if self._guard is not None:
            self._guard.lift()
        self._guard = None
        self._samples = {}

    def left(self) -> None:
        """The function was left, and the state is whole."""
        self.forget()
        if self._registry is not None and not self._registry.dropped:
            self._note(self._registry)

    def entered(self) -> None:
        """The function is entered again."""
        if self._samples and self._registry is not None:
            self._guard = LoadGuard(self._registry)

    def restoring(self) -> None:
        """The state is to be restored, or given away. Raises UnsupportedStateError where it is not what it was."""
        self._check("between a restart and restore(): what was there")

    def restored(self) -> None:
        """The state is that of the step to go on with."""
        assert self._registry is not None
        self._note(self._registry)
        self._guard = LoadGuard(self._registry)

    def loop_begins(self) -> None:
        """The first step of a restart. Raises UnsupportedStateError where the state is not what was restored, whoever
        has written to it since (DDP has)."""
        self._check("between restore() and the first step: what was restored")

    def _note(self, registry: Registry) -> None:
        self._samples, self._versions = _samples(registry), registry.state.versions()

    def _check(self, when: str) -> None:
        before, registry = self._samples, self._registry
        self.forget()
        if not before or registry is None or registry.dropped or registry.state.versions() == self._versions:
            return
        odd = different(before, _samples(registry))
        if odd:
            raise UnsupportedStateError(
                f"'{odd[0]}' was changed {when} is newer than what the script has put there; load or initialise "
                "weights where the objects are made, or only where restore() returns 0"
            )


def _is_its_own(state: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether this is what the optimizer has: accelerate loads what it has just been given by it."""
    given, there = (dict(tensors_in(value, "")) for value in (state, own))
    return given.keys() == there.keys() and all(
        tensor.data_ptr() == there[path].data_ptr() or same(tensor, there[path]) for path, tensor in given.items()
    )


class LoadGuard:
    """Until `lift`, `load_state_dict` of registered modules and optimizers loads what they have already."""

    def __init__(self, registry: Registry) -> None:
        self._handles: list[Any] = []
        self._said: set[str] = set()
        for name, module in registry.torch_state.modules.items():
            for submodule in module.modules():
                self._handles.append(submodule.register_load_state_dict_pre_hook(self._for_module(name)))
        for name, optimizer in registry.torch_state.optimizers.items():
            if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
                self._handles.append(optimizer.register_load_state_dict_pre_hook(self._for_optimizer(name)))

    def lift(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _for_module(self, name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            for key, value in module.state_dict().items():
                if prefix + key in state:
                    state[prefix + key] = value
            self._say(name)

        return keep

    def _for_optimizer(self, name: str) -> Callable[..., dict[str, Any]]:
        def keep(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            own = optimizer.state_dict()
            if not _is_its_own(state, own):
                self._say(name)
            return own

        return keep

    def _say(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _log.warning("%s.load_state_dict() after restore() is left out: what was restored is newer", name)


def _samples(registry: Registry) -> dict[str, int]:
    """Fingerprints of a few thousand elements of each tensor: whoever loads or initialises weights changes them."""
    samples = {}
    for name, value in registry.state.named_tensors().items():
        flat = value.reshape(-1) if value.is_contiguous() else value
        samples[name] = flat[:1024] if flat.dim() else flat
    return fingerprints(samples)
