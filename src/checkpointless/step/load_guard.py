"""A script that loads a checkpoint of its own after `restore()` keeps what was restored, which is newer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..state.registry import Registry

_log = logging.getLogger("hyperpodrun.checkpointless")


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
            self._say(name)
            return optimizer.state_dict()

        return keep

    def _say(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _log.warning("%s.load_state_dict() after restore() is left out: what was restored is newer", name)
