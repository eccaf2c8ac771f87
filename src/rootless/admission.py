"""Which connections the store takes: those of this job's users, and no more of them than leave the agent room to work.

Owns the listening sockets' readers. A refused client costs one accepted descriptor for a moment, and a line a minute.
When the machine has no descriptor left, accepting pauses: it is no error of anybody's here. Called by: `server.py`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterable

from .connection import Connection, Hub
from .peer_user import GONE, PeerUsers

_AT_ONCE = 64
"""So many connections are accepted before other things have their turn."""
_PAUSE_S = 0.2
_OUT_OF_THEM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_RESERVE = 256
_ASK_AGAIN_S = 1.0

Users = Callable[[], Iterable[int]]


def most_connections() -> int:
    """So many that pipes, pidfds and the agent's other sockets still find descriptors."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(soft - max(_RESERVE, soft // 8), soft // 2)


class Doorkeeper:
    """Accepts for one store. `users` names those who run processes of the job beside this one; it may take a while.

    `from_elsewhere`: other machines' clients are let in as well, and nothing tells whose they are.
    """

    def __init__(
        self, hub: Hub, users: Users | None = None, limit: int | None = None, *, from_elsewhere: bool = False
    ) -> None:
        self._hub = hub
        self._users = users
        self._from_elsewhere = from_elsewhere
        self._limit = most_connections() if limit is None else limit
        self._peer_users = PeerUsers()
        self._known = {os.geteuid(), os.getuid()}
        self._asked_at = float("-inf")
        self._opening: set[asyncio.Task[object]] = set()
        self._sockets: list[socket.socket] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, sockets: Iterable[socket.socket]) -> None:
        """Begins to accept, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._sockets = list(sockets)
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def shut(self) -> None:
        """Accepts nobody until it is opened again: clients wait in the kernel's queue."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            assert self._loop is not None
            self._loop.remove_reader(sock)

    async def close(self) -> None:
        """Accepts no more; who was being let in is in, or gone."""
        self.shut()
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self, listener: socket.socket) -> None:
        assert self._loop is not None
        for _ in range(_AT_ONCE):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_THEM:
                    self._pause(listener, error)
                    return
                continue  # this client has gone while it waited
            reason = self._refusal(sock)
            if reason is not None:
                sock.close()
                if reason:
                    self._hub.tell("store_refused", f"peer={address[0]}:{address[1]} reason={reason!r}")
                continue
            sock.setblocking(False)
            task = self._loop.create_task(self._let_in(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _let_in(self, sock: socket.socket) -> None:
        assert self._loop is not None
        try:
            await self._loop.connect_accepted_socket(lambda: Connection(self._hub), sock)
        except OSError as error:
            sock.close()
            self._hub.tell("store_refused", f"reason={error!s:.200}")

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        assert self._loop is not None
        self._hub.tell("store_full", f"reason={error.strerror!r} action='clients wait'")
        self._loop.remove_reader(listener)
        self._loop.call_later(_PAUSE_S, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        assert self._loop is not None
        if listener in self._sockets:
            self._loop.add_reader(listener, self._accept, listener)

    def _refusal(self, sock: socket.socket) -> str | None:
        """Why a client is not let in, empty if it has gone already; None: it is."""
        uid = None if self._from_elsewhere and _is_elsewhere(sock) else self._peer_users.of(sock)
        if uid == GONE:
            return ""
        if uid is not None and uid not in self._known and not self._is_of_the_job(uid):
            return f"user {uid} has no part in this job"
        if len(self._hub.connections) + len(self._opening) >= self._limit:
            return f"{self._limit} connections are open, the limit (ulimit -n)"
        return None

    def _is_of_the_job(self, uid: int) -> bool:
        """Workers may have been started as somebody else, by sudo or setpriv."""
        assert self._loop is not None
        now = self._loop.time()
        if self._users is None or now < self._asked_at + _ASK_AGAIN_S:
            return False
        self._asked_at = now
        self._known.update(self._users())
        return uid in self._known


def _is_elsewhere(sock: socket.socket) -> bool:
    """A connection from this machine to one of its own addresses has that address at both ends."""
    try:
        return bool(sock.getpeername()[0] != sock.getsockname()[0])
    except OSError:
        return False
