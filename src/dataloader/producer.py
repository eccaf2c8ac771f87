"""The producer: one process per node and stream. It has batches made ahead of its readers, and removed behind them.

Forked by the host, and dies with it. What there should be is decided by `window.py`; the order of batches comes from
`source.py`; fetchers make them. Here are only the sockets, the processes and the files. Nothing blocks it once the
user's loader exists: the dataset runs in the fetchers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from ..protocol import dataloader as protocol
from ..protocol.dataloader import Position
from ..protocol.messages import MessageError, shorten
from . import recipe, seeds, source, wire
from .fetcher import Fetcher, Restart
from .store import StreamDirectory, batch_name, open_stream
from .window import Limits, Window

_IN_FLIGHT = 2
"""Batches asked of one fetcher at a time: it has the next in hand when it is done with one."""
_RESTART = 75
"""The exit code of a fetcher that wants to be replaced."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_libc = ctypes.CDLL(None, use_errno=True)


def log(event: str, **fields: object) -> None:
    """One line for people, in the form of the agent's own."""
    text = " ".join(
        f"{name}={str(value)!r}" if " " in str(value) else f"{name}={value}" for name, value in fields.items()
    )
    sys.stderr.write(f"hyperpodrun: {event} {text}\n")
    sys.stderr.flush()


def die_with_parent(parent: int, name: str) -> None:
    """To be called first in a forked child; `name` is what `ps` and `top` show."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _libc.prctl(_PR_SET_NAME, name.encode()[:15])


class _Reader:
    """One connection. `pid` is the kernel's word for who it is."""

    def __init__(self, number: int, line: socket.socket) -> None:
        self.number = number
        self.line = line
        self.pid = wire.peer(line)[0]
        self.reading = False
        self.told: Position | None = None
        """The last `Window`."""
        self.told_ends = -1
        self.pending_global: tuple[int, int] | None = None
        """(serial, batch) of a Seek that counts over epochs whose length is not known yet."""
        self.placed: Position = (0, 0)
        """Where that Seek was taken to lead."""
        self.outgoing: deque[bytes] = deque()


class _Fetcher:
    """One fetcher process, and what it was asked for, oldest first."""

    def __init__(self, number: int, pid: int, pidfd: int, line: socket.socket) -> None:
        self.number = number
        self.pid = pid
        self.pidfd = pidfd
        self.line = line
        self.jobs: deque[Position] = deque()


