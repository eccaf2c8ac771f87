"""Finding and killing the processes behind a loader, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def producer_of(loader: Any) -> int:
    return loader._opened().pid


def fetchers_of(producer: int) -> list[int]:
    return [pid for pid in children_of(producer) if comm(pid) == "hpr-fetcher"]


def host_of(producer: int) -> int:
    return parent_of(producer)


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def marked(token: str) -> list[int]:
    """The pids of processes that have this text in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if token.encode() in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
    return found


def kill(pid: int) -> None:
    """SIGKILL, and waits until it is gone."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0], f"{pid} does not end"
    os.close(pidfd)


def wait_for(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
