"""Addresses, IPv6 among them, and the ports that the kernel may give to somebody else."""

from __future__ import annotations

import socket

import pytest
from hyperpodrun.rendezvous.addresses import (
    format_address,
    interface_of,
    is_local,
    is_loopback,
    own_address_towards,
    parse_address,
    port_warning,
    resolve,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("host-1.domain:17000", "host-1.domain", 17000),
        ("10.0.0.7:1", "10.0.0.7", 1),
        ("[fd00::7]:17000", "fd00::7", 17000),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
    ],
)
def test_an_address_is_read_as_it_is_written(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert format_address(host, port) == text


@pytest.mark.parametrize("text", ["", "host", "host:", "host:65536", "host:-1", "fd00::7:17000x", "a b:1"])
def test_what_is_no_address_has_no_port(text: str) -> None:
    assert parse_address(text) == ("", 0)


@pytest.mark.parametrize(
    ("range_text", "warned"),
    [
        ("32768\t60999\n", False),
        ("1024 65535", True),
        ("16000 17000", True),
        ("17001 65535", False),
        ("10000 16999", False),
        ("nonsense", False),
    ],
)
def test_a_port_of_the_ephemeral_range_is_warned_of_with_what_mends_it(range_text: str, warned: bool) -> None:
    warning = port_warning(17000, 17000, range_text)
    assert (warning is not None) == warned
    if warning is not None:
        assert warning.startswith("port 17000 is in the range ")
        assert "sysctl -w net.ipv4.ip_local_port_range='17001 65535'" in warning
        assert "HPCT_PORT_BASE" in warning


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "loopback",
    ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"))],
)
def test_what_is_here(loopback: str) -> None:
    assert is_local(loopback)
    assert is_loopback(loopback)
    assert own_address_towards(loopback) == loopback
    assert interface_of(loopback) == "lo"


def test_what_is_elsewhere() -> None:
    assert not is_local("192.0.2.1")
    assert not is_local("2001:db8::1")
    assert not is_loopback("192.0.2.1")
    assert interface_of("192.0.2.1") is None
    assert resolve("nobody.invalid") == []
