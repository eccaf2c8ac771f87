"""MMAPDataLoader: what a training loop iterates over.

It never makes the user's loader itself, and so is there at once after a restart, wherever training stood: the next
batch is a file that the producer has ready; mapping it takes microseconds.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..protocol import dataloader as protocol
from ..protocol.dataloader import Position
from . import format, recipe
from .config import CacheResumeMMAPConfig, MMAPConfig, PassthroughMMAPConfig
from .connection import Connection
from .errors import (
    BatchTypeError,
    CacheCorruptError,
    CacheFullError,
    ProducerError,
    SkipLimitError,
    user_error,
)
from .names import check_stream_name, data_coordinate
from .passthrough import PassthroughReader

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
        self._position: Position = (0, 0)
        self._global: int | None = None
        """A number of batches over all epochs, whose epoch only the producer can tell."""
        self._state: Any = None
        """The source's own state at the position, from a checkpoint."""
        self._fresh = True
        """Whether the next `iter` begins at the position, and not at the epoch after it."""
        self._iteration = 0
        self._last: format.Loaded | None = None
        self._connection: Connection | None = None
        self._passthrough: PassthroughReader | None = None
        if isinstance(config, PassthroughMMAPConfig):
            self._passthrough = PassthroughReader(loader_factory, seed)
        else:
            self._open().open()

    # ---- what a training loop uses -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        if not self._fresh:
            self._set_position((self._position[0] + 1, 0))
        self._fresh = False
        self._iteration += 1
        if self._passthrough is not None:
            return self._passthrough.iterate(self)
        return _Batches(self, self._iteration)

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
        self._set_position((0, 0))
        self._global = batches
        self._fresh = True

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last batch that this loader gave out. Plain data, and tensors if the
        user's loader has state of its own with tensors in it."""
        source = self._state
        if self._last is not None:
            source = self._last.state()
        epoch, index = self._position
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "index": index,
            "batches": self._global,
            "seed": self._effective_seed(),
            "source": source,
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
        self._set_position(position)
        self._global = None if batches is None else int(batches)
        self._state = state.get("source")
        self._fresh = True

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
        self._iteration += 1

    # ---- inside ------------------------------------------------------------------------------------------------

    def _set_position(self, position: Position) -> None:
        self._position = position
        self._global = None
        self._state = None
        self._last = None

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
                config.max_cache_bytes,
                config.max_skip_batches,
            )
            seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF if self._seed is None else self._seed
            self._connection = Connection(self._factory, self.stream, options, seed, self._seed is not None)
        return self._connection

    def _opened(self) -> protocol.Opened:
        assert isinstance(self._config, CacheResumeMMAPConfig)
        opened = self._open().await_open(self._config.start_timeout)
        if opened.loaders:
            raise ProducerError(
                f"the loader factory of stream {self.stream!r} gives {opened.loaders} loaders: each needs an "
                "MMAPDataLoader of its own"
            )
        return opened

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


