"""Who may use the store, how many of them, and how much of the agent's memory: no client can cost the agent more."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hyperpodrun.rootless import peer_user
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.namespace import Namespace
from hyperpodrun.rootless.peer_user import GONE, PeerUsers
from hyperpodrun.rootless.room import OVERHEAD, Room
from hyperpodrun.rootless.server import StoreServer
from hyperpodrun.rootless.wire import Limits, WireError
from store_process import StoreProcess
from wire_client import RawClient, blob

MIB = 1 << 20


def pair(family: int = socket.AF_INET, host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """(client, accepted)."""
    with socket.socket(socket.AF_INET6 if ":" in host and "." not in host else socket.AF_INET) as listener:
        listener.bind(("127.0.0.1" if "." in host else host, 0))
        listener.listen()
        client = socket.socket(family)
        client.connect((host, listener.getsockname()[1]))
        return client, listener.accept()[0]


@pytest.mark.parametrize("way", ["sock_diag", "/proc/net"])
@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1")],
)
def test_the_kernel_tells_whose_a_connection_is(monkeypatch: Any, family: int, host: str, way: str) -> None:
    if way == "/proc/net":
        monkeypatch.setattr(peer_user, "_ask_kernel", _no_such_service)
    users = PeerUsers()
    try:
        client, accepted = pair(family, host)
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    with accepted:
        assert users.of(accepted) == os.geteuid()
        client.close()
        assert users.of(accepted) == GONE


def _no_such_service(*_: object) -> int:
    raise OSError(errno.ENOENT, "no such service")


def test_where_the_kernel_tells_nothing_the_user_is_not_known(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(peer_user, "_ask_kernel", _no_such_service)
    monkeypatch.setattr(peer_user, "_TABLES", (tmp_path / "nothing",))
    client, accepted = pair()
    with client, accepted:
        assert PeerUsers().of(accepted) is None


def serve(scene: Callable[[StoreServer, int], Awaitable[None]], **options: Any) -> list[str]:
    """Plays a scene with a store on its own loop; what the store has logged."""
    lines: list[str] = []

    async def play() -> None:
        server = StoreServer(log=lines.append, **options)
        try:
            await asyncio.wait_for(scene(server, await server.start()), 30)
        finally:
            await server.close()

    asyncio.run(play())
    return lines


async def answered(port: int) -> bool:
    """Whether a new client gets an answer, or else the end of its connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"\0" + struct.pack("<I", 0x3C85F7CE) + b"\x0d" + struct.pack("<I", 7))
        return await reader.read(4) == struct.pack("<I", 7)
    except ConnectionError:
        return False
    finally:
        writer.close()


def test_other_users_are_not_let_in_and_fill_no_log(monkeypatch: Any) -> None:
    uid = os.geteuid() + 4242
    monkeypatch.setattr(PeerUsers, "of", lambda self, sock: uid)

    async def scene(server: StoreServer, port: int) -> None:
        assert not any([await answered(port) for _ in range(20)])
        assert server.counters.connections == 0

    (line,) = serve(scene)
    assert line.startswith("store_refused peer=127.0.0.1:")
    assert f"user {uid} has no part in this job" in line


def test_workers_that_run_as_somebody_else_are_let_in(monkeypatch: Any) -> None:
    uid = os.geteuid() + 4242
    monkeypatch.setattr(PeerUsers, "of", lambda self, sock: uid)

    async def scene(server: StoreServer, port: int) -> None:
        assert await answered(port)

    assert serve(scene, users=lambda: {uid}) == []


