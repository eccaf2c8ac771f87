"""The owner's side of the shared store: what nodes ask of the keys that this node owns, its own clients among them.

An ask that is for one client is a session of its own in the keyspace, so that a wait blocks there like a local
client's. A WAIT that is for a node's clients together joins the crowd that waits for the same keys (`crowds.py`), and
with its answer the node has copies of them, which its clients read without asking.

So before a key that was read is changed, and before any key that is waited for is deleted or becomes a queue, it is
revoked: each node that has it in a crowd drops its copy, and asks for each of its clients that wait. The change is held
until all have said so, and applied then: nobody reads the value before it once somebody has read the one after. From
then on the key is for single asks only, until it is deleted. Whoever is revoked waits for nobody, so no two wait for
each other; a node that never says so is one that the epoch fails with.

Costs: O(1) beside the keyspace for each ask, and once for each key that is changed after it was read O(nodes). An ask
that cannot be carried out is some client's mistake, so it is answered, with a refusal: it never costs the asking node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import requests as rq
from .. import wire
from ..keyspace import Keyspace
from ..namespace import Session
from ..room import Room
from ..shard_messages import MAX_SHARED_BYTES, Answer, Ask, Item, Join, Revoke
from .crowds import Crowds
from .parts import SILENT, keys_of
from .receiver import Receiver
from .values import values_of

Put = Callable[[int, Item], None]
"""(node, what it is told)."""


class _Asked:
    """One ask of one node, for one client, until it is answered."""

    def __init__(self, owner: EpochOwner, node: int, ask: Ask) -> None:
        self._owner = owner
        self.node = node
        self.ask = ask
        self.session: Session | None = None
        self.awaited = 0
        """So many keys must be released before it is applied."""
        self.over = False

    def send(self, reply: list[bytes]) -> None:
        """The keyspace has an answer."""
        size = sum(map(len, reply))
        if size > MAX_SHARED_BYTES:
            self.refuse(f"an answer of {size} bytes is over the limit of {MAX_SHARED_BYTES} between nodes")
            return
        data = b"".join(reply)
        values: tuple[bytes | None, ...] = ()
        if isinstance(self.ask.request, rq.Wait) and data == wire.STOP_WAITING:
            values = self._owner.values(self.ask.request.keys)
        self._give(Answer(self.ask.serial, data, values))

    def refuse(self, reason: str) -> None:
        """The asking node is told, and closes its client's connection."""
        self._give(Answer(self.ask.serial, b"", refused=reason))

    def _give(self, answer: Answer) -> None:
        if not self.over:
            self._owner.close(self)
            self._owner.put(self.node, answer)

    def abort(self) -> None:
        """The store closes: the asking node will see that for itself."""


@dataclass(eq=False)
class _Revocation:
    """A key that is being released, and what is to be done then."""

    nodes: set[int]
    held: list[_Asked] = field(default_factory=list)


