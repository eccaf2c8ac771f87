"""Carrying the recovery plan out on one rank: keep, go back, give, receive, load.

The transfers of a plan are in one order, the same on every rank, and each rank takes part in its own, one after the
other: nobody waits in a circle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...protocol.plan import Origin, RestorePlan, Transfer
from ..arrivals import ArrivalOrders
from ..errors import ChecksumError, LocalStateLost, RestoreError
from ..state.registry import Registry
from ..state.small import SmallState, differing
from ..step.history import History
from ..step.rollback import KeptState
from ..step.tracker import StepTracker, listed
from .buckets import Memory
from .disk import DiskCheckpoints
from .exchange import receive, send
from .header import Header, build, describe, read_before, read_small_state
from .link import Link
from .snapshots import Snapshots

_log = logging.getLogger("hyperpodrun.checkpointless")


class Restorer:
    """What a rank has for a restore. One is made for each.

    `on_change` is called right before parameters and optimizer begin to change. A rank that only gives, or has what it
    needs, is never changed: a restore that fails, for whatever reason, does not cost its state.
    """

    def __init__(
        self,
        registry: Registry,
        history: History,
        tracker: StepTracker,
        orders: ArrivalOrders,
        *,
        rank: int,
        shard: str,
        checksum: bool = False,
        kept: KeptState | None = None,
        snapshots: Snapshots | None = None,
        disk: DiskCheckpoints | None = None,
        on_change: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._history = history
        self._tracker = tracker
        self._orders = orders
        self._rank = rank
        self._shard = shard
        self._checksum = checksum
        self._kept = kept
        self._snapshots = snapshots
        self._disk = disk
        self._on_change = on_change
        self.changed = False
        """The state of this rank was replaced: what it has kept for a rollback is of another past."""
        self.distrusted: int | None = None
        """A rank that has sent wrong bytes."""

    def run(self, plan: RestorePlan | None) -> SmallState:
        """Brings the registered state to the plan's target; the small state of it.

        Raises RestoreError, and what the process group raises when a peer is lost.
        """
        if plan is None or plan.origin is Origin.START:
            return self._begin()
        if plan.moves:
            Link().connect()
        match plan.origin:
            case Origin.MEMORY:
                return self._from_memory(plan)
            case Origin.SNAPSHOT:
                return self._from_snapshots(plan)
            case Origin.DISK:
                return self._from_disk(plan.target_step)
        raise RestoreError(f"a plan of an unknown origin, {plan.origin}")

    def _begin(self) -> SmallState:
        """There is nothing to go on from: the state is what the script has made."""
        return self._registry.taker.take(0)

    def _from_memory(self, plan: RestorePlan) -> SmallState:
        step, rank = plan.target_step, self._rank
        if rank in plan.rollbacks:
            assert self._kept is not None, "only who keeps a state reports it"
            self._begin_change()
            self._kept.go_back(step, self._registry.state)
        small: SmallState | None = None
        for transfer in plan.transfers:
            if transfer.source == rank:
                self._give(transfer, self._live(step))
            elif transfer.receiver == rank:
                small = self._take(transfer, step)
        return small or self._put_back(step)

    def _from_snapshots(self, plan: RestorePlan) -> SmallState:
        assert self._snapshots is not None, "only who makes snapshots reports them"
        step, rank = plan.target_step, self._rank
        small: SmallState | None = None
        for transfer in plan.transfers:
            assert transfer.owner is not None
            if transfer.source == rank == transfer.receiver:
                header, saved = self._snapshots.load(transfer.owner, step)
                self._build(header, step).fill_from(saved)
                small = self._adopt(header, giver=transfer.owner)
            elif transfer.source == rank:
                self._give(transfer, self._snapshots.load(transfer.owner, step))
            elif transfer.receiver == rank:
                small = self._take(transfer, step)
        if small is None:
            raise RestoreError(f"the plan has no snapshot for rank {rank}")
        return small

    def _from_disk(self, step: int) -> SmallState:
        assert self._disk is not None, "only who has checkpoints reports them"
        header = self._disk.load(step, self._rank)
        self._build(header, step)
        self._disk.fill(step, self._shard, self._registry.state.named_tensors())
        return self._adopt(header, giver=self._rank)

    def _live(self, step: int) -> tuple[Header, Memory]:
        history = self._history
        header = describe(
            self._registry,
            history[step],
            self._tracker.learned,
            self._orders.told(step),
            history.get(self._tracker.previous if self._tracker.previous < step else step - 1),
        )
        return header, Memory(self._registry.state.named_tensors())

    def _give(self, transfer: Transfer, parcel: tuple[Header, Memory]) -> None:
        header, memory = parcel
        send(Link(), transfer.receiver, header.as_dict(), memory, checksum=self._checksum)

    def _take(self, transfer: Transfer, step: int) -> SmallState:
        headers: list[Header] = []

        def make(fields: dict[str, Any]) -> Memory:
            headers.append(Header.from_dict(fields))
            return self._build(headers[0], step)

        try:
            receive(Link(), transfer.source, make)
        except ChecksumError as error:
            self.distrusted = error.source
            raise
        return self._adopt(headers[0], giver=transfer.source if transfer.owner is None else transfer.owner)

    def _build(self, header: Header, step: int) -> Memory:
        self._begin_change()
        return build(self._registry, header, step)

    def _begin_change(self) -> None:
        self.changed = True
        self._on_change()

    def _put_back(self, step: int) -> SmallState:
        """Parameters and optimizer are at `step`; all that an interrupted step has touched goes back to it."""
        small = self._history[step]
        self._registry.taker.put_back(small, generators=False)
        return small

    def _adopt(self, header: Header, *, giver: int) -> SmallState:
        """The small state that came with the tensors, which were those of rank `giver`.

        If that is another rank, what only this rank's earlier process knew is in its record.
        """
        small = read_small_state(header)
        if giver != self._rank:
            self._take_own_part(small, header, giver)
        self._registry.taker.distrust(frozenset(header.learned.untracked))
        self._registry.taker.put_back(small, generators=False)
        self._tracker.learned = header.learned
        self._orders.adopt(header.orders)
        return small

    def _take_own_part(self, small: SmallState, header: Header, giver: int) -> None:
        """Replaces the giver's local part by this rank's own, as far as it is known.

        An item that changes after the last backward pass is not in the record of a process that was lost there. Where
        it has changed in earlier steps, which this rank has seen, and was equal on both ranks when this step began, it
        is the same thing on both, and the giver's is this rank's. Otherwise it is nowhere: raises LocalStateLost. (What
        has never changed is equal on all ranks as long as it does not, and tells nothing.)
        """
        mine, theirs = self._history.of_predecessor(header.step), read_before(header)
        before = self._history.of_predecessor(theirs.step) if theirs is not None else None
        if mine is None and before is None:
            _log.warning(
                "rank %d: its random generators and data position of step %d are nowhere (they are lost with a "
                "node; or see CheckpointManager.begin_backward); it goes on with those of rank %d's state",
                self._rank,
                header.step,
                giver,
            )
            return
        everything = frozenset(item for item, _ in small.items())
        late = everything
        if mine is not None:
            late = frozenset() if mine.final else (mine.late | header.learned.late) & everything
        unseen = late - mine.late if mine is not None else frozenset()
        unequal = frozenset(
            item for item in _unequal(before, theirs, late) | unseen if not self._comes_from_a_replica(item, before)
        )
        if unequal:
            raise LocalStateLost(
                f"rank {self._rank}: {listed(unequal)} of step {header.step} is nowhere: it changes after "
                "the backward pass and is not the same on all ranks (let it change before backward, or in the same way "
                "everywhere, or keep the step before with rollback=True)",
                header.step,
            )
        if mine is not None:
            for item, _ in mine.items():
                if item not in late:
                    small.adopt(item, mine)
            small.forward, small.begun = mine.forward, mine.begun
            if "iterators of data loaders" not in late:
                small.starts = mine.starts
        else:
            small.forward = None

    def _comes_from_a_replica(self, item: str, before: SmallState | None) -> bool:
        """A buffer that no record holds: it is taken to be the same on all replicas."""
        kind, _, name = item.partition(" ")
        return kind == "buffer" and (before is None or name not in before.buffers)


def _unequal(one: SmallState | None, other: SmallState | None, items: frozenset[str]) -> frozenset[str]:
    """Those of the items that two small states do not have in common."""
    if one is None or other is None:
        return items
    mine = frozenset(item for item, _ in one.items())
    return differing(one, other, mine - items) | (items - mine)
