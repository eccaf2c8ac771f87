"""The connections that this agent has made, or tries to make, with others. None is made again by itself.

All are of one socket. ZeroMQ knows each by the text that it was told to connect to, and tells its end by that text, so
no two that live at the same time may have the same: the port is written with more or fewer zeros.
Called by: `transport.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from .keys import JobKeys
from .router import MOST_BYTES, TOO_SLOW, Owner, Router
from .sockets import ENDS, FAILED, key_in, secured_router

_CONNECT_MS = 2000
_ATTEMPT_S = 10.0
"""An attempt of which nothing is heard for so long is over: more than ZeroMQ gives connecting and its handshake."""
_TEXTS = 32
"""So many attempts later the same text is used again, unless it is still in use."""


class Connection:
    """An attempt and, if it succeeds, the connection. What is said before `open` waits for the name to be looked up."""

    def __init__(self, address: str, number: int) -> None:
        self.address = address
        self.id = b"%d" % number
        self.key = ""
        """Who is there, once that is known."""
        self.endpoint: str | None = None
        self.refused = False
        """The handshake has failed: the other end has another secret, or none."""
        self.shaken = False
        self.early: list[Sequence[bytes]] = []
        self.early_bytes = 0


class Outgoing:
    """`on_end(connection)`: one is over, or the attempt at it, without having been given up here."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: JobKeys | None,
        owner: Owner,
        on_end: Callable[[Connection], None],
    ) -> None:
        sock = secured_router(context, keys)
        if keys is not None:
            sock.setsockopt(zmq.CURVE_SERVERKEY, keys.public)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        self._router = Router(sock, self._too_slow)
        self._owner = owner
        self._on_end = on_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count(1)
        self._by_address: dict[str, Connection] = {}
        self._by_id: dict[bytes, Connection] = {}
        """And by what ZeroMQ calls it."""
        self._by_endpoint: dict[str, Connection] = {}
        self._attempts: deque[tuple[float, Connection]] = deque()
        """Those under way, in the order of their deadlines."""
        self._timer: asyncio.TimerHandle | None = None
        self.shaken = 0
        """So many are connections by now."""

    def __len__(self) -> int:
        return len(self._by_address)

    def start(self, loop: asyncio.AbstractEventLoop, identity: bytes) -> None:
        """As the agent `identity`."""
        self._loop = loop
        self._router.socket.setsockopt(zmq.IDENTITY, identity)
        self._router.start(loop, self._on_message, self._on_event)

    def close(self, linger_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._by_address.clear()
        self._router.close(linger_s)

    # ---- speaking --------------------------------------------------------------------------------------------------

    def find(self, address: str) -> Connection | None:
        return self._by_address.get(address)

    def add(self, address: str) -> Connection:
        """A connection that is to be opened, or given up."""
        connection = self._by_address[address] = Connection(address, next(self._numbers))
        self._by_id[connection.id] = connection
        return connection

    def holds(self, connection: Connection) -> bool:
        """Whether it has not been given up."""
        return self._by_id.get(connection.id) is connection

    def open(self, connection: Connection, host: str, port: int) -> None:
        """Begins to connect to a numeric address. Raises OSError if it cannot."""
        assert self._loop is not None
        no_room = self._owner.no_room()
        if no_room:
            raise OSError(errno.EMFILE, no_room)
        with socket.socket():  # ZeroMQ does not tell that there is no descriptor left
            pass
        endpoint = self._free_text(connection, host, port)
        try:
            self._router.socket.setsockopt(zmq.CONNECT_ROUTING_ID, connection.id)
            self._router.socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot connect to {connection.address}: {error.strerror}") from error
        connection.endpoint = endpoint
        self._by_endpoint[endpoint] = connection
        self._attempts.append((self._loop.time() + _ATTEMPT_S, connection))
        if self._timer is None:
            self._timer = self._loop.call_later(_ATTEMPT_S, self._overdue)
        early, connection.early = connection.early, []
        for frames in early:
            self.send(connection, frames)
        self._router.soon()

    def _free_text(self, connection: Connection, host: str, port: int) -> str:
        where = f"[{host}]" if ":" in host else host
        texts = (f"tcp://{where}:{'0' * zeros}{port}" for zeros in itertools.count(1 + int(connection.id) % _TEXTS))
        return next(text for text in texts if text not in self._by_endpoint)

    def send(self, connection: Connection, frames: Sequence[bytes]) -> bool:
        """False if the connection is over, or too much waits for it."""
        if connection.endpoint is not None:
            return self._router.send(connection.id, frames)
        connection.early.append(frames)
        connection.early_bytes += sum(map(len, frames))
        if connection.early_bytes > MOST_BYTES:
            connection.early.clear()
            self._too_slow(connection.id)
            return False
        return True

    def give_up(self, connection: Connection) -> None:
        """It is no more; nobody is told."""
        if not self.holds(connection):
            return
        del self._by_id[connection.id]
        self.shaken -= connection.shaken
        if self._by_address.get(connection.address) is connection:
            del self._by_address[connection.address]
        self._router.forget(connection.id)
        if connection.endpoint is not None:
            del self._by_endpoint[connection.endpoint]
            with contextlib.suppress(zmq.ZMQError):  # closed, or ZeroMQ has forgotten it already
                self._router.socket.disconnect(connection.endpoint)
            self._router.soon()

    # ---- what comes ------------------------------------------------------------------------------------------------

    def _on_message(self, identity: bytes, frames: list[bytes], descriptor: int) -> None:
        connection = self._by_id.get(identity)
        if connection is None:  # given up, and this was on its way
            return
        key = key_in(frames)
        if not key:
            self._owner.refuse(connection.address.encode(), "it is not of this protocol")
            self._on_end(connection)
            return
        connection.key = key
        self._owner.heard(key, connection.address, frames[0], frames[2])

    def _on_event(self, kind: int, value: int, endpoint: str) -> None:
        connection = self._by_endpoint.get(endpoint)
        if connection is None:
            return
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            connection.shaken = True
            self.shaken += 1
        elif kind in ENDS:
            connection.refused = kind in FAILED or (kind == zmq.EVENT_DISCONNECTED and not connection.shaken)
            self._on_end(connection)

    def _overdue(self) -> None:
        assert self._loop is not None
        self._timer = None
        now = self._loop.time()
        while self._attempts and (self._attempts[0][0] <= now or not self._is_under_way(self._attempts[0][1])):
            connection = self._attempts.popleft()[1]
            if self._is_under_way(connection):
                self._on_end(connection)
        if self._attempts:
            self._timer = self._loop.call_at(self._attempts[0][0], self._overdue)

    def _is_under_way(self, connection: Connection) -> bool:
        return self.holds(connection) and not connection.shaken

    def _too_slow(self, identity: bytes) -> None:
        connection = self._by_id[identity]
        self._owner.counters["too_slow"] += 1
        self._owner.tell_seldom("peer-slow", peer=connection.address, reason=TOO_SLOW)
        assert self._loop is not None
        self._loop.call_soon(self._on_end, connection)
