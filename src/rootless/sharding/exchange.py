"""What this node's store says to others, and to itself, and what it does with what they say.

Whatever comes up in a turn of the event loop is said at its end: to other nodes in one message each (`link.py`), to
itself at once. What is for an owner goes to the owner's side of its epoch, the rest to the side that asks. Called by:
`shards.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .. import requests as rq
from ..keyspace import Keyspace
from ..namespace import Session
from ..room import Room
from ..shard_messages import Answer, Ask, Batch, Forget, Item, Join, Released, StoreMessage
from .link import Later, Links
from .owner import EpochOwner
from .parts import part_of
from .receiver import Receiver

_WRITES = (
    rq.Set | rq.MultiSet | rq.Add | rq.Append | rq.CompareSet | rq.DeleteKey | rq.QueuePush | rq.QueuePop | rq.Barrier
)
Soon = Callable[[Callable[[], None]], object]
Send = Callable[[int, StoreMessage], None]


class Exchange:
    """`send(node, message)` may lose messages; `own` is this node; `soon` and `later` are the event loop's.

    `hear(epoch, node, item)`: of the side that asks.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        receivers: dict[Session, Receiver],
        room: Room,
        send: Send,
        own: Callable[[], int],
        soon: Soon,
        later: Later,
        hear: Callable[[int, int, Item], None],
    ) -> None:
        self._keyspace = keyspace
        self._receivers = receivers
        self._room = room
        self._send = send
        self._own = own
        self._soon = soon
        self._asking_side = hear
        self._links = Links(room, send, later)
        self._here: deque[tuple[int, Item]] = deque()
        """What this node says to itself."""
        self._turn = False
        self._owned: dict[int, EpochOwner] = {}
        self.now_ns = 0

    def put(self, epoch: int, node: int, item: Item) -> None:
        """To be said at the end of this turn."""
        if node == self._own():
            self._here.append((epoch, item))
        else:
            self._links.put(epoch, node, item)
        if not self._turn:
            self._turn = True
            self._soon(self.flush)

    def flush(self) -> None:
        """The end of a turn."""
        own = self._own()
        while self._here:
            epoch, item = self._here.popleft()
            try:
                self._hear(epoch, own, item)
            except Exception as error:  # a fault in the store itself must cost one client, not the agent
                if not isinstance(item, Ask):
                    raise
                self._here.append(
                    (epoch, Answer(item.serial, b"", refused=f"the store cannot carry it out: {error!r}"))
                )
        self._turn = False
        self._links.flush()

    def receive(self, node: int, peer: str, batch: Batch) -> None:
        """Another node speaks, of an epoch that has not gone here. Raises WireError."""
        if batch.epoch >= self._keyspace.epoch:
            for item in self._links.receive(node, peer, batch):
                self._hear(batch.epoch, node, item)
        elif batch.number:
            self._send(node, Batch(batch.epoch, 0, 0, over=True))

    def lost(self, node: int, *, waits: bool) -> None:
        """A connection is gone, with what was under way: it is said again. `waits`: an answer is to come."""
        self._links.lost(node, waits=waits)

    def is_asked(self, epoch: int) -> bool:
        """Whether this node was asked for keys of an epoch."""
        return epoch in self._owned

    def is_needed_for(self, epoch: int, request: rq.Request, keys: tuple[bytes, ...]) -> bool:
        """Whether a request of a client here, for keys of this node, changes what others have copies of."""
        owner = self._owned.get(epoch)
        if owner is None or not isinstance(request, _WRITES):
            return False
        return owner.is_needed_for(part_of(request, keys, range(len(keys))))

    def advance(self, epoch: int) -> None:
        """Older epochs are not spoken of any more."""
        for old in [old for old in self._owned if old < epoch]:
            self._owned.pop(old).end()
        self._links.advance(epoch)
        self._here = deque(entry for entry in self._here if entry[0] >= epoch)

    def close(self) -> None:
        """Nothing is spoken of any more."""
        while self._owned:
            self._owned.popitem()[1].end()
        self._links.close()
        self._here.clear()

    def _hear(self, epoch: int, node: int, item: Item) -> None:
        match item:
            case Ask():
                self._owner(epoch).serve(node, item, self.now_ns)
            case Join():
                self._owner(epoch).join(node, item)
            case Forget():
                self._owner(epoch).forget(node, item.serial)
            case Released():
                self._owner(epoch).released(node, item.key, self.now_ns)
            case _:
                self._asking_side(epoch, node, item)

    def _owner(self, epoch: int) -> EpochOwner:
        if epoch not in self._owned:
            self._owned[epoch] = EpochOwner(
                epoch,
                self._keyspace,
                self._receivers,
                self._room,
                self._own(),
                lambda node, item: self.put(epoch, node, item),
            )
        return self._owned[epoch]
