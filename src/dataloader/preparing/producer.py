"""The producer: one process per node and stream. It has batches made ahead of its readers, and removed behind them.

Forked by the host, and dies with it. What there should be is decided by `window.py`; the order of batches comes from
`sources/`; fetchers make them. Here these are brought together: what readers want and fetchers answer goes to the
window, what the window wants is asked of fetchers and told to readers. Nothing blocks it once the user's loader exists
(`opening.py`): the dataset runs in the fetchers.
"""

from __future__ import annotations

import os
import selectors
import socket
import traceback
from collections import deque
from typing import Any

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from ...protocol.messages import MessageError, shorten
from .. import wire
from ..sources.loaders import length_of
from ..sources.map_style import MapSource, is_map_style
from ..storing.directories import Manifest, StreamDirectory, admit, batch_name, forget
from .fetcher import Fetcher
from .fetcher_pool import FetcherPool
from .forked import log
from .readers import Reader, Readers
from .window import Limits, Window

_SKIP_WORTH_LOGGING_S = 0.5


class Producer:
    """Serves the readers of one stream until it is killed, or has nobody left to serve it with a new recipe."""

    def __init__(
        self, loader: Any, opened: protocol.Open, directory: StreamDirectory, manifest: Manifest, key: bytes
    ) -> None:
        options = opened.options
        self._loader = loader
        self._name = opened.stream
        self._directory = directory
        self._manifest = manifest
        self._seed = manifest.seed
        self._key = key
        self._max_skip = options.max_skip_batches
        self._map = MapSource(loader, self._seed) if is_map_style(loader) else None
        self._length = length_of(loader)
        limits = Limits(
            options.prefetch,
            options.lookback,
            options.checkpoint_frequency,
            stop_at_failure=self._map is None,
        )
        self._window = Window(limits, self._length)
        self._begun = False
        self._state_at: tuple[Position, int] | None = None
        """A descriptor of the source's own state at a position, from a reader's checkpoint."""
        self._selector = selectors.DefaultSelector()
        self._control: socket.socket | None = None
        self._readers = Readers(self._selector, self._name, self._obey, self._on_reader_gone)
        self._fetchers = FetcherPool(self._selector, self._fetch, self._heed, self._on_fetcher_death)

    # ---- life --------------------------------------------------------------------------------------------------

    def run(self, control: socket.socket) -> None:
        """Serves until the host closes `control`."""
        self._control = control
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        self._fetchers.start(max(1, getattr(self._loader, "num_workers", 0)) if self._map is not None else 1)
        while True:
            for key, events in self._selector.select():
                key.data(events)
            self._work()

    def _work(self) -> None:
        """Does what the window wants, then tells the readers what has changed."""
        while removals := self._window.take_removals():
            for position in removals:
                self._directory.remove(position)
            self._dispatch()  # there may be room only now; and what it finds may end an epoch
        self._dispatch()
        for reader in self._readers:
            self._tell(reader)

    # ---- readers -----------------------------------------------------------------------------------------------

    def _on_control(self, events: int) -> None:
        """The host hands over a reader: its connection, and what it has said."""
        assert self._control is not None
        data, fds = wire.receive(self._control, 2)
        if not data:
            os._exit(0)
        opened = protocol.decode_from_reader(data)
        assert isinstance(opened, protocol.Open)
        self.accept(opened, fds)

    def accept(self, opened: protocol.Open, fds: list[int]) -> None:
        """A new reader. `fds`: its connection, and the recipe that is not needed any more."""
        line = socket.socket(fileno=fds[0])
        wire.close_all(fds[1:])
        reader = self._readers.add(line)
        if opened.digest != self._manifest.digest:
            self._turn_away(reader, "is made by another loader factory, or with other arguments")
            return
        if opened.options.encrypt != bool(self._key):
            self._turn_away(reader, "has readers with and without enable_batch_encryption")
            return
        if opened.insist and opened.seed != self._seed:
            self._make_way("restored from a checkpoint of another seed")
        others = [other for other in self._readers if other.pid != reader.pid]
        if opened.content not in self._manifest.contents:
            if opened.renew or not others:
                self._make_way("the objects in its factory hold something else now")
            self._manifest = admit(self._directory.path, self._manifest, opened.content)
        for older in self._readers:
            if older.pid == reader.pid and older is not reader:
                self._turn_away(older, "is read by a newer MMAPDataLoader of this process")
        pin = bool(getattr(self._loader, "pin_memory", False))
        place = (str(self._directory.path), self._directory.mark)
        self._readers.say(reader, protocol.Opened(os.getpid(), *place, self._seed, self._length, pin, 0, self._key))

    def _make_way(self, reason: str) -> None:
        """What was made so far is of no use. Readers come back, to a new producer of a new stream; does not return."""
        log("data-anew", stream=self._name, pid=os.getpid(), reason=reason)
        forget(self._directory.path)
        os._exit(0)

    def _turn_away(self, reader: Reader, reason: str) -> None:
        text = f"stream {self._name!r} {reason}: give every MMAPDataLoader a name of its own"
        self._readers.say(reader, protocol.Refused("taken", "", text))
        self._readers.close(reader)

    def _on_reader_gone(self, reader: Reader) -> None:
        self._window.leave(reader.number)

    def _obey(self, reader: Reader, message: protocol.FromReader, fds: list[int]) -> None:
        match message:
            case protocol.Took():
                self._window.advance(reader.number, (message.epoch, message.index))
            case protocol.Seek():
                self._seek(reader, message, fds)
            case protocol.Again():
                self._again(reader, message)
            case protocol.Pause():
                reader.reading = False
                reader.pending_global = None
                self._window.leave(reader.number)
            case protocol.Open():
                raise MessageError("Open on an open connection")

    def _seek(self, reader: Reader, message: protocol.Seek, fds: list[int]) -> None:
        if message.has_state and fds:
            if self._state_at is not None:
                os.close(self._state_at[1])
            self._state_at = ((message.epoch or 0, message.index), fds.pop(0))
        reader.pending_global = None
        if message.epoch is not None:
            self._place(reader, message.serial, (message.epoch, message.index))
        elif self._length:
            self._place(reader, message.serial, divmod(message.index, self._length))
        else:
            reader.pending_global = (message.serial, message.index)
            self._settle_global(reader)

    def _settle_global(self, reader: Reader) -> None:
        """Finds the epoch of a batch that is counted over all epochs, as far as their lengths are known by now."""
        assert reader.pending_global is not None
        serial, index = reader.pending_global
        epoch = 0
        while epoch in self._window.lengths and index >= self._window.lengths[epoch]:
            if self._window.lengths[epoch] == 0:
                index = 0
                break
            index -= self._window.lengths[epoch]
            epoch += 1
        reader.placed = (epoch, index)
        self._place(reader, serial, (epoch, index))

    def _place(self, reader: Reader, serial: int, position: Position) -> None:
        if not self._begun:
            self._begun = True
            self._window.begin(position, self._directory.present())
        self._window.seek(reader.number, position)
        self._sought(reader, serial, position)

    def _again(self, reader: Reader, message: protocol.Again) -> None:
        position = (message.epoch, message.index)
        log("data-again", stream=self._name, batch=batch_name(position), reason=message.reason)
        self._directory.remove(position)
        if self._window.again(position):
            self._window.seek(reader.number, position)  # it may not even be among those there should be
        else:
            text = f"batch {message.index} of epoch {message.epoch} was made three times and is never what was written"
            self._fail(position, "corrupt", "", f"{text}: {message.reason}")
        self._sought(reader, message.serial, position)

    def _sought(self, reader: Reader, serial: int, position: Position) -> None:
        """The reader is there now, and knows nothing of the window."""
        reader.reading, reader.told = True, None
        self._readers.say(reader, protocol.Sought(serial, *position))

    def _tell(self, reader: Reader) -> None:
        """What the reader does not know yet."""
        if not reader.reading:
            return
        for epoch, length in self._window.lengths.items():
            if epoch > reader.told_ends:
                reader.told_ends = epoch
                self._readers.say(reader, protocol.Ended(epoch, length))
        if reader.told != self._window.until:
            reader.told = self._window.until
            self._readers.say(reader, protocol.Window(*self._window.until))

    # ---- fetchers ----------------------------------------------------------------------------------------------

    def _fetch(self, line: socket.socket, number: int) -> None:
        """The life of a fetcher, in the forked process."""
        self._readers.close_copies()
        if self._control is not None:
            self._control.close()
        self._selector.close()
        fetcher = Fetcher(line, self._directory, self._max_skip)
        fetcher.serve(self._loader, self._seed, number, self._map is not None)

    def _dispatch(self) -> None:
        """Asks fetchers for what is wanted, as long as one has room."""
        while self._begun and self._fetchers.have_room:
            position = self._window.next_wanted()
            if position is None:
                return
            indices: bytes | None = None
            if self._map is not None:
                try:
                    indices = self._map.indices(*position)
                except Exception as error:  # the user's sampler
                    self._window.asked(position)
                    text = shorten("".join(traceback.format_exception(error)), protocol.MAX_TEXT)
                    self._fail(position, "dataset", type(error).__name__, f"in the sampler:\n{text}")
                    continue
                if self._map.skipped is not None:
                    self._tell_skipped(protocol.Skipped(*self._map.skipped, "indices of the sampler only"))
                if indices is None:
                    self._ended(position[0], self._map.length(*position))
                    continue
            self._window.asked(position)
            state_fd = self._state_at[1] if self._state_at is not None and self._state_at[0] == position else None
            self._fetchers.ask(position, indices, state_fd)

    def _heed(self, message: protocol.FromFetcher) -> None:
        """What a fetcher has to say."""
        match message:
            case protocol.Fetched():
                position = (message.epoch, message.index)
                if not self._window.ready(position):
                    self._directory.remove(position)
            case protocol.SourceEnded():
                self._ended(message.epoch, message.length)
            case protocol.NotFetched(kind="full"):
                given_up = self._window.no_room((message.epoch, message.index))
                if given_up is not None:
                    self._fail(given_up, "full", "", message.text)
            case protocol.NotFetched():
                self._fail((message.epoch, message.index), message.kind, message.type_name, message.text)
            case protocol.Skipped():
                self._tell_skipped(message)

    def _on_fetcher_death(self, pid: int, jobs: deque[Position], how: str | None) -> None:
        """What it was making is asked again, of its replacement; what kills three of them in a row is given up."""
        if how is not None:
            log("data-fetcher-lost", stream=self._name, pid=pid, how=how, action="replaced")
            if jobs and not self._window.lost(jobs[0]):  # it has died of the batch that it was making, or so it looks
                text = f"the process that makes it has died three times, the last time by {how} (out of memory?)"
                self._fail(jobs.popleft(), "killed", "", text)
        for position in jobs:
            self._window.given_back(position)

    # ---- both --------------------------------------------------------------------------------------------------

    def _ended(self, epoch: int, length: int) -> None:
        self._window.ended(epoch, length)
        for reader in self._readers:
            if reader.pending_global is not None and reader.placed[0] == epoch and reader.placed[1] >= length:
                self._settle_global(reader)

    def _fail(self, position: Position, kind: str, type_name: str, text: str) -> None:
        """A reader that comes to this batch is told why it is not there."""
        if self._window.failed(position):
            self._readers.say_to_all(protocol.Failed(*position, kind, type_name, text))

    def _tell_skipped(self, message: protocol.Skipped) -> None:
        if message.seconds > _SKIP_WORTH_LOGGING_S or message.how.startswith("making"):
            taken = f"{message.seconds:.2f}"
            log("data-skipped", stream=self._name, batches=message.batches, seconds=taken, how=message.how)
        self._readers.say_to_all(message)
