"""Two incarnations of a job count their epochs alike: what a node says to the store of the other changes nothing."""

from __future__ import annotations

import zlib

from hyperpodrun.agent.node.cluster import ClusterHead
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.members import Configuration, Configurations, Member
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless import shard_messages

BATCH = shard_messages.Batch(0, 1, 0, (shard_messages.Ask(1, rq.Add(b"key", 1)),))


class Heard:
    """In the place of the store."""

    def __init__(self) -> None:
        self.messages: list[shard_messages.StoreMessage] = []
        self.left = 0

    def receive(self, node: int, asker: str, message: shard_messages.StoreMessage, now_ns: int) -> None:
        self.messages.append(message)

    def leave(self) -> None:
        self.left += 1


class Sent:
    """In the place of the network."""

    def __init__(self) -> None:
        self.messages: list[shard_messages.StoreMessage] = []

    def send(self, address: str, channel: bytes, data: bytes) -> None:
        self.messages.append(shard_messages.decode(data))


def head_of(founder: str) -> tuple[ClusterHead, Heard, Sent]:
    head, heard, sent = ClusterHead.__new__(ClusterHead), Heard(), Sent()
    head._sharing, head._transport, head._job = heard, sent, 0  # type: ignore[assignment]
    member = Member(4, "key", "host", "host:1", 1)
    configuration = Configuration(1, 1, (member,), 5, founder)
    head._do(msg.Members(Configurations(configuration, configuration), 4))
    return head, heard, sent


def test_a_store_hears_only_the_incarnation_that_it_is_in() -> None:
    head, heard, sent = head_of("one.1")
    other, other_heard, _ = head_of("other.1")
    head._send_store(4, BATCH)
    (message,) = sent.messages
    assert message.job == zlib.crc32(b"one.1")
    for receiver in (head, other):
        receiver._on_store_message("key", "host:1", shard_messages.encode(message))
    assert (heard.messages, other_heard.messages) == ([message], [])


def test_a_store_forgets_whom_it_spoke_with_in_another_incarnation() -> None:
    """Agents there were started again and count their messages anew; its epochs may have the same numbers."""
    head, heard, _ = head_of("one.1")
    left = heard.left
    member = Member(4, "key", "host", "host:1", 1)
    for founder, times in (("one.1", 0), ("other.1", 1), ("other.1", 1)):
        configuration = Configuration(2, 1, (member,), 5, founder)
        head._do(msg.Members(Configurations(configuration, configuration), 4))
        assert heard.left - left == times


def test_who_has_left_a_job_asks_its_stores_nothing_more() -> None:
    head, _, sent = head_of("one.1")
    head._do(msg.Members(Configurations(), None))
    head._send_store(4, BATCH)
    assert sent.messages == []
