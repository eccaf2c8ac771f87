"""Whatever becomes of messages, the stores of many nodes answer as one: for each key there is an order of all that was
done with it, which keeps to when it was done, and in which one store would have given just these answers.

Clients of four nodes do at random what torch's clients can do, with few keys, so that copies are made, shared, revoked
and joined all the time; messages overtake each other, come twice and are lost.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest
from histories import has_an_order
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.sharding import asks, crowds, relays
from hyperpodrun.rootless.wire import READY, STOP_WAITING, decode_blobs
from shard_cluster import Client, ShardCluster

NODES, CLIENTS, OPERATIONS, KEYS = 4, 3, 8, 6
KINDS = [
    *["set"] * 4, *["get"] * 4, *["gets"] * 3,
    "wait", "add", "append", "swap", "delete", "check", "push", "pop", "length",
]  # fmt: skip
OF_AN_EPOCH = 1 << 10
Play = Generator[rq.Request, bytes, None]
State = tuple[bytes | None, tuple[bytes, ...]]


@dataclass
class Done:
    """What a client did with a key, from the first step in which it can have happened to the last."""

    what: str
    given: bytes
    result: object
    begin: int
    end: int


def after(state: State, done: Done) -> State | None:
    """The state after it; None if one store would not have answered so."""
    value, queue = state
    match done.what:
        case "set":
            return done.given, queue
        case "append":
            return (value or b"") + done.given, queue
        case "add":
            total = int(value or b"0") + int(done.given)
            return (b"%d" % total, queue) if done.result == total else None
        case "swap":
            expected, desired = done.given.split(b">")
            if value is None and expected:
                return state if done.result == expected else None
            new = desired if value in (None, expected) else value
            return (new, queue) if done.result == new else None
        case "delete":
            return (None, queue) if done.result == (value is not None) else None
        case "get":
            return state if done.result == (value or b"") else None
        case "there":
            return state if done.result == (value is not None or bool(queue)) else None
        case "push":
            return value, (*queue, done.given)
        case "pop":
            return (value, queue[1:]) if done.result == (len(queue), queue[0] if queue else b"") else None
        case "length":
            return state if done.result == len(queue) else None
    raise AssertionError(done.what)


class Script:
    """What one client does, and what becomes of it."""

    def __init__(self, cluster: ShardCluster, client: Client, dice: random.Random, history: dict[bytes, list[Done]]):
        self._cluster = cluster
        self._client = client
        self._dice = dice
        self._history = history
        self._play = self._operations()
        self._asked = 0
        self._waits = 0
        """The number of the request that waits, if one does."""
        self.over = False
        client.on_answer = self._hear
        cluster.at(3 * dice.random(), lambda: self._go_on(None))

    def _hear(self, reply: bytes) -> None:
        self._waits = 0
        self._cluster.at(0.2 * self._dice.random(), lambda: self._go_on(reply))

    def _go_on(self, reply: bytes | None) -> None:
        try:
            request = next(self._play) if reply is None else self._play.send(reply)
        except StopIteration:
            self.over = True
            return
        self._asked += 1
        if isinstance(request, rq.Wait):
            self._waits = number = self._asked
            self._cluster.at(1 + 15 * self._dice.random(), lambda: self._give_up(number))
        self._client.ask(request)

    def _give_up(self, number: int) -> None:
        if self._waits == number:
            self._client.ask(rq.CancelWait())

    def _operations(self) -> Play:
        dice = self._dice
        keys = list(self._history)
        for _ in range(OPERATIONS):
            key, given = dice.choice(keys), b"%d" % dice.randrange(1, 5)
            match dice.choice(KINDS):
                case "set":
                    yield from self._do("set", key, rq.Set(key, given), given)
                case "append":
                    yield from self._do("append", key, rq.Append(key, given), given)
                case "push":
                    yield from self._do("push", key, rq.QueuePush(key, given), given)
                case "add":
                    yield from self._do("add", key, rq.Add(key, int(given)), given, number)
                case "swap":
                    expected = dice.choice([b"", b"1", b"2"])
                    given, request = expected + b">" + given, rq.CompareSet(key, expected, given)
                    yield from self._do("swap", key, request, given, lambda reply: decode_blobs(reply)[0])
                case "delete":
                    yield from self._do("delete", key, rq.DeleteKey(key), b"", lambda reply: bool(number(reply)))
                case "check":
                    yield from self._do("there", key, rq.Check((key,)), b"", lambda reply: reply == READY)
                case "length":
                    yield from self._do("length", key, rq.QueueLen(key), b"", number)
                case "get":
                    yield from self._get((key,))
                case "gets":
                    yield from self._get(tuple(dice.sample(keys, 2)))
                case "wait":
                    yield from self._wait(tuple(dice.sample(keys, dice.randrange(1, 3))))
                case "pop":
                    if (yield from self._wait((key,))):
                        yield from self._do("pop", key, rq.QueuePop(key), b"", popped)

    def _do(
        self, what: str, key: bytes, request: rq.Request, given: bytes, result: Callable[[bytes], object] = bytes
    ) -> Play:
        begin = self._cluster.steps
        reply = yield request
        self._history[key].append(Done(what, given, result(reply), begin, self._cluster.steps))

    def _wait(self, keys: tuple[bytes, ...]) -> Generator[rq.Request, bytes, bool]:
        begin = self._cluster.steps
        if (yield rq.Wait(keys)) != STOP_WAITING:
            return False
        for key in keys:
            self._history[key].append(Done("there", b"", True, begin, self._cluster.steps))
        return True

    def _get(self, keys: tuple[bytes, ...]) -> Play:
        """As torch's clients read: the two requests are one operation."""
        begin = self._cluster.steps
        if not (yield from self._wait(keys)):
            return
        reply = yield rq.Get(keys[0]) if len(keys) == 1 else rq.MultiGet(keys)
        for key, value in zip(keys, decode_blobs(reply), strict=True):
            self._history[key].append(Done("get", b"", value, begin, self._cluster.steps))


