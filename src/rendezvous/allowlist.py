"""Who may connect to this agent: whoever has the job's own key (ZeroMQ's authentication protocol, ZAP)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import zmq
from zmq.auth import Authenticator

from .keys import JobKeys


class Allowlist:
    """Answers the questions of a context's sockets about keys, on the event loop."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: JobKeys, loop: asyncio.AbstractEventLoop) -> None:
        self._public = keys.public
        self._loop = loop
        self._authenticator: Any = Authenticator(context)
        self._authenticator.configure_curve_callback("*", self)
        self._authenticator.start()
        loop.add_reader(self._socket.FD, self._answer)
        loop.call_soon(self._answer)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this public key may connect; asked by pyzmq."""
        return key == self._public

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket.FD)
        self._socket.close(0)

    @property
    def _socket(self) -> Any:
        return self._authenticator.zap_socket

    def _answer(self) -> None:
        while not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            request = self._authenticator.handle_zap_message(frames)
            with contextlib.suppress(StopIteration):
                request.send(None)  # the allowlist answers at once: there is nothing to wait for
