"""The stores of many nodes in one thread and in virtual time: no socket, no clock, and nothing happens twice alike.

Messages between nodes are encoded. With dice they take their time, overtake each other, come twice or are lost, which
both ends hear a little later as of a connection that has closed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless import shard_messages
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.namespace import Session
from hyperpodrun.rootless.room import Room
from hyperpodrun.rootless.shard_messages import StoreMessage
from hyperpodrun.rootless.sharding.receiver import Receiver
from hyperpodrun.rootless.shards import Shards

LOST_AFTER = 3.0


class ShardCluster:
    """`watch` is entered around all that a node does."""

    def __init__(self, nodes: int, dice: random.Random | None = None) -> None:
        self.dice = dice
        self.now = 0.0
        self.steps = 0
        self.messages: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()
        """Of what each node has sent and received."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self.watch: Callable[[int], object] | None = None
        self.nodes = [Node(self, number) for number in range(nodes)]
        self.open(0)

    def open(self, epoch: int) -> None:
        for node in self.nodes:
            node.advance(epoch, range(len(self.nodes)))

    def at(self, delay: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._serial), callback))

    def send(self, sender: int, node: int, message: StoreMessage) -> None:
        data = shard_messages.encode(message)
        for end in (sender, node):
            self.messages[end] += 1
            self.bytes[end] += len(data)
        if self.dice is None:
            self.at(1, lambda: self.nodes[node].receive(sender, data))
            return
        fate = self.dice.random()
        if fate < 0.05:
            for end, other in ((sender, node), (node, sender)):
                self.at(LOST_AFTER * (1 + self.dice.random()), lambda end=end, other=other: self.nodes[end].lost(other))  # type: ignore[misc]
            return
        for _ in range(2 if fate > 0.95 else 1):
            self.at(2 * self.dice.random(), lambda: self.nodes[node].receive(sender, data))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left to happen."""
        while self._events and not until():
            self.now, _, callback = heapq.heappop(self._events)
            self.steps += 1
            callback()

    @contextmanager
    def watched(self, node: int) -> Iterator[None]:
        if self.watch is not None:
            self.watch(node)
        yield
        if self.watch is not None:
            self.watch(-1)


class Node:
    """One store."""

    def __init__(self, cluster: ShardCluster, number: int) -> None:
        self._cluster = cluster
        self.number = number
        self.room = Room()
        self.keyspace = Keyspace(room=self.room)
        self.receivers: dict[Session, Receiver] = {}
        self.shards = Shards(
            self.keyspace,
            self.receivers,
            lambda node, message: cluster.send(number, node, message),
            lambda: number,
            room=self.room,
            soon=lambda callback: cluster.at(0, lambda: self._turn(callback)),
            later=lambda seconds, callback: cluster.at(seconds * 1000, lambda: self._turn(callback)),
        )

    def _turn(self, callback: Callable[[], None]) -> None:
        with self._cluster.watched(self.number):
            callback()

    def advance(self, epoch: int, owners: range) -> None:
        for session, reply in self.keyspace.advance(epoch):
            self.receivers[session].send(reply)
        self.shards.open(epoch, owners)

    def fail(self, epoch: int) -> None:
        self.shards.fail(epoch)
        for session, reply in self.keyspace.cancel(epoch):
            self.receivers[session].send(reply)

    def receive(self, sender: int, data: bytes) -> None:
        with self._cluster.watched(self.number):
            self.shards.receive(sender, f"agent-{sender}", shard_messages.decode(data), self._cluster.steps)

    def lost(self, other: int) -> None:
        with self._cluster.watched(self.number):
            self.shards.lost(other)

    def client(self) -> Client:
        return Client(self._cluster, self)


class Client:
    """As a connection with one client of torch's: one request after the other."""

    def __init__(self, cluster: ShardCluster, node: Node) -> None:
        self._cluster = cluster
        self.node = node
        self.session = node.keyspace.open()
        node.receivers[self.session] = self
        self.heard: list[bytes] = []
        self.refused = ""
        self.on_answer: Callable[[bytes], None] = lambda reply: None

    def send(self, reply: list[bytes]) -> None:
        self.heard.append(b"".join(reply))
        self.on_answer(self.heard[-1])

    def refuse(self, reason: str) -> None:
        self.refused = reason

    def abort(self) -> None:
        raise AssertionError("nobody closes the store")

    def ask(self, request: rq.Request) -> None:
        """What it gets is in `heard`, now or later; an empty answer for what torch's clients get none to."""
        assert not self.node.shards.holds(self.session), "a connection would have waited"
        with self._cluster.watched(self.node.number):
            if self.node.shards.take(self.session, request, self._cluster.steps):
                return
            answers = self.node.keyspace.apply(self.session, request, self._cluster.steps)
            for session, reply in answers:
                self.node.receivers[session].send(reply)
            if isinstance(request, rq.Set | rq.MultiSet | rq.Append | rq.QueuePush):
                self.send([])

    def close(self) -> None:
        self.node.shards.close(self.session)
        self.node.keyspace.close(self.session)
        self.node.receivers.pop(self.session, None)
