"""Messages between agents: one ZeroMQ ROUTER that all others connect to, one DEALER for each agent we connect to.

Owns the connections, who is at the other end of them, and the news that one has closed. It never looks into a
message: bytes go to the callback of their channel.

An agent is known by its identity, `key|address`. Where a connection with an agent exists, whoever made it, it is used
in both directions; where there is none it is made, with one attempt, and what has not been sent when it fails is lost.
That is what the layer above expects: it sends again what matters. Everything happens on the event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import zmq

from ..protocol.seldom import Seldom
from .addresses import format_address, parse_address
from .allowlist import Allowlist
from .keys import JobKeys
from .outgoing import Outgoing
from .resolver import Resolver
from .sockets import (
    FAILED,
    UNKNOWN,
    WATCHED,
    descriptor_of,
    hang_up,
    key_in,
    next_event,
    parse_identity,
    peer_name,
    secured,
    why_refused,
)

_AT_ONCE = 256
"""So many messages of one socket are dealt with before the others have their turn."""
_LOOK_UP_S = 5.0
_ATTEMPTS = 16
_STRANGERS = 64
"""So many connections of one host may be open whose agent has not said who it is. More are ended as they come: each
costs a descriptor, until ZeroMQ gives it up."""
_NAMED = 100
"""Of so many peers it is said, once, that they cannot be reached; of more, in one line a minute."""
_REMEMBERED = 10_000
"""So many peers that were refused, and lines that were said, are known again."""

Log = Callable[..., None]
_What = TypeVar("_What")


class Transport:
    """The connections of one agent. `bind` before `start`."""

    def __init__(self, key: str, keys: JobKeys | None, log: Log) -> None:
        """`keys` None: neither encrypted nor authenticated."""
        self._key = key
        self._keys = keys
        self._log = log
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._identity = b""
        self._router = secured(self._context, zmq.ROUTER, keys)
        if keys is not None:
            self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._monitor: zmq.Socket[bytes] = self._router.get_monitor_socket(WATCHED)
        self._allowlist: Allowlist | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[str, str, bytes, bytes], None] = lambda *_: None
        self._on_closed: Callable[[str, str], None] = lambda *_: None
        self._identities: dict[int, bytes] = {}
        """By the descriptor of a connection that was made to us."""
        self._incoming: dict[str, bytes] = {}
        """The identity at the other end of such a connection, by address."""
        self._peers: dict[int, str] = {}
        """Where the other end of such a connection is, by descriptor."""
        self._outgoing: dict[str, Outgoing] = {}
        self._resolver = Resolver()
        self._look_ups: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        """Why the handshake failed of which the end of the connection will be told next."""
        self._refused: dict[bytes, None] = {}
        self._told: dict[str, None] = {}
        self.tried: dict[str, str] = {}
        """By address: which numeric one it stands for, and how the last attempt at it ended."""
        self._seldom = Seldom()
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
            self._allowlist = Allowlist(self._context, self._keys, self._loop)
        self._loop.add_reader(self._router.FD, self._drain)
        self._loop.add_reader(self._monitor.FD, self._drain)
        self._loop.call_soon(self._drain)

    def close(self, linger_s: float = 1.0) -> None:
        """Sends what is under way, for as long as `linger_s`, and closes. The loop may have ended."""
        if self._context.closed:
            return
        for outgoing in self._outgoing.values():
            outgoing.close(int(linger_s * 1000))
        self._outgoing.clear()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._router.FD)
            self._loop.remove_reader(self._monitor.FD)
        self._router.disable_monitor()
        self._monitor.close(0)
        self._router.close(int(linger_s * 1000))
        if self._allowlist is not None:
            self._allowlist.close()
        self._context.term()

    # ---- speaking --------------------------------------------------------------------------------------------------

    def send(self, address: str, channel: bytes, data: bytes) -> None:
        """Queues a message for the agent at `address`. One that cannot be reached is told by `on_closed`."""
        frames = [channel, self._key.encode(), data]
        identity = self._incoming.get(address)
        if identity is not None and self._send_back(identity, frames):
            return
        outgoing = self._outgoing.get(address)
        fresh = outgoing is None
        if outgoing is None:
            outgoing = self._outgoing[address] = Outgoing(address)
        if not outgoing.send(frames):
            self.counters["undelivered"] += 1
        if fresh:
            self._connect(outgoing)
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

    def _connect(self, outgoing: Outgoing) -> None:
        assert self._loop is not None
        host, port = parse_address(outgoing.address)
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        except OSError:
            # Looked up every time: a pod that was replaced has another address under the same name.
            task = self._loop.create_task(self._look_up(outgoing, host, port))
            self._look_ups.add(task)
            task.add_done_callback(self._look_ups.discard)
            return
        self._open(outgoing, host, port)

    async def _look_up(self, outgoing: Outgoing, host: str, port: int) -> None:
        assert self._loop is not None
        try:
            if not port:
                raise OSError("it is not an address")
            found = await self._resolver.look_up(host, port, _LOOK_UP_S)
        except (OSError, UnicodeError, asyncio.TimeoutError) as error:
            reason = str(error) or f"silence for {_LOOK_UP_S} s"
            self._tell_once("unknown-host", host=host or outgoing.address, reason=reason)
            self._note_attempt(outgoing.address, "nobody knows the name")
            self._give_up(outgoing)
            return
        if self._outgoing.get(outgoing.address) is outgoing:
            self._open(outgoing, str(found[0][4][0]), port)

    def _open(self, outgoing: Outgoing, host: str, port: int) -> None:
        assert self._loop is not None
        try:
            numeric = format_address(host, port)
            where = "" if numeric == outgoing.address else f"{numeric} "
            self._note_attempt(outgoing.address, f"{where}does not answer")
            outgoing.open(self._context, self._keys, self._identity, host, port, self._loop, self._drain)
        except OSError as error:
            self._tell_once("unreachable", address=outgoing.address, reason=error)
            self._loop.call_soon(self._give_up, outgoing)
        self._soon()

    def _note_attempt(self, address: str, outcome: str) -> None:
        self.tried[address] = outcome
        if len(self.tried) > _ATTEMPTS:
            del self.tried[next(iter(self.tried))]

    def _give_up(self, outgoing: Outgoing) -> None:
        """The connection, or the attempt at it, is over."""
        if self._outgoing.get(outgoing.address) is not outgoing:
            return
        del self._outgoing[outgoing.address]
        outgoing.close()
        if outgoing.key or outgoing.address not in self._incoming:
            self._on_closed(outgoing.address, outgoing.key)

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
        for _ in range(_AT_ONCE):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:  # no more, or closed by what the last message brought about
                return False
            parts = [bytes(frame.buffer) for frame in frames]
            self._receive(parts[0], parts[1:], descriptor_of(frames[-1]))
        return True

    def _receive(self, identity: bytes, frames: list[bytes], descriptor: int) -> None:
        if identity in self._refused:
            self.counters["refused"] += 1
            return
        key, address = parse_identity(identity)
        if descriptor >= 0:
            self._identities[descriptor] = identity
        if not key or key_in(frames) != key:
            self._refuse(identity, "it is not of this protocol")
            return
        self._incoming[address] = identity
        self._on_message(key, address, frames[0], frames[2])

    def _drain_outgoing(self, outgoing: Outgoing) -> bool:
        for _ in range(_AT_ONCE):
            frames = outgoing.receive()
            if frames is None:
                break
            self.tried.pop(outgoing.address, None)
            if not key_in(frames):
                self._refuse(outgoing.address.encode(), "it is not of this protocol")
                self._give_up(outgoing)
                return False
            self._on_message(outgoing.key, outgoing.address, frames[0], frames[2])
            if self._outgoing.get(outgoing.address) is not outgoing:
                return False
        else:
            return True
        if outgoing.has_ended():
            if outgoing.refused:
                reason = "no agreement on a key: is the job's secret the same there?"
                if self._keys is None:
                    reason = "it ended the handshake: it has a secret, which this job has not, or is no agent"
                self._note_attempt(outgoing.address, "no agreement on a key")
                self._tell_once("peer-refused", peer=outgoing.address, reason=reason)
            self._give_up(outgoing)
        return False

    def _drain_monitor(self) -> None:
        while not self._monitor.closed and (news := next_event(self._monitor)) is not None:
            kind, value = news
            if kind == zmq.EVENT_ACCEPTED:
                self._peers[value] = peer_name(value)
                self._bound_strangers(value)
            elif kind in FAILED:
                self.counters["handshakes_failed"] += 1
                self._failure = why_refused(kind, value, secret=self._keys is not None)
            elif kind == zmq.EVENT_DISCONNECTED:
                self._disconnected(value)

    def _bound_strangers(self, descriptor: int) -> None:
        """A connection has come; it is one too many if its host has many that say nothing."""
        peer = self._peers[descriptor]
        host = parse_address(peer)[0]
        strangers = sum(
            number not in self._identities and parse_address(other)[0] == host for number, other in self._peers.items()
        )
        if peer != UNKNOWN and strangers > _STRANGERS:
            self.counters["too_many"] += 1
            self._tell_refusal(peer, f"{_STRANGERS} connections from there are open and say nothing")
            hang_up(descriptor, peer)

    def _disconnected(self, descriptor: int) -> None:
        self._drain_router()  # what it said before counts
        peer = self._peers.pop(descriptor, UNKNOWN)
        identity = self._identities.pop(descriptor, None)
        failure, self._failure = self._failure, None
        if identity is None:
            if failure is not None:
                self._tell_refusal(peer, failure)
            return
        key, address = parse_identity(identity)
        if self._incoming.get(address) == identity and identity not in self._identities.values():
            del self._incoming[address]
            self._on_closed(address, key)

    # ---- who may speak ---------------------------------------------------------------------------------------------

    def refuse_agent(self, key: str, address: str, reason: object) -> None:
        """A peer that sends what only the layer above could see to be wrong: its connection ends."""
        self._refuse(f"{key}|{address}".encode(), reason)
        outgoing = self._outgoing.get(address)
        if outgoing is not None and outgoing.key == key and self._loop is not None:
            self._loop.call_soon(self._give_up, outgoing)

    def _refuse(self, identity: bytes, reason: object) -> None:
        """One line, the end of its connections to us, and it is not listened to again."""
        _remember(self._refused, identity)
        self.counters["malformed"] += 1
        self._tell_seldom("bad-message", peer=repr(identity[:80]), reason=reason)
        for descriptor in [number for number, known in self._identities.items() if known == identity]:
            hang_up(descriptor, self._peers.get(descriptor, UNKNOWN))

    def _tell_refusal(self, peer: str, reason: str) -> None:
        """Who is gone before he can be asked has no name."""
        self._tell_seldom("peer-refused", peer=peer, reason=reason)

    def _tell_seldom(self, event: str, **fields: object) -> None:
        """One line a minute: who scans ports, or says what nobody understands, must not fill the log."""
        assert self._loop is not None
        left_out = self._seldom.due(event, self._loop.time())
        if left_out is not None:
            self._log(event, **fields, **({"more_of_them": left_out} if left_out else {}))

    def _tell_once(self, event: str, *, reason: object, **who: object) -> None:
        """One line about each peer."""
        what = f"{event} {who}"
        if what not in self._told:
            _remember(self._told, what)
            if len(self._told) <= _NAMED:
                self._log(event, **who, reason=reason)
            else:  # more than a job has: somebody invents them
                self._tell_seldom(event, **who, reason=reason)


def _remember(table: dict[_What, None], what: _What) -> None:
    table[what] = None
    if len(table) > _REMEMBERED:
        del table[next(iter(table))]
