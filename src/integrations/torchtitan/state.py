"""What is carried of a trainer: the parts of its containers, the position of its data, its own counts."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any


def state_of(trainer: Any) -> dict[str, Any]:
    """What the manager is to register. The containers' parts, not the containers: to read the `state_dict` of one makes
    optimizer state, and to load it computes the learning rates anew."""
    return {
        **_numbered("model", trainer.model_parts),
        **_numbered("optimizer", trainer.optimizers),
        **_numbered("scheduler", trainer.lr_schedulers),
        "dataloader": Position(trainer.dataloader),
        "trainer": trainer,
    }


def _numbered(name: str, parts: Iterable[Any]) -> dict[str, Any]:
    found = list(parts)
    return {name: found[0]} if len(found) == 1 else {f"{name}{number}": part for number, part in enumerate(found)}


class Position:
    """Where the data loader is. torchtitan's own `state_dict` has it pickled; here it is plain."""

    def __init__(self, loader: Any) -> None:
        stateful: Any = importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
        self._loader = loader
        plain = isinstance(loader, stateful)
        self._class: Any = stateful if plain else type(loader)
        self._seeds = _own_seeds(loader) if plain else None
        if plain and loader.num_workers:
            loader.snapshot_every_n_steps = 1  # or a restart would read again what came since the last checkpoint
            state = getattr(loader.dataset, "state_dict", None)
            if state is not None:
                loader.dataset.state_dict = functools.partial(_copied, state)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._class.state_dict(self._loader))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._seeds is not None:
            self._seeds.manual_seed(self._seeds.initial_seed())
        self._class.load_state_dict(self._loader, state)


def _own_seeds(loader: Any) -> Any:
    """Where the seed of an iterator's workers comes from: not out of training's random numbers, since a restarted rank
    makes one iterator more. None: the loader has its own."""
    if loader.generator is not None:
        return None
    import torch

    loader.generator = torch.Generator()
    return loader.generator.manual_seed(torch.initial_seed())


def _copied(state_dict: Callable[[], Any]) -> Any:
    """torchtitan's datasets give lists that they go on writing to, while a thread of the worker sends them."""
    return copy.deepcopy(state_dict())
