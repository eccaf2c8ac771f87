"""Connections in their hundreds: what one costs, what a message costs, and what happens where one cannot be had.

The peers are plain ZeroMQ sockets of this process: all of 127.0.0.0/8 leads here, and every address is an agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import pytest
import zmq
from hyperpodrun.rendezvous import incoming, router
from hyperpodrun.rendezvous.sockets import CONTROL, is_open
from hyperpodrun.rendezvous.transport import Transport

MANY = 450


class Agent:
    """The one whose connections these are; `insecure`, so that plain sockets can be its peers."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.closed: list[str] = []
        self.logged: list[tuple[str, dict[str, object]]] = []
        self.transport = Transport("me", None, lambda event, **fields: self.logged.append((event, fields)))
        self.port = self.transport.bind("127.0.0.1", 17600, 200)
        self.transport.start(
            f"127.0.0.1:{self.port}",
            lambda key, address, channel, data: self.heard.append((address, data)),
            lambda address, key: self.closed.append(address),
        )

    def send(self, address: str, data: bytes) -> None:
        self.transport.send(address, CONTROL, data)


async def until(condition: Callable[[], object], limit: float = 20.0) -> None:
    async def watch() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(watch(), limit)


@pytest.fixture
def peers() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def play(scene: Callable[[Agent], Awaitable[None]]) -> None:
    async def run() -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        agent = Agent()
        try:
            await scene(agent)
        finally:
            agent.transport.close(0)
        assert not errors

    asyncio.run(run())


def listening(peers: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], int]:
    """Many agents that are reached at any address; answers go to them in turn."""
    dealer = peers.socket(zmq.DEALER)
    dealer.setsockopt(zmq.BACKLOG, 1000)
    return dealer, dealer.bind_to_random_port("tcp://0.0.0.0")


def connected(peers: zmq.Context[zmq.Socket[bytes]], agent: Agent, number: int) -> zmq.Socket[bytes]:
    dealer = peers.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, b"peer|127.0.0.1:%d" % (1000 + number))
    dealer.connect(f"tcp://127.0.0.1:{agent.port}")
    return dealer


def addresses(count: int, port: int) -> list[str]:
    return [f"127.1.{number // 250}.{number % 250 + 1}:{port}" for number in range(count)]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_hundreds_of_connections_are_made_and_each_costs_one_descriptor(
    peers: zmq.Context[zmq.Socket[bytes]],
) -> None:
    async def scene(agent: Agent) -> None:
        others, port = listening(peers)
        before, told = open_files(), addresses(MANY, port)
        for address in told:
            agent.send(address, address.encode())
        asked: set[bytes] = set()

        def all_are_asked() -> bool:
            with contextlib.suppress(zmq.Again):
                while len(asked) < MANY:
                    asked.add(others.recv_multipart(zmq.NOBLOCK)[2])
            return len(asked) == MANY

        await until(all_are_asked)
        assert open_files() - before <= 2 * MANY + 10, "one for each end, and both are in this process"
        for _ in range(MANY):
            others.send_multipart([CONTROL, b"peer", b"an answer"])
        await until(lambda: len(agent.heard) == MANY)
        assert {address for address, _ in agent.heard} == set(told)
        others.close(0)
        await until(lambda: len(agent.closed) == MANY)
        assert set(agent.closed) == set(told)
        await until(lambda: open_files() - before <= 10)

    play(scene)


