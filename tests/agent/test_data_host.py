"""The socket of the data producers' host, and the process behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from hyperpodrun.agent.workers.data_host import DataHost


class Lines:
    """A console that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.changed = asyncio.Event()

    def log(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self.changed.set()

    debug = log

    async def wait_for(self, event: str, count: int = 1) -> None:
        await asyncio.wait_for(self._until(event, count), 30)

    async def _until(self, event: str, count: int) -> None:
        while sum(name == event for name, _ in self.events) < count:
            self.changed.clear()
            await self.changed.wait()


def connect(host: DataHost) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.settimeout(30)
    line.connect(host.endpoint)
    return line


def test_there_is_no_host_until_one_is_wanted_and_a_new_one_after_it_died(tmp_path: Path) -> None:
    async def scenario() -> None:
        lines: Any = Lines()
        host = DataHost(tmp_path, "0123456789abcdef", lines)
        try:
            host.attach(asyncio.get_running_loop(), dict(os.environ))
            await asyncio.sleep(0)
            assert host.pid is None
            with connect(host):
                await lines.wait_for("data-host")
                first = host.pid
                assert first is not None
                os.kill(first, signal.SIGKILL)
                await lines.wait_for("data-host-lost")
            with connect(host):
                await lines.wait_for("data-host", 2)
                assert host.pid not in (None, first)
        finally:
            host.close()
        with pytest.raises(ConnectionRefusedError):
            connect(host)

    asyncio.run(scenario())


def test_a_host_that_cannot_live_is_given_up_and_those_who_wait_are_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        lines: Any = Lines()
        host = DataHost(tmp_path, "0123456789abcdef", lines)
        try:
            host.attach(asyncio.get_running_loop(), {"PYTHONHOME": str(tmp_path / "nowhere")})
            with connect(host) as line:
                await lines.wait_for("data-host-off")
                assert sum(name == "data-host" for name, _ in lines.events) == 5
                try:
                    said = line.recv(1)
                except ConnectionResetError:
                    said = b""
                assert said == b""
        finally:
            host.close()

    asyncio.run(scenario())