def test_connections_are_bounded_and_each_that_ends_makes_room() -> None:
    async def scene(server: StoreServer, port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        while server.counters.connections < 3:
            await asyncio.sleep(0.001)
        assert not await answered(port)
        assert not await answered(port)
        held[0][1].close()
        while not await answered(port):
            await asyncio.sleep(0.001)
        for _, writer in held:
            writer.close()

    (line,) = serve(scene, most_connections=3)
    assert "3 connections are open" in line


_NO_DESCRIPTORS = """
import asyncio, os, resource, socket
from hyperpodrun.rootless.server import StoreServer

async def main():
    problems, lines = [], []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    server = StoreServer(log=lines.append, most_connections=10_000)
    port = await server.start()
    clients = [socket.socket() for _ in range(8)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for client in clients:
        client.connect(("127.0.0.1", port))
    while not lines:
        await asyncio.sleep(0.01)
    for fd in taken:
        os.close(fd)
    while server.counters.connections < len(clients):
        await asyncio.sleep(0.01)
    await server.close()
    print(problems, lines)

asyncio.run(asyncio.wait_for(main(), 30))
"""


def test_without_a_descriptor_left_clients_wait_and_nothing_breaks() -> None:
    done = subprocess.run([sys.executable, "-c", _NO_DESCRIPTORS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] [\"store_full reason='Too many open files' action='clients wait'"), done.stdout


@pytest.mark.parametrize(
    "request_of",
    [
        lambda n: rq.Set(b"/k%d" % n, bytes(MIB)),
        lambda n: rq.QueuePush(b"/q", bytes(MIB)),
        lambda n: rq.Append(b"/a", bytes(MIB)),
        lambda n: rq.MultiSet(((b"/k%d" % n, bytes(MIB // 2)), (b"/l%d" % n, bytes(MIB // 2)))),
        lambda n: rq.CompareSet(b"/k%d" % n, b"", bytes(MIB)),
        lambda n: rq.Wait(tuple(b"/%d-%d-" % (n, k) + bytes(1000) for k in range(1000))),
        lambda n: rq.Wait(tuple(b"hyperpodrun-epoch-%d%04d/k" % (n + 1, k) for k in range(1000))),
    ],
    ids=["set", "push", "append", "multi_set", "compare_set", "wait", "epochs"],
)
def test_memory_is_bounded_and_what_is_over_it_costs_its_client(request_of: Any) -> None:
    with StoreProcess(limits={"store": 20 * MIB}) as store, RawClient(store.port) as good:
        good.send(rq.Set(b"/good", b"1"))
        assert good.in_step()
        clients = []
        for number in range(40):
            clients.append(RawClient(store.port))
            try:
                clients[-1].send(request_of(number))
            except ConnectionError:
                break
            if store.call("counters")["malformed_connections"]:
                break
        else:
            store.until("counters", lambda counters: counters["malformed_connections"] > 0)
        (line,) = store.call("lines")
        assert "over its limit of 20971520" in line
        good.send(rq.Get(b"/good"))
        assert good.read(9) == blob(b"1")
        for client in clients:
            client.socket.close()


def test_requests_that_never_become_complete_count() -> None:
    with StoreProcess(limits={"store": 20 * MIB}) as store, RawClient(store.port) as good:
        half = b"\x01" + blob(b"/k") + struct.pack("<Q", 8 * MIB) + bytes(6 * MIB)
        clients = [RawClient(store.port) for _ in range(4)]
        for client in clients:
            try:
                client.socket.sendall(half)
            except ConnectionError:
                break
        store.until("counters", lambda counters: counters["malformed_connections"] > 0)
        for client in clients:
            client.socket.close()
        store.until("open", lambda count: count == 1)
        good.send(rq.Set(b"/k", bytes(15 * MIB)))
        assert good.in_step(), "what is gone has made room"


def test_one_key_read_a_million_times_in_one_request_is_refused(store: StoreProcess) -> None:
    with RawClient(store.port) as client:
        client.send(rq.Set(b"/k", bytes(MIB)), rq.MultiGet((b"/k",) * 1000))
        assert client.closed()
    assert "over the limit of" in store.call("lines")[0]


def test_room_is_given_back_to_the_last_byte() -> None:
    room = Room(1 << 20)
    space = Namespace(0, room)
    empty = room.held
    space.put(b"a", b"12345")
    space.put(b"a", b"1")
    assert room.held == empty + OVERHEAD + 2
    space.add(b"n", 41)
    space.append(b"n", b"7")
    space.push(b"q", b"element")
    space.push(b"q", b"other")
    assert [space.pop(b"q"), space.pop(b"q")] == [(2, b"element"), (1, b"other")]
    assert space.remove(b"n")
    assert not space.remove(b"n")
    assert room.held == empty + OVERHEAD + 2
    with pytest.raises(WireError):
        space.put(b"a", bytes(1 << 20))
    assert space.values[b"a"] == b"1"
    space.free()
    assert room.held == 0
    assert Limits().store >= 1 << 30


def test_the_agent_may_have_more_descriptors_and_its_workers_what_they_would_have_had(script, run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"the hard limit is {hard}")
    worker = script(
        "import os, pathlib, resource\n"
        "agent = pathlib.Path(f'/proc/{os.getppid()}/limits').read_text()\n"
        "(line,) = [line for line in agent.splitlines() if line.startswith('Max open files')]\n"
        "print('limits', *resource.getrlimit(resource.RLIMIT_NOFILE), *line.split()[3:5])\n"
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        finished = run("--start-method=spawn", worker)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finished.stdout.split() == ["limits", "1000", str(hard), str(min(hard, 1 << 16)), str(hard)], finished.output


def test_malformed_connections_cost_one_line_a_minute(store: StoreProcess) -> None:
    for _ in range(20):
        with RawClient(store.port, validate=False) as client:
            client.socket.sendall(b"GET / HTTP/1.1\r\n")
            assert client.closed()
    assert store.call("counters")["malformed_connections"] == 20
    (line,) = store.call("lines")
    assert line.startswith("store_malformed peer=127.0.0.1:")
