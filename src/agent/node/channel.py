"""The agent's end of the conversation with its workers: one ZeroMQ ROUTER on an ipc socket in a 0700 directory.

Owns: the socket, which identities are believed, and the one log line for bytes that are not a message. It decides
nothing: messages go to the callback it was given.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import zmq

from ...protocol import messages
from ...protocol.names import parse_identity
from ...protocol.seldom import Seldom
from ..output.console import Console

_MAX_FRAMES = 2
_REMEMBERED = 10_000
"""So many peers that were refused are known again."""


class WorkerChannel:
    """Talks to the workers of this node. Everything happens on the event loop."""

    def __init__(
        self,
        endpoint: str,
        console: Console,
        on_message: Callable[[int, int, messages.WorkerMessage], None],
    ) -> None:
        self._console = console
        self._on_message = on_message
        self._refused: dict[bytes, None] = {}
        self._seldom = Seldom()
        self.counters: Counter[str] = Counter()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._drain)
        self._loop.call_soon(self._drain)

    def send(self, local_rank: int, incarnation: int, message: messages.AgentMessage) -> None:
        """Queues a message; a worker that is gone is no error, its death is told by other means."""
        identity = f"{local_rank}.{incarnation}".encode()
        try:
            self._socket.send_multipart([identity, messages.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.counters["undelivered"] += 1
        # The descriptor is edge-triggered: sending can consume the edge that announced an arrival.
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.FD)
        self._socket.close()
        self._context.term()

    def _drain(self) -> None:
        if self._socket.closed:
            return
        for _ in range(256):  # then let the loop do other things
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(frames)
        self._loop.call_soon(self._drain)

    def _receive(self, frames: list[bytes]) -> None:
        identity = frames[0]
        if identity in self._refused:
            self.counters["refused"] += 1
            return
        try:
            if len(frames) != _MAX_FRAMES:
                raise messages.MessageError(f"{len(frames)} frames instead of {_MAX_FRAMES}")
            local_rank, incarnation = parse_identity(identity.decode("ascii", "replace"))
            message = messages.decode_from_worker(frames[1])
        except ValueError as error:
            # A peer that sends what is not in the protocol is not listened to again.
            self._refused[identity] = None
            if len(self._refused) > _REMEMBERED:
                del self._refused[next(iter(self._refused))]
            self.counters["malformed"] += 1
            left_out = self._seldom.due("bad-message", self._loop.time())
            if left_out is not None:
                peer = repr(identity[:40])
                self._console.log("bad-message", peer=peer, reason=error, more_of_them=left_out or None)
            return
        self._on_message(local_rank, incarnation, message)
