"""What two nodes' stores say to each other about an epoch: once, and in order, whatever becomes of their connections.

All that is to be said in one turn of the event loop goes in one message. It is kept until the other side has said that
it has arrived; after a connection has broken, or where a number is missing, it is sent again, and what arrives twice is
left out. So an ask is carried out once, and what an owner says of a key arrives in the order in which it was true.
Where there is nothing to say, an acknowledgement waits for a while, or for many bytes: only memory depends on it.

No I/O, no clock. Called by: `shards.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from ..room import Room
from ..shard_messages import Answer, Ask, Batch, Item, Relay, Revoke, StoreMessage
from .parts import size_of

_BATCH_BYTES = 1 << 20
"""A message has no more than this, or one item."""
_OWED_BYTES = 256 << 10
"""After so many bytes they are acknowledged even if there is nothing else to say,"""
ACKNOWLEDGE_S = 0.2
"""and after so long."""
_AHEAD = 64
"""So many messages are kept that came before one that is missing; the rest is sent again."""
_OF_AN_ITEM = 32

Later = Callable[[float, Callable[[], None]], object]


class Link:
    """Both directions with one node, of one epoch."""

    def __init__(self, epoch: int, room: Room) -> None:
        self._epoch = epoch
        self.peer = ""
        """Which incarnation of the agent there is spoken with: the first that has said something."""
        self._room = room
        self._outbox: list[Item] = []
        self._sent: deque[tuple[Batch, int]] = deque()
        self._held = 0
        self._number = 0
        self._received = 0
        self._ahead: dict[int, Batch] = {}
        self._missed = -1
        self.owed = 0
        """Bytes that have arrived and are not acknowledged."""

    def put(self, item: Item) -> None:
        """To be said this turn."""
        self._outbox.append(item)

    def batches(self) -> list[Batch]:
        """All that is to be said, which is then under way."""
        items, self._outbox = self._outbox, []
        made: list[Batch] = []
        first, size = 0, 0
        for index, item in enumerate(items):
            more = _size_of(item)
            if size and size + more > _BATCH_BYTES:
                made.append(self._batch(tuple(items[first:index]), size))
                first, size = index, 0
            size += more
        if items:
            made.append(self._batch(tuple(items[first:]), size))
            self.owed = 0
        return made

    def _batch(self, items: tuple[Item, ...], size: int) -> Batch:
        self._number += 1
        batch = Batch(self._epoch, self._number, self._received, items)
        self._sent.append((batch, size))
        self._room.hold(size)
        self._held += size
        return batch

    def unacknowledged(self) -> list[Batch]:
        """What the other side may not have."""
        return [replace(batch, received=self._received) for batch, _ in self._sent]

    def acknowledgement(self, *, again: bool = False) -> Batch:
        self.owed = 0
        return Batch(self._epoch, 0, self._received, again=again)

    def receive(self, batch: Batch) -> tuple[Sequence[Item], bool]:
        """What is new in it, and whether something before it is missing, which is said once."""
        while self._sent and self._sent[0][0].number <= batch.received:
            self._free(self._sent.popleft()[1])
        if not batch.number:
            return (), False
        self.owed += _OF_AN_ITEM + sum(map(_size_of, batch.items))
        if batch.number <= self._received:
            return (), False
        if batch.number > self._received + 1:
            if len(self._ahead) < _AHEAD:
                self._ahead[batch.number] = batch
            missed, self._missed = self._missed, self._received
            return (), missed != self._received
        self._received += 1
        if not self._ahead:
            return batch.items, False
        items = list(batch.items)
        while (following := self._ahead.pop(self._received + 1, None)) is not None:
            items += following.items
            self._received += 1
        return items, False

    def close(self) -> None:
        self._free(self._held)

    def _free(self, size: int) -> None:
        self._room.give(size)
        self._held -= size


class Links:
    """The links with all nodes. `send(node, message)` may lose messages; `later(seconds, callback)` is the loop's."""

    def __init__(self, room: Room, send: Callable[[int, StoreMessage], None], later: Later) -> None:
        self._room = room
        self._send = send
        self._later = later
        self._links: dict[int, dict[int, Link]] = {}
        """By node and epoch."""
        self._full: dict[tuple[int, int], Link] = {}
        """Those that have something to say."""
        self._owing: dict[tuple[int, int], Link] = {}
        self._waits_to_acknowledge = False

    def put(self, epoch: int, node: int, item: Item) -> None:
        """To be said at the end of this turn."""
        link = self._full[node, epoch] = self._of(epoch, node)
        link.put(item)

    def flush(self) -> None:
        """The end of a turn."""
        full, self._full = self._full, {}
        for (node, epoch), link in full.items():
            for batch in link.batches():
                self._send(node, batch)
            self._owing.pop((node, epoch), None)

    def receive(self, node: int, peer: str, batch: Batch) -> Sequence[Item]:
        """What is new in it, in order."""
        link = self._of(batch.epoch, node)
        link.peer = link.peer or peer
        if link.peer != peer:  # it was started again, with which the epoch has failed
            return ()
        items, missing = link.receive(batch)
        if batch.again:
            for sent in link.unacknowledged():
                self._send(node, sent)
        if missing:
            self._send(node, link.acknowledgement(again=True))
        elif link.owed > _OWED_BYTES:
            self._send(node, link.acknowledgement())
        elif link.owed:
            self._owing[node, batch.epoch] = link
            if not self._waits_to_acknowledge:
                self._waits_to_acknowledge = True
                self._later(ACKNOWLEDGE_S, self._acknowledge)
        return items

    def lost(self, node: int, *, waits: bool = False) -> None:
        """A connection is gone, with what was under way. `waits`: something is to come, of which the other side may
        believe that it has been said. Where nothing is open nothing is said: the node may have gone for good."""
        for link in self._links.get(node, {}).values():
            for batch in link.unacknowledged():
                self._send(node, batch)
            if waits:
                self._send(node, link.acknowledgement(again=True))

    def advance(self, epoch: int) -> None:
        """Older epochs are not spoken of any more."""
        self.flush()
        for node, links in list(self._links.items()):
            for old in [old for old in links if old < epoch]:
                links.pop(old).close()
                self._owing.pop((node, old), None)
            if not links:
                del self._links[node]

    def close(self) -> None:
        """Nothing is spoken of any more."""
        for links in self._links.values():
            for link in links.values():
                link.close()
        for table in (self._links, self._full, self._owing):
            table.clear()

    def _acknowledge(self) -> None:
        self._waits_to_acknowledge = False
        owing, self._owing = self._owing, {}
        for (node, _), link in owing.items():
            if link.owed:
                self._send(node, link.acknowledgement())

    def _of(self, epoch: int, node: int) -> Link:
        links = self._links.setdefault(node, {})
        if epoch not in links:
            links[epoch] = Link(epoch, self._room)
        return links[epoch]


def _size_of(item: Item) -> int:
    match item:
        case Ask():
            return _OF_AN_ITEM + size_of(item.request)
        case Answer():
            return _OF_AN_ITEM + len(item.reply) + 16 * len(item.values) + sum(map(len, filter(None, item.values)))
        case Relay():
            return 9 * len(item.targets) + 16 * len(item.values) + sum(map(len, filter(None, item.values)))
        case Revoke():
            return _OF_AN_ITEM + len(item.key) + 9 * len(item.serials)
    return _OF_AN_ITEM
