"""The server itself: bytes, pacing, hostile clients, life and death. No torch here."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
import time

import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.server import StoreServer
from hyperpodrun.rootless.wire import STOP_WAITING, WAIT_CANCELED, QueryType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_process import StoreProcess
from wire_client import RawClient, blob, encode

CONVERSATION = (
    rq.Set(b"/a", b"1" * 300),
    rq.Get(b"/a"),
    rq.Add(b"/n", -7),
    rq.MultiSet(((b"/b", b""), (b"/c", b"x"))),
    rq.MultiGet((b"/a", b"/b", b"/c", b"/missing")),
    rq.Check((b"/a", b"/b")),
    rq.Wait((b"/a",)),
    rq.CompareSet(b"/a", b"no", b"2"),
    rq.Append(b"/c", b"yz"),
    rq.Get(b"/c"),
    rq.QueuePush(b"/q", b"e"),
    rq.QueueLen(b"/q"),
    rq.QueuePop(b"/q"),
    rq.QueuePop(b"/q"),
    rq.DeleteKey(b"/a"),
    rq.NumKeys(),
    rq.ListKeys(),
    rq.Barrier(b"/bar", 1),
    rq.Ping(7),
)
ANSWERS = (
    blob(b"1" * 300)
    + struct.pack("<q", -7)
    + blob(b"1" * 300) + blob(b"") + blob(b"x") + blob(b"")
    + b"\x00"
    + b"\x00"
    + blob(b"1" * 300)
    + blob(b"xyz")
    + struct.pack("<q", 1)
    + struct.pack("<q", 1) + blob(b"e")
    + struct.pack("<q", 0)
    + struct.pack("<q", 1)
    + struct.pack("<q", 3)
    + struct.pack("<q", 3) + blob(b"/n") + blob(b"/b") + blob(b"/c")
    + b"\x00"
    + struct.pack("<I", 7)
)  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_answers_are_the_same_however_the_bytes_arrive(store: StoreProcess, piece: int) -> None:
    data = b"".join(map(encode, CONVERSATION))
    with RawClient(store.port) as client:
        for at in range(0, len(data), piece):
            client.socket.sendall(data[at : at + piece])
        assert client.read(len(ANSWERS)) == ANSWERS
        assert client.in_step()


def test_the_store_process_never_loads_torch(store: StoreProcess) -> None:
    assert not store.call("loaded", "torch")
    code = "import sys, hyperpodrun.rootless.server; print('torch' in sys.modules, len(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).startswith("False")


@pytest.fixture(scope="module")
def battered() -> object:
    """A store that the fuzz shares, with a client that must notice nothing."""
    with StoreProcess(limits={"value": 1 << 16}) as process, RawClient(process.port) as witness:
        witness.send(rq.Set(b"/witness", b"unharmed"))
        yield process, witness


GARBAGE = st.one_of(
    st.binary(max_size=100),
    st.lists(
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from([encode(request) for request in CONVERSATION]),
            st.integers(0, 20).map(lambda code: bytes([code])),
            st.integers(0, 1 << 70).map(lambda number: struct.pack("<Q", number % (1 << 64))),
        ),
        max_size=8,
    ).map(b"".join),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GARBAGE, st.booleans())
def test_no_bytes_hurt_the_store_or_its_other_clients(battered, data: bytes, validate: bool) -> None:  # type: ignore[no-untyped-def]
    store, witness = battered
    with RawClient(store.port, validate=validate) as client:
        client.socket.sendall(data)
    witness.send(rq.Get(b"/witness"))
    assert witness.read(16) == blob(b"unharmed")
    assert witness.in_step()


def test_a_malformed_request_costs_one_line_and_one_connection(store: StoreProcess) -> None:
    with RawClient(store.port) as good, RawClient(store.port) as bad:
        bad.send(rq.Set(b"/a", b"1"))
        bad.socket.sendall(bytes([QueryType.GET]) + struct.pack("<Q", 1 << 40))
        assert bad.closed()
        good.send(rq.Get(b"/a"))
        assert good.read(9) == blob(b"1")
    (line,) = store.call("lines")
    assert line.startswith("store_malformed peer=127.0.0.1:")
    assert line.endswith("epoch=0 reason='a key of 1099511627776 bytes is over the limit of 65536'")
    counters = store.call("counters")
    assert counters["malformed_connections"] == 1
    assert counters["connections"] == 2


def test_a_client_that_does_not_read_is_not_read_from(store: StoreProcess) -> None:
    value = os.urandom(1 << 20)
    count = 200
    with RawClient(store.port) as slow, RawClient(store.port) as other:
        slow.send(rq.Set(b"/big", value))
        slow.send(*[rq.Get(b"/big")] * count)
        other.send(rq.Wait((b"/big",)))
        assert other.read(1) == STOP_WAITING
        for _ in range(50):
            assert other.in_step()
        # Of 200 MB of answers only what the kernel's buffers take has been produced.
        assert store.call("counters")["requests"] < count / 2
        expected = blob(value)
        for _ in range(count):
            assert slow.read(len(expected)) == expected
        assert slow.in_step()


def test_a_flood_of_requests_leaves_room_for_others(store: StoreProcess) -> None:
    flood = b"".join(encode(rq.Set(b"/k%d" % number, b"v")) for number in range(2000)) * 20
    with RawClient(store.port) as busy, RawClient(store.port) as other:
        busy.socket.setblocking(False)
        sent = 0
        slowest = 0.0
        while sent < len(flood):
            try:
                sent += busy.socket.send(flood[sent : sent + (1 << 18)])
            except BlockingIOError:
                started = time.perf_counter()
                assert other.in_step()
                slowest = max(slowest, time.perf_counter() - started)
        busy.socket.setblocking(True)
        assert busy.in_step()
    assert slowest < 1.0  # a slice is about 2 ms; the rest is what a busy two-core machine may add


def test_a_large_value_delivered_in_small_pieces(store: StoreProcess) -> None:
    value = random.Random(1).randbytes(3 << 20)
    data = encode(rq.Set(b"/v", value))
    with RawClient(store.port) as client:
        for at in range(0, len(data), 1000):
            client.socket.sendall(data[at : at + 1000])
        client.send(rq.Get(b"/v"))
        assert client.read(8 + len(value)) == blob(value)


def test_a_cancel_that_crosses_the_clients_deadline_leaves_the_stream_in_step(store: StoreProcess) -> None:
    with RawClient(store.port) as client:
        client.send(rq.Wait((b"/never",)))
        store.until_blocked(1)
        assert store.call("cancel", 0) == 1
        client.send(rq.CancelWait())
        assert client.read(1) == WAIT_CANCELED
        assert client.in_step()
    assert store.call("counters")["cancelled_waits"] == 1


def test_stale_writes_are_dropped_and_counted(store: StoreProcess) -> None:
    with RawClient(store.port) as stale:
        stale.send(rq.Set(b"/hyperpodrun-epoch-0/k", b"old"))
        assert stale.in_step()
        store.call("advance", 1)
        stale.send(
            rq.Set(b"/hyperpodrun-epoch-0/k", b"new"),
            rq.Set(b"/bare", b"new"),
            rq.Add(b"/hyperpodrun-epoch-1/n", 1),
        )
        assert stale.read(8) == struct.pack("<q", 1)
        stale.send(rq.Get(b"/hyperpodrun-epoch-0/k"), rq.Get(b"/hyperpodrun-epoch-1/bare"))
        assert stale.read(16) == blob(b"") * 2
    assert store.call("counters")["dropped_stale_writes"] == 2
    assert store.call("last_write_ns", 0) is None
    assert store.call("last_write_ns", 1) is not None


def test_clients_that_connect_before_the_loop_exists_are_served() -> None:
    server = StoreServer(log=print)
    port = server.bind()
    assert server.bind() == port
    with RawClient(port) as early:

        async def serve() -> None:
            assert await server.start() == port
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, early.in_step)
            await server.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(serve())
        assert early.closed()


def test_a_taken_port_is_said_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: another process uses it"):
            StoreServer(port=port, log=print).bind()
        with pytest.raises(OSError, match="another process uses it"):
            StoreServer("localhost", port, log=print).bind()
    with pytest.raises(OSError, match="cannot listen on no-such-address:0: "):
        StoreServer("no-such-address", log=print).bind()


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_localhost_is_both_loopback_addresses() -> None:
    with (
        StoreProcess(host="localhost") as store,
        RawClient(store.port, host="127.0.0.1") as four,
        RawClient(store.port, host="::1") as six,
    ):
        four.send(rq.Set(b"/k", b"v"))
        assert four.in_step()
        six.send(rq.Get(b"/k"))
        assert six.read(9) == blob(b"v")


def test_close_ends_blocked_clients() -> None:
    with StoreProcess() as store:
        clients = [RawClient(store.port) for _ in range(3)]
        for client in clients:
            client.send(rq.Wait((b"/never",)))
        store.until_blocked(3)
    for client in clients:
        assert client.closed()
        client.socket.close()


def test_a_client_that_leaves_is_forgotten(store: StoreProcess) -> None:
    with RawClient(store.port) as client:
        client.send(rq.Wait((b"/never",)))
        store.until_blocked(1)
    store.until("open", lambda count: count == 0)
    assert store.call("cancel", 0) == 0
