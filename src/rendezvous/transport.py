"""Messages between agents: who can be reached by which connection, who may speak, and the news that one has left.

Connections that were made to this agent are in `incoming.py`, those it makes in `outgoing.py`. It never looks into a
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
from .incoming import Incoming, most_connections
from .keys import JobKeys
from .outgoing import Connection, Outgoing
from .resolver import Resolver

_LOOK_UP_S = 5.0
_ATTEMPTS = 16
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
        self.counters: Counter[str] = Counter()
        self._most = most_connections()
        self.incoming = Incoming(self._context, keys, self)
        self.outgoing = Outgoing(self._context, keys, self, self._ended)
        self._allowlist: Allowlist | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[str, str, bytes, bytes], None] = lambda *_: None
        self._on_closed: Callable[[str, str], None] = lambda *_: None
        self._resolver = Resolver()
        self._look_ups: set[asyncio.Task[None]] = set()
        self._refused: dict[bytes, None] = {}
        self._told: dict[str, None] = {}
        self.tried: dict[str, str] = {}
        """By address: which numeric one it stands for, and how the last attempt at it ended."""
        self._seldom = Seldom()

    # ---- life ------------------------------------------------------------------------------------------------------

    def bind(self, host: str, first_port: int, ports: int) -> int:
        """Listens on the first free port of a range. `host`: a numeric address, or `*`. Raises OSError."""
        for port in range(first_port, first_port + ports):
            try:
                self.incoming.bind(host, port)
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
        self._on_message, self._on_closed = on_message, on_closed
        self._loop = asyncio.get_running_loop()
        if self._keys is not None:
            self._allowlist = Allowlist(self._context, self._keys, self._loop)
        self.incoming.start(self._loop)
        self.outgoing.start(self._loop, f"{self._key}|{address}".encode())

    def close(self, linger_s: float = 1.0) -> None:
        """Sends what is under way, for as long as `linger_s`, and closes. The loop may have ended."""
        if self._context.closed:
            return
        self.outgoing.close(linger_s)
        self.incoming.close(linger_s)
        if self._allowlist is not None:
            self._allowlist.close()
        self._context.term()

    # ---- speaking --------------------------------------------------------------------------------------------------

    def send(self, address: str, channel: bytes, data: bytes) -> None:
        """Queues a message for the agent at `address`. One that cannot be reached is told by `on_closed`."""
        frames = [channel, self._key.encode(), data]
        if self.incoming.send(address, frames):
            return
        connection = self.outgoing.find(address)
        if connection is None:
            connection = self.outgoing.add(address)
            self.outgoing.send(connection, frames)
            self._connect(connection)
        elif not self.outgoing.send(connection, frames):
            self.counters["undelivered"] += 1

    def _connect(self, connection: Connection) -> None:
        assert self._loop is not None
        host, port = parse_address(connection.address)
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        except OSError:
            # Looked up every time: a pod that was replaced has another address under the same name.
            task = self._loop.create_task(self._look_up(connection, host, port))
            self._look_ups.add(task)
            task.add_done_callback(self._look_ups.discard)
            return
        self._open(connection, host, port)

    async def _look_up(self, connection: Connection, host: str, port: int) -> None:
        try:
            if not port:
                raise OSError("it is not an address")
            found = await self._resolver.look_up(host, port, _LOOK_UP_S)
        except (OSError, UnicodeError, asyncio.TimeoutError, RuntimeError) as error:  # the last: no thread can be had
            reason = str(error) or f"silence for {_LOOK_UP_S} s"
            self._tell_once("unknown-host", host=host or connection.address, reason=reason)
            self._note_attempt(connection.address, "nobody knows the name")
            self._give_up(connection)
            return
        if self.outgoing.holds(connection):
            self._open(connection, str(found[0][4][0]), port)

    def _open(self, connection: Connection, host: str, port: int) -> None:
        assert self._loop is not None
        numeric = format_address(host, port)
        where = "" if numeric == connection.address else f"{numeric} "
        self._note_attempt(connection.address, f"{where}does not answer")
        try:
            self.outgoing.open(connection, host, port)
        except OSError as error:
            self._tell_once("unreachable", address=connection.address, reason=error)
            self._loop.call_soon(self._give_up, connection)

    def _note_attempt(self, address: str, outcome: str) -> None:
        self.tried[address] = outcome
        if len(self.tried) > _ATTEMPTS:
            del self.tried[next(iter(self.tried))]

    def _ended(self, connection: Connection) -> None:
        """A connection, or the attempt at it, has come to its end."""
        if connection.refused and self.outgoing.holds(connection):
            reason = "no agreement on a key: is the job's secret the same there?"
            if self._keys is None:
                reason = "it ended the handshake: it has a secret, which this job has not, or is no agent"
            self._note_attempt(connection.address, "no agreement on a key")
            self._tell_once("peer-refused", peer=connection.address, reason=reason)
        self._give_up(connection)

    def _give_up(self, connection: Connection) -> None:
        if not self.outgoing.holds(connection):
            return
        self.outgoing.give_up(connection)
        if connection.key or connection.address not in self.incoming:
            self._on_closed(connection.address, connection.key)

    # ---- what either side tells --------------------------------------------------------------------------------------

    def heard(self, key: str, address: str, channel: bytes, data: bytes) -> None:
        self.tried.pop(address, None)
        self._on_message(key, address, channel, data)

    def left(self, address: str, key: str) -> None:
        self._on_closed(address, key)

    def refuse_agent(self, key: str, address: str, reason: object) -> None:
        """A peer that sends what only the layer above could see to be wrong: its connection ends."""
        self.refuse(f"{key}|{address}".encode(), reason)
        connection = self.outgoing.find(address)
        if connection is not None and connection.key == key and self._loop is not None:
            self._loop.call_soon(self._give_up, connection)

    def refuse(self, identity: bytes, reason: object) -> None:
        """One line, the end of its connections to us, and it is not listened to again."""
        _remember(self._refused, identity)
        self.counters["malformed"] += 1
        self.tell_seldom("bad-message", peer=repr(identity[:80]), reason=reason)
        self.incoming.end(identity)

    def is_refused(self, identity: bytes) -> bool:
        return identity in self._refused

    def no_room(self) -> str:
        if len(self.incoming) + len(self.outgoing) <= self._most:
            return ""
        return f"{self._most} connections are open, and there are no descriptors for more"

    def tell_seldom(self, event: str, **fields: object) -> None:
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
                self.tell_seldom(event, **who, reason=reason)


def _remember(table: dict[_What, None], what: _What) -> None:
    table[what] = None
    if len(table) > _REMEMBERED:
        del table[next(iter(table))]
