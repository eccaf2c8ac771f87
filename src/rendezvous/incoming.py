"""The connections that other agents have made to this one, and who is at the other end of each.

Every table is by descriptor, identity, address or host: nothing here looks at all connections to deal with one.
Called by: `transport.py`.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from .addresses import format_address, parse_address
from .keys import JobKeys
from .router import TOO_SLOW, Owner, Router
from .sockets import FAILED, UNKNOWN, hang_up, is_open, key_in, parse_identity, peer_name, secured_router, why_refused

_STRANGERS = 64
"""So many connections of one host may be open whose agent has not said who it is. More are ended as they come: each
costs a descriptor, until ZeroMQ gives it up."""
_CLOSED_WITHIN_S = 0.05
"""ZeroMQ tells the end of a connection before it closes the descriptor, at once in the same thread."""
_RESERVE = 256
"""Descriptors for workers' pipes and the store."""


def most_connections() -> int:
    """So many that descriptors are left for the rest of the agent."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(soft - _RESERVE, soft // 2)


def descriptor_warning(nodes: int) -> str | None:
    """A sentence if an agent cannot have a connection with each of so many nodes, and what mends it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if nodes <= most_connections():
        return None
    return (
        f"this agent may have {soft} descriptors, and with {nodes} nodes it needs {nodes + _RESERVE} if it leads: some "
        f"will not be let in; raise the hard limit, which is {hard} (`ulimit -Hn`, LimitNOFILE=)"
    )


@dataclass
class _Connection:
    peer: str = UNKNOWN
    """Its other end, once its beginning has been told: who may be hung up on."""
    seen: str = UNKNOWN
    """Whose the descriptor was at its first word. A later connection's, if this one had gone by then."""
    host: str = ""
    """Counted among its strangers while this is not empty and the identity is not known."""
    identity: bytes | None = None


