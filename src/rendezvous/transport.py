"""Messages between agents: one ZeroMQ ROUTER that all others connect to, one DEALER for each agent we connect to.

Owns sockets, encryption (CURVE, with an allowlist of the job's own key), who is at the other end of a connection, and
the news that one has closed. It never looks into a message: bytes go to the callback of their channel.

An agent is known by its identity, `key|address`. Where a connection with an agent exists, whoever made it, it is used
in both directions; where there is none it is made, with one attempt, and what has not been sent when it fails is lost.
That is what the layer above expects: it sends again what matters. Everything happens on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq
import zmq.utils.monitor

from .addresses import format_address, parse_address
from .keys import JobKeys

MAX_FRAME_BYTES = 32 << 20
CONTROL, STORE = b"c", b"s"
_FRAMES = 3  # channel, the sender's key, the message
_KEY = re.compile(rb"[0-9a-z-]{1,64}")
_ROOM = 100_000
"""Messages that wait for a peer who does not read them; more are dropped."""
_CONNECT_MS = 2000
_UNKNOWN = "unknown"
_REFUSALS_EVERY_S = 60.0
_HANDSHAKE_MS = 5000
_FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
}
_WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

Log = Callable[..., None]


class _Outgoing:
    """One attempt at a connection, and the connection."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.waiting: list[list[bytes]] = []
        """What was said while the name was being looked up."""
        self.key = ""
        self.shaken = False


