"""How the benchmark of bootstraps talks to its processes: values over a Unix socket, which network namespaces share.

Each process says who it is, and then answers one question at a time.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_BYTES = struct.Struct("=QQ")
_BYTES_AT = 120
"""tcpi_bytes_acked and tcpi_bytes_received in the kernel's tcp_info."""


class Desk:
    """The benchmark's end: processes by their names."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "desk.sock")
        self._listener = Listener(self.path, "AF_UNIX", backlog=512)
        self._processes: dict[tuple[Any, ...], Connection] = {}

    def meet(self, *names: tuple[Any, ...]) -> None:
        """Waits until these processes have come."""
        while not set(names) <= set(self._processes):
            connection = self._listener.accept()
            self._processes[connection.recv()] = connection

    def tell(self, name: tuple[Any, ...], *message: Any) -> None:
        self._processes[name].send(message)

    def hear(self, name: tuple[Any, ...], limit_s: float = 120.0) -> Any:
        """Raises RuntimeError after so long, or with what the process says has gone wrong."""
        if not self._processes[name].poll(limit_s):
            raise RuntimeError(f"{name} has not answered within {limit_s:.0f} s")
        answer = self._processes[name].recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"{name}: {answer!r}") from answer
        return answer

    def ask(self, names: list[tuple[Any, ...]], *message: Any) -> list[Any]:
        """The same question to several, and their answers."""
        for name in names:
            self.tell(name, *message)
        return [self.hear(name) for name in names]

    def forget(self, name: tuple[Any, ...]) -> None:
        self._processes.pop(name).close()

    def close(self) -> None:
        """Processes end when their connection does."""
        for connection in self._processes.values():
            connection.close()
        self._listener.close()


def come(path: str, *name: Any) -> Connection:
    """A process's end."""
    connection = Client(path, "AF_UNIX")
    connection.send(name)
    return connection


def spent_s() -> float:
    """Processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def transferred() -> int:
    """Bytes sent and received by the open TCP connections of this process, by the kernel's count."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += sum(_BYTES.unpack_from(info, _BYTES_AT))
        except (OSError, struct.error):
            continue
    return total


def raise_limits() -> None:
    """As many descriptors as are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
