"""One client's connection to the store: bytes between a transport, the parser and the keyspace.

Owns pacing: a connection gets a slice of the event loop at a time, and one whose client does not read is
not read from. It decides nothing about keys. `server.py` makes one for each client that connects.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..protocol.seldom import Seldom
from .keyspace import Keyspace
from .namespace import Session
from .repeated import Repeated
from .room import Room
from .waits import Answer
from .wire import Limits, RequestParser, WireError

if TYPE_CHECKING:
    from .sharding.receiver import Receiver
    from .shards import Shards

REQUESTS_PER_SLICE = 256
WRITE_CHUNK = 256 << 10
BYTES_PER_SLICE = 4 << 20
_COUNTED = 64 << 10
"""A request of less than this is counted when it has been dealt with, not before."""


@dataclass
class Hub:
    """What the connections of one store share."""

    keyspace: Keyspace
    limits: Limits
    room: Room
    log: Callable[[str], None]
    closing: bool = False
    connections: dict[Session, Connection] = field(default_factory=dict)
    receivers: dict[Session, Receiver] = field(default_factory=dict)
    """The connections, and the asks of other nodes."""
    repeated: Repeated = field(default_factory=Repeated)
    sharing: Shards | None = None
    """Where the store is one of many."""
    requests: int = 0
    accepted: int = 0
    malformed: int = 0
    _seldom: Seldom = field(default_factory=Seldom)

    def tell(self, event: str, text: str) -> None:
        """A line about what a client did, at most one a minute of each kind: whoever connects can cause it."""
        left_out = self._seldom.due(event, time.monotonic())
        if left_out is not None:
            self.log(f"{event} {text}" + (f" more_of_them={left_out}" if left_out else ""))

    def deliver(self, answers: Iterable[Answer]) -> None:
        """Send answers to whom they are for."""
        for session, reply in answers:
            self.receivers[session].send(reply)


class Connection(asyncio.Protocol):
    """asyncio's side of one client."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._parser = RequestParser(hub.limits, hub.repeated)
        self._outbox: deque[bytes | memoryview] = deque()
        self._transport: asyncio.Transport
        self._session: Session
        self._loop = asyncio.get_running_loop()
        self._clogged = False  # the transport holds more than it wants to
        self._slice: asyncio.Handle | None = None  # the next slice, if one is due
        self._over = False
        self._counted = 0  # bytes of requests that are not complete, as the store's room knows them
        self.gone: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._session = self._hub.keyspace.open()
        self._hub.connections[self._session] = self._hub.receivers[self._session] = self
        self._hub.accepted += 1
        transport.set_write_buffer_limits(high=WRITE_CHUNK)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._hub.closing:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._over = True
        if self._slice is not None:
            self._slice.cancel()
        self._outbox.clear()
        self._hub.room.give(self._counted)
        self._counted = 0
        if self._hub.sharing is not None:
            self._hub.sharing.close(self._session)
        self._hub.keyspace.close(self._session)
        self._hub.connections.pop(self._session, None)
        self._hub.receivers.pop(self._session, None)
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        """The client sent something."""
        if self._over:
            return
        self._parser.feed(data)
        if self._slice is None:
            self._work()
        if not self._over:
            try:
                self._count()
            except WireError as error:
                self.refuse(str(error))

    def _count(self) -> None:
        """Tells the store's room what this client has under way. Raises WireError if that is too much."""
        held = self._parser.held
        self._hub.room.take(held - self._counted)
        self._counted = held

    def pause_writing(self) -> None:
        """The client reads more slowly than it asks."""
        self._clogged = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._clogged = False
        if self._slice is None and not self._over:
            self._work()

    def send(self, reply: list[bytes]) -> None:
        """Answer a wait of this client, or what another node was asked for it."""
        self._outbox.extend(reply)
        if (
            (self._flush() or self._hub.sharing is not None)
            and self._slice is None
            and not self._clogged
            and not self._over
        ):
            self._slice = self._loop.call_soon(self._work)

    def refuse(self, reason: str) -> None:
        """Its request was a mistake: one line, and the end of this connection."""
        self._hub.malformed += 1
        self._hub.tell("store_malformed", f"peer={self._peer()} epoch={self._hub.keyspace.epoch} reason={reason!r}")
        if self._over:
            return
        self._flush()
        self.abort()

    def abort(self) -> None:
        """Close at once, without sending what is left."""
        self._over = True
        self._transport.abort()

    def _work(self) -> None:
        """One slice: send what is due, then answer requests until the slice or the transport is full."""
        self._slice = None
        more = self._flush()
        if not more and not self._over:
            more = self._answer()
            more = self._flush() or more
        if self._over:
            return
        if self._hub.sharing is not None and self._hub.sharing.holds(self._session):
            self._transport.pause_reading()  # `send` goes on
            return
        if more and not self._clogged:
            self._slice = self._loop.call_soon(self._work)
        if more:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _answer(self) -> bool:
        """Answer up to a slice of requests; True if there may be more of them."""
        hub, session, parser, outbox = self._hub, self._session, self._parser, self._outbox
        now_ns = time.monotonic_ns()
        try:
            for _ in range(REQUESTS_PER_SLICE):
                request = parser.next_request()
                if request is None:
                    return False
                hub.requests += 1
                if self._counted > _COUNTED:
                    self._count()  # what becomes a value is not to be counted twice
                if hub.sharing is not None and hub.sharing.take(session, request, now_ns):
                    if hub.sharing.holds(session):
                        return True
                    continue
                for other, reply in hub.keyspace.apply(session, request, now_ns):
                    if other is session:
                        outbox.extend(reply)
                    else:
                        hub.receivers[other].send(reply)
                if outbox and len(outbox[-1]) >= WRITE_CHUNK:
                    break
        except WireError as error:
            self.refuse(str(error))
        except Exception as error:  # a fault in the store itself must cost one client, not the agent
            hub.tell("store_error", f"peer={self._peer()} epoch={hub.keyspace.epoch} error={error!r}")
            self.abort()
        return True

    def _flush(self) -> bool:
        """Hand the outbox to the transport as far as it takes it; True if something is left."""
        outbox, budget = self._outbox, BYTES_PER_SLICE
        while outbox and budget > 0 and not self._clogged and not self._over:
            chunk: bytes | memoryview = outbox.popleft()
            if len(chunk) > WRITE_CHUNK:
                view = memoryview(chunk)
                outbox.appendleft(view[WRITE_CHUNK:])
                chunk = view[:WRITE_CHUNK]
            elif outbox:
                small, size = [chunk], len(chunk)
                while outbox and size + len(outbox[0]) <= WRITE_CHUNK:
                    size += len(outbox[0])
                    small.append(outbox.popleft())
                chunk = b"".join(small)
            budget -= len(chunk)
            self._transport.write(chunk)
        return bool(outbox) or self._clogged

    def _peer(self) -> str:
        peer = self._transport.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if peer else "unknown"
