"""Several stores that answer as one, with torch's own clients: whichever node a client asks, the keys are the same."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless import shard_messages
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.room import Room
from hyperpodrun.rootless.server import StoreServer
from hyperpodrun.rootless.shard_messages import MAX_SHARED_BYTES, Answer, Ask, Batch, StoreMessage
from hyperpodrun.rootless.shards import Shards
from hyperpodrun.rootless.wire import STOP_WAITING, WireError
from msgspec import structs
from wire_client import RawClient, blob

dist = pytest.importorskip("torch.distributed")
LIMIT = timedelta(seconds=20)
LARGE = b"x" * (MAX_SHARED_BYTES // 2 + 1)


class Stores:
    """The stores of some nodes on one event loop; messages between them are encoded, delayed and, on request, lost."""

    def __init__(self, count: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.servers = [StoreServer(log=lambda line: self.lines.append(line)) for _ in range(count)]
        self.sharings: list[Shards] = []
        self.cut: set[int] = set()
        self.lines: list[str] = []
        self.blamed: list[tuple[int, str]] = []
        """Nodes whose messages were not fit to be taken, and why."""
        self.messages = self.asks = 0
        self._dice = random.Random(5)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.ports = [self.call(server.start()) for server in self.servers]
        for node, server in enumerate(self.servers):
            self.do(lambda node=node, server=server: self.sharings.append(self._share(node, server)))
        self.open(0)

    def _share(self, node: int, server: StoreServer) -> Shards:
        return server.share(lambda other, message: self._carry(node, other, message), lambda: node)

    def _carry(self, node: int, other: int, message: StoreMessage) -> None:
        self.messages += 1
        self.asks += sum(isinstance(item, Ask) for item in message.items)
        data = shard_messages.encode(message)
        if not self.cut & {node, other}:
            self.loop.call_later(0.0005 * self._dice.random(), self._deliver, node, other, data)

    def _deliver(self, node: int, other: int, data: bytes) -> None:
        try:
            self.sharings[other].receive(node, f"agent-{node}", shard_messages.decode(data), 1)
        except WireError as error:
            self.blamed.append((node, str(error)))

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def do(self, action: Callable[[], Any]) -> Any:
        async def act() -> Any:
            return action()

        return self.call(act())

    def open(self, epoch: int) -> None:
        def act() -> None:
            for server, sharing in zip(self.servers, self.sharings, strict=True):
                server.advance(epoch)
                sharing.open(epoch, range(len(self.servers)))

        self.do(act)

    def client(self, node: int) -> Any:
        return dist.TCPStore("127.0.0.1", self.ports[node], is_master=False, wait_for_workers=False, timeout=LIMIT)

    def close(self) -> None:
        for server in self.servers:
            self.call(server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores(3)
    yield made
    made.close()


def test_what_one_node_writes_every_node_reads(stores: Stores) -> None:
    clients = [stores.client(node) for node in range(3)]
    for number in range(30):
        clients[number % 3].set(f"key-{number}", f"value-{number}")
    for client in clients:
        assert [client.get(f"key-{number}") for number in range(30)] == [b"value-%d" % n for n in range(30)]
        assert client.check([f"key-{number}" for number in range(30)])
        assert not client.check(["key-1", "nothing"])
        assert client.multi_get([f"key-{n}" for n in range(30)]) == [b"value-%d" % n for n in range(30)]
        assert client.num_keys() >= 30
    assert stores.messages > 30, "most keys belong to another node"


def test_counters_have_one_owner(stores: Stores) -> None:
    def count(client: Any) -> None:
        for _ in range(50):
            client.add("counter", 1)

    clients = [stores.client(node) for node in range(3)]
    threads = [threading.Thread(target=count, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [client.add("counter", 0) for client in clients] == [150] * 3


def test_every_other_operation_reaches_the_owner(stores: Stores) -> None:
    one, other, third = (stores.client(node) for node in range(3))
    one.multi_set([f"m{n}" for n in range(12)], [f"{n}" for n in range(12)])
    assert other.multi_get([f"m{n}" for n in range(12)]) == [b"%d" % n for n in range(12)]
    for n in range(6):
        one.append(f"a{n}", "x")
        assert one.get(f"a{n}") == b"x"  # an append has no answer: without this, the next could be there before it
        other.append(f"a{n}", "y")
        assert other.get(f"a{n}") == third.get(f"a{n}") == b"xy"
        assert one.compare_set(f"c{n}", "", "first") == b"first"
        assert other.compare_set(f"c{n}", "first", "second") == b"second"
        assert third.compare_set(f"c{n}", "first", "third") == b"second"
        assert other.delete_key(f"c{n}")
        assert not third.check([f"c{n}"])


def test_queues_reach_the_owner(stores: Stores) -> None:
    """In a process of their own: torch's client keeps the GIL in these calls, and the stores here need it."""
    program = """
import sys, threading
from torch.distributed import TCPStore
one, other, third = (TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False) for port in sys.argv[1:])
for n in range(6):
    one.queue_push(f"q{n}", "p1")
    assert one.queue_len(f"q{n}") == 1
    other.queue_push(f"q{n}", "p2")
    assert other.queue_len(f"q{n}") == 2
    assert [third.queue_pop(f"q{n}"), one.queue_pop(f"q{n}")] == [b"p1", b"p2"]
    assert third.queue_len(f"q{n}") == 0
"""
    command = [sys.executable, "-c", program, *map(str, stores.ports)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_a_wait_is_answered_once_the_last_key_is_there_and_never_polls(stores: Stores) -> None:
    one, other = stores.client(0), stores.client(1)
    keys = [f"late-{n}" for n in range(9)]
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (one.wait(keys, LIMIT), done.set()))
    waiting.start()
    for key in keys[:-1]:
        other.set(key, "here")
    before = stores.do(lambda: stores.asks)
    assert not done.wait(0.3)
    assert stores.do(lambda: stores.asks) - before <= 6, "what was under way, and no polls"
    other.set(keys[-1], "here")
    assert done.wait(10)
    waiting.join()
    assert one.get(keys[-1]) == b"here"


