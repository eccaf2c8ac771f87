"""Addresses as `host:port`, which one a node offers to the others, and the range of ports they are in."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PORTS = 64
"""So many agents of one job can share a host."""
_LOOPBACK_NAMES = frozenset({
    "localhost", "localhost.localdomain", "localhost4", "localhost4.localdomain4", "localhost6",
    "localhost6.localdomain6", "ip6-localhost", "ip6-loopback",
})  # fmt: skip
_T = TypeVar("_T")
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def format_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """(host, port); port 0 for what is not an address."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([\w.-]+)):([0-9]{1,5})", address)
    if match is None or int(match[3]) >= 1 << 16:
        return "", 0
    return match[1] or match[2], int(match[3])


def interruptibly(question: Callable[[], _T]) -> _T:
    """The answer of the resolver, which can take its time: on a thread, so that this one hears signals meanwhile."""
    answers: list[_T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="hyperpodrun-resolver", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]


def resolve(host: str) -> list[str]:
    """Its numeric addresses; none for a name that nobody knows (yet)."""
    try:
        found = interruptibly(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_local(address: str) -> bool:
    """Whether this machine has the numeric address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_written_loopback(host: str) -> bool:
    """Whether it says so by itself: this machine and no other. A name that a hosts file leads there does not, as
    Debian's and Red Hat's do with the machine's own name."""
    name = host.lower().rstrip(".").partition("%")[0]
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def own_address_outside() -> str:
    """An address of this machine that is not loopback; a loopback address where it has no other."""
    # Of ranges for documentation: whatever leads outside.
    towards = (own_address_towards(target) for target in ("192.0.2.1", "2001:db8::1"))
    found = next((address for address in towards if address is not None and not is_loopback(address)), None)
    return found or _any_address() or "127.0.0.1"


def _any_address() -> str | None:
    """Of an interface that is up, without a route that leads anywhere: IPv4 first, link-local last."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    entries = [entry for name, found in psutil.net_if_addrs().items() if name in up for entry in found]
    addresses = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
    usable = [address for address in addresses if not is_loopback(address)]
    return min(usable, key=lambda address: ("%" in address, ":" in address), default=None)


def own_address_towards(address: str) -> str | None:
    """The address of this machine from which packets to a numeric address leave; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has the numeric address: where gloo must listen to be reached."""
    import psutil

    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if ipaddress.ip_address(entry.address.partition("%")[0]) == wanted:
                return str(name)
    return None


def port_warning(first: int, last: int, text: str | None = None) -> str | None:
    """A sentence if another program's outgoing connection could be given one of our ports, and what mends it.

    `text`: the content of ip_local_port_range.
    """
    try:
        low, high = map(int, (text or _EPHEMERAL.read_text()).split())
    except (OSError, ValueError):
        return None
    if last < low or first > high:
        return None
    ours = f"port {first} is" if first == last else f"ports {first}-{last} are"
    return (
        f"{ours} in the range {low}-{high} that the kernel gives to outgoing connections: another "
        f"program can take it; `sysctl -w net.ipv4.ip_local_port_range='{last + 1} 65535'` mends that, or another "
        "HPCT_PORT_BASE"
    )