class _Batches(Iterator[Any]):
    """One epoch of a cached loader."""

    def __init__(self, loader: MMAPDataLoader, iteration: int) -> None:
        assert isinstance(loader._config, CacheResumeMMAPConfig)
        self._loader = loader
        self._iteration = iteration
        self._config = loader._config
        self._connection = loader._open()
        self._unreported = 0
        self._report_every = max(1, loader._config.prefetch_length // 4)
        self._placed = False
        self._pin = False
        self._ended = False
        self._retry = False
        self._closer = weakref.finalize(self, _pause, self._connection, weakref.ref(loader), iteration)
        self._closer.atexit = False

    def __next__(self) -> Any:
        loader, connection = self._loader, self._connection
        if loader._iteration != self._iteration:
            raise RuntimeError(
                f"stream {loader.stream!r} is iterated anew: an earlier iterator cannot be used any more"
            )
        if self._ended:
            raise StopIteration
        if not self._placed or not connection.connected:
            self._place()
        while True:
            position = loader._position
            if (
                position >= connection.until
                or position[1] == connection.lengths.get(position[0])
                or position in connection.failures
                or loader._global is not None
            ):
                position = self._wait(position)
            assert connection.directory is not None
            try:
                loaded = connection.directory.load(position)
                batch = loaded.batch()
            except (FileNotFoundError, CacheCorruptError) as error:
                self._again(position, str(error))
                continue
            break
        self._advance(position, loaded)
        return _pinned(batch) if self._pin else batch

    def _advance(self, position: Position, loaded: format.Loaded | None) -> None:
        """A batch goes out: this reader needs it no more."""
        loader = self._loader
        loader._position = (position[0], position[1] + 1)
        loader._state = None
        loader._last = loaded if loaded is not None and loaded.has_state else None
        self._unreported += 1
        if self._unreported >= self._report_every or loader._position >= self._connection.until:
            self._unreported = 0
            self._connection.took(loader._position)

    def _place(self) -> None:
        """Tells the producer, a new one perhaps, where this reader is. What lies ready can be read meanwhile."""
        loader, connection = self._loader, self._connection
        first = not self._placed
        while True:
            connection.open()
            if not connection.connected:
                continue
            state_fd = self._state_file(loader)
            try:
                if loader._global is not None:
                    connection.seek(None, loader._global, state_fd)
                else:
                    connection.seek(*loader._position, state_fd)
            finally:
                if state_fd is not None:
                    os.close(state_fd)
            if not connection.connected:
                continue
            if not first:
                return
            generation = connection.generation
            self._pin = loader._opened().pin_memory and torch.cuda.is_available()
            if connection.generation != generation:  # the first one was not the producer of this seed, or died
                continue
            self._wait_until_sought()
            if connection.connected:
                self._placed = True
                return

    @staticmethod
    def _state_file(loader: MMAPDataLoader) -> int | None:
        """The source's own state at the position, as a file for the producer."""
        state = loader._state if loader._last is None else loader._last.state()
        if state is None:
            return None
        fd = os.memfd_create("state", os.MFD_CLOEXEC)
        format.write(fd, format.Label("state", *loader._position), state)
        return fd

    def _wait_until_sought(self) -> None:
        connection = self._connection
        deadline = time.monotonic() + self._config.batch_timeout
        while connection.position is None and connection.connected:
            connection.receive(deadline, "the producer has not found the position", self._config.batch_timeout)
        if connection.position is not None:
            self._loader._position = connection.position

    def _wait(self, position: Position) -> Position:
        """Returns when the next batch may be read, with its place.

        Raises StopIteration at the epoch's end, and what kept the batch from being made.
        """
        loader, connection = self._loader, self._connection
        deadline = time.monotonic() + self._config.batch_timeout
        if self._retry:
            self._retry = False
            self._again(position, "asked for again")
        while True:
            if not connection.connected:
                self._place()
            if loader._global is not None and connection.position is not None:
                # Counted over epochs of unknown length: where it is turns out with their ends.
                position = loader._position = connection.position
            failure = connection.failures.get(position)
            if failure is not None:
                self._raise(failure)
            length = connection.lengths.get(position[0])
            if length is not None and position[1] >= length:
                self._end(position[0])
            if position < connection.until:
                loader._global = None
                return position
            what = f"batch {position[1]} of epoch {position[0]} of stream {loader.stream!r} was not ready"
            connection.receive(deadline, what, self._config.batch_timeout)

    def _end(self, epoch: int) -> None:
        self._ended = True
        self._loader._set_position((epoch + 1, 0))
        self._loader._fresh = True
        self._closer()
        raise StopIteration

    def _raise(self, failure: protocol.Failed) -> None:
        position = (failure.epoch, failure.index)
        del self._connection.failures[position]
        where = f"batch {failure.index} of epoch {failure.epoch} of stream {self._loader.stream!r}"
        if failure.kind in ("dataset", "batch"):
            self._advance(position, None)  # as in torch: the next one can be asked for
            if failure.kind == "batch":
                raise BatchTypeError(f"{where}: {failure.text}")
            raise user_error(failure.type_name, failure.text)
        self._retry = True
        if failure.kind == "full":
            raise CacheFullError(
                f"there is no room for {where}: {failure.text}. Make room, choose another cache_dir, or lower "
                "prefetch_length and lookback_length; the batch can then be asked for again"
            )
        if failure.kind == "skip":
            raise SkipLimitError(failure.text)
        kind = CacheCorruptError if failure.kind == "corrupt" else ProducerError
        raise kind(f"{where}: {failure.text}")

    def _again(self, position: Position, reason: str) -> None:
        self._connection.again(position, reason)


def _pause(connection: Connection, loader: Any, iteration: int) -> None:
    """An iterator is gone: nobody should wait for this reader, unless it has a newer one."""
    owner = loader()
    if connection.connected and (owner is None or owner._iteration == iteration):
        connection.pause()


def _pinned(value: Any) -> Any:
    """As DataLoader(pin_memory=True): the same batch in memory that a GPU can read by itself."""
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(value)
