"""What the shared store costs a node as nodes become more: counted, never timed.

Each pattern is played on 200 and on 400 nodes, of which four own keys. Twice the nodes may cost a node at most twice
the messages, bytes and executed lines of code, the node that serves others and the one that only asks alike.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hyperpodrun.rootless
import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.sharding import asks, crowds, epoch
from hyperpodrun.rootless.wire import STOP_WAITING, decode_blobs
from shard_cluster import Client, ShardCluster

OWNERS = 4
SOURCE = str(Path(hyperpodrun.rootless.__file__).parent)
VALUE = b"an address of gloo's".ljust(154, b".")


class Lines:
    """Counts the lines of the store's code that some nodes execute; a step of a loop is one."""

    def __init__(self, nodes: set[int]) -> None:
        self._nodes = nodes
        self._now = -1
        self.counts: Counter[int] = Counter()

    def watch(self, node: int) -> None:
        self._now = node
        sys.settrace(self._call if node in self._nodes else None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.counts[self._now] += 1
        return self._line


@dataclass
class Cost:
    """Of the busiest of those nodes that own keys, and of those that own none."""

    owner: int
    other: int


Ranks = list[Client]
Step = Iterator[None]


def ask_all(ranks: Ranks, request_of: Callable[[int], rq.Request]) -> None:
    for rank, client in enumerate(ranks):
        client.ask(request_of(rank))


def all_gather(ranks: Ranks, prefix: bytes = b"0//cpu//0/") -> Step:
    """As gloo does with its newer store calls: a set, then a wait and a read of all."""
    keys = tuple(b"/hyperpodrun-epoch-0/%s%d" % (prefix, rank) for rank in range(len(ranks)))
    ask_all(ranks, lambda rank: rq.Set(keys[rank], VALUE))
    yield
    ask_all(ranks, lambda rank: rq.Wait(keys))
    yield
    ask_all(ranks, lambda rank: rq.MultiGet(keys))
    yield
    assert all(decode_blobs(client.heard[-1]) == [VALUE] * len(ranks) for client in ranks[:: len(ranks) // 4])


def all_gather_that_waits_first(ranks: Ranks) -> Step:
    """Most ranks wait when the last one publishes."""
    keys = tuple(b"0//cpu//0/%d" % rank for rank in range(len(ranks)))
    for rank in range(len(ranks) - 1):
        ranks[rank].ask(rq.Set(keys[rank], VALUE))
    yield
    for client in ranks[:-1]:
        client.ask(rq.Wait(keys))
    yield
    ranks[-1].ask(rq.Set(keys[-1], VALUE))
    yield
    assert all(client.heard[-1] == STOP_WAITING for client in ranks[:-1])


def one_to_all(ranks: Ranks) -> Step:
    """The id of an NCCL communicator."""
    for client in ranks[1:]:
        client.ask(rq.Wait((b"0//cuda//0",)))
    yield
    ranks[0].ask(rq.Set(b"0//cuda//0", VALUE))
    yield
    for client in ranks[1:]:
        client.ask(rq.Get(b"0//cuda//0"))
    yield
    assert all(decode_blobs(client.heard[-1]) == [VALUE] for client in ranks[1:])


def counter(ranks: Ranks) -> Step:
    """Torch's barrier in a store: all count, the last one says so."""
    ask_all(ranks, lambda rank: rq.Add(b"arrived", 1))
    yield
    ranks[-1].ask(rq.Set(b"last", b"1"))
    yield
    ask_all(ranks, lambda rank: rq.Wait((b"last",)))
    yield
    assert all(client.heard[-1] == STOP_WAITING for client in ranks)


def barrier(ranks: Ranks) -> Step:
    ask_all(ranks, lambda rank: rq.Barrier(b"barrier", len(ranks)))
    yield
    assert all(client.heard[-1] == STOP_WAITING for client in ranks)


def neighbours(ranks: Ranks) -> Step:
    """Each rank waits for a key of its own."""
    ask_all(ranks, lambda rank: rq.Wait((b"from-%d" % ((rank + 1) % len(ranks)),)))
    yield
    ask_all(ranks[::2], lambda index: rq.CancelWait())
    ask_all(ranks[::2], lambda index: rq.Set(b"from-%d" % (2 * index), b"1"))
    yield


def changes(ranks: Ranks) -> Step:
    """A key that all have read is changed, three times, and then deleted."""
    for turn in range(3):
        ranks[turn].ask(rq.Set(b"state", b"%d" % turn))
        yield
        ask_all(ranks, lambda rank: rq.Wait((b"state",)))
        yield
        ask_all(ranks, lambda rank: rq.Get(b"state"))
        yield
        assert all(decode_blobs(client.heard[-1]) == [b"%d" % turn] for client in ranks)
    ranks[3].ask(rq.DeleteKey(b"state"))
    yield


def groups(ranks: Ranks) -> Step:
    """Every eight ranks make a group, and so do those that have the same place in each."""
    for members in (8, -8):
        teams = [ranks[first : first + 8] for first in range(0, len(ranks), 8)] if members > 0 else []
        teams = teams or [ranks[first::8] for first in range(8)]
        steps = [all_gather(team, b"%d/%d//cpu//0/" % (members, number)) for number, team in enumerate(teams)]
        while steps:
            steps = [step for step in steps if next(step, steps) is None]
            yield


def checks(ranks: Ranks) -> Step:
    ask_all(ranks, lambda rank: rq.Check((b"dump", b"0/%d" % rank)))
    yield
    ask_all(ranks, lambda rank: rq.CompareSet(b"first", b"", b"%d" % rank))
    yield
    ask_all(ranks, lambda rank: rq.NumKeys())
    yield


def play(nodes: int, pattern: Callable[[Ranks], Step]) -> tuple[Cost, Cost, Cost]:
    cluster = ShardCluster(nodes)
    owners = set(cluster.nodes[0].shards._epochs[0].owners)
    assert len(owners) == OWNERS
    others = set(range(nodes)) - owners
    lines = Lines({*owners, *sorted(others)[:: nodes // 4]})
    ranks = [node.client() for node in cluster.nodes]
    cluster.watch = lines.watch
    for _ in pattern(ranks):
        cluster.run()
    sys.settrace(None)
    assert not any(client.refused for client in ranks)
    return tuple(  # type: ignore[return-value]
        Cost(max(count[node] for node in owners), max(count[node] for node in others))
        for count in (cluster.messages, cluster.bytes, lines.counts)
    )


@pytest.mark.parametrize(
    "pattern",
    [
        all_gather,
        all_gather_that_waits_first,
        one_to_all,
        counter,
        barrier,
        neighbours,
        changes,
        groups,
        checks,
    ],
    ids=lambda pattern: pattern.__name__,
)
def test_twice_the_nodes_cost_a_node_at_most_twice(
    pattern: Callable[[Ranks], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch, "MAX_OWNERS", OWNERS)
    for where, limit, low in ((crowds, "_MANY", 8), (crowds, "_MUCH", 0), (crowds, "_WORTH", 500), (asks, "_LONG", 99)):
        monkeypatch.setattr(where, limit, low)  # small groups, too, pass answers on
    small, large = play(200, pattern), play(400, pattern)
    for what, before, now, spare in zip(("messages", "bytes", "lines"), small, large, (40, 4000, 4000), strict=True):
        assert now.other <= 2 * before.other + spare, f"{what} of a node that owns nothing: {before}, {now}"
        assert now.owner <= 2 * before.owner + spare, f"{what} of an owner: {before}, {now}"
