"""A fetcher: the process in which the user's dataset runs. It makes batches, publishes their files and says so.

Forked by the producer, and dies with it. It knows nothing of readers, windows and limits. An exception of the user's
code is sent back as text and belongs to the batch that was being made; the fetcher goes on.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import traceback
from typing import Any

import torch
from torch.utils.data import _utils

from ...protocol import dataloader as protocol
from ...protocol.messages import shorten
from .. import wire
from ..errors import BatchTypeError, CacheCorruptError, SkipLimitError
from ..sources import seeds
from ..sources.iterable import IterableSource
from ..sources.map_style import MapFetcher
from ..storing import format
from ..storing.directories import StreamDirectory

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SKIP_WORTH_TELLING_S = 1.0


class Fetcher:
    """Serves one line until it closes."""

    def __init__(self, line: socket.socket, directory: StreamDirectory, max_skip: int) -> None:
        self._line = line
        self._directory = directory
        self._max_skip = max_skip
        self._map: MapFetcher | None = None
        self._iterable: IterableSource | None = None
        self._lengths: dict[int, int] = {}
        """Of epochs of the iterable source whose end was seen."""

    def serve(self, loader: Any, seed: int, number: int, map_style: bool) -> None:
        """`number`: which of the loader's workers this is. Returns when the producer is gone."""
        workers = getattr(loader, "num_workers", 0) if map_style else 0
        if workers:
            torch.set_num_threads(1)  # as in a DataLoader worker; threads of the parent did not survive the fork
            _utils.worker._worker_info = _utils.worker.WorkerInfo(
                id=number, num_workers=workers, seed=seeds.derive(seed, 0, -2 - number), dataset=loader.dataset
            )
            if loader.worker_init_fn is not None:
                loader.worker_init_fn(number)
        if map_style:
            self._map = MapFetcher(loader, seed)
        else:
            self._iterable = IterableSource(loader, seed)
        while True:
            data, fds = wire.receive(self._line, 1)
            if not data:
                return
            try:
                reply = self._answer(protocol.decode_fetch(data), fds)
            finally:
                wire.close_all(fds)
            self._line.send(protocol.encode(reply))

    def _answer(self, job: protocol.Fetch, fds: list[int]) -> protocol.FromFetcher:
        position = (job.epoch, job.index)
        try:
            if self._map is not None:
                batch, state = self._map.make(*position, _indices(job, fds)), None
            else:
                assert self._iterable is not None
                batch, state = self._next(self._iterable, position, fds if job.attached == "state" else [])
        except _EndOfEpoch as end:
            self._lengths[job.epoch] = end.length
            return protocol.SourceEnded(*position, end.length)
        except Restart:
            raise
        except SkipLimitError as error:
            return protocol.NotFetched(*position, "skip", "SkipLimitError", str(error))
        except Exception as error:  # the user's: it goes to the training loop
            return self._failed(position, "dataset", error)
        try:
            self._directory.publish(position, batch, state)
            return protocol.Fetched(*position)
        except BatchTypeError as error:
            return protocol.NotFetched(*position, "batch", "BatchTypeError", str(error))
        except OSError as error:
            if error.errno in _NO_ROOM:
                return protocol.NotFetched(*position, "full", "", f"{error.strerror} in {self._directory.path}")
            return self._failed(position, "dataset", error)

    @staticmethod
    def _failed(position: protocol.Position, kind: str, error: Exception) -> protocol.NotFetched:
        own = error.__traceback__.tb_next if error.__traceback__ else None
        name = type(error).__name__
        where = f"Caught {name} while batch {position[1]} of epoch {position[0]} was made (process {os.getpid()})."
        text = f"{where}\nOriginal {''.join(traceback.format_exception(type(error), error, own))}"
        return protocol.NotFetched(*position, kind, name, shorten(text, protocol.MAX_TEXT))

    # ---- iterable sources ----------------------------------------------------------------------------------------

    def _next(self, source: IterableSource, position: protocol.Position, state_fds: list[int]) -> tuple[Any, Any]:
        if position[1] >= self._lengths.get(position[0], position[1] + 1):
            raise _EndOfEpoch(self._lengths[position[0]])
        if source.position != position or state_fds or not source.running:
            self._reposition(source, position, state_fds)
        try:
            batch = source.next()
        except StopIteration:
            raise _EndOfEpoch(position[1]) from None
        return batch, source.state()

    def _reposition(self, source: IterableSource, position: protocol.Position, state_fds: list[int]) -> None:
        """Gets the source to where its next batch is that of `position`: by its state, or by making what is before.

        It can go on, and from the end of an epoch to the next one. For anything else it may not be what it was when it
        was made (a dataset with state stands where it was left): a new fetcher has one that nobody has used.
        """
        epoch, index = position
        started = time.monotonic()
        here = source.position
        forward = source.running and not state_fds and here[0] == epoch and here[1] <= index
        next_epoch = not source.running and position == (here[0] + 1, 0) and here[0] in self._lengths
        if source.used and not forward and not next_epoch:
            raise Restart
        state = None if forward else self._state_before(source, position, state_fds)
        if state is not None:
            source.begin(epoch, index, state)
            self._tell_skip(0, started, "the source's own state")
            return
        if not forward:
            source.begin(epoch)
        missing = index - source.position[1]
        if missing > self._max_skip:
            raise SkipLimitError(
                f"batch {index} of epoch {epoch} can be reached only by making the {missing} batches before it, more "
                f"than max_skip_batches={self._max_skip}: give the dataset state_dict() and load_state_dict(), or "
                "raise max_skip_batches"
            )
        while source.position[1] < index:
            try:
                source.next()
            except StopIteration:
                raise _EndOfEpoch(source.position[1]) from None
        if missing:
            self._tell_skip(missing, started, "making them and throwing them away")

    def _state_before(self, source: IterableSource, position: protocol.Position, state_fds: list[int]) -> Any:
        """The source's state at a position: from a checkpoint, or kept with the batch before it."""
        epoch, index = position
        if not source.stateful:
            return None
        if state_fds:
            return format.read(state_fds[0], format.Label("state", epoch, index)).batch()
        if index == 0:
            return None
        try:
            return self._directory.load((epoch, index - 1)).state()
        except (FileNotFoundError, CacheCorruptError):
            return None

    def _tell_skip(self, batches: int, started: float, how: str) -> None:
        seconds = time.monotonic() - started
        if batches or seconds > _SKIP_WORTH_TELLING_S:
            self._line.send(protocol.encode(protocol.Skipped(batches, seconds, how)))


class Restart(Exception):
    """This fetcher cannot get to where it should: another one can."""


class _EndOfEpoch(Exception):
    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length


def _indices(job: protocol.Fetch, fds: list[int]) -> bytes:
    if job.attached != "indices":
        assert job.indices is not None
        return job.indices
    with open(fds[0], "rb", closefd=False) as file:
        file.seek(0)
        return file.read()
