"""The store's listening sockets: bound before there is an event loop, or anything of the store but this module.

The agent binds first of all, because its workers' environment names the port, and imports the server while they start.
"""

from __future__ import annotations

import errno
import socket

BACKLOG = 1024
_PORT_ATTEMPTS = 16
_PAIRS = {"localhost": ("127.0.0.1", "::1"), "*": ("0.0.0.0", "::")}


def listen(host: str, port: int = 0) -> list[socket.socket]:
    """One listening socket; for "localhost" one on each loopback address, for "*" one on all addresses of either kind,
    IPv6 if the host has it.

    "localhost" spares torch's clients a DNS query for each connection wherever /etc/hosts names ::1; 127.0.0.1 they
    look up as ::ffff:127.0.0.1, which it never names. Raises OSError with a sentence if the address cannot be had.
    """
    try:
        return _listen(host, port)
    except OSError as error:
        why = "another process uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(error.errno, f"the store cannot listen on {host}:{port}: {why}") from error


def _listen(host: str, port: int) -> list[socket.socket]:
    if host not in _PAIRS:
        return [_listening_socket(host, port)]
    four, six = _PAIRS[host]
    for attempt in range(_PORT_ATTEMPTS):
        first = _listening_socket(four, port)
        try:
            return [first, _listening_socket(six, first.getsockname()[1])]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return [first]
            first.close()
            if port or attempt == _PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
