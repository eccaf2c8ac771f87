"""A ZeroMQ ROUTER on the event loop, with its monitor and with what waits for peers that read too slowly.

One socket has all connections of one direction, so an agent has two of them however many agents there are, and each
connection costs one descriptor. The work for a message or an event does not depend on the number of peers.
Called by: `incoming.py`, `outgoing.py`.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from .sockets import ENDS, WATCHED, descriptor_of

MOST_BYTES = 64 << 20
"""So much may wait for one peer. With more it is too slow: its connection is closed, the others go on."""
TOO_SLOW = f"more than {MOST_BYTES >> 20} MiB wait for it: its connection is closed"
_MOST_BYTES_OF_ALL = 1 << 30
_AT_ONCE = 256
"""So many messages, and so many events, are dealt with before others have their turn."""
_LAST_WORDS = 16 * _AT_ONCE
"""So many messages are read before the end of a connection is told: what it said before counts."""
_TRIED_AT_ONCE = 64
_TRY_AGAIN_S = 0.05

_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""As numbers: arithmetic with pyzmq's flags takes longer than sending."""
_EVENT = struct.Struct("=Hi")

OnMessage = Callable[[bytes, list[bytes], int], None]
"""(the peer's identity, frames, the descriptor they came from)."""
OnEvent = Callable[[int, int, str], None]
"""(event, its value, endpoint)."""


class Owner(Protocol):
    """What either side, `incoming.py` and `outgoing.py`, asks and tells of the transport."""

    counters: Counter[str]

    def heard(self, key: str, address: str, channel: bytes, data: bytes) -> None: ...

    def left(self, address: str, key: str) -> None:
        """An agent has no connection here any more."""

    def refuse(self, identity: bytes, reason: object) -> None:
        """What it says is not of the protocol: one line, and it is not listened to again."""

    def is_refused(self, identity: bytes) -> bool: ...

    def no_room(self) -> str:
        """Why there may not be as many connections as there are; empty if there may."""

    def tell_seldom(self, event: str, **fields: object) -> None: ...


class _Queue:
    """What waits for one peer."""

    def __init__(self) -> None:
        self.messages: deque[Sequence[bytes]] = deque()
        self.bytes = 0


