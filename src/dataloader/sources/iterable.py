"""Any other loader: it is iterated as it is, in one process.

An iterable dataset, a dataset with state, a subclass that iterates in its own way, any iterable. If it, or its dataset,
has `state_dict` and `load_state_dict`, its state is kept with every batch, and iteration goes on from any of them; else
what is before a position is made and thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import seeds
from .loaders import Generators, has_state, set_epoch


class IterableSource:
    """Batches one after the other, from a loader that can only be iterated."""

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self.seed = seed
        dataset = getattr(loader, "dataset", None)
        sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        self._epoch_owners = [
            owner for i, owner in enumerate((loader, dataset, sampler, batch_sampler))
            if owner is not None and not any(owner is o for o in (loader, dataset, sampler)[:i])
        ]  # fmt: skip
        self._generators = Generators(loader, sampler, batch_sampler)
        self._stateful = self._whohas_state(loader, dataset)
        self._iterator: Iterator[Any] | None = None
        self._position: tuple[int, int] = (0, 0)
        self.used = False
        """Whether it has ever been iterated."""

    @staticmethod
    def _whohas_state(loader: Any, dataset: Any) -> Any:
        for owner in (loader, dataset if getattr(loader, "num_workers", 0) == 0 else None):
            if has_state(owner):
                return owner
        return None

    @property
    def stateful(self) -> bool:
        return self._stateful is not None

    @property
    def running(self) -> bool:
        """Whether it is in an epoch; not so at first, at an epoch's end and after an error."""
        return self._iterator is not None

    @property
    def position(self) -> tuple[int, int]:
        """Of the batch that `next` makes."""
        return self._position

    def begin(self, epoch: int, index: int = 0, state: Any = None) -> None:
        """An epoch anew; with `state`, from `index` on."""
        seeds.set_seed(seeds.derive(self.seed, epoch, seeds.ORDER))
        set_epoch(epoch, *self._epoch_owners)
        self._generators.begin(epoch)
        if state is not None:
            self._stateful.load_state_dict(state)
        self.used = True
        self._iterator = iter(self._loader)
        self._position = (epoch, index)

    def next(self) -> Any:
        """The next batch. Raises StopIteration at the end of the epoch, and what the loader raises."""
        assert self._iterator is not None
        epoch, index = self._position
        seeds.set_seed(seeds.derive(self.seed, epoch, index))
        iterator, self._iterator = self._iterator, None  # one that has raised is not to be asked again
        batch = next(iterator)
        self._iterator = iterator
        self._position = (epoch, index + 1)
        return batch

    def state(self) -> Any:
        """The source's state after the last batch; None where it has none."""
        return None if self._stateful is None else self._stateful.state_dict()
