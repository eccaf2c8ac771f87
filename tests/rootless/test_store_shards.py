"""The parts of the shared store one by one: who owns, what is asked once, and what arrives."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.room import Room
from hyperpodrun.rootless.shard_messages import Ask, Batch, Forget, encode
from hyperpodrun.rootless.sharding import crowds
from hyperpodrun.rootless.sharding.epoch import MAX_OWNERS, owners_among
from hyperpodrun.rootless.sharding.link import Link, Links
from hyperpodrun.rootless.sharding.places import Places
from hyperpodrun.rootless.wire import READY, STOP_WAITING, WAIT_CANCELED, WireError, decode_blobs
from shard_cluster import Client, ShardCluster


@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 100, 10_000])
def test_at_most_32_nodes_own_keys_and_they_are_spread_over_all(nodes: int) -> None:
    numbers = tuple(range(5, 5 + nodes))
    owners = owners_among(numbers)
    assert len(owners) == len(set(owners)) == min(nodes, MAX_OWNERS)
    assert set(owners) <= set(numbers)
    gaps = {later - owner for owner, later in pairwise(owners)}
    assert all(abs(gap - max(nodes / MAX_OWNERS, 1)) <= 1 for gap in gaps)


@pytest.fixture
def cluster() -> ShardCluster:
    return ShardCluster(3)


def key_of(cluster: ShardCluster, node: int, number: int = 0) -> bytes:
    """The so-manieth key that a node owns."""
    keys = (b"key-%d" % count for count in range(1000))
    return [key for key in keys if cluster.nodes[0].shards._epochs[0].owner_of(key) == node][number]


def ask(cluster: ShardCluster, client: Client, request: rq.Request) -> bytes:
    before = len(client.heard)
    client.ask(request)
    cluster.run()
    assert len(client.heard) == before + 1
    return client.heard[-1]


def test_eight_ranks_of_a_node_ask_no_more_than_one() -> None:
    """Waits, reads and checks of what others have published."""
    counts: list[tuple[Counter[int], Counter[int]]] = []
    for ranks in (1, 8):
        cluster = ShardCluster(4)
        keys = tuple(b"0//cpu//0/%d" % number for number in range(200))
        publisher = cluster.nodes[1].client()
        for key in keys:
            ask(cluster, publisher, rq.Set(key, b"address"))
        cluster.messages.clear()
        cluster.bytes.clear()
        clients = [cluster.nodes[0].client() for _ in range(ranks)]
        for request in (rq.Wait(keys), rq.MultiGet(keys), rq.Check(keys), rq.Wait(keys[:7]), rq.Get(keys[3])):
            for client in clients:
                client.ask(request)
            cluster.run()
            assert len({client.heard[-1] for client in clients}) == 1
        assert [client.heard[2] for client in clients] == [READY] * ranks
        counts.append((cluster.messages.copy(), cluster.bytes.copy()))
    assert counts[0] == counts[1]


def test_a_change_waits_until_no_copy_of_the_value_before_it_is_left(cluster: ShardCluster) -> None:
    key = key_of(cluster, 0)
    writer, reader = cluster.nodes[0].client(), cluster.nodes[1].client()
    ask(cluster, writer, rq.Set(key, b"1"))
    assert ask(cluster, reader, rq.Wait((key,))) == STOP_WAITING
    writer.ask(rq.Set(key, b"2"))
    assert cluster.nodes[0].shards.holds(writer.session)
    assert cluster.nodes[0].keyspace.value(0, key) == b"1"
    cluster.run()
    assert not cluster.nodes[0].shards.holds(writer.session)
    assert decode_blobs(ask(cluster, reader, rq.Get(key))) == [b"1"], "what its wait has brought along"
    assert ask(cluster, reader, rq.Wait((key,))) == STOP_WAITING
    assert decode_blobs(ask(cluster, reader, rq.Get(key))) == [b"2"]


def test_a_key_that_was_deleted_can_be_copied_again(cluster: ShardCluster) -> None:
    """So that a loop that publishes, reads and deletes costs the same each time, and leaves nothing behind."""
    key = key_of(cluster, 0)
    writer, reader = cluster.nodes[2].client(), cluster.nodes[1].client()
    held: list[list[int]] = []
    for _ in range(4):
        ask(cluster, writer, rq.Set(key, b"1"))
        ask(cluster, reader, rq.Wait((key,)))
        ask(cluster, writer, rq.DeleteKey(key))
        cluster.run()
        owner = cluster.nodes[0].shards._exchange._owned[0]
        assert not owner._single
        assert not owner._revoking
        held.append([node.room.held for node in cluster.nodes])
    assert held[0] == held[3]


def test_one_push_frees_one_of_the_clients_that_wait_for_a_queue_on_any_node(cluster: ShardCluster) -> None:
    """They have asked together, before anybody knew that it would be a queue."""
    key = key_of(cluster, 0)
    clients = [node.client() for node in cluster.nodes for _ in range(3)]
    for client in clients:
        client.ask(rq.Wait((key,)))
    cluster.run()
    pusher = cluster.nodes[1].client()
    for count in range(1, 10):
        ask(cluster, pusher, rq.QueuePush(key, b"%d" % count))
        free = [client for client in clients if client.heard]
        assert len(free) == count
    elements = [ask(cluster, client, rq.QueuePop(key))[16:] for client in clients]
    assert sorted(elements) == [b"%d" % count for count in range(1, 10)]


@pytest.mark.parametrize("many", [False, True])
def test_a_fault_frees_who_waits_for_keys_that_others_own(monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    if many:
        for limit in ("_MANY", "_MUCH", "_WORTH"):
            monkeypatch.setattr(crowds, limit, 0)
    cluster = ShardCluster(4)
    keys = tuple(b"0//cpu//0/%d" % number for number in range(100))
    writer = cluster.nodes[1].client()
    for key in keys[1:]:
        ask(cluster, writer, rq.Set(key, b"address"))
    clients = [node.client() for node in cluster.nodes for _ in range(3)]
    for client in clients:
        client.ask(rq.Wait(keys))
    cluster.run()
    assert not any(client.heard for client in clients)
    for node in cluster.nodes:
        node.fail(0)
    assert all(client.heard == [WAIT_CANCELED] for client in clients)
    cluster.run()
    cluster.open(1)
    cluster.run()
    assert all(len(client.heard) == 1 for client in clients)


def test_an_owner_that_has_failed_the_epoch_frees_who_waits_elsewhere(cluster: ShardCluster) -> None:
    key = key_of(cluster, 0)
    client = cluster.nodes[1].client()
    client.ask(rq.Wait((key,)))
    cluster.run()
    cluster.nodes[0].fail(0)
    cluster.run()
    assert client.heard == [WAIT_CANCELED]


def test_an_owner_whose_epoch_has_gone_says_so(cluster: ShardCluster) -> None:
    key = key_of(cluster, 0)
    cluster.nodes[0].advance(1, range(3))
    client = cluster.nodes[1].client()
    client.ask(rq.Wait((key,)))
    cluster.run()
    assert client.heard == [WAIT_CANCELED]


@pytest.mark.parametrize("seed", range(50))
def test_messages_arrive_once_and_in_order_whatever_becomes_of_connections(seed: int) -> None:
    dice = random.Random(seed)
    under_way: list[tuple[int, Batch]] = []
    links = [Links(Room(), lambda *sent: under_way.append(sent), lambda delay, callback: None) for _ in range(2)]
    said: tuple[list[int], list[int]] = ([], [])
    heard: tuple[list[int], list[int]] = ([], [])

    def deliver() -> None:
        node, batch = under_way.pop(dice.randrange(len(under_way)))
        items = links[node].receive(1 - node, "agent", batch)
        heard[node].extend(item.serial for item in items if isinstance(item, Forget))

    for number in range(60):
        node = dice.randrange(2)
        links[node].put(0, 1 - node, Forget(number))
        said[1 - node].append(number)
        if dice.random() < 0.5:
            links[node].flush()
        if under_way and dice.random() < 0.6:
            deliver()
        if under_way and dice.random() < 0.1:
            del under_way[dice.randrange(len(under_way)) :]
            for end in range(2):
                links[end].lost(1 - end)
    for end in range(2):
        links[end].flush()
        links[end].lost(1 - end)
    while under_way:
        deliver()
    assert heard == said


def test_a_batch_is_bounded_in_bytes_and_what_is_acknowledged_is_not_held() -> None:
    room = Room()
    one, other = Link(0, room), Link(0, Room())
    for number in range(40):
        one.put(Ask(number, rq.Set(b"key", bytes(100_000))))
    one.put(Ask(40, rq.Set(b"key", bytes(5 << 20))))
    batches = one.batches()
    assert sum(len(batch.items) for batch in batches) == 41
    assert all(len(encode(batch)) < (1 << 20) + 1000 for batch in batches[:-1])
    assert len(batches[-1].items) == 1
    assert room.held > 40 * 100_000 + (5 << 20)
    for batch in batches:
        other.receive(batch)
    one.receive(other.acknowledgement())
    assert room.held == 0
    assert one.unacknowledged() == []


def test_a_node_that_nothing_is_open_with_is_not_called_again_when_its_connection_closes(cluster: ShardCluster) -> None:
    """It may have gone for good: whoever calls it would hear of one more connection that has closed, and so on."""
    client = cluster.nodes[0].client()
    ask(cluster, client, rq.Set(key_of(cluster, 1), b"1"))
    before = cluster.messages.copy()
    cluster.nodes[0].lost(1)
    cluster.nodes[1].lost(0)
    assert cluster.messages == before
    client.ask(rq.Wait((key_of(cluster, 1, 5),)))
    cluster.run()
    before = cluster.messages.copy()
    cluster.nodes[0].lost(1)
    assert cluster.messages[1] > before[1], "the answer may have been on its way"


def test_whether_keys_name_an_epoch_is_known_of_each_client_by_itself() -> None:
    """Where the keys of a long request belong is worked out once for all clients of a node."""
    keyspace = Keyspace()
    places = Places(keyspace, lambda epoch: True)
    bare = tuple(b"key-%d" % number for number in range(100))
    named = tuple(b"hyperpodrun-epoch-3/" + key for key in bare)
    first, second = keyspace.open(), keyspace.open()
    for session in (first, second):
        assert places.find(session, rq.Get(b"hyperpodrun-epoch-2/x" if session is first else b"x"))[0] in (2, 0)
        assert places.find(session, rq.Wait(bare)) == (0, bare)
    assert (first.named, second.named) == (2, None)
    for session in (first, second):
        assert places.find(session, rq.Wait(named)) == (3, bare)
        assert session.named == 3
    with pytest.raises(WireError, match="two epochs"):
        places.find(first, rq.Wait((*bare, *named)))


def test_the_only_owner_of_an_epoch_tells_others_of_changes_too() -> None:
    cluster = ShardCluster(3)
    for node in cluster.nodes:
        node.advance(1, range(1))
    writer, reader = cluster.nodes[0].client(), cluster.nodes[1].client()
    for value in (b"1", b"2", b"3"):
        ask(cluster, writer, rq.Set(b"key", value))
        assert ask(cluster, reader, rq.Wait((b"key",))) == STOP_WAITING
        assert decode_blobs(ask(cluster, reader, rq.Get(b"key"))) == [value]
