"""One store over many nodes: each key of an epoch has one owner, chosen by the key's hash.

Theory of operation. A client talks to the store of its own node. A request for keys that this node owns is dealt with
here; for others their owners are asked, and the client's next request waits until all of them have answered. So every
client sees its own writes, and what it wrote before it told somebody else, as with one store. At most 32 nodes own
keys (`sharding/epoch.py`), and what comes up for one of them in one turn of the event loop is one message, which
arrives once and in order whatever connections do (`sharding/link.py`).

A WAIT is registered at the owners and answered by them once, never polled; the answer brings the values, so that the
GET which a client of torch sends next is answered here. Clients of a node that wait for the same keys are asked for
once, and what they read is copied for the epoch (`sharding/copies.py`). An owner that changes a key has its copies
released first (`sharding/owner.py`), so a copy is never older than what the owner would answer. When every rank
publishes a key and reads all, a node sends and receives O(ranks) bytes in O(owners) messages, however many ranks it
has, and an owner O(ranks) bytes in O(nodes) messages: where many wait for the same, one says the keys for all, and they
pass the answer on to each other (`sharding/relays.py`). One key that all read costs its owner O(nodes), in one turn.

When an epoch fails, everything that is asked for in it is answered at once: waits with a cancel, the rest as the
keyspace answers for an epoch that has gone. An owner that is lost is a fault of the epoch.

What cannot be carried out costs the client that asked for it; an answer that does not fit its question costs the node
that gave it; an answer of another node than was asked is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import requests as rq
from . import wire
from .keyspace import Keyspace
from .namespace import Session
from .room import Room
from .shard_messages import MAX_SHARED_BYTES, Answer, Item, PassOn, Relay, Revoke, StoreMessage, Tell
from .sharding.asks import Asks
from .sharding.copies import Copies
from .sharding.epoch import SharedEpoch
from .sharding.exchange import Exchange, Send, Soon
from .sharding.link import Later
from .sharding.parts import Pending, answer_of_the_past, one_answer, part_of, size_of
from .sharding.places import Places
from .sharding.receiver import Receiver
from .sharding.relays import Relays
from .sharding.waits import ClientWaits

_ALL = rq.NumKeys | rq.ListKeys
_BLOCKING = rq.Wait | rq.Barrier
_READS = rq.Get | rq.MultiGet


class Shards:
    """One node's part in it: what its clients ask of others, and what others ask of it.

    `send(node, message)` may lose messages; `lost` tells when. `soon` and `later` are those of the event loop.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        receivers: dict[Session, Receiver],
        send: Send,
        own: Callable[[], int],
        *,
        room: Room,
        soon: Soon,
        later: Later,
    ) -> None:
        self._keyspace = keyspace
        self._receivers = receivers
        self._own = own
        self._room = room
        self._exchange = Exchange(keyspace, receivers, room, send, own, soon, later, self._hear)
        self._asks = Asks(self._exchange.put)
        self._relays = Relays(self._exchange.put)
        self._epochs: dict[int, SharedEpoch] = {}
        self._places = Places(keyspace, self.is_shared)
        self._pending: dict[Session, Pending] = {}
        self._waits = ClientWaits(self._asks, self._pending, self._answer)

    # ---- epochs ----------------------------------------------------------------------------------------------------

    def open(self, epoch: int, nodes: Sequence[int]) -> None:
        """An epoch is shared by these nodes, which are told alike everywhere. Older ones have gone."""
        for old, known in list(self._epochs.items()):
            if old < epoch or (old == epoch and known.nodes != tuple(nodes)):
                self._end(old)
        self._exchange.advance(epoch)
        self._relays.advance(epoch)
        if epoch not in self._epochs:
            self._epochs[epoch] = SharedEpoch(epoch, tuple(nodes), Copies(epoch, self._room))

    def fail(self, epoch: int) -> int:
        """Everything that is asked for in an epoch is answered now; how many waits that frees."""
        known = self._epochs.get(epoch)
        if known is None:
            return 0
        known.failed = True
        freed = 0
        for session, pending in [(s, p) for s, p in self._pending.items() if p.epoch == epoch]:
            freed += isinstance(pending.request, _BLOCKING)
            self._abandon(session, pending)
        return freed

    def leave(self) -> None:
        """This node is in another job, or in none: whoever is spoken with from now on has heard nothing yet."""
        for epoch in list(self._epochs):
            self._end(epoch)
        self._exchange.close()
        self._relays.close()

    def lost(self, node: int) -> None:
        """A connection is gone, with what was under way: it is said again."""
        self._exchange.lost(node, waits=self._asks.waits_for(node))

    def is_shared(self, epoch: int) -> bool:
        """Whether other nodes own keys of it, too."""
        own = self._own()
        return epoch in self._epochs and any(node != own for node in self._epochs[epoch].owners)

    def listeners(self, epoch: int) -> tuple[tuple[str, int], ...]:
        """The gloo listeners that have passed by in an epoch."""
        return tuple(self._epochs[epoch].listeners) if epoch in self._epochs else ()

    def last_write_ns(self, epoch: int) -> int | None:
        return self._epochs[epoch].last_write_ns if epoch in self._epochs else None

    # ---- this node's clients ---------------------------------------------------------------------------------------

    def take(self, session: Session, request: rq.Request, now_ns: int) -> bool:
        """Whether others are asked for this; the answer is then sent to the session's receiver."""
        self._exchange.now_ns = now_ns
        before = self._pending.get(session)
        if before is not None:  # its client has given the wait up
            self._drop(session, before)
        if isinstance(request, rq.CancelWait):
            if before is not None:
                self._answer(session, [wire.WAIT_CANCELED])
            return before is not None
        number, keys = self._places.find(session, request)
        epoch = self._epochs.get(number)
        if isinstance(request, _READS):
            if self._read_here(session, request, number, keys):
                return True
        else:
            self._waits.promises.pop(session, None)
        if epoch is None or isinstance(request, rq.Validate | rq.Ping):
            return False
        if not self.is_shared(number) and not self._exchange.is_asked(number):
            return False
        epoch.observe(request, now_ns)
        return self._share(session, request, epoch, keys)

    def holds(self, session: Session) -> bool:
        """Whether the session's next request must wait. One that blocks can be given up, so it does not count."""
        pending = self._pending.get(session)
        return pending is not None and not isinstance(pending.request, _BLOCKING)

    def close(self, session: Session) -> None:
        """A client is gone."""
        self._waits.promises.pop(session, None)
        pending = self._pending.get(session)
        if pending is not None:
            self._drop(session, pending)

    # ---- other nodes -----------------------------------------------------------------------------------------------

    def receive(self, node: int, asker: str, message: StoreMessage, now_ns: int) -> None:
        """Another store speaks. Raises WireError for an answer that does not fit its question."""
        self._exchange.now_ns = now_ns
        if not message.over:
            self._exchange.receive(node, asker, message)
        elif message.epoch in self._epochs and node in self._epochs[message.epoch].owners:
            self.fail(message.epoch)

    # ---- inside ------------------------------------------------------------------------------------------

    def _read_here(self, session: Session, request: rq.Request, number: int, keys: tuple[bytes, ...]) -> bool:
        """Answers a read of copies, and of what the client's last WAIT has brought along."""
        promise = self._waits.promises.get(session)
        if promise is not None and promise.copies.epoch != number:
            promise = None
        copies = (
            promise.copies if promise is not None else self._epochs[number].copies if number in self._epochs else None
        )
        reply = copies.reply(keys, promise) if copies is not None and keys else None
        if reply is not None:
            self._answer(session, reply)
        return reply is not None

    def _share(self, session: Session, request: rq.Request, epoch: SharedEpoch, keys: tuple[bytes, ...]) -> bool:
        """Answers a request with copies, or asks the owners; False if that is this node alone."""
        waits = isinstance(request, rq.Wait)
        if waits and keys and self._waits.join(session, epoch, keys):
            return True
        if (size := size_of(request)) > MAX_SHARED_BYTES:  # whoever owns it: what works must not depend on a hash
            raise wire.WireError(f"a request of {size} bytes is over the limit of {MAX_SHARED_BYTES} on several nodes")
        own = self._own()
        everywhere = isinstance(request, _ALL)
        parts = {node: [] for node in epoch.owners} if everywhere else epoch.by_owner(enumerate(keys))
        if all(node == own for node in parts) and not self._exchange.is_needed_for(epoch.number, request, keys):
            if isinstance(request, _READS):
                epoch.note_listeners(self._keyspace.value(epoch.number, key) for key in keys)
            return False
        pending = Pending({session: None}, request, epoch.number, keys)
        self._pending[session] = pending
        if epoch.failed or epoch.number < self._keyspace.epoch:
            self._abandon(session, pending)
        elif waits:
            self._waits.begin(pending, epoch)
        else:
            self._ask(pending, epoch, parts)
        return True

    def _ask(self, pending: Pending, epoch: SharedEpoch, parts: dict[int, list[int]]) -> None:
        """The owners of what there are no copies of."""
        request, keys = pending.request, pending.keys
        if isinstance(request, rq.Check):
            parts = epoch.by_owner((index, key) for index, key in enumerate(keys) if key not in epoch.copies)
        elif isinstance(request, rq.MultiGet):
            promise = self._waits.promises.get(next(iter(pending.sessions)))
            if promise is not None and promise.copies is not epoch.copies:
                promise = None
            for key in keys:
                value = epoch.copies.find(key, promise)
                if value is not None:
                    pending.values[key] = value
            parts = epoch.by_owner((index, key) for index, key in enumerate(keys) if key not in pending.values)
        for node, indices in parts.items():
            part = part_of(request, keys, indices)
            self._asks.ask(node, part, (pending,), epoch=epoch.number, indices=indices)
        if not parts:
            self._complete(pending)

    def _end(self, epoch: int) -> None:
        self.fail(epoch)
        self._epochs.pop(epoch).copies.close()

    def _complete(self, pending: Pending) -> None:
        """Every part of a request that is one client's is answered."""
        (session,) = pending.sessions
        del self._pending[session]
        if isinstance(pending.request, rq.ListKeys):
            keys = [key for _, answer in pending.answers for key in wire.decode_blobs(answer.reply[8:])]
            keys = [self._keyspace.full_key(session, pending.epoch, key) for key in keys]
            self._answer(session, [wire.encode_i64(len(keys)), *wire.encode_blobs(keys)])
        elif isinstance(pending.request, rq.Barrier):
            self._answer(session, [wire.STOP_WAITING])
        else:
            self._answer(session, one_answer(pending))

    def _abandon(self, session: Session, pending: Pending) -> None:
        """It is answered as for an epoch that has gone."""
        self._drop(session, pending)
        if isinstance(pending.request, _BLOCKING):
            session.cancel_unasked = True
        self._answer(session, answer_of_the_past(pending.request))

    def _drop(self, session: Session, pending: Pending) -> None:
        del self._pending[session]
        self._waits.drop(session, pending, self._epochs.get(pending.epoch))

    def _answer(self, session: Session, reply: list[bytes]) -> None:
        receiver = self._receivers.get(session)
        if receiver is not None:
            receiver.send(reply)

    def _hear(self, number: int, node: int, item: Item) -> None:
        """What is not for an owner."""
        epoch = self._epochs.get(number)
        if epoch is None:
            return
        match item:
            case Answer():
                if item.kept:
                    self._relays.answered(number, node, item)
                self._answered(epoch, node, item)
            case Relay() if item.targets:
                self._answered(epoch, item.owner, self._relays.take(number, item))
            case PassOn():
                self._relays.pass_on(number, node, item)
            case Tell():
                self._asks.tell(number, node, item.serial)
            case Revoke():
                self._waits.revoked(epoch, node, item)

    def _answered(self, epoch: SharedEpoch, node: int, answer: Answer) -> None:
        part = self._asks.answered(node, answer)
        if part is None:
            return
        if answer.refused:  # it was these clients' mistake
            for session, pending in [(session, one) for one in part.waiting for session in one.sessions]:
                self._drop(session, pending)
                if session in self._receivers:
                    self._receivers[session].refuse(answer.refused)
        elif isinstance(part.request, _BLOCKING) and answer.reply == wire.WAIT_CANCELED:
            for session, pending in [(session, one) for one in part.waiting for session in one.sessions]:
                self._abandon(session, pending)
        elif isinstance(part.request, rq.Wait):
            self._waits.answered(epoch, part, answer)
        else:
            (pending,) = part.waiting
            pending.answers.append((part, answer))
            if isinstance(part.request, _READS):
                epoch.note_listeners(wire.decode_blobs(answer.reply))
            if not pending.parts:
                self._complete(pending)
