"""The readers of a producer, seen from the producer: their connections, and what each has been told.

Nothing is decided here about batches: what readers say goes to the producer's callbacks. A reader that does not read
holds up nobody: what it is told waits here.
"""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Callable, Iterator

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from ...protocol.messages import MessageError
from .. import wire
from .forked import log_seldom


class Reader:
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


class Readers:
    """All that are connected. `on_message(reader, message, fds)` takes the descriptors; `on_gone(reader)`."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        stream: str,
        on_message: Callable[[Reader, protocol.FromReader, list[int]], None],
        on_gone: Callable[[Reader], None],
    ) -> None:
        self._selector = selector
        self._stream = stream
        self._on_message = on_message
        self._on_gone = on_gone
        self._connected: dict[int, Reader] = {}
        self._numbers = 0

    def __iter__(self) -> Iterator[Reader]:
        """Those of now: one that goes meanwhile does no harm."""
        return iter(list(self._connected.values()))

    def add(self, line: socket.socket) -> Reader:
        reader = Reader(self._numbers, line)
        self._numbers += 1
        line.setblocking(False)
        self._connected[reader.number] = reader
        self._selector.register(line, selectors.EVENT_READ, lambda events: self._on_events(reader, events))
        return reader

    def say(self, reader: Reader, message: protocol.ToReader) -> None:
        reader.outgoing.append(protocol.encode(message))
        self._flush(reader)

    def say_to_all(self, message: protocol.ToReader) -> None:
        for reader in self:
            self.say(reader, message)

    def close(self, reader: Reader) -> None:
        del self._connected[reader.number]
        self._selector.unregister(reader.line)
        reader.line.close()
        self._on_gone(reader)

    def close_copies(self) -> None:
        """In a forked process: its copies of the lines."""
        for reader in self:
            reader.line.close()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _on_events(self, reader: Reader, events: int) -> None:
        if reader.number in self._connected and events & selectors.EVENT_WRITE:
            self._flush(reader)
        while reader.number in self._connected:
            try:
                data, fds = wire.receive(reader.line, 1)
            except BlockingIOError:
                return
            if not data:
                self.close(reader)
                return
            try:
                self._on_message(reader, protocol.decode_from_reader(data), fds)
            except MessageError as error:
                log_seldom("bad-message", peer=f"reader {reader.pid}", stream=self._stream, reason=error)
                self.close(reader)
            finally:
                wire.close_all(fds)

    def _flush(self, reader: Reader) -> None:
        try:
            while reader.outgoing:
                reader.line.send(reader.outgoing[0])
                reader.outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:  # its end of the line tells
            reader.outgoing.clear()
        if reader.number in self._connected:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if reader.outgoing else 0)
            key = self._selector.get_key(reader.line)
            if key.events != wanted:
                self._selector.modify(reader.line, wanted, key.data)
