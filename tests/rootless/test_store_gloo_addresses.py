"""Which values publish a gloo listener."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hyperpodrun.rootless.gloo_addresses import listeners_in
from hypothesis import given
from hypothesis import strategies as st

# Written by torch 2.13, two ranks of one host, the second with GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER=1.
REAL = bytes.fromhex(
    "0200000000000000766d88000000000000000200872d7f0000010000000000000000352cbfbfbfbfbfbfa2bfbfbfbfbfbfbf"
    "6fe9f52ebb3ebfbfbfbfbfbfbfbfbfbf0000000000000000000000000000000000000000000000000000000000000000352cbfbf22"
    "bfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfcf00000000000000000000000000000000ffffffffffffffff"
    "00000000000000000100000000000000"
)
REAL_FLAT = bytes.fromhex(
    "0200000000000000766d880000000000000002008e8b7f000001000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000352cbfbf22bfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfbfcf000000000000000000"
    "000000000000000000000000000000000000000000000041414141414141414141414141414141ffffffffffffffff"
)


def published(storage: bytes, *, host: bytes = b"node-1", seq: int = -1, pairs: int = 0) -> bytes:
    storage = storage.ljust(128, b"\xbf")
    ids = b"".join(struct.pack("<q", number) for number in range(pairs))
    return struct.pack("<Q", len(host)) + host + struct.pack("<Q", 136) + storage + struct.pack("<q", seq) + ids


def inet(ip: str, port: int) -> bytes:
    return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(ip) + bytes(8)


def inet6(ip: str, port: int) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, ip)
    return struct.pack("<H", socket.AF_INET6) + struct.pack(">H", port) + b"\x01\x02\x03\x04" + address + bytes(4)


def test_what_torch_really_writes() -> None:
    assert listeners_in(REAL) == (("127.0.0.1", 34605),)
    assert listeners_in(REAL_FLAT) == (("127.0.0.1", 36491),)


@given(
    st.one_of(st.tuples(st.just(inet), st.ip_addresses(v=4)), st.tuples(st.just(inet6), st.ip_addresses(v=6))),
    st.integers(1, 65535),
    st.binary(min_size=1, max_size=64).filter(lambda name: b"\0" not in name),
    st.integers(0, 9),
)
def test_any_address_of_any_rank_is_found(where, port: int, host: bytes, pairs: int) -> None:  # type: ignore[no-untyped-def]
    make, ip = where
    value = published(make(str(ip), port), host=host, pairs=pairs)
    ((found, found_port),) = listeners_in(value)
    assert ipaddress.ip_address(found) == ip
    assert found_port == port
    assert listeners_in(bytearray(value)) == listeners_in(value)


@pytest.mark.parametrize(
    "value",
    [
        published(inet("10.0.0.1", 0)),
        published(inet("10.0.0.1", 4000), seq=0),
        published(inet("10.0.0.1", 4000), host=b""),
        published(inet("10.0.0.1", 4000), host=b"a\0b"),
        published(inet("10.0.0.1", 4000)) + b"x",
        published(inet("10.0.0.1", 4000))[:-1],
        published(inet("10.0.0.1", 4000)[:8] + b"\x01" * 8),
        published(b"\x01\x00/run/socket"),
    ],
)
def test_near_misses_are_nothing(value: bytes) -> None:
    assert listeners_in(value) == ()


@given(st.binary(max_size=600))
def test_random_values_are_nothing(value: bytes) -> None:
    assert listeners_in(value) == ()


@given(st.integers(0, len(REAL) - 1))
def test_a_part_of_a_value_is_nothing(length: int) -> None:
    if length not in (154, 162):  # with one pair identifier less it is still whole
        assert listeners_in(REAL[:length]) == ()
