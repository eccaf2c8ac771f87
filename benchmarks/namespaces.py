"""Nodes on one machine: network namespaces on a bridge of their own, which can be killed, cut off and healed.

Nothing of it is seen outside: the bridge has a namespace, too. Needs root and `ip`; `why_not()` says what is missing.
Whatever happens, `close()` kills every process in the namespaces and removes them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command (iproute2)"
    name = f"hp{os.getpid()}t"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"the kernel refuses network namespaces: {tried.stderr.strip()}"
    bridge = subprocess.run(["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"the kernel refuses bridges: {bridge.stderr.strip()}" if bridge.returncode else None


class Namespaces:
    """So many nodes, with addresses 10.77.0.10 and up."""

    _made = itertools.count()

    def __init__(self, count: int, ports: str = "40000 60999") -> None:
        self._prefix = f"hp{os.getpid()}x{next(self._made)}n"
        self._switch = f"{self._prefix}sw"
        self.count = count
        self.processes: list[subprocess.Popen[str]] = []
        try:
            self._make(ports)
        except BaseException:
            self.close()
            raise

    def _make(self, ports: str) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for node in range(self.count):
            name = self.name(node)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{node}", "netns", self._switch)
            _ip("-n", self._switch, "link", "set", f"p{node}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            self.command(node, ["sysctl", "-qw", f"net.ipv4.ip_local_port_range={ports}"])

    def name(self, node: int) -> str:
        return f"{self._prefix}{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{10 + node}"

    def command(self, node: int, command: Sequence[str]) -> None:
        """Runs a command on a node to its end."""
        subprocess.run(["ip", "netns", "exec", self.name(node), *command], check=True)

    def start(
        self, node: int, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on a node, its output in a file."""
        with output.open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name(node), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut(self, node: int) -> None:
        """Nothing reaches the node or leaves it, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"p{node}", "nomaster")

    def heal(self, node: int) -> None:
        _ip("-n", self._switch, "link", "set", f"p{node}", "master", "br0")

    def kill_everything(self, node: int) -> None:
        """SIGKILL for every process of a node."""
        found = subprocess.run(["ip", "netns", "pids", self.name(node)], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        """Whatever happened, nothing stays."""
        for node in range(self.count):
            self.kill_everything(node)
        for process in self.processes:
            process.wait()
        deadline = time.monotonic() + 10
        for name in [*(self.name(node) for node in range(self.count)), self._switch]:
            while subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