def test_a_fault_frees_every_wait_on_every_node_and_later_ones(stores: Stores) -> None:
    clients = [stores.client(node) for node in range(3)]
    errors: list[BaseException] = []

    def wait(client: Any, key: str) -> None:
        try:
            client.get(key)
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=wait, args=(clients[node], f"never-{node}-{n}")) for node in range(3) for n in range(1)
    ]
    for thread in threads:
        thread.start()
    while stores.do(lambda: sum(len(sharing._pending) for sharing in stores.sharings)) < 1:
        pass
    for server in stores.servers:
        stores.do(lambda server=server: server.cancel(0))
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(errors) == 3
    with pytest.raises(dist.DistStoreError):
        clients[0].get("never-again")
    stores.open(1)
    prefixed = [dist.PrefixStore("hyperpodrun-epoch-1", client) for client in clients]
    prefixed[0].set("new", "epoch")
    assert [store.get("new") for store in prefixed] == [b"epoch"] * 3, "the connections are as good as before"


def test_what_a_broken_connection_swallowed_is_asked_again_and_applied_once(stores: Stores) -> None:
    client = stores.client(0)
    key = next(f"k{n}" for n in range(99) if stores.sharings[0]._epochs[0].owner_of(b"k%d" % n) == 1)
    assert client.add(key, 1) == 1
    stores.do(lambda: stores.cut.add(1))
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(client.add(key, 1)))
    thread.start()
    while not stores.do(lambda: len(stores.sharings[0]._asks)):
        pass
    stores.do(stores.cut.clear)
    for _ in range(3):
        stores.do(lambda: stores.sharings[0].lost(1))
    thread.join(10)
    assert results == [2]
    assert client.add(key, 0) == 2


def test_torchs_client_gives_a_wait_up_and_goes_on(stores: Stores) -> None:
    client = stores.client(0)
    for n in range(4):
        with pytest.raises(dist.DistStoreError):
            client.wait([f"nothing-{n}"], timedelta(seconds=0.1))
    client.set("after", "all")
    assert client.get("after") == b"all"


def test_gloo_listeners_of_all_nodes_are_known_on_each(stores: Stores) -> None:
    """A rank's address is published on one node and read on the others: all must know it to abort."""
    address = b"\x02\x00\x1f\x90\x0a\x4d\x00\x0b".ljust(128, b"\0")
    value = (4).to_bytes(8, "little") + b"host" + (136).to_bytes(8, "little") + address + b"\xff" * 8
    stores.client(0).set("0/1", value)
    for node in (1, 2):
        stores.client(node).get("0/1")
    found = [stores.do(lambda server=server: server.published_listeners(0)) for server in stores.servers]
    assert found == [(("10.77.0.11", 8080),)] * 3


@pytest.mark.parametrize(
    ("before", "mistake"),
    [
        ([rq.Set(b"{}", b"text")], rq.Add(b"{}", 1)),
        ([rq.Set(b"{}", b"text")], rq.Barrier(b"{}", 3)),
        ([], rq.Set(b"{}", LARGE * 2)),
        ([], rq.MultiSet(((b"{}", LARGE), (b"{}+", LARGE)))),
        ([rq.Append(b"{}", LARGE), rq.Append(b"{}", LARGE)], rq.Get(b"{}")),
    ],
    ids=["add", "barrier", "set", "multi_set", "get"],
)
def test_a_mistake_with_the_store_costs_one_client_and_no_node(stores: Stores, before: Any, mistake: Any) -> None:
    for number in range(6):  # keys of every node are among them
        with RawClient(stores.ports[0]) as good, RawClient(stores.ports[0]) as bad:
            for request in before:
                good.send(named(request, number))
                assert good.in_step()
            bad.send(named(mistake, number))
            if isinstance(mistake, rq.Get) and _owner(stores, number) == 0:
                continue  # what is here need not go anywhere
            assert bad.closed()
            assert good.in_step()
    assert stores.blamed == []
    assert stores.lines
    assert all("store_malformed" in line for line in stores.lines)
    clients = [RawClient(port) for port in stores.ports]
    clients[1].send(rq.Set(b"after", b"1"), rq.Ping(1))
    assert clients[1].read(4)
    clients[2].send(rq.Get(b"after"))
    assert clients[2].read(9) == blob(b"1")
    for client in clients:
        client.socket.close()