class Calls:
    """Counts what is called in this thread."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: object, event: str, argument: object) -> None:
        self.count += event in ("call", "c_call")


async def _calls(agent: Agent, peers: zmq.Context[zmq.Socket[bytes]], count: int) -> dict[str, float]:
    """How much is called for one of each, with so many peers."""
    found: dict[str, float] = {}

    async def note(what: str, times: int, condition: Callable[[], object]) -> None:
        with Calls() as calls:
            while not condition():
                await asyncio.sleep(0.05)  # few of these calls are the test's own
        found[what] = calls.count / times

    dealers = [connected(peers, agent, number) for number in range(count)]
    await note("accept", count, lambda: len(agent.transport.incoming) == count)
    for _ in range(3):
        for dealer in dealers:
            dealer.send_multipart([CONTROL, b"peer", b"a word"])
    await note("hear", 3 * count, lambda: len(agent.heard) == 3 * count)
    others, port = listening(peers)
    told = addresses(count, port)
    with Calls() as calls:
        for address in told:
            agent.send(address, b"a word")
    found["connect"] = calls.count / count
    await until(lambda: agent.transport.outgoing.shaken == count)
    with Calls() as calls:
        for address in told:
            agent.send(address, b"another")
    found["send"] = calls.count / count
    for _ in range(count):
        others.send_multipart([CONTROL, b"other", b"a word"])
    await note("hear over a connection made here", count, lambda: len(agent.heard) == 4 * count)
    with Calls() as calls:
        for number in range(count):
            agent.send(f"127.0.0.1:{1000 + number}", b"back")
    found["answer"] = calls.count / count
    for dealer in dealers:
        dealer.close(0)
    others.close(0)
    await note("end", 2 * count, lambda: len(agent.closed) == 2 * count)
    return found


def test_no_message_and_no_connection_costs_more_where_there_are_more_peers(
    peers: zmq.Context[zmq.Socket[bytes]],
) -> None:
    found: list[dict[str, float]] = []

    async def scene(agent: Agent, count: int) -> None:
        agent.transport.incoming.strangers_of_a_host = 1000
        found.append(await _calls(agent, peers, count))

    for count in (200, 400):
        play(lambda agent, count=count: scene(agent, count))
    few, many = found
    growth = {what: round(many[what] / few[what], 2) for what in few}
    assert max(growth.values()) < 1.5, f"calls for one of each, with 200 peers and with 400: {few}, {many}"


@pytest.mark.parametrize("limit", ["MOST_BYTES", "_MOST_BYTES_OF_ALL"])
def test_a_peer_that_does_not_read_loses_its_connection_and_the_others_go_on(
    peers: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(router, limit, 4 << 20)

    async def scene(agent: Agent) -> None:
        others, port = listening(peers)  # its end of a connection that is made to it
        stuck, reader = connected(peers, agent, 0), connected(peers, agent, 1)
        for dealer in (stuck, reader):
            dealer.send_multipart([CONTROL, b"peer", b"hello"])
        await until(lambda: len(agent.heard) == 2)
        told = ["127.0.0.1:1000", f"127.1.0.1:{port}"]
        read = 0
        for number in range(3000):
            for address in told:
                if address not in agent.closed:
                    agent.send(address, b"x" * (1 << 16))
            agent.send("127.0.0.1:1001", b"%d" % number)
            await asyncio.sleep(0)
            with contextlib.suppress(zmq.Again):
                while True:
                    assert reader.recv_multipart(zmq.NOBLOCK)[2] == b"%d" % read
                    read += 1
            if len(agent.closed) == len(told):
                break
        await until(lambda: sorted(agent.closed) == sorted(told))
        assert agent.transport.counters["too_slow"] == 2
        assert [event for event, _ in agent.logged] == ["peer-slow"], "the other is in its next line, a minute later"
        assert others.getsockopt(zmq.EVENTS) & zmq.POLLIN
        stuck.close(0)
        again = connected(peers, agent, 0)
        again.send_multipart([CONTROL, b"peer", b"here I am again"])
        await until(lambda: len(agent.heard) == 3)
        agent.send("127.0.0.1:1000", b"welcome")
        await until(lambda: again.poll(0))
        assert again.recv_multipart()[2] == b"welcome"

    play(scene)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_attempt_for_which_there_is_no_descriptor_is_a_lost_peer_and_is_made_again(
    peers: zmq.Context[zmq.Socket[bytes]],
) -> None:
    async def scene(agent: Agent) -> None:
        others, port = listening(peers)
        told = addresses(5, port)
        with no_descriptors():
            for address in told:
                agent.send(address, b"lost")
            await until(lambda: len(agent.closed) == 5)
        assert all(event == "unreachable" and "Too many open files" in str(said) for event, said in agent.logged)
        for address in told:
            agent.send(address, b"heard")
        heard: list[bytes] = []

        def all_have_heard() -> bool:
            with contextlib.suppress(zmq.Again):
                heard.append(others.recv_multipart(zmq.NOBLOCK)[2])
            return len(heard) == 5

        await until(all_have_heard)
        assert set(heard) == {b"heard"}

    play(scene)


def test_a_connection_for_which_no_descriptor_is_left_is_ended_with_one_line(
    peers: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperpodrun.rendezvous.transport.most_connections", lambda: 3)

    async def scene(agent: Agent) -> None:
        dealers = [connected(peers, agent, number) for number in range(3)]
        for dealer in dealers:
            dealer.send_multipart([CONTROL, b"peer", b"hello"])
        await until(lambda: len(agent.heard) == 3)
        dealers += [connected(peers, agent, number) for number in range(3, 6)]
        await until(lambda: agent.transport.counters["too_many"] >= 3)
        assert [event for event, _ in agent.logged] == ["peer-refused"]
        assert agent.closed == []
        agent.send("127.0.0.1:1", b"x")
        await until(lambda: agent.closed == ["127.0.0.1:1"])
        assert [event for event, _ in agent.logged] == ["peer-refused", "unreachable"]
        assert all("no descriptors" in str(said) for _, said in agent.logged)

    play(scene)


def test_a_limit_that_is_too_low_for_the_job_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((256, 128), (1024, 768), (20000, 19744)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert incoming.most_connections() == most
        assert incoming.descriptor_warning(most) is None
        said = incoming.descriptor_warning(most + 1) or ""
        assert f"with {most + 1} nodes" in said
        assert "ulimit -Hn" in said


@pytest.mark.parametrize("said", [True, False], ids=["the first has spoken", "the first has said nothing"])
def test_a_descriptor_that_is_another_agents_before_the_end_of_the_first_is_told_costs_the_second_nothing(
    said: bool,
) -> None:
    first, second = b"one|127.0.0.1:1", b"two|127.0.0.1:2"

    async def scene(agent: Agent) -> None:
        side = agent.transport.incoming
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            connection, _ = server.accept()
        descriptor = connection.fileno()
        side._on_event(zmq.EVENT_ACCEPTED, descriptor, "")
        if said:
            side._on_message(first, [CONTROL, b"one", b"hello"], descriptor)
        side._on_message(second, [CONTROL, b"two", b"hello"], descriptor)
        left = ["127.0.0.1:1"] if said else []
        assert agent.closed == left
        for event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_ACCEPTED):
            side._on_event(event, descriptor, "")
        await asyncio.sleep(3 * incoming._CLOSED_WITHIN_S)
        assert agent.closed == left
        client.close()
        await until(lambda: not is_open(descriptor, side._connections[descriptor].seen))
        side._on_event(zmq.EVENT_DISCONNECTED, descriptor, "")
        assert agent.closed == [*left, "127.0.0.1:2"]
        assert len(side) == 0
        connection.close()

    play(scene)