class Producer:
    """Serves the readers of one stream until it is killed, or has nobody left to serve it with a new recipe."""

    def __init__(self, loader: Any, opened: protocol.Open, directory: StreamDirectory, seed: int, key: bytes) -> None:
        options = opened.options
        self._loader = loader
        self._name = opened.stream
        self._digest = opened.digest
        self._directory = directory
        self._seed = seed
        self._key = key
        self._max_skip = options.max_skip_batches
        self._map = source.MapSource(loader, seed) if source.is_map_style(loader) else None
        self._length = source.length_of(loader)
        limits = Limits(
            options.prefetch,
            options.lookback,
            options.checkpoint_frequency,
            options.max_cache_bytes,
            stop_at_failure=self._map is None,
        )
        self._window = Window(limits, self._length)
        self._begun = False
        self._state_at: tuple[Position, int] | None = None
        """A descriptor of the source's own state at a position, from a reader's checkpoint."""
        self._selector = selectors.DefaultSelector()
        self._control: socket.socket | None = None
        self._readers: dict[int, _Reader] = {}
        self._fetchers: list[_Fetcher] = []
        self._numbers = 0

    # ---- life --------------------------------------------------------------------------------------------------

    def run(self, control: socket.socket) -> None:
        """Serves until the host closes `control`."""
        self._control = control
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)
        workers = max(1, getattr(self._loader, "num_workers", 0)) if self._map is not None else 1
        for number in range(workers):
            self._fetchers.append(self._fork_fetcher(number))
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
        for reader in list(self._readers.values()):
            self._tell(reader)

    # ---- readers -----------------------------------------------------------------------------------------------

    def _on_control(self, events: int) -> None:
        """The host hands over a reader: its connection, and what it has said."""
        assert self._control is not None
        data, fds = wire.receive(self._control, 2)
        if not data:
            os._exit(0)
        self.accept(protocol.decode_from_reader(data), fds)

    def accept(self, opened: protocol.FromReader, fds: list[int]) -> None:
        """A new reader. `fds`: its connection, and the recipe that is not needed any more."""
        assert isinstance(opened, protocol.Open)
        line = socket.socket(fileno=fds[0])
        wire.close_all(fds[1:])
        line.setblocking(False)
        if opened.insist and opened.seed != self._seed:
            # Restored from a checkpoint of another order: everything made so far is of no use. The reader comes back.
            log("data-reseeded", stream=self._name, pid=os.getpid())
            os.unlink(self._directory.path / "stream.json")
            os._exit(0)
        reader = _Reader(self._numbers, line)
        self._numbers += 1
        if opened.digest != self._digest:
            text = (
                f"stream {self._name!r} is made by another loader factory, or with other arguments: give every "
                "MMAPDataLoader a name of its own"
            )
            self._say(reader, protocol.Refused("taken", "", text))
            line.close()
            return
        for other in [other for other in self._readers.values() if other.pid == reader.pid]:
            text = f"a newer MMAPDataLoader of this process reads stream {self._name!r}: give each a name of its own"
            self._say(other, protocol.Refused("taken", "", text))
            self._close(other)
        self._readers[reader.number] = reader
        self._selector.register(line, selectors.EVENT_READ, lambda events: self._on_reader(reader, events))
        self._say(reader, opened_reply(self._directory, self._seed, self._length, self._loader, self._key))

    def _on_reader(self, reader: _Reader, events: int) -> None:
        if reader.number in self._readers and events & selectors.EVENT_WRITE:
            self._flush(reader)
        while reader.number in self._readers:
            try:
                data, fds = wire.receive(reader.line, 1)
            except BlockingIOError:
                return
            if not data:
                self._close(reader)
                return
            try:
                self._obey(reader, protocol.decode_from_reader(data), fds)
            except MessageError as error:
                log("bad-message", peer=f"reader {reader.pid}", stream=self._name, reason=error)
                self._close(reader)

    def _obey(self, reader: _Reader, message: protocol.FromReader, fds: list[int]) -> None:
        match message:
            case protocol.Took():
                self._window.advance(reader.number, (message.epoch, message.index))
            case protocol.Seek():
                self._seek(reader, message, fds)
                return
            case protocol.Again():
                self._again(reader, message)
            case protocol.Pause():
                reader.reading = False
                reader.pending_global = None
                self._window.leave(reader.number)
            case protocol.Open():
                raise MessageError("Open on an open connection")
        wire.close_all(fds)

    def _seek(self, reader: _Reader, message: protocol.Seek, fds: list[int]) -> None:
        if message.has_state and fds:
            if self._state_at is not None:
                os.close(self._state_at[1])
            self._state_at = ((message.epoch or 0, message.index), fds.pop(0))
        wire.close_all(fds)
        reader.pending_global = None
        if message.epoch is not None:
            self._place(reader, message.serial, (message.epoch, message.index))
        elif self._length:
            self._place(reader, message.serial, divmod(message.index, self._length))
        else:
            reader.pending_global = (message.serial, message.index)
            self._settle_global(reader)

    def _settle_global(self, reader: _Reader) -> None:
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

    def _place(self, reader: _Reader, serial: int, position: Position) -> None:
        if not self._begun:
            self._begun = True
            self._window.begin(position, self._directory.sizes())
        self._window.seek(reader.number, position)
        reader.reading = True
        reader.told = None
        self._say(reader, protocol.Sought(serial, *position))

    def _again(self, reader: _Reader, message: protocol.Again) -> None:
        position = (message.epoch, message.index)
        log("data-again", stream=self._name, batch=batch_name(position), reason=message.reason)
        self._directory.remove(position)
        if self._window.again(position):
            self._window.seek(reader.number, position)  # it may not even be among those there should be
        else:
            text = f"batch {message.index} of epoch {message.epoch} was made three times and is never what was written"
            self._fail(position, "corrupt", "", f"{text}: {message.reason}")
        reader.reading, reader.told = True, None
        self._say(reader, protocol.Sought(message.serial, *position))

    def _tell(self, reader: _Reader) -> None:
        """What the reader does not know yet."""
        if not reader.reading:
            return
        for epoch, length in self._window.lengths.items():
            if epoch > reader.told_ends:
                reader.told_ends = epoch
                self._say(reader, protocol.Ended(epoch, length))
        if reader.told != self._window.until:
            reader.told = self._window.until
            self._say(reader, protocol.Window(*self._window.until))

    def _say(self, reader: _Reader, message: protocol.ToReader) -> None:
        reader.outgoing.append(protocol.encode(message))
        self._flush(reader)

    def _flush(self, reader: _Reader) -> None:
        try:
            while reader.outgoing:
                reader.line.send(reader.outgoing[0])
                reader.outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:  # its end of the line tells
            reader.outgoing.clear()
        if reader.number in self._readers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if reader.outgoing else 0)
            if self._selector.get_key(reader.line).events != wanted:
                self._selector.modify(reader.line, wanted, self._selector.get_key(reader.line).data)

    def _close(self, reader: _Reader) -> None:
        del self._readers[reader.number]
        self._selector.unregister(reader.line)
        reader.line.close()
        self._window.leave(reader.number)

    # ---- fetchers ----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Asks fetchers for what is wanted, as long as one has room."""
        if not self._begun:
            return
        while True:
            fetcher = min(self._fetchers, key=lambda fetcher: len(fetcher.jobs))
            if len(fetcher.jobs) >= _IN_FLIGHT:
                return
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
            self._ask(fetcher, position, indices)

    def _ask(self, fetcher: _Fetcher, position: Position, indices: bytes | None) -> None:
        fds: list[int] = []
        attached = ""
        if indices is not None and len(indices) > protocol.MAX_PACKET_BYTES // 2:
            fds, attached, indices = [wire.anonymous_file("indices", indices)], "indices", None
        elif self._state_at is not None and self._state_at[0] == position:
            fds, attached = [os.dup(self._state_at[1])], "state"
        fetcher.jobs.append(position)
        try:
            packet = protocol.encode(protocol.Fetch(*position, indices, attached))
            if fds:
                socket.send_fds(fetcher.line, [packet], fds)
            else:
                fetcher.line.send(packet)
        except OSError:
            pass  # it is dead: its pidfd tells, and its jobs are asked again
        finally:
            wire.close_all(fds)

    def _fork_fetcher(self, number: int) -> _Fetcher:
        ours, theirs = wire.pair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_fetcher(parent, number, ours, theirs)
        theirs.close()
        ours.setblocking(False)
        fetcher = _Fetcher(number, pid, os.pidfd_open(pid), ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._on_fetcher(fetcher))
        self._selector.register(fetcher.pidfd, selectors.EVENT_READ, lambda events: self._on_fetcher_exit(fetcher))
        return fetcher

    def _become_fetcher(self, parent: int, number: int, ours: socket.socket, theirs: socket.socket) -> None:
        """In the forked process; does not return."""
        code = 1
        try:
            die_with_parent(parent, "hpr-fetcher")
            ours.close()
            # Whoever holds a copy of a line keeps its other end from seeing that this producer is gone.
            for reader in self._readers.values():
                reader.line.close()
            for other in self._fetchers:
                other.line.close()
                os.close(other.pidfd)
            if self._control is not None:
                self._control.close()
            self._selector.close()
            fetcher = Fetcher(theirs, self._directory, self._max_skip)
            fetcher.serve(self._loader, self._seed, number, self._map is not None)
            code = 0
        except Restart:
            code = _RESTART
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _on_fetcher(self, fetcher: _Fetcher) -> None:
        while fetcher in self._fetchers:  # else an event of one that was just replaced
            try:
                data, _ = wire.receive(fetcher.line)
            except BlockingIOError:
                return
            if not data:
                return
            self._heed(fetcher, protocol.decode_from_fetcher(data))

    def _heed(self, fetcher: _Fetcher, message: protocol.FromFetcher) -> None:
        if isinstance(message, protocol.Skipped):
            self._tell_skipped(message)
            return
        position = (message.epoch, message.index)
        fetcher.jobs.remove(position)
        match message:
            case protocol.Fetched():
                if not self._window.ready(position, message.nbytes):
                    self._directory.remove(position)
            case protocol.SourceEnded():
                self._ended(message.epoch, message.length)
            case protocol.NotFetched(kind="full"):
                given_up = self._window.no_room(position)
                if given_up is not None:
                    self._fail(given_up, "full", "", message.text)
            case protocol.NotFetched():
                self._fail(position, message.kind, message.type_name, message.text)

    def _on_fetcher_exit(self, fetcher: _Fetcher) -> None:
        """What it was making is asked again, of its replacement; what kills three of them in a row is given up."""
        self._on_fetcher(fetcher)  # its last words
        self._fetchers.remove(fetcher)
        self._selector.unregister(fetcher.line)
        self._selector.unregister(fetcher.pidfd)
        _, status = os.waitpid(fetcher.pid, 0)
        fetcher.line.close()
        os.close(fetcher.pidfd)
        code = os.waitstatus_to_exitcode(status)
        if code != _RESTART:
            self._blame(fetcher, f"signal {-code}" if code < 0 else f"exit code {code}")
        for position in fetcher.jobs:
            self._window.given_back(position)
        fetcher.jobs.clear()
        self._fetchers.append(self._fork_fetcher(fetcher.number))

    def _blame(self, fetcher: _Fetcher, how: str) -> None:
        """A fetcher has died of the batch that it was making, or so it looks."""
        log("data-fetcher-lost", stream=self._name, pid=fetcher.pid, how=how, action="replaced")
        if fetcher.jobs and not self._window.lost(fetcher.jobs[0]):
            text = f"the process that makes it has died three times, the last time by {how} (out of memory?)"
            self._fail(fetcher.jobs.popleft(), "killed", "", text)

    # ---- both --------------------------------------------------------------------------------------------------

    def _ended(self, epoch: int, length: int) -> None:
        self._window.ended(epoch, length)
        for reader in self._readers.values():
            if reader.pending_global is not None and reader.placed[0] == epoch and reader.placed[1] >= length:
                self._settle_global(reader)

    def _fail(self, position: Position, kind: str, type_name: str, text: str) -> None:
        """A reader that comes to this batch is told why it is not there."""
        if not self._window.failed(position):
            return
        for reader in self._readers.values():
            self._say(reader, protocol.Failed(*position, kind, type_name, text))

    def _tell_skipped(self, message: protocol.Skipped) -> None:
        if message.seconds > 0.5 or message.how.startswith("making"):
            log(
                "data-skipped",
                stream=self._name,
                batches=message.batches,
                seconds=f"{message.seconds:.2f}",
                how=message.how,
            )
        for reader in self._readers.values():
            self._say(reader, message)


