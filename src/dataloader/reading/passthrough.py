"""The same order and the same resume positions, without a producer: the user's loader runs in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import ProducerError
from ..sources import seeds
from ..sources.iterable import IterableSource
from ..sources.loaders import length_of
from ..sources.map_style import MapSource, is_map_style
from .cursor import Cursor


class PassthroughReader:
    """Makes the user's loader when it is first needed."""

    def __init__(self, factory: Callable[[], Any], seed: int | None) -> None:
        self._factory = factory
        self._loader: Any = None
        self._source: MapSource | IterableSource | None = None
        self.seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF if seed is None else seed

    def loader(self) -> Any:
        if self._loader is None:
            with seeds.preserved():
                seeds.set_seed(seeds.derive(self.seed, 0, seeds.FACTORY))
                self._loader = self._factory()
        return self._loader

    def loaders(self) -> int:
        return len(self.loader()) if isinstance(self.loader(), list | tuple) else 0

    def length(self) -> int | None:
        return length_of(self.loader())

    def iterate(self, cursor: Cursor) -> Iterator[Any]:
        """One epoch from the cursor's position on; keeps it up to date."""
        loader = self.loader()
        if self.loaders():
            raise ProducerError(f"the loader factory gives {self.loaders()} loaders: each needs a loader of its own")
        if cursor.counted is not None:
            length = length_of(loader)
            cursor.position = divmod(cursor.counted, length) if length else (0, cursor.counted)
            cursor.counted = None
        epoch, index = cursor.position
        for batch, state in self._batches(loader, epoch, index, cursor.state):
            cursor.advance(None)
            cursor.state = state
            yield batch
        cursor.move((epoch + 1, 0), fresh=True)

    def _batches(self, loader: Any, epoch: int, index: int, state: Any) -> Iterator[tuple[Any, Any]]:
        if self._source is None or self._source.seed != self.seed:
            self._source = (MapSource if is_map_style(loader) else IterableSource)(loader, self.seed)
        source = self._source
        if isinstance(source, MapSource):
            for batch in _from_position(loader, source, epoch, index):
                yield batch, None
            return
        with seeds.preserved():
            source.begin(epoch, index if state is not None else 0, state)
        while True:
            with seeds.preserved():
                try:
                    batch = source.next()
                except StopIteration:
                    return
            if source.position[1] > index:
                yield batch, source.state()


def _from_position(loader: Any, source: MapSource, epoch: int, index: int) -> Iterator[Any]:
    """torch's own iteration of the same loader, from a batch on."""
    with seeds.preserved():
        order = source.positioned(epoch, index)
    batched = loader.batch_sampler is not None
    workers = loader.num_workers
    place: dict[str, Any] = {"batch_sampler": order} if batched else {"sampler": order, "batch_size": None}
    positioned: Any = DataLoader(
        loader.dataset,
        **place,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        prefetch_factor=loader.prefetch_factor if workers else None,
    )
    return iter(positioned)
