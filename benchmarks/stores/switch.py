"""Nodes on one machine whose network has a latency: TAP devices in network namespaces, joined by a switch in Python.

    switch.py LATENCY_MS NAMESPACE...     runs until its standard input ends; prints a line when the devices are there

Where the kernel has no netem, this is how a network is made slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import selectors
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from namespaces import Namespaces, _ip

_TUNSETIFF, _TAP, _NO_PI, _NEWNET = 0x400454CA, 0x0002, 0x1000, 0x40000000
_FRAME = 65536
_GROUP = 1


class SlowNamespaces(Namespaces):
    """As `Namespaces`, and every frame takes so long."""

    def __init__(self, count: int, latency_ms: float) -> None:
        self._latency_ms = latency_ms
        self._switching: subprocess.Popen[str] | None = None
        super().__init__(count)

    def _make(self, ports: str) -> None:
        _ip("netns", "add", self._switch)
        names = [self.name(node) for node in range(self.count)]
        for name in names:
            _ip("netns", "add", name)
        command = [sys.executable, __file__, str(self._latency_ms), *names]
        self._switching = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._switching.stdout is not None
        if not self._switching.stdout.readline():
            raise OSError("the switch has not come up")
        for node, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            self.command(node, ["sysctl", "-qw", f"net.ipv4.ip_local_port_range={ports}"])

    def close(self) -> None:
        super().close()
        if self._switching is not None:
            assert self._switching.stdin is not None
            assert self._switching.stdout is not None
            with contextlib.suppress(OSError):
                self._switching.stdin.close()
            self._switching.wait()
            self._switching.stdout.close()


def _tap(namespace: str) -> int:
    """The descriptor of a device `eth0` in a namespace. Leaves this process there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}", "rb") as place:
        if libc.setns(place.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _TAP | _NO_PI))
    return device


def _switch(latency_s: float, devices: list[int]) -> None:
    places: dict[bytes, int] = {}
    under_way: list[tuple[float, int, int, bytes]] = []
    count = itertools.count()
    selector = selectors.DefaultSelector()
    for device in (*devices, sys.stdin.fileno()):
        selector.register(device, selectors.EVENT_READ)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for ready, _ in selector.select(wait):
            if ready.fd == sys.stdin.fileno():
                return
            for _ in range(64):
                try:
                    frame = os.read(ready.fd, _FRAME)
                except OSError:
                    break
                places[frame[6:12]] = ready.fd
                known = places.get(frame[:6]) if not frame[0] & _GROUP else None
                targets = [known] if known is not None else [other for other in devices if other != ready.fd]
                due = time.monotonic() + latency_s
                for target in targets:
                    heapq.heappush(under_way, (due, next(count), target, frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            *_, target, frame = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # a device that is full, or gone, loses frames
                os.write(target, frame)


def main() -> None:
    devices = [_tap(name) for name in sys.argv[2:]]
    print("ready", flush=True)
    _switch(float(sys.argv[1]) / 1000, devices)


if __name__ == "__main__":
    main()
