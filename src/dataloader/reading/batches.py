"""One epoch of a cached loader: what `iter(MMAPDataLoader)` gives.

Maps the file of the next batch if it lies ready, waits for it if it does not, and tells the producer what was taken. A
producer that dies meanwhile is asked for anew, and what lies ready is read until the next one is there.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from ..config import CacheResumeMMAPConfig
from ..errors import BatchTypeError, CacheCorruptError, CacheFullError, ProducerError, SkipLimitError, user_error
from ..storing import format
from .connection import Connection
from .cursor import Cursor
from .peers import Peers
from .warming import MOST_BATCHES, Report, plan

_COLD_S = 0.1
"""A producer that has the batch ready says so within milliseconds. One that has not by then counts as cold."""


class Batches(Iterator[Any]):
    """Reads from the cursor's position to the end of its epoch."""

    def __init__(
        self, stream: str, config: CacheResumeMMAPConfig, cursor: Cursor, connection: Connection, peers: Peers | None
    ) -> None:
        """`peers`: where this is the loader's first iterator, and other ranks may have its batches."""
        self._stream = stream
        self._config = config
        self._cursor = cursor
        self._iteration = cursor.iteration
        self._connection = connection
        self._peers = peers
        self._carried: deque[format.Loaded] = deque()
        """The next batches, from another rank."""
        self._unreported = 0
        self._report_every = max(1, config.prefetch_length // 4)
        self._placed = False
        self._ended = False
        self._retry = False
        self._closer = weakref.finalize(self, _pause, connection, cursor, self._iteration)
        self._closer.atexit = False

    def __next__(self) -> Any:
        cursor, connection = self._cursor, self._connection
        if cursor.iteration != self._iteration:
            raise RuntimeError(f"stream {self._stream!r} is iterated anew: an earlier iterator cannot be used any more")
        if self._ended:
            raise StopIteration
        if not self._placed or not connection.connected:
            self._place()
        if self._carried:
            loaded = self._carried.popleft()
            cursor.advance(loaded)
            return self._out(loaded.batch())
        while True:
            position = cursor.position
            if (
                position >= connection.until
                or position[1] == connection.lengths.get(position[0])
                or position in connection.failures
                or cursor.counted is not None
            ):
                position = self._wait(position)
            assert connection.directory is not None
            try:
                loaded = connection.directory.load(position)
                batch = loaded.batch()
            except (FileNotFoundError, CacheCorruptError) as error:
                connection.again(position, str(error))
                continue
            break
        self._advance(loaded)
        return self._out(batch)

    def _out(self, batch: Any) -> Any:
        opened = self._connection.opened
        return _pinned(batch) if opened is not None and opened.pin_memory and torch.cuda.is_available() else batch

    def _advance(self, loaded: format.Loaded | None) -> None:
        """A batch goes out: this reader needs it no more."""
        self._cursor.advance(loaded)
        self._unreported += 1
        if self._unreported >= self._report_every or self._cursor.position >= self._connection.until:
            self._unreported = 0
            self._connection.took(self._cursor.position)

    # ---- finding the place -------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Tells the producer, a new one perhaps, where this reader is. What lies ready can be read meanwhile."""
        connection = self._connection
        first = not self._placed
        while True:
            connection.open()
            if not connection.connected:
                continue
            self._seek(len(self._carried))
            if not connection.connected:
                continue
            if not first:
                return
            if self._peers is not None:
                peers, self._peers = self._peers, None
                self._warm_up(peers)
                if self._carried:
                    self._placed = True
                    self._seek(len(self._carried))
                    return
            generation = connection.generation
            connection.await_one(self._config.start_timeout)
            if connection.generation != generation:  # the first one was not the producer of this seed, or died
                continue
            self._wait_until_sought()
            if connection.connected:
                self._placed = True
                return

    def _seek(self, ahead: int) -> None:
        """The producer is to go on `ahead` batches after the cursor: those are here."""
        cursor = self._cursor
        epoch, index = cursor.position
        state = self._carried[-1].state() if ahead else cursor.source_state()
        state_fd = None if state is None else _state_file((epoch, index + ahead), state)
        try:
            if cursor.counted is not None:
                self._connection.seek(None, cursor.counted, state_fd)
            else:
                self._connection.seek(epoch, index + ahead, state_fd)
        finally:
            if state_fd is not None:
                os.close(state_fd)

    def _wait_until_sought(self) -> None:
        connection = self._connection
        deadline = time.monotonic() + self._config.batch_timeout
        while connection.position is None and connection.connected:
            connection.receive(deadline, "the producer has not found the position", self._config.batch_timeout)
        if connection.position is not None:
            self._cursor.position = connection.position

    # ---- other ranks -------------------------------------------------------------------------------------------

    def _warm_up(self, peers: Peers) -> None:
        """Gives other ranks what lies ready here and not there, or gets it from them."""
        cursor, connection = self._cursor, self._connection
        deadline = time.monotonic() + _COLD_S
        while connection.connected and (connection.position is None or connection.until <= connection.position):
            if not connection.hear(deadline):
                break
        asked = cursor.position if cursor.counted is None else (None, cursor.counted)
        seed, digest = connection.identity
        report = Report(self._stream, digest, seed, asked, connection.position, self._sizes())
        transfers = plan(peers.exchange(report))
        directory = connection.directory
        taken = peers.carry(transfers, directory.load if directory is not None else _no_batch)
        if taken is not None and taken[1]:
            transfer, batches = taken
            cursor.position, cursor.counted = transfer.place, None
            self._carried.extend(batches)

    def _sizes(self) -> tuple[int, ...]:
        """Of the batches that lie ready from the position on, in its epoch."""
        connection = self._connection
        found: list[int] = []
        if connection.position is None or connection.directory is None:
            return ()
        epoch, index = connection.position
        end = connection.lengths.get(epoch)
        while len(found) < MOST_BATCHES and (epoch, index) < connection.until and index != end:
            if (epoch, index) in connection.failures:
                break
            try:
                found.append(connection.directory.size((epoch, index)))
            except FileNotFoundError:
                break
            index += 1
        return tuple(found)

    # ---- waiting -----------------------------------------------------------------------------------------------

    def _wait(self, position: Position) -> Position:
        """Returns when the next batch may be read, with its place.

        Raises StopIteration at the epoch's end, and what kept the batch from being made.
        """
        cursor, connection = self._cursor, self._connection
        deadline = time.monotonic() + self._config.batch_timeout
        if self._retry:
            self._retry = False
            connection.again(position, "asked for again")
        while True:
            if not connection.connected:
                self._place()
            if cursor.counted is not None and connection.position is not None:
                # Counted over epochs of unknown length: where it is turns out with their ends.
                position = cursor.position = connection.position
            failure = connection.failures.get(position)
            if failure is not None:
                self._raise(failure)
            length = connection.lengths.get(position[0])
            if length is not None and position[1] >= length:
                self._end(position[0])
            if position < connection.until:
                cursor.counted = None
                return position
            what = f"batch {position[1]} of epoch {position[0]} of stream {self._stream!r} was not ready"
            connection.receive(deadline, what, self._config.batch_timeout)

    def _end(self, epoch: int) -> None:
        self._ended = True
        self._cursor.move((epoch + 1, 0), fresh=True)
        self._closer()
        raise StopIteration

    def _raise(self, failure: protocol.Failed) -> None:
        position = (failure.epoch, failure.index)
        del self._connection.failures[position]
        where = f"batch {failure.index} of epoch {failure.epoch} of stream {self._stream!r}"
        if failure.kind in ("dataset", "batch"):
            self._advance(None)  # as in torch: the next one can be asked for
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


def _state_file(position: Position, state: Any) -> int:
    """The source's own state at a position, as a file for the producer."""
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        format.write(fd, format.Label("state", *position), state)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _no_batch(position: Position) -> format.Loaded:
    raise FileNotFoundError(f"batch {position}: there is no cache yet")


def _pause(connection: Connection, cursor: Cursor, iteration: int) -> None:
    """An iterator is gone: nobody should wait for this reader, unless it has a newer one."""
    if connection.connected and cursor.iteration == iteration:
        connection.pause()


def _pinned(value: Any) -> Any:
    """As DataLoader(pin_memory=True): the same batch in memory that a GPU can read by itself."""
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(value)