class Incoming:
    """One side of the transport, which is the `owner`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: JobKeys | None, owner: Owner) -> None:
        sock = secured_router(context, keys)
        if keys is not None:
            sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router = Router(sock, self._too_slow)
        self._has_secret = keys is not None
        self._owner = owner
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[int, _Connection] = {}
        self._descriptors: dict[bytes, set[int]] = {}
        """By identity."""
        self._identities: dict[str, bytes] = {}
        """By address."""
        self.strangers_of_a_host = _STRANGERS
        self._strangers: Counter[str] = Counter()
        """By host."""
        self._failure: str | None = None
        """Why the handshake failed of which the end of the connection will be told next."""

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, address: object) -> bool:
        return address in self._identities

    def bind(self, host: str, port: int) -> None:
        """Raises ZMQError."""
        self._router.socket.bind(f"tcp://{format_address(host, port)}")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._router.start(loop, self._on_message, self._on_event)

    def close(self, linger_s: float) -> None:
        self._router.close(linger_s)

    def send(self, address: str, frames: Sequence[bytes]) -> bool:
        """False if the agent at this address has no connection here."""
        identity = self._identities.get(address)
        return identity is not None and self._router.send(identity, frames)

    def end(self, identity: bytes) -> None:
        """All connections of an agent."""
        for descriptor in self._descriptors.get(identity, ()):
            hang_up(descriptor, self._connections[descriptor].peer)

    # ---- what comes ------------------------------------------------------------------------------------------------

    def _on_message(self, identity: bytes, frames: list[bytes], descriptor: int) -> None:
        if self._owner.is_refused(identity):
            self._owner.counters["refused"] += 1
            return
        if descriptor >= 0:
            self._introduced(descriptor, identity)
        key, address = parse_identity(identity)
        if not key or key_in(frames) != key:
            self._owner.refuse(identity, "it is not of this protocol")
            return
        self._identities[address] = identity
        self._owner.heard(key, address, frames[0], frames[2])

    def _introduced(self, descriptor: int, identity: bytes) -> None:
        connection = self._connections.get(descriptor)
        if connection is None:  # its beginning will be told after its first message
            connection = self._connections[descriptor] = _Connection()
        if connection.identity == identity:
            return
        self._no_stranger(connection)
        if connection.identity is not None:
            self._leave(connection.identity, descriptor)
            connection = self._connections[descriptor] = _Connection()
        connection.identity = identity
        connection.seen = peer_name(descriptor)
        self._router.has_another(identity)
        self._descriptors.setdefault(identity, set()).add(descriptor)

    def _on_event(self, kind: int, value: int, endpoint: str) -> None:
        if kind == zmq.EVENT_ACCEPTED:
            self._accepted(value)
        elif kind in FAILED:
            self._owner.counters["handshakes_failed"] += 1
            self._failure = why_refused(kind, value, secret=self._has_secret)
        elif kind == zmq.EVENT_DISCONNECTED:
            self._disconnected(value)

    def _accepted(self, descriptor: int) -> None:
        peer = peer_name(descriptor)
        known = self._connections.get(descriptor)
        if known is not None and known.identity is not None and known.seen != peer:
            self._ended(descriptor, known)
        connection = self._connections.setdefault(descriptor, _Connection())
        connection.peer = peer
        host = parse_address(connection.peer)[0]
        if connection.peer == UNKNOWN:
            return
        no_room = self._owner.no_room()
        if no_room:
            self._one_too_many(descriptor, no_room)
        elif connection.identity is None:
            connection.host = host
            self._strangers[host] += 1
            if self._strangers[host] > self.strangers_of_a_host:
                reason = f"{self.strangers_of_a_host} connections from there are open and say nothing"
                self._one_too_many(descriptor, reason)

    def _one_too_many(self, descriptor: int, reason: str) -> None:
        peer = self._connections[descriptor].peer
        self._owner.counters["too_many"] += 1
        self._owner.tell_seldom("peer-refused", peer=peer, reason=reason)
        hang_up(descriptor, peer)

    def _disconnected(self, descriptor: int) -> None:
        failure, self._failure = self._failure, None
        connection = self._connections.get(descriptor) or _Connection()
        if connection.identity is None:
            self._connections.pop(descriptor, None)
            self._no_stranger(connection)
            if failure is not None:  # who is gone before it can be asked has no name
                self._owner.tell_seldom("peer-refused", peer=connection.peer, reason=failure)
        elif is_open(descriptor, connection.seen) and self._loop is not None:
            # Another's, which had the descriptor before and whose end is told after the first word of this one; or
            # ZeroMQ is about to close it.
            self._loop.call_later(_CLOSED_WITHIN_S, self._ended_unless_open, descriptor, connection)
        else:
            self._ended(descriptor, connection)

    def _ended_unless_open(self, descriptor: int, connection: _Connection) -> None:
        if self._connections.get(descriptor) is connection and not is_open(descriptor, connection.seen):
            self._ended(descriptor, connection)

    def _ended(self, descriptor: int, connection: _Connection) -> None:
        assert connection.identity is not None
        del self._connections[descriptor]
        self._leave(connection.identity, descriptor)

    def _no_stranger(self, connection: _Connection) -> None:
        if connection.host and connection.identity is None:
            self._strangers[connection.host] -= 1
            if not self._strangers[connection.host]:
                del self._strangers[connection.host]
            connection.host = ""

    def _leave(self, identity: bytes, descriptor: int) -> None:
        """A connection of an agent is no more; with its last one it is gone."""
        descriptors = self._descriptors.get(identity, set())
        descriptors.discard(descriptor)
        if descriptors:
            return
        self._descriptors.pop(identity, None)
        self._router.forget(identity)
        key, address = parse_identity(identity)
        if self._identities.get(address) == identity:
            del self._identities[address]
            self._owner.left(address, key)

    def _too_slow(self, identity: bytes) -> None:
        self._owner.counters["too_slow"] += 1
        _, address = parse_identity(identity)
        self._owner.tell_seldom("peer-slow", peer=address, reason=TOO_SLOW)
        self.end(identity)
