"""Whose process is at the other end of a local TCP connection: the kernel's word for it (sock_diag, or /proc/net).

SO_PEERCRED knows Unix sockets only, and torch's client speaks TCP and can be given no token. The kernel's table of
sockets names the owner of every one of this network namespace. One look-up costs some microseconds, never a wait.
Called by: `admission.py`.
"""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

GONE = -1
"""The client has closed its end: nobody owns it any more."""

_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST = 1
_ERROR = 2
_ANY = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBBBI")
_ENDS = struct.Struct("!HH16s16s")
_UID_AND_INODE = struct.Struct("=II")
_UID_AT = _HEADER.size + 4 + 48 + 12
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


class PeerUsers:
    """Looks owners up; remembers which way works here."""

    def __init__(self) -> None:
        self._netlink_works = False

    def of(self, sock: socket.socket) -> int | None:
        """The user at the other end, GONE, or None where this machine does not tell."""
        try:
            peer, own = sock.getpeername()[:2], sock.getsockname()[:2]
        except OSError:
            return GONE
        try:
            found = _ask_kernel(sock.family, peer, own)
        except OSError as error:
            if self._netlink_works and error.errno == errno.ENOENT:
                return GONE
            return _look_up(sock.family, peer, own)
        self._netlink_works = True
        return found


def _ask_kernel(family: int, peer: tuple[str, int], own: tuple[str, int]) -> int:
    """Raises OSError: ENOENT if there is no such socket, or no such service."""
    source, destination = (socket.inet_pton(family, end[0]).ljust(16, b"\0") for end in (peer, own))
    question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, _ANY)
    question += _ENDS.pack(peer[1], own[1], source, destination) + struct.pack("=III", 0, _ANY, _ANY)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _SOCK_DIAG) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _REQUEST, 1, 0) + question)
        answer = kernel.recv(4096)
    if len(answer) < _HEADER.size:
        raise OSError(errno.EPROTO, "the kernel's answer is cut short")
    if _HEADER.unpack_from(answer)[1] == _ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        raise OSError(code or errno.EPROTO, "the kernel does not know this connection")
    if len(answer) < _UID_AT + _UID_AND_INODE.size:
        raise OSError(errno.EPROTO, "the kernel's answer is cut short")
    uid, inode = _UID_AND_INODE.unpack_from(answer, _UID_AT)
    return int(uid) if inode else GONE


def _look_up(family: int, peer: tuple[str, int], own: tuple[str, int]) -> int | None:
    ends = {_as_listed(family, peer) + " " + _as_listed(family, own)}
    if family == socket.AF_INET:  # a client that uses IPv6 sockets for everything
        ends.add(" ".join(_as_listed(socket.AF_INET6, (f"::ffff:{host}", port)) for host, port in (peer, own)))
    readable = False
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        readable = True
        for line in lines:
            fields = line.split()
            if f"{fields[1]} {fields[2]}" in ends:
                return int(fields[7]) if fields[9] != "0" else GONE
    return GONE if readable else None


def _as_listed(family: int, end: tuple[str, int]) -> str:
    packed = socket.inet_pton(family, end[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{end[1]:04X}"