def opened_reply(directory: StreamDirectory, seed: int, length: int | None, loader: Any, key: bytes) -> protocol.Opened:
    pin = bool(getattr(loader, "pin_memory", False))
    return protocol.Opened(os.getpid(), str(directory.path), directory.mark, seed, length, pin, 0, key)


def main(parent: int, control: socket.socket, opened: protocol.Open, fds: list[int], job: Path, key: bytes) -> None:
    """The life of a producer, in a process just forked; does not return."""
    code = 1
    try:
        die_with_parent(parent, "hpr-producer")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = _serve(control, opened, fds, job, key)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve(control: socket.socket, opened: protocol.Open, fds: list[int], job: Path, key: bytes) -> int:
    line_fd, recipe_fd = fds
    try:
        directory, seed = _directory(opened, job, key)
        loader = _make_loader(opened, recipe_fd, seed)
    except BaseException as error:  # the user's import, factory or sys.exit: it goes to the training loop
        _refuse(control, line_fd, error)
        return 1
    several = len(loader) if isinstance(loader, list | tuple) else 0
    if several:
        _tell_several(line_fd, several, directory, seed)
        return 0
    producer = Producer(loader, opened, directory, seed, key)
    producer.accept(opened, [line_fd])
    os.close(recipe_fd)
    producer.run(control)
    return 0


