"""One attempt at a connection with another agent, and the connection: a DEALER that never connects again by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from .addresses import format_address
from .keys import JobKeys
from .sockets import FAILED, ROOM, WATCHED, key_in, next_event, secured

_CONNECT_MS = 2000


class Outgoing:
    """Until `open`, what is said waits for the name to be looked up. `key`: who is there, once that is known."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.key = ""
        self.refused = False
        """The handshake has failed: the other end has another secret, or none."""
        self._shaken = False
        self._waiting: list[list[bytes]] = []
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: JobKeys | None,
        identity: bytes,
        host: str,
        port: int,
        loop: asyncio.AbstractEventLoop,
        on_readable: Callable[[], None],
    ) -> None:
        """Begins to connect to a numeric address, as the agent `identity`. Raises OSError if it cannot be one."""
        sock = secured(context, zmq.DEALER, keys)
        if keys is not None:
            sock.setsockopt(zmq.CURVE_SERVERKEY, keys.public)
        sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        monitor = sock.get_monitor_socket(WATCHED)
        self._socket, self._monitor, self._loop = sock, monitor, loop
        try:
            sock.connect(f"tcp://{format_address(host, port)}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot connect to {self.address}: {error.strerror}") from error
        for watched in (sock, monitor):
            loop.add_reader(watched.FD, on_readable)
        waiting, self._waiting = self._waiting, []
        for frames in waiting:
            self.send(frames)

    def send(self, frames: list[bytes]) -> bool:
        """False if there is no room for it."""
        if self._socket is None:
            if len(self._waiting) >= ROOM:
                return False
            self._waiting.append(frames)
            return True
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        """The frames of the next message; None if there is none."""
        if self._socket is None or self._socket.closed:
            return None
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        self.key = key_in(frames) or self.key
        return frames

    def has_ended(self) -> bool:
        """Whether the connection, or the attempt at it, is over. To be asked when there is no message any more."""
        while self._monitor is not None:
            news = next_event(self._monitor)
            if news is None:
                return False
            event = news[0]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaken = True
            elif event in FAILED or event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                self.refused = event in FAILED or (event == zmq.EVENT_DISCONNECTED and not self._shaken)
                return True
        return False

    def close(self, linger_ms: int = 0) -> None:
        """What is under way is still sent for `linger_ms`, in the background."""
        if self._socket is None or self._monitor is None or self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            for watched in (self._socket, self._monitor):
                self._loop.remove_reader(watched.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
