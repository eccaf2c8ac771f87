"""Packets on unix sockets: one message each, descriptors along with them, and who is on the other side."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from ..protocol.dataloader import MAX_PACKET_BYTES

_BUFFER_BYTES = 2 * MAX_PACKET_BYTES


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends, both of which wait."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        _enlarge(end)
    return ours, theirs


def connect(path: str, timeout: float) -> socket.socket:
    """Raises OSError when nobody listens there."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        line.settimeout(timeout)
        line.connect(path)
        _enlarge(line)
    except BaseException:
        line.close()
        raise
    return line


def receive(line: socket.socket, max_fds: int = 0) -> tuple[bytes, list[int]]:
    """One packet; b"" when the other side is gone. Raises BlockingIOError and TimeoutError as the socket is set."""
    try:
        if not max_fds:
            return line.recv(MAX_PACKET_BYTES + 1), []
        data, fds, _, _ = socket.recv_fds(line, MAX_PACKET_BYTES + 1, max_fds)
    except ConnectionError:
        return b"", []
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, list(fds)


def peer(line: socket.socket) -> tuple[int, int]:
    """(pid, user) of the other side, as the kernel knows it."""
    pid, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def anonymous_file(name: str, data: bytes) -> int:
    """A descriptor of a file in memory that holds `data`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _enlarge(line: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        line.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
