"""The node-local store: serves torch's TCPStore clients of one node on loopback.

Owns the listening sockets and the connections' lives, and turns the agent's decisions (a new epoch, a
fault) into answers to blocked clients. It decides neither of them itself and never imports torch. The agent
makes one, binds it before its event loop exists, and calls everything else from that loop's thread.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .admission import Doorkeeper
from .connection import Hub
from .gloo_addresses import listeners_in
from .keyspace import Keyspace
from .listening import listen
from .room import Room
from .wire import Limits

if TYPE_CHECKING:
    from .shard_messages import StoreMessage
    from .shards import Shards


@dataclass(frozen=True)
class StoreCounters:
    """What a store has seen since it started; `connections` counts every client that ever connected."""

    requests: int
    dropped_stale_writes: int
    cancelled_waits: int
    malformed_connections: int
    connections: int


class StoreServer:
    """The store of one node. It serves `sockets` of `listening.listen`, or binds `host` and `port` itself.

    `users` names those who run the job's processes beside this one; nobody else is served.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sockets: Sequence[socket.socket] = (),
        epoch: int = 0,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        users: Callable[[], Iterable[int]] | None = None,
        most_connections: int | None = None,
        log: Callable[[str], None],
    ) -> None:
        self._host = host
        self._port = port
        self._sockets = list(sockets)
        room = Room(limits.store)
        self._keyspace = Keyspace(epoch, room)
        self._hub = Hub(self._keyspace, limits, room, log)
        self._users, self._most_connections = users, most_connections
        self._door: Doorkeeper | None = None
        self._network_doors: list[Doorkeeper] = []

    def bind(self) -> int:
        """Bind and listen, without an event loop; clients that connect wait for `start`. Returns the port.

        Raises OSError with a sentence if the address cannot be had.

        """
        if not self._sockets:
            self._sockets = listen(self._host, self._port)
            self._port = self._sockets[0].getsockname()[1]
        return self._port

    async def start(self) -> int:
        """Begin to serve, on the sockets of `bind`, which is called if it was not. Returns the port."""
        self.bind()
        if self._door is None:
            self._door = Doorkeeper(self._hub, self._users, self._most_connections)
            self._door.open(self._sockets)
        return self._port

    def network_door(self) -> Doorkeeper:
        """For clients of other machines, on sockets of its owner's; shut until it is opened."""
        door = Doorkeeper(self._hub, self._users, self._most_connections, from_elsewhere=True)
        self._network_doors.append(door)
        return door

    def advance(self, epoch: int) -> None:
        """Make an epoch current: keys of older ones are freed, their waits cancelled, their writes dropped
        from now on.

        Processes that use bare keys belong to the epoch in which they connect, so start them after this. The
        current epoch again changes nothing. Raises ValueError for an older one.

        """
        self._hub.deliver(self._keyspace.advance(epoch))

    def share(self, send: Callable[[int, StoreMessage], None], own: Callable[[], int]) -> Shards:
        """From now on this store is one of many: `send(node, message)` reaches the others, `own` is this node."""
        from .shards import Shards

        loop = asyncio.get_running_loop()
        self._hub.sharing = Shards(
            self._keyspace,
            self._hub.receivers,
            send,
            own,
            room=self._hub.room,
            soon=loop.call_soon,
            later=loop.call_later,
        )
        return self._hub.sharing

    def cancel(self, epoch: int) -> int:
        """An epoch faulted: waits that block in it are answered "cancelled", now and later.

        Returns how many were freed now; 0 for an epoch that has gone.

        """
        asked = 0 if self._hub.sharing is None else self._hub.sharing.fail(epoch)
        answers = self._keyspace.cancel(epoch)
        self._hub.deliver(answers)
        return len(answers) + asked

    def published_listeners(self, epoch: int) -> tuple[tuple[str, int], ...]:
        """Where the gloo ranks of an epoch listen that workers here can be connected with; nothing once it has gone.

        Where this is the only store, all who have published that; else who was published, or read, by workers here.
        """
        if self._hub.sharing is not None and self._hub.sharing.is_shared(epoch):
            return self._hub.sharing.listeners(epoch)
        return tuple({listener: None for value in self._keyspace.values(epoch) for listener in listeners_in(value)})

    def last_write_ns(self, epoch: int) -> int | None:
        """`time.monotonic_ns()` of the last write in an epoch, within milliseconds; None if none or gone."""
        times = [self._keyspace.last_write_ns(epoch)]
        if self._hub.sharing is not None:
            times.append(self._hub.sharing.last_write_ns(epoch))
        return max((at for at in times if at is not None), default=None)

    @property
    def counters(self) -> StoreCounters:
        """What this store has seen so far."""
        return StoreCounters(
            requests=self._hub.requests,
            dropped_stale_writes=self._keyspace.dropped_stale_writes,
            cancelled_waits=self._keyspace.cancelled_waits,
            malformed_connections=self._hub.malformed,
            connections=self._hub.accepted,
        )

    async def close(self) -> None:
        """Stop listening and close every connection; returns when the last is closed."""
        self._hub.closing = True
        if self._door is not None:
            await self._door.close()
        for door in self._network_doors:
            await door.close()
        for sock in self._sockets:
            sock.close()
        for connection in list(self._hub.connections.values()):
            connection.abort()
        while self._hub.connections:
            await asyncio.wait([connection.gone for connection in self._hub.connections.values()])
