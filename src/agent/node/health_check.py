"""`TORCHELASTIC_HEALTH_CHECK_PORT`: answers `GET /healthz`, as probes of Kubernetes ask it.

Owns: the listening socket and the few connections to it. The answer comes from the agent's event loop, so that it says
that the loop runs; it says nothing about how training goes. A probe can neither hold the agent up nor end it: what it
sends is limited in size and time, and so is the number of probes at once. Called by: `local.py`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping

from ..output.console import Console

PORT = "TORCHELASTIC_HEALTH_CHECK_PORT"
_PATH = "/healthz"
_MOST_CONNECTIONS = 32
_LONGEST_REQUEST = 8192
_REQUEST_S = 5.0
_ACCEPT_AGAIN_S = 1.0


def health_check(environment: Mapping[str, str], console: Console, problem: Callable[[], str]) -> HealthCheck | None:
    """Listens if the environment wants it, on the event loop. A port that cannot be had costs a line, and no job."""
    wanted = environment.get(PORT)
    if not wanted:
        return None
    try:
        if not (wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) < 1 << 16):
            raise ValueError("it is not a port")
        return HealthCheck(_listen(int(wanted)), problem)
    except (OSError, ValueError) as error:
        console.log("no-health-check", port=wanted, reason=error)
        return None


def _listen(port: int) -> socket.socket:
    """On all addresses: a probe comes to the pod's. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("0.0.0.0", port))


class HealthCheck:
    """`problem()`: why the agent is not in order, or nothing."""

    def __init__(self, listener: socket.socket, problem: Callable[[], str]) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._problem = problem
        self._requests: dict[socket.socket, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Nobody is answered any more."""
        for probe in list(self._requests):
            self._end(probe)
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        try:
            probe, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptors are left: later, instead of again and again
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        if len(self._requests) >= _MOST_CONNECTIONS:
            self._end(next(iter(self._requests)))  # who has said nothing for longest
        probe.setblocking(False)
        self._requests[probe] = b""
        self._loop.add_reader(probe, self._read, probe)
        self._loop.call_later(_REQUEST_S, self._end, probe)

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _read(self, probe: socket.socket) -> None:
        try:
            data = probe.recv(_LONGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        request = self._requests[probe] = self._requests[probe] + data
        whole = b"\r\n\r\n" in request or b"\n\n" in request
        if whole:
            try:
                probe.send(self._answer(request))  # a few bytes: they fit into the buffer of a new connection
                probe.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has not waited
        if whole or not data or len(request) >= _LONGEST_REQUEST:
            self._end(probe)

    def _end(self, probe: socket.socket) -> None:
        if self._requests.pop(probe, None) is not None:
            self._loop.remove_reader(probe)
            probe.close()

    def _answer(self, request: bytes) -> bytes:
        method, path = (*request.partition(b"\n")[0].decode("latin-1").split(), "", "")[:2]
        problem = self._problem()
        if method not in ("GET", "HEAD"):
            status, text = "405 Method Not Allowed", "GET is what is answered"
        elif path.partition("?")[0] != _PATH:
            status, text = "404 Not Found", f"{_PATH} is what there is"
        elif problem:
            status, text = "503 Service Unavailable", problem
        else:
            status, text = "200 OK", "ok"
        body = f"{text}\n"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return (head + ("" if method == "HEAD" else body)).encode()
