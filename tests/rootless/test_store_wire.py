"""The wire format: what is a request, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.repeated import Repeated
from hyperpodrun.rootless.wire import Limits, QueryType, RequestParser, WireError
from hypothesis import given
from hypothesis import strategies as st
from wire_client import blob, encode

i64 = st.integers(-(1 << 63), (1 << 63) - 1)
keys = st.binary(max_size=40)
values = st.binary(max_size=3000)
key_rows = st.lists(keys, max_size=5).map(tuple)
any_request = st.one_of(
    st.builds(rq.Set, keys, values),
    st.builds(rq.CompareSet, keys, values, values),
    st.builds(rq.Get, keys),
    st.builds(rq.Add, keys, i64),
    st.builds(rq.Check, key_rows),
    st.builds(rq.Wait, key_rows),
    st.builds(rq.NumKeys),
    st.builds(rq.DeleteKey, keys),
    st.builds(rq.Append, keys, values),
    st.builds(rq.MultiGet, key_rows),
    st.builds(rq.MultiSet, st.lists(st.tuples(keys, values), max_size=5).map(tuple)),
    st.builds(rq.CancelWait),
    st.builds(rq.Ping, st.integers(0, (1 << 32) - 1)),
    st.builds(rq.QueuePush, keys, values),
    st.builds(rq.QueuePop, keys),
    st.builds(rq.QueueLen, keys),
    st.builds(rq.ListKeys),
    st.builds(rq.Barrier, keys, i64),
)


def parse(parser: RequestParser, *pieces: bytes) -> list[rq.Request]:
    found: list[rq.Request] = []
    for piece in pieces:
        parser.feed(piece)
        while (request := parser.next_request()) is not None:
            found.append(request)
    return found


def opened(limits: Limits = Limits()) -> RequestParser:  # noqa: B008
    parser = RequestParser(limits)
    assert parse(parser, encode(rq.Validate())) == [rq.Validate()]
    return parser


def test_query_types_are_those_of_the_installed_torch() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    header = Path(spec.origin).parent / "include/torch/csrc/distributed/c10d/TCPStoreBackend.hpp"
    listed = re.search(r"enum class QueryType[^{]*{([^}]*)}", header.read_text())
    assert listed is not None
    names = re.findall(r"\w+", listed[1])
    assert names == [query.name for query in QueryType][: len(names)]


@given(st.lists(any_request, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_however_the_bytes_are_cut_the_requests_are_the_same(requests: list[rq.Request], cuts: list[int]) -> None:
    data = b"".join(map(encode, requests))
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    parser = opened()
    assert parse(parser, *pieces) == requests
    assert parser.buffered == 0


@given(st.lists(any_request, max_size=4))
def test_one_byte_at_a_time_gives_the_same_requests(requests: list[rq.Request]) -> None:
    data = b"".join(map(encode, requests))
    assert parse(opened(), *(data[at : at + 1] for at in range(len(data)))) == requests


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_requests_or_a_wire_error(data: bytes, validated: bool) -> None:
    parser = opened() if validated else RequestParser(Limits())
    with suppress(WireError):
        parse(parser, data)


LIMITS = Limits(key=10, value=20, count=4, request=60)
U64 = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes([19]), "query type 19 is unknown"),
        (bytes([255]), "query type 255 is unknown"),
        (encode(rq.Validate()), "VALIDATE came twice"),
        (encode(rq.Get(b"k" * 11)), "key of 11 bytes is over the limit of 10"),
        (encode(rq.Set(b"k", b"v" * 21)), "value of 21 bytes is over the limit of 20"),
        (
            bytes([QueryType.SET]) + blob(b"k") + U64.to_bytes(8, "little"),
            "value of 18446744073709551615 bytes",
        ),
        (bytes([QueryType.WAIT]) + (5).to_bytes(8, "little"), "a request for 5 keys is over the limit of 4"),
        (bytes([QueryType.MULTI_SET]) + U64.to_bytes(8, "little"), "is over the limit of 4"),
        (encode(rq.MultiSet(((b"k" * 10, b"v" * 20),) * 3)), "a request of 70 bytes is over the limit of 60"),
    ],
)
def test_refused_before_it_is_buffered(data: bytes, reason: str) -> None:
    parser = opened(LIMITS)
    with pytest.raises(WireError, match=reason):
        parse(parser, data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(rq.Ping(1)), "query type 13 came before VALIDATE"),
        (b"\x00\x01\x02\x03\x04", "opened with 0x04030201 in place of the TCPStore magic number"),
        (b"GET / HTTP/1.1\r\n", "query type 71 is unknown"),
    ],
)
def test_a_connection_opens_with_validate(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        parse(RequestParser(Limits()), data)


def test_a_long_request_that_was_read_before_is_known_however_it_is_cut() -> None:
    """All ranks of a node ask for the same keys: the second reads none of them, and gets the very same request."""
    keys = tuple(b"//cpu//0/%d" % rank for rank in range(1000))
    other = (*keys[:-1], b"//cpu//0/xyz")
    assert len(other[-1]) == len(keys[-1])
    repeated = Repeated()
    first = RequestParser(Limits(), repeated)
    (_, made) = parse(first, encode(rq.Validate()), encode(rq.Wait(keys)))
    assert made == rq.Wait(keys)
    data = encode(rq.Wait(keys)) + encode(rq.Ping(7))
    for cuts in ([1, 9, 10, 5000], [len(data) // 2], [], [len(data) - 6]):
        parser = RequestParser(Limits(), repeated)
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        found = parse(parser, encode(rq.Validate()), *pieces)
        assert found[1:] == [rq.Wait(keys), rq.Ping(7)]
        assert (found[1] is made) == (1 not in cuts), "nine bytes say which it may be"
        assert parser.held == 0
    for request in (rq.Wait(other), rq.MultiGet(keys), rq.Wait(keys[:-1])):
        for cut in (4000, len(encode(request)) - 2):
            parser = RequestParser(Limits(), repeated)
            data = encode(request)
            assert parse(parser, encode(rq.Validate()), data[:cut], data[cut:])[1:] == [request]
