"""A torch DataLoader over a map-style dataset, taken as a description.

Its sampler gives the indices of every batch, any batch can be made from its indices alone, in any process, and none has
to be made to get to a later one. torchdata's StatefulDataLoader is one too, if its dataset has no state.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data._utils.collate import collate, default_collate, default_collate_fn_map

from . import seeds
from .indices import pack_indices, unpack_indices
from .loaders import Generators, has_state, length_of, set_epoch

_FORKS = (None, "fork")


def is_map_style(loader: Any) -> bool:
    """Whether any batch can be made from its indices."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__ and not _is_torchdatas(loader):
        return False
    context = loader.multiprocessing_context
    method = context if isinstance(context, str) or context is None else context.get_start_method()
    return method in _FORKS


def _is_torchdatas(loader: Any) -> bool:
    """A StatefulDataLoader whose dataset has no state: what it would save is a position in the order of its sampler."""
    torchdata = sys.modules.get("torchdata.stateful_dataloader")
    return torchdata is not None and type(loader) is torchdata.StatefulDataLoader and not has_state(loader.dataset)


class MapSource:
    """The order of batches: their indices, from any position on, without touching the dataset."""

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self.seed = seed
        self._batched = loader.batch_sampler is not None
        self._sampler = loader.batch_sampler if self._batched else loader.sampler
        self._generators = Generators(loader, loader.sampler, loader.batch_sampler)
        self._iterator: Iterator[Any] = iter(())
        self._position: tuple[int, int] | None = None
        self.skipped: tuple[int, float] | None = None
        """(batches, seconds) of indices that the last call passed over, if it did."""

    def indices(self, epoch: int, index: int) -> bytes | None:
        """The dataset indices of a batch, packed; None: the epoch has no such batch."""
        self.skipped = None
        if self._position != (epoch, index):
            started = time.monotonic()
            self._iterator = self._iterate(epoch, index)
            if index:
                self.skipped = (index, time.monotonic() - started)
        try:
            found = next(self._iterator)
        except StopIteration:
            self._position = None
            return None
        self._position = (epoch, index + 1)
        return pack_indices(list(found) if self._batched else found, self._batched)

    def positioned(self, epoch: int, index: int) -> list[Any]:
        """The rest of an epoch's order, for torch's own DataLoader."""
        return list(self._iterate(epoch, index))

    def length(self, epoch: int, beyond: int) -> int:
        """Batches of an epoch that has no batch `beyond`."""
        known = length_of(self._sampler)
        if known is not None and known <= beyond:
            return known
        if self._position is None and beyond == 0:
            return 0
        return sum(1 for _ in self._iterate(epoch, 0))

    def _iterate(self, epoch: int, index: int) -> Iterator[Any]:
        """The epoch's batches of indices from `index` on."""
        batch_sampler, sampler = self._loader.batch_sampler, self._loader.sampler
        seeds.set_seed(seeds.derive(self.seed, epoch, seeds.ORDER))
        set_epoch(epoch, *([sampler] if sampler is batch_sampler else [sampler, batch_sampler]))
        self._generators.begin(epoch)
        if self._loader.generator is not None:  # as DataLoader does before it draws the order
            torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        seek = getattr(self._sampler, "seek", None)
        if callable(seek):
            seek(index)
            return iter(self._sampler)
        if type(batch_sampler) is BatchSampler:
            # Passing over indices one by one costs nothing to speak of; passing over lists of them would.
            size = batch_sampler.batch_size
            flat = _from(batch_sampler.sampler, index * size)
            return iter(BatchSampler(_Once(flat), size, batch_sampler.drop_last))
        return itertools.islice(iter(self._sampler), index, None)


class _Once:
    """An iterator as the sampler that BatchSampler wants."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self._iterator


def _from(sampler: Any, index: int) -> Iterator[Any]:
    """The sampler's indices from `index` on."""
    if type(sampler) is SequentialSampler:
        return iter(range(min(index, len(sampler)), len(sampler)))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return _permutation(sampler, index)
    return itertools.islice(iter(sampler), index, None)


def _permutation(sampler: RandomSampler, index: int) -> Iterator[int]:
    """RandomSampler's own draw, without making a list of the part that is passed over."""
    generator = sampler.generator
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    order = torch.randperm(len(sampler.data_source), generator=generator)
    for begin in range(index, len(order), 1 << 16):
        yield from order[begin : begin + (1 << 16)].tolist()


class MapFetcher:
    """Makes batches from indices: what a DataLoader worker does, in a process that may have no other."""

    def __init__(self, loader: Any, seed: int) -> None:
        self._dataset = loader.dataset
        self._collate = _without_shared_memory if loader.collate_fn is default_collate else loader.collate_fn
        self._seed = seed
        self._epoch: int | None = None

    def make(self, epoch: int, index: int, packed: bytes) -> Any:
        """One batch. Raises what the dataset and the collate function raise."""
        if epoch != self._epoch:
            set_epoch(epoch, self._dataset)
            self._epoch = epoch
        seeds.set_seed(seeds.derive(self._seed, epoch, index))
        indices, batched = unpack_indices(packed)
        if not batched:
            return self._collate(self._dataset[indices])
        fetch_all = getattr(self._dataset, "__getitems__", None)
        return self._collate(fetch_all(indices) if fetch_all else [self._dataset[i] for i in indices])


def _stack(batch: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
    return torch.stack(batch, 0)


_TO_PRIVATE_MEMORY = {**default_collate_fn_map, torch.Tensor: _stack}


def _without_shared_memory(samples: Any) -> Any:
    """torch's default_collate in a worker allocates shared memory, a file for each tensor; ours are written anyway."""
    if any(isinstance(sample, torch.Tensor) and (sample.is_nested or sample.is_sparse) for sample in samples[:1]):
        return default_collate(samples)
    return collate(samples, collate_fn_map=_TO_PRIVATE_MEMORY)
