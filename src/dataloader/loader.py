"""MMAPDataLoader: what a training loop iterates over.

It never makes the user's loader itself, and so is there at once after a restart, wherever training stood: the next
batch is a file that the producer has ready; mapping it takes microseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..protocol import dataloader as protocol
from . import recipe
from .config import CacheResumeMMAPConfig, MMAPConfig, PassthroughMMAPConfig
from .names import check_stream_name, data_coordinate
from .reading import peers
from .reading.batches import Batches
from .reading.connection import Connection
from .reading.cursor import Cursor
from .reading.passthrough import PassthroughReader

STATE_VERSION = 1


class MMAPDataLoader:
    """Iterates over the batches of `loader_factory()`, which are prepared by another process and outlive this one.

    `loader_factory` takes no arguments and gives a torch DataLoader, a torchdata StatefulDataLoader or any iterable of
    batches. It is called in the producer, never here: it must be a function of a module or of the training script (or
    functools.partial of one), and the script must train under `if __name__ == "__main__":` only.
    `config`: CacheResumeMMAPConfig, the default, or PassthroughMMAPConfig to do without producer and cache.
    `name` and `data_rank` name the stream: processes of this node that give the same ones read the same batches and
    share one copy of them. By default `data_rank` is this process's data-parallel rank (`names.py`).
    `seed`: of the order and of what the dataset draws; the stream's own if it has one, else torch.initial_seed().

    Every `iter()` is one epoch. The first one after construction, `seek` or `load_state_dict` begins there; a loader
    that has `set_epoch` is told the epoch.
    """

    def __init__(
        self,
        loader_factory: Callable[[], Any],
        config: MMAPConfig | None = None,
        *,
        name: str = "train",
        data_rank: int | str | None = None,
        seed: int | None = None,
    ) -> None:
        if recipe.inside_producer:
            raise RuntimeError(
                "the producer imports the training script to find its loader factory, and the script began to train: "
                'put what it does under `if __name__ == "__main__":`'
            )
        if not callable(loader_factory):
            raise TypeError(f"loader_factory must be callable, not {type(loader_factory).__name__}")
        config = CacheResumeMMAPConfig() if config is None else config
        coordinate = (
            data_coordinate() if data_rank is None else f"dp{data_rank}" if isinstance(data_rank, int) else data_rank
        )
        self.stream = check_stream_name(f"{name}-{coordinate}")
        self._factory = loader_factory
        self._config = config
        self._seed = seed
        self._cursor = Cursor()
        self._peers: peers.Peers | None = None
        self._connection: Connection | None = None
        self._passthrough: PassthroughReader | None = None
        if isinstance(config, PassthroughMMAPConfig):
            self._passthrough = PassthroughReader(loader_factory, seed)
        else:
            self._peers = peers.make(config.model_parallel_group)
            self._open().open()

    # ---- what a training loop uses -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        cursor = self._cursor
        if not cursor.fresh:
            cursor.move((cursor.position[0] + 1, 0), fresh=False)
        cursor.fresh = False
        cursor.iteration += 1
        if self._passthrough is not None:
            return self._passthrough.iterate(cursor)
        assert isinstance(self._config, CacheResumeMMAPConfig)
        others, self._peers = self._peers, None
        return Batches(self.stream, self._config, cursor, self._open(), others)

    def __len__(self) -> int:
        """Batches per epoch. Raises TypeError if the user's loader has no length."""
        length = self._length()
        if length is None:
            raise TypeError(f"the loader of stream {self.stream!r} has no length")
        return length

    def seek(self, batches: int) -> None:
        """The next `iter` begins after so many batches, counted over all epochs."""
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            raise ValueError(f"a number of batches must be a whole number from 0 on, not {batches!r}")
        self._cursor.move((0, 0), fresh=True, counted=batches)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last batch that this loader gave out. Plain data, and tensors if the
        user's loader has state of its own with tensors in it."""
        epoch, index = self._cursor.position
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "index": index,
            "batches": self._cursor.counted,
            "seed": self._effective_seed(),
            "source": self._cursor.source_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `iter` begins there. Raises ValueError for what `state_dict` did not give."""
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise ValueError(f"not the state of an MMAPDataLoader: {str(state)[:100]}")
        try:
            position = (int(state["epoch"]), int(state["index"]))
            batches, seed = state["batches"], int(state["seed"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state of an MMAPDataLoader lacks {error}") from None
        if min(position) < 0:
            raise ValueError(f"a position of {position}")
        if self._passthrough is not None:
            self._passthrough.seed = seed
        elif seed != self._effective_seed():
            self._seed = seed
            assert self._connection is not None
            self._connection.close()
            self._connection = None
        counted = None if batches is None else int(batches)
        self._cursor.move(position, fresh=True, counted=counted, state=state.get("source"))

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """HyperPod's way to say `seek`: `{"global_step": k}`."""
        self.seek(int(checkpoint["global_step"]))

    @property
    def skipped(self) -> protocol.Skipped | None:
        """What the last resume had to pass over: `batches`, `seconds` and `how`; None if nothing."""
        return None if self._connection is None else self._connection.skipped

    def close(self) -> None:
        """Reads no more. The producer lives on: a loader made later goes on where it stands."""
        if self._connection is not None:
            self._connection.close()
        self._cursor.iteration += 1

    # ---- inside ------------------------------------------------------------------------------------------------

    def _open(self) -> Connection:
        if self._connection is None:
            assert isinstance(self._config, CacheResumeMMAPConfig)
            config = self._config
            options = protocol.StreamOptions(
                os.path.abspath(config.cache_dir),
                config.prefetch_length,
                config.lookback_length,
                config.checkpoint_frequency,
                config.enable_batch_encryption,
                config.max_skip_batches,
            )
            seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF if self._seed is None else self._seed
            self._connection = Connection(self._factory, self.stream, options, seed, self._seed is not None)
        return self._connection

    def _opened(self) -> protocol.Opened:
        assert isinstance(self._config, CacheResumeMMAPConfig)
        return self._open().await_one(self._config.start_timeout)

    def _effective_seed(self) -> int:
        return self._passthrough.seed if self._passthrough is not None else self._opened().seed

    def _length(self) -> int | None:
        return self._passthrough.length() if self._passthrough is not None else self._opened().length

    def loaders(self) -> int:
        """How many loaders the factory gives: 0 for one that is not in a list."""
        if self._passthrough is not None:
            return self._passthrough.loaders()
        assert isinstance(self._config, CacheResumeMMAPConfig)
        return self._open().await_open(self._config.start_timeout).loaders
