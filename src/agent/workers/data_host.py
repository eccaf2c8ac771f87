"""The host of data producers (`dataloader/preparing/host.py`): started when a worker first wants it, and again.

Owns: the socket that workers connect to and the host's process. The socket is open from before the first worker starts
until the job is over, whatever becomes of the host: connections that come meanwhile wait in its queue. There is never a
second host, and what it serves is not known here. Must never import torch, or anything of `dataloader/`.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...protocol.names import AGENT_ENDPOINT, DATA_ENDPOINT, WORKER_IDENTITY
from .. import processes
from ..output.console import Console

if TYPE_CHECKING:
    import asyncio

CACHES = "caches"
"""A file in the runtime directory: the host writes there which directories are to be removed with the job."""
_OF_A_WORKER = (AGENT_ENDPOINT, WORKER_IDENTITY, DATA_ENDPOINT, "RANK", "LOCAL_RANK", "ROLE_RANK")
_EARLY_S = 10.0
_EARLY_DEATHS = 5
"""So many hosts in a row that live for less than that, and there is no other: something is wrong with all of them."""


class DataHost:
    """At most one process, and the socket it serves."""

    def __init__(self, runtime: Path, token: str, console: Console) -> None:
        self.endpoint = str(runtime / "data.sock")
        self._runtime = runtime
        self._token = token
        self._console = console
        self._child: processes.Child | None = None
        self._started = 0.0
        self._early_deaths = 0
        self._environment: dict[str, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.endpoint)
        self._listener.listen(1024)

    @property
    def pid(self) -> int | None:
        """Of the host; None while nobody wants one."""
        return None if self._child is None else self._child.pid

    def attach(self, loop: asyncio.AbstractEventLoop, environment: Mapping[str, str]) -> None:
        """The event loop runs now. `environment` is a worker's: the host gets what is not a worker's own."""
        self._loop = loop
        self._environment = {name: value for name, value in environment.items() if name not in _OF_A_WORKER}
        self._await_demand()

    def close(self) -> None:
        """The job is over."""
        self._close_listener()
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _close_listener(self) -> None:
        if self._listener is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = None

    def _await_demand(self) -> None:
        assert self._loop is not None
        assert self._listener is not None
        self._loop.add_reader(self._listener, self._start)

    def _start(self) -> None:
        """A connection waits."""
        assert self._loop is not None
        assert self._listener is not None
        self._loop.remove_reader(self._listener)
        fd = self._listener.fileno()
        command = [sys.executable, "-m", "hyperpodrun.dataloader.preparing", f"--listener={fd}"]
        command += [f"--token={self._token}", f"--runtime={self._runtime}"]
        try:
            self._child = processes.start(command, self._environment, pass_fds=(fd,))
        except OSError as error:
            self._give_up(str(error))
            return
        self._started = time.monotonic()
        self._console.debug("data-host", pid=self._child.pid)
        self._loop.add_reader(self._child.pidfd, self._on_exit, self._child)

    def _on_exit(self, child: processes.Child) -> None:
        assert self._loop is not None
        self._loop.remove_reader(child.pidfd)
        exit_code = child.reap()
        child.signal_session(signal.SIGKILL)  # producers die with it anyway
        self._child = None
        early = time.monotonic() - self._started < _EARLY_S
        self._early_deaths = self._early_deaths + 1 if early else 0
        if self._early_deaths >= _EARLY_DEATHS:
            self._give_up(f"{_EARLY_DEATHS} in a row ended at once, the last with {exit_code}")
            return
        self._console.log("data-host-lost", pid=child.pid, exit_code=exit_code, action="replaced when wanted")
        self._await_demand()

    def _give_up(self, reason: str) -> None:
        """Workers that want one are told so by the end of their connections."""
        self._console.log("data-host-off", reason=reason)
        self._close_listener()