class Router:
    """`on_slow(identity)` is called when more waits for a peer than may: its owner ends the connection."""

    def __init__(self, sock: zmq.Socket[bytes], on_slow: Callable[[bytes], None]) -> None:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket = sock
        self._on_slow = on_slow
        self._monitor = _watched(sock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: OnMessage = lambda *_: None
        self._on_event: OnEvent = lambda *_: None
        self._queues: OrderedDict[bytes, _Queue] = OrderedDict()
        self._bytes = 0
        self._too_slow: set[bytes] = set()
        """Their connections are being ended: nothing is kept for them any more."""
        self._due = False
        self._retry: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_message: OnMessage, on_event: OnEvent) -> None:
        self._loop, self._on_message, self._on_event = loop, on_message, on_event
        for watched in (self.socket, self._monitor):
            loop.add_reader(watched.FD, self._drain)
        self.soon()

    def close(self, linger_s: float) -> None:
        """Sends what it can for as long as `linger_s`. The loop may have ended."""
        if self.socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            for watched in (self.socket, self._monitor):
                self._loop.remove_reader(watched.FD)
        if self._retry is not None:
            self._retry.cancel()
        deadline = time.monotonic() + linger_s
        while self._queues and time.monotonic() < deadline:
            self._flush()
            time.sleep(0.001)
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(max(0, int((deadline - time.monotonic()) * 1000)))

    # ---- speaking --------------------------------------------------------------------------------------------------

    def send(self, identity: bytes, frames: Sequence[bytes]) -> bool:
        """False if there is no such peer. What it has no room for waits."""
        if identity in self._too_slow:
            return True
        queue = self._queues.get(identity)
        if queue is None:
            sent = self._try(identity, frames)
            if sent is not None:
                self.soon()
                return sent
            queue = self._queues[identity] = _Queue()
        size = sum(map(len, frames))
        queue.messages.append(frames)
        queue.bytes += size
        self._bytes += size
        if queue.bytes > MOST_BYTES:
            self._end(identity)
        elif self._bytes > _MOST_BYTES_OF_ALL:
            self._end(max(self._queues, key=lambda other: self._queues[other].bytes))
        self.soon()
        return True

    def forget(self, identity: bytes) -> None:
        """It has gone: nothing waits for it any more."""
        self._too_slow.discard(identity)
        queue = self._queues.pop(identity, None)
        if queue is not None:
            self._bytes -= queue.bytes

    def has_another(self, identity: bytes) -> None:
        """A peer has made another connection, which is not slow yet."""
        self._too_slow.discard(identity)

    def _end(self, identity: bytes) -> None:
        self.forget(identity)
        self._too_slow.add(identity)
        self._on_slow(identity)

    def _try(self, identity: bytes, frames: Sequence[bytes]) -> bool | None:
        """Whether it is sent; False if the peer is not there, None if there is no room."""
        try:
            self.socket.send(identity, _MORE)
            for frame in frames[:-1]:
                self.socket.send(frame, _MORE)
            self.socket.send(frames[-1], _NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError:  # it has gone, or this socket has been closed
            return False
        return True

    def _flush(self) -> None:
        """Tries some of those for whom something waits, in turn."""
        for _ in range(min(len(self._queues), _TRIED_AT_ONCE)):
            identity, queue = self._queues.popitem(last=False)
            sent: bool | None = True
            while queue.messages and (sent := self._try(identity, queue.messages[0])):
                size = sum(map(len, queue.messages.popleft()))
                queue.bytes -= size
                self._bytes -= size
            if sent is False:
                self._bytes -= queue.bytes
            elif queue.messages:
                self._queues[identity] = queue
        # Room that was made while another was tried is not announced again.
        if self._queues and self._retry is None and self._loop is not None and not self._loop.is_closed():
            self._retry = self._loop.call_later(_TRY_AGAIN_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._drain()

    # ---- hearing ---------------------------------------------------------------------------------------------------

    def soon(self) -> None:
        """ZeroMQ's descriptors are edge-triggered: sending can consume the edge that announced an arrival."""
        if self._loop is not None and not self._due:
            self._due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._due = False
        if self.socket.closed:
            return
        more = self._receive(_AT_ONCE)
        more |= self._hear_events()
        if self._queues:
            self._flush()
        if more and not self.socket.closed:
            self.soon()

    def _receive(self, most: int) -> bool:
        """Whether there may be more."""
        for _ in range(most):
            try:
                frames = [self.socket.recv(_NOBLOCK, copy=False)]
                while frames[-1].more:
                    frames.append(self.socket.recv(_NOBLOCK, copy=False))
            except zmq.ZMQError:  # no more, or closed by what the last message brought about
                return False
            identity, *parts = [bytes(frame.buffer) for frame in frames]
            self._on_message(identity, parts, descriptor_of(frames[-1]))
        return True

    def _hear_events(self) -> bool:
        for _ in range(_AT_ONCE):
            if self._monitor.closed:
                return False
            try:
                kind, value = _EVENT.unpack(self._monitor.recv(_NOBLOCK))
                endpoint = self._monitor.recv(_NOBLOCK).decode("ascii", "replace")
            except zmq.ZMQError:
                return False
            if kind in ENDS:
                self._receive(_LAST_WORDS)
            self._on_event(kind, value, endpoint)
        return True


def _watched(sock: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """Its monitor. Without a limit: where there is one, ZeroMQ's thread waits in the middle of its work."""
    where = f"inproc://monitor-{id(sock)}"
    sock.monitor(where, WATCHED)
    monitor: zmq.Socket[bytes] = sock.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(where)
    return monitor