class EpochOwner:
    """The owner's side of one epoch. `receivers` is the table by which the store delivers answers."""

    def __init__(
        self, epoch: int, keyspace: Keyspace, receivers: dict[Session, Receiver], room: Room, own: int, put: Put
    ) -> None:
        self.put = put
        self._epoch = epoch
        self._keyspace = keyspace
        self._receivers = receivers
        self._crowds = Crowds(epoch, keyspace, receivers, room, own, put)
        self._asked: dict[int, dict[int, _Asked]] = defaultdict(dict)
        """Those without an answer, by node and serial."""
        self._revoking: dict[bytes, _Revocation] = {}
        self._single: set[bytes] = set()
        """Keys that are there and have been changed after they were read."""

    def serve(self, node: int, ask: Ask, now_ns: int) -> None:
        """Applies an ask, now or when what it changes is released; its answer is put when there is one."""
        if ask.together and isinstance(ask.request, rq.Wait):
            if self._crowds.waits(node, ask.serial):  # another has said the keys that it was to say
                return
            promised = self._crowds.said(node, ask.serial)
            if not self._crowds.join(node, ask.serial, ask.request):
                self._begin_crowd(node, ask.serial, ask.request, now_ns)
            self._crowds.know(ask.request.keys, promised)
            return
        asked = self._asked[node][ask.serial] = _Asked(self, node, ask)
        self._carry_out(asked, now_ns)

    def join(self, node: int, join: Join) -> None:
        """Applies an ask for keys that the node need not say."""
        self._crowds.join_by_digest(node, join.serial, join.digest)

    def forget(self, node: int, serial: int) -> None:
        """The asking node's clients have given up."""
        asked = self._asked[node].get(serial)
        if asked is None:
            self._crowds.forget(node, serial)
            return
        if asked.session is not None and asked.session.waiter is not None:
            self._keyspace.apply(asked.session, rq.CancelWait(), 0)
        self.close(asked)

    def released(self, node: int, key: bytes, now_ns: int) -> None:
        """A node has no copy of a key any more."""
        revocation = self._revoking.get(key)
        if revocation is not None:
            revocation.nodes.discard(node)
            self._complete(key, now_ns)

    def is_needed_for(self, request: rq.Request) -> bool:
        """Whether a request of a client here for keys of this node must come through here."""
        return bool(self._to_release(request)) or (
            bool(self._single) and isinstance(request, rq.DeleteKey | rq.QueuePop)
        )

    def values(self, keys: tuple[bytes, ...]) -> tuple[bytes | None, ...]:
        """What a wait brings along."""
        return values_of(self._keyspace, self._epoch, keys, MAX_SHARED_BYTES, MAX_SHARED_BYTES)

    def close(self, asked: _Asked) -> None:
        """It is answered, or needs no answer."""
        asked.over = True
        self._asked[asked.node].pop(asked.ask.serial, None)
        session, asked.session = asked.session, None
        if session is not None:
            self._receivers.pop(session, None)
            self._keyspace.close(session)

    def end(self) -> None:
        """The epoch has gone, and who asked for it has been answered."""
        for asks in list(self._asked.values()):
            for asked in list(asks.values()):
                self.close(asked)
        self._crowds.end()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _carry_out(self, asked: _Asked, now_ns: int) -> None:
        request = asked.ask.request
        shared = self._to_release(request)
        if shared:
            asked.awaited = len(shared)
            for key in shared:
                self._revoke(key).held.append(asked)
            return
        session = asked.session = self._keyspace.open()
        session.epoch, session.named = self._epoch, None
        self._receivers[session] = asked
        try:
            answers = self._keyspace.apply(session, request, now_ns)
        except wire.WireError as error:
            asked.refuse(str(error))
            return
        except Exception as error:  # a fault in the store itself must cost one client, not a node
            asked.refuse(f"the store cannot carry it out: {error!r}")
            return
        for other, data in answers:
            self._receivers[other].send(data)
        if isinstance(request, SILENT):
            asked.send([])
        if isinstance(request, rq.DeleteKey | rq.QueuePop) and not self._keyspace.has(self._epoch, request.key):
            self._single.discard(request.key)  # what comes after it begins anew

    def _begin_crowd(self, node: int, serial: int, request: rq.Wait, now_ns: int) -> None:
        single = [key for key in request.keys if self._is_single(key)]
        if not single:
            self._crowds.begin(node, serial, request, now_ns)
            return
        for key in single[:-1]:
            self.put(node, Revoke(key))
        self.put(node, Revoke(single[-1], (serial,)))

    def _is_single(self, key: bytes) -> bool:
        return key in self._single or key in self._revoking or self._keyspace.is_queue(self._epoch, key)

    def _to_release(self, request: rq.Request) -> list[bytes]:
        """What must be released before this request is applied: it would be read, or waited for, as it was before."""
        match request:
            case rq.Set() | rq.MultiSet() | rq.Add() | rq.Append() | rq.CompareSet() | rq.Barrier():
                keys = dict.fromkeys(keys_of(request))
                return [key for key in keys if key in self._revoking or self._crowds.has_copies(key)]
            case rq.QueuePush():
                return [request.key] if request.key in self._revoking or request.key in self._crowds else []
            case rq.DeleteKey() if self._keyspace.has(self._epoch, request.key):
                return [request.key] if request.key in self._revoking or request.key in self._crowds else []
        return []

    def _revoke(self, key: bytes) -> _Revocation:
        """Has it released, unless that has begun."""
        revocation = self._revoking.get(key)
        if revocation is None:
            told = self._crowds.take_out(key)
            revocation = self._revoking[key] = _Revocation(set(told))
            for node, serials in told.items():
                self.put(node, Revoke(key, tuple(serials)))
        return revocation

    def _complete(self, key: bytes, now_ns: int) -> None:
        revocation = self._revoking[key]
        if revocation.nodes:
            return
        del self._revoking[key]
        self._single.add(key)
        for asked in revocation.held:
            asked.awaited -= 1
            if not asked.awaited and not asked.over:
                self._carry_out(asked, now_ns)