def number(reply: bytes) -> int:
    return int(struct.unpack("<q", reply)[0])


def popped(reply: bytes) -> tuple[int, bytes]:
    count = number(reply[:8])
    return count, decode_blobs(reply[8:])[0] if count else b""


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("seed", range(20))
def test_each_key_has_an_order_that_explains_every_answer(
    seed: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`many`: nodes tell each other what an owner answers, and ask by digests, as they do where there are many."""
    if many:
        for where, limit in ((crowds, "_MANY"), (crowds, "_MUCH"), (crowds, "_WORTH"), (asks, "_LONG")):
            monkeypatch.setattr(where, limit, 0)
        for where in (relays, crowds):
            monkeypatch.setattr(where, "BRANCHES", 1)
    dice = random.Random(seed)
    cluster = ShardCluster(NODES, dice)
    history: dict[bytes, list[Done]] = {b"key-%d" % number: [] for number in range(KEYS)}
    scripts = [Script(cluster, node.client(), dice, history) for node in cluster.nodes for _ in range(CLIENTS)]
    cluster.run()
    assert all(script.over for script in scripts)
    for key, done in history.items():
        done.sort(key=lambda one: one.begin)
        spans = [(one.begin, one.end) for one in done]
        found = has_an_order(spans, (None, ()), lambda state, index, all_of_it=done: after(state, all_of_it[index]))
        assert found, f"seed {seed}, {key!r}: {done}"
    cluster.open(1)
    cluster.run()
    for node in cluster.nodes:
        assert len(node.shards._asks) == len(node.shards._pending) == 0
        assert node.room.held == OF_AN_EPOCH, "nothing of an epoch that has gone is held"


@pytest.mark.parametrize("seed", range(20))
def test_a_fault_at_any_moment_leaves_nobody_without_an_answer(seed: int) -> None:
    """Each node hears of it at another time, and of the next epoch, in which everything works."""
    dice = random.Random(seed)
    cluster = ShardCluster(NODES, dice)
    history: dict[bytes, list[Done]] = {b"key-%d" % number: [] for number in range(KEYS)}
    scripts = [Script(cluster, node.client(), dice, history) for node in cluster.nodes for _ in range(CLIENTS)]
    moment = 30 * dice.random()
    for node in cluster.nodes:
        cluster.at(moment + 3 * dice.random(), lambda node=node: node.fail(0))  # type: ignore[misc]
        cluster.at(moment + 3 + 3 * dice.random(), lambda node=node: node.advance(1, range(NODES)))  # type: ignore[misc]
    cluster.run()
    assert all(script.over for script in scripts)
    writer, *readers = (node.client() for node in cluster.nodes)
    for reader in readers:
        reader.ask(rq.Wait((b"a", b"b", b"c")))
    for key in (b"a", b"b", b"c"):
        writer.ask(rq.Set(key, key))
        cluster.run(until=lambda: not writer.node.shards.holds(writer.session))
    cluster.run()
    for reader in readers:
        assert reader.heard == [STOP_WAITING]
        reader.ask(rq.MultiGet((b"a", b"b", b"c")))
        assert decode_blobs(reader.heard[-1]) == [b"a", b"b", b"c"]
    for node in cluster.nodes:
        assert len(node.shards._asks) == 0