def _directory(opened: protocol.Open, job: Path, key: bytes) -> tuple[StreamDirectory, int]:
    directory, seed = open_stream(job, opened.stream, opened.digest, opened.seed, key)
    if opened.insist and seed != opened.seed:
        os.unlink(directory.path / "stream.json")
        directory, seed = open_stream(job, opened.stream, opened.digest, opened.seed, key)
    return directory, seed


def _make_loader(opened: protocol.Open, recipe_fd: int, seed: int) -> Any:
    factory = recipe.prepare(recipe.unpack(recipe_fd))
    seeds.set_seed(seeds.derive(seed, 0, seeds.FACTORY))
    started = time.monotonic()
    loader = factory()
    log("data-producer", stream=opened.stream, pid=os.getpid(), factory_s=f"{time.monotonic() - started:.2f}")
    if not isinstance(loader, list | tuple) and not hasattr(loader, "__iter__"):
        raise TypeError(f"the loader factory gave {type(loader).__name__}, which cannot be iterated")
    return loader


def _tell_several(line_fd: int, several: int, directory: StreamDirectory, seed: int) -> None:
    with socket.socket(fileno=line_fd) as line:
        line.send(
            protocol.encode(
                protocol.Opened(os.getpid(), str(directory.path), directory.mark, seed, None, False, several, b"")
            )
        )
        line.settimeout(60)
        with contextlib.suppress(OSError):
            wire.receive(line)  # until it has gone: an early end of the line would look like a death


def _refuse(control: socket.socket, line_fd: int, error: BaseException) -> None:
    """Tells everybody who waits that there will be no batches, and why."""
    text = shorten("".join(traceback.format_exception(error)), protocol.MAX_TEXT)
    packet = protocol.encode(protocol.Refused("factory", type(error).__name__, text))
    lines = [line_fd]
    control.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, fds = wire.receive(control, 2)
            if not data:
                break
            lines.append(fds[0])
    for fd in lines:
        with socket.socket(fileno=fd) as line, contextlib.suppress(OSError):
            line.send(packet)
