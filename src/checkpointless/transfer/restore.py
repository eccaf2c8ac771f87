"""Carrying the recovery plan out on one rank: keep, go back, give, receive, load.

The transfers of a plan are in one order, the same on every rank, and each rank takes part in its own, one after the
other: nobody waits in a circle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...protocol.plan import Origin, RestorePlan, Transfer
from ..ddp import ArrivalOrder
from ..errors import ChecksumError, RestoreError
from ..state.registry import Registry
from ..state.small import SmallState
from ..step.history import History
from ..step.rollback import KeptState
from ..step.tracker import StepTracker
from .buckets import Memory
from .disk import DiskCheckpoints
from .exchange import receive, send
from .header import Header, build, describe, read_small_state
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
        journal: History,
        tracker: StepTracker,
        order: ArrivalOrder,
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
        self._journal = journal
        self._tracker = tracker
        self._order = order
        self._rank = rank
        self._shard = shard
        self._checksum = checksum
        self._kept = kept
        self._snapshots = snapshots
        self._disk = disk
        self._on_change = on_change
        self.distrusted: int | None = None
        """A rank that has sent wrong bytes."""

    def run(self, plan: RestorePlan | None) -> SmallState:
        """Brings the registered state to the plan's target; the note of it.

        Raises RestoreError, and what the process group raises when a peer is lost.
        """
        if plan is None or plan.origin is Origin.START:
            return self._begin()
        if plan.transfers:
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
        return self._registry.notes.take(0)

    def _from_memory(self, plan: RestorePlan) -> SmallState:
        step, rank = plan.target_step, self._rank
        if rank in plan.rollbacks:
            assert self._kept is not None, "only who keeps a state reports it"
            self._on_change()
            self._kept.go_back(step, self._registry.state)
        note: SmallState | None = None
        for transfer in plan.transfers:
            if transfer.source == rank:
                self._give(transfer, self._live(step))
            elif transfer.receiver == rank:
                note = self._take(transfer, step)
        return note or self._put_back(step)

    def _from_snapshots(self, plan: RestorePlan) -> SmallState:
        assert self._snapshots is not None, "only who makes snapshots reports them"
        step, rank = plan.target_step, self._rank
        note: SmallState | None = None
        for transfer in plan.transfers:
            assert transfer.owner is not None
            if transfer.source == rank == transfer.receiver:
                header, saved = self._snapshots.load(transfer.owner, step)
                self._build(header, step).fill_from(saved)
                note = self._adopt(header, giver=transfer.owner)
            elif transfer.source == rank:
                self._give(transfer, self._snapshots.load(transfer.owner, step))
            elif transfer.receiver == rank:
                note = self._take(transfer, step)
        if note is None:
            raise RestoreError(f"the plan has no snapshot for rank {rank}")
        return note

    def _from_disk(self, step: int) -> SmallState:
        assert self._disk is not None, "only who has checkpoints reports them"
        header = self._disk.load(step, self._rank)
        self._build(header, step)
        self._disk.fill(step, self._shard, self._registry.state.named_tensors())
        return self._adopt(header, giver=self._rank)

    def _live(self, step: int) -> tuple[Header, Memory]:
        header = describe(self._registry, self._journal[step], self._tracker.learned(), self._order.indices)
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
        self._on_change()
        return build(self._registry, header, step)

    def _put_back(self, step: int) -> SmallState:
        """Parameters and optimizer are at `step`; all that an interrupted step has touched goes back to it."""
        note = self._journal[step]
        self._registry.notes.put_back(note)
        return note

    def _adopt(self, header: Header, *, giver: int) -> SmallState:
        """The small state that came with the tensors, which were those of rank `giver`.

        If that is another rank, what only this rank's earlier process knew is in its record.
        """
        note = read_small_state(header)
        if giver != self._rank:
            mine = self._journal.of_predecessor(header.step)
            if mine is None:
                _log.warning(
                    "rank %d: its random generators and data position of step %d are nowhere (they are lost with a "
                    "node; or see CheckpointManager.begin_backward); it goes on with those of rank %d's state",
                    self._rank,
                    header.step,
                    giver,
                )
            else:
                note.generators, note.local = mine.generators, mine.local
                note.buffers |= mine.buffers
        self._registry.notes.put_back(note)
        self._tracker.learn(*header.learned)
        self._order.indices = header.order
        return note