class Transport:
    """The connections of one agent. `bind` before `start`."""

    def __init__(self, key: str, keys: JobKeys | None, log: Log) -> None:
        """`keys` None: neither encrypted nor authenticated."""
        self._key = key
        self._keys = keys
        self._log = log
        self._context = zmq.Context(io_threads=1)
        self._identity = b""
        self._router: zmq.Socket[bytes] = self._secured(zmq.ROUTER)
        if keys is not None:
            self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._monitor: zmq.Socket[bytes] = self._router.get_monitor_socket(_WATCHED)
        self._zap: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[str, str, bytes, bytes], None] = lambda *_: None
        self._on_closed: Callable[[str, str], None] = lambda *_: None
        self._identities: dict[int, bytes] = {}
        """By the descriptor of a connection that was made to us."""
        self._incoming: dict[str, bytes] = {}
        """The identity at the other end of such a connection, by address."""
        self._outgoing: dict[str, _Outgoing] = {}
        self._peers: dict[int, str] = {}
        self._failure: dict[int, str] = {}
        self._refused: set[bytes] = set()
        self._told: Counter[str] = Counter()
        self._silent_until = 0.0
        self._draining = False
        self.counters: Counter[str] = Counter()

    # ---- life ------------------------------------------------------------------------------------------------------

    def bind(self, host: str, first_port: int, ports: int) -> int:
        """Listens on the first free port of a range. `host`: a numeric address, or `*`. Raises OSError."""
        for port in range(first_port, first_port + ports):
            try:
                self._router.bind(f"tcp://{format_address(host, port)}")
            except zmq.ZMQError as error:
                if error.errno == zmq.EADDRINUSE:
                    continue
                raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
            return port
        raise OSError(f"ports {first_port} to {first_port + ports - 1} of {host} are all in use (HPCT_PORT_BASE)")

    def start(
        self,
        address: str,
        on_message: Callable[[str, str, bytes, bytes], None],
        on_closed: Callable[[str, str], None],
    ) -> None:
        """Begins to listen and to speak as the agent at `address`. On the event loop.

        `on_message(key, address, channel, data)`; `on_closed(address, key)`, whose key may be empty.
        """
        self._identity = f"{self._key}|{address}".encode()
        self._on_message, self._on_closed = on_message, on_closed
        self._loop = asyncio.get_running_loop()
        if self._keys is not None:
            self._start_allowlist(self._keys)
        self._loop.add_reader(self._router.FD, self._drain)
        self._loop.add_reader(self._monitor.FD, self._drain)
        self._loop.call_soon(self._drain)

    def close(self, linger_s: float = 1.0) -> None:
        """Sends what is under way, for as long as `linger_s`, and closes. The loop may have ended."""
        if self._context.closed:
            return
        for outgoing in list(self._outgoing.values()):
            self._close_outgoing(outgoing, int(linger_s * 1000))
        self._outgoing.clear()
        for sock in (self._router, self._monitor):
            self._forget_reader(sock)
        self._router.disable_monitor()
        self._monitor.close(0)
        self._router.close(int(linger_s * 1000))
        if self._zap is not None:
            self._forget_reader(self._zap.zap_socket)
            self._zap.zap_socket.close(0)
        self._context.term()

    def _forget_reader(self, sock: zmq.Socket[bytes]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(sock.FD)

    # ---- speaking --------------------------------------------------------------------------------------------------

    def send(self, address: str, channel: bytes, data: bytes) -> None:
        """Queues a message for the agent at `address`. One that cannot be reached is told by `on_closed`."""
        frames = [channel, self._key.encode(), data]
        identity = self._incoming.get(address)
        if identity is not None and self._send_back(identity, frames):
            return
        outgoing = self._outgoing.get(address)
        if outgoing is None:
            self._connect(address, frames)
        elif outgoing.socket is None:
            outgoing.waiting.append(frames)
        else:
            self._send_out(outgoing, frames)
        self._soon()

    def _send_back(self, identity: bytes, frames: list[bytes]) -> bool:
        try:
            self._router.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.counters["undelivered"] += 1
            return error.errno == zmq.EAGAIN
        self._soon()
        return True

    def _send_out(self, outgoing: _Outgoing, frames: list[bytes]) -> None:
        assert outgoing.socket is not None
        try:
            outgoing.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.counters["undelivered"] += 1

    def _connect(self, address: str, frames: list[bytes]) -> None:
        assert self._loop is not None
        outgoing = self._outgoing[address] = _Outgoing(address)
        outgoing.waiting.append(frames)
        host, port = parse_address(address)
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        except OSError:
            # Looked up every time: a pod that was replaced has another address under the same name.
            self._loop.create_task(self._look_up(outgoing, host, port))
            return
        self._open(outgoing, host, port)

    async def _look_up(self, outgoing: _Outgoing, host: str, port: int) -> None:
        assert self._loop is not None
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            self._tell_once(f"unknown-host {host}", "unknown-host", host=host, reason=error)
            if self._outgoing.pop(outgoing.address, None) is outgoing:
                self._on_closed(outgoing.address, "")
            return
        if self._outgoing.get(outgoing.address) is outgoing:
            self._open(outgoing, str(found[0][4][0]), port)

    def _open(self, outgoing: _Outgoing, host: str, port: int) -> None:
        assert self._loop is not None
        sock = self._secured(zmq.DEALER)
        if self._keys is not None:
            sock.setsockopt(zmq.CURVE_SERVERKEY, self._keys.public)
        sock.setsockopt(zmq.IDENTITY, self._identity)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        outgoing.socket = sock
        outgoing.monitor = sock.get_monitor_socket(_WATCHED)
        sock.connect(f"tcp://{format_address(host, port)}")
        self._loop.add_reader(sock.FD, self._drain)
        self._loop.add_reader(outgoing.monitor.FD, self._drain)
        for frames in outgoing.waiting:
            self._send_out(outgoing, frames)
        outgoing.waiting.clear()
        self._soon()

    def _secured(self, kind: int) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.LINGER, 0),
            (zmq.IPV6, 1),
            (zmq.SNDHWM, _ROOM),
            (zmq.RCVHWM, _ROOM),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
        ):
            sock.setsockopt(option, value)
        if self._keys is not None:
            sock.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public)
            sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        return sock

    # ---- hearing ---------------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        """ZeroMQ's descriptors are edge-triggered: sending can consume the edge that announced an arrival."""
        if self._loop is not None and not self._draining:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._draining = False
        if self._router.closed:
            return
        more = self._drain_router()
        for outgoing in list(self._outgoing.values()):
            more |= self._drain_outgoing(outgoing)
        self._drain_monitor()
        if more:
            self._soon()

    def _drain_router(self) -> bool:
        for _ in range(256):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            except zmq.ZMQError:  # closed by what the last message brought about
                return False
            self._receive(
                bytes(frames[0].buffer), [bytes(f.buffer) for f in frames[1:]], int(frames[-1].get(zmq.SRCFD))
            )
            if self._router.closed:
                return False
        return True

    def _receive(self, identity: bytes, frames: list[bytes], descriptor: int) -> None:
        if identity in self._refused:
            self.counters["refused"] += 1
            return
        key, address = _parse_identity(identity)
        if not key or len(frames) != _FRAMES or frames[0] not in (CONTROL, STORE) or frames[1] != key.encode():
            self.refuse(identity, "it is not of this protocol")
            return
        self._identities[descriptor] = identity
        self._incoming[address] = identity
        self._on_message(key, address, frames[0], frames[2])

    def _drain_outgoing(self, outgoing: _Outgoing) -> bool:
        if outgoing.socket is None or outgoing.monitor is None:
            return False
        for _ in range(256):
            try:
                frames = outgoing.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != _FRAMES or frames[0] not in (CONTROL, STORE) or not _KEY.fullmatch(frames[1]):
                self._tell_once(f"bad {outgoing.address}", "bad-message", peer=outgoing.address, reason="wrong frames")
                continue
            outgoing.key = frames[1].decode()
            self._on_message(outgoing.key, outgoing.address, frames[0], frames[2])
            if self._outgoing.get(outgoing.address) is not outgoing:
                return False
        else:
            return True
        while True:
            try:
                event = zmq.utils.monitor.recv_monitor_message(outgoing.monitor, zmq.NOBLOCK)
            except zmq.Again:
                return False
            if self._outgoing_event(outgoing, event["event"]):
                return False

    def _outgoing_event(self, outgoing: _Outgoing, event: int) -> bool:
        """Whether it was the last one."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            outgoing.shaken = True
        elif event in _FAILED or event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            if (event == zmq.EVENT_DISCONNECTED and not outgoing.shaken) or event in _FAILED:
                self._tell_once(
                    f"handshake {outgoing.address}",
                    "peer-refused",
                    peer=outgoing.address,
                    reason="no agreement on a key: is the job's secret the same there?",
                )
            self._outgoing.pop(outgoing.address, None)
            self._close_outgoing(outgoing, 0)
            if outgoing.key or outgoing.address not in self._incoming:
                self._on_closed(outgoing.address, outgoing.key)
            return True
        return False

    def _close_outgoing(self, outgoing: _Outgoing, linger_ms: int) -> None:
        if outgoing.socket is None or outgoing.monitor is None:
            return
        self._forget_reader(outgoing.socket)
        self._forget_reader(outgoing.monitor)
        outgoing.socket.disable_monitor()
        outgoing.monitor.close(0)
        outgoing.socket.close(linger_ms)

    def _drain_monitor(self) -> None:
        while not self._monitor.closed:
            try:
                event = zmq.utils.monitor.recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            kind, value = event["event"], int(event["value"])
            if kind == zmq.EVENT_ACCEPTED:
                self._peers[value] = _peer_name(value)
                self._failure.pop(value, None)
            elif kind in _FAILED:
                self.counters["handshakes_failed"] += 1
                self._failure[-1] = "wrong or no secret" if self._keys is not None else "not of this protocol"
            elif kind == zmq.EVENT_DISCONNECTED:
                self._disconnected(value)

    def _disconnected(self, descriptor: int) -> None:
        self._drain_router()  # what it said before counts
        peer = self._peers.pop(descriptor, "")
        identity = self._identities.pop(descriptor, None)
        failure = self._failure.pop(-1, None)
        if identity is None:
            if failure is not None:
                self._tell_refusal(peer, failure)
            return
        key, address = _parse_identity(identity)
        if self._incoming.get(address) == identity and identity not in self._identities.values():
            del self._incoming[address]
            self._on_closed(address, key)

    # ---- who may speak ---------------------------------------------------------------------------------------------

    def refuse(self, identity: bytes, reason: object) -> None:
        """A peer that sends what is not in the protocol is not listened to again."""
        self._refused.add(identity)
        self.counters["malformed"] += 1
        self._tell_once(f"bad {identity[:40]!r}", "bad-message", peer=repr(identity[:40]), reason=reason)

    def refuse_agent(self, key: str, address: str, reason: object) -> None:
        """The same, for a message that only the layer above could read."""
        self.refuse(f"{key}|{address}".encode(), reason)

    def _tell_refusal(self, peer: str, reason: str) -> None:
        """One line a minute: who scans ports must not fill the log. Who is gone before he can be asked has no name."""
        assert self._loop is not None
        now = self._loop.time()
        if now >= self._silent_until:
            self._silent_until = now + _REFUSALS_EVERY_S
            self._log("peer-refused", peer=peer, reason=reason)

    def _tell_once(self, what: str, event: str, **fields: object) -> None:
        self._told[what] += 1
        if self._told[what] == 1:
            self._log(event, **fields)

    def _start_allowlist(self, keys: JobKeys) -> None:
        from zmq.auth import Authenticator

        class OnlyTheJob:
            def callback(self, domain: str, key: bytes) -> bool:
                return key == keys.public

        self._zap = Authenticator(self._context)
        self._zap.configure_curve_callback("*", OnlyTheJob())
        self._zap.start()
        assert self._loop is not None
        self._loop.add_reader(self._zap.zap_socket.FD, self._drain_zap)
        self._loop.call_soon(self._drain_zap)

    def _drain_zap(self) -> None:
        while not self._zap.zap_socket.closed:
            try:
                frames = self._zap.zap_socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            request = self._zap.handle_zap_message(frames)
            with contextlib.suppress(StopIteration):
                request.send(None)  # the allowlist answers at once: there is nothing to wait for


def _parse_identity(identity: bytes) -> tuple[str, str]:
    """(key, address), or empty for what is not an agent's identity."""
    text = identity.decode("ascii", "replace")
    key, separator, address = text.partition("|")
    if not separator or not _KEY.fullmatch(key.encode()) or parse_address(address)[1] == 0:
        return "", ""
    return key, address


def _peer_name(descriptor: int) -> str:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as peer:
            name = peer.getpeername()
    except OSError:  # gone again
        return _UNKNOWN
    return format_address(str(name[0]).removeprefix("::ffff:"), int(name[1]))
