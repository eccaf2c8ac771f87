"""What is asked of any loader of a user's: its length, its state, its random numbers, and to begin an epoch."""

from __future__ import annotations

from typing import Any

import torch


def length_of(loader: Any) -> int | None:
    """Batches per epoch; None where the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def has_state(owner: Any) -> bool:
    return callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None))


def set_epoch(epoch: int, *owners: Any) -> None:
    """Tells samplers and datasets that shuffle by epoch."""
    for owner in owners:
        method = getattr(owner, "set_epoch", None)
        if callable(method):
            method(epoch)


class Generators:
    """The torch.Generator objects of a loader, with the seeds their owner gave them."""

    def __init__(self, *owners: Any) -> None:
        found: dict[int, tuple[torch.Generator, int]] = {}
        for owner in owners:
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = (generator, generator.initial_seed())
        self._found = list(found.values())

    def begin(self, epoch: int) -> None:
        """The first epoch as their owner has seeded them, the others anew: no epoch needs the ones before it."""
        for generator, initial in self._found:
            generator.manual_seed((initial + epoch) & 0x7FFFFFFFFFFFFFFF)