def named(request: Any, number: int) -> Any:
    """The request, with keys of this number."""
    if isinstance(request, rq.MultiSet):
        return rq.MultiSet(tuple((key.replace(b"{}", b"k%d" % number), value) for key, value in request.items))
    return structs.replace(request, key=request.key.replace(b"{}", b"k%d" % number))


def _owner(stores: Stores, number: int) -> int:
    return stores.sharings[0]._epochs[0].owner_of(b"k%d" % number)


class Asking:
    """The asking side alone: what it asks, and what its one client hears."""

    def __init__(self) -> None:
        keyspace = Keyspace()
        self.sent: list[tuple[int, Batch]] = []
        self.heard: list[bytes] = []
        self.session = keyspace.open()
        self._said: dict[int, int] = {}
        self.sharing = Shards(
            keyspace,
            {self.session: self},
            lambda *sent: self.sent.append(sent),
            lambda: 0,
            room=Room(),
            soon=lambda callback: None,
            later=lambda seconds, callback: None,
        )
        self.sharing.open(0, (0, 1, 2))
        self.keys = [b"k%d" % n for n in range(40) if self.sharing._epochs[0].owner_of(b"k%d" % n) == 1]

    def send(self, reply: list[bytes]) -> None:
        self.heard.append(b"".join(reply))

    def refuse(self, reason: str) -> None:
        self.heard.append(reason.encode())

    def abort(self) -> None:
        raise AssertionError("nobody closes the store")

    def ask(self, request: Any) -> Ask:
        assert self.sharing.take(self.session, request, 0)
        self.sharing._exchange.flush()
        node, batch = self.sent[-1]
        assert node == 1
        (ask,) = batch.items
        assert isinstance(ask, Ask)
        return ask

    def answer(self, node: int, answer: Answer) -> None:
        self._said[node] = number = self._said.get(node, 0) + 1
        self.sharing.receive(node, f"agent-{node}", Batch(0, number, 0, (answer,)), 0)


def test_an_answer_of_a_node_that_was_not_asked_is_not_taken() -> None:
    asking = Asking()
    ask = asking.ask(rq.Wait((asking.keys[0],)))
    asking.answer(2, Answer(ask.serial, STOP_WAITING, (b"forged",)))
    assert asking.heard == []
    asking.answer(1, Answer(ask.serial, STOP_WAITING, (b"true",)))
    assert asking.heard == [STOP_WAITING]
    assert asking.sharing.take(asking.session, rq.Get(asking.keys[0]), 0)
    assert asking.heard[1:] == [blob(b"true")]


@pytest.mark.parametrize(
    ("request_of", "reply", "values"),
    [
        (lambda keys: rq.Wait(keys[:2]), STOP_WAITING, ()),
        (lambda keys: rq.Wait(keys[:2]), STOP_WAITING, (b"1",)),
        (lambda keys: rq.Wait(keys[:1]), b"maybe", ()),
        (lambda keys: rq.MultiGet(keys[:2]), blob(b"one"), ()),
        (lambda keys: rq.MultiGet(keys[:1]), b"\xff" * 20, ()),
        (lambda keys: rq.Get(keys[0]), b"", ()),
        (lambda keys: rq.Get(keys[0]), blob(b"one") * 2, ()),
        (lambda keys: rq.Get(keys[0]), blob(b"one"), (b"one",)),
        (lambda keys: rq.Check(keys[:1]), b"", ()),
        (lambda keys: rq.Add(keys[0], 1), b"1", ()),
        (lambda keys: rq.DeleteKey(keys[0]), b"", ()),
        (lambda keys: rq.QueuePop(keys[0]), b"\x01" + bytes(7), ()),
        (lambda keys: rq.Set(keys[0], b"1"), b"thanks", ()),
        (lambda keys: rq.Barrier(keys[0], 3), b"", ()),
    ],
)
def test_an_answer_that_does_not_fit_its_question_costs_who_gave_it(request_of: Any, reply: bytes, values: Any) -> None:
    asking = Asking()
    ask = asking.ask(request_of(tuple(asking.keys)))
    with pytest.raises(WireError):
        asking.answer(1, Answer(ask.serial, reply, values))
    assert asking.heard == [], "the client waits on: its epoch ends with that node"
    asking.sharing.fail(0)
    assert len(asking.heard) == 1 or isinstance(ask.request, rq.Set)
