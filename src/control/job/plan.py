"""Who gives state to whom in a new epoch, decided from what every rank reported at the barrier.

The order of preference: the newest step that is whole in memory for every shard, then the newest snapshot, then disk.
Going on from an older state than the newest one is never silent: the plan counts the steps it loses.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import msgspec

from ...protocol.plan import Holding, Origin, RestorePlan, Transfer
from ...protocol.text import some

_SHARDS_NAMED = 8


class Report(msgspec.Struct, frozen=True):
    """A rank at the barrier. `managed`: its script has a CheckpointManager, which carries the plan out in full."""

    holding: Holding
    managed: bool = False
    node: int = 0


class Impossible(msgspec.Struct, frozen=True):
    """There is no state to go on from. `from_start`: no step has ever completed, so starting again loses nothing."""

    reason: str
    from_start: bool


Reports = Mapping[int, Report]
_Shards = dict[str, list[int]]


def make_plan(reports: Reports, shard_of: Mapping[int, str] | None = None, newest: int = 0) -> RestorePlan | Impossible:
    """The plan for these ranks.

    `shard_of`: what the ranks' earlier processes said of their shards; a new process does not know yet. `newest`: the
    most steps that any rank is known to have completed.
    """
    shards = _group(reports, shard_of or {})
    distrusted = {rank for report in reports.values() for rank in report.holding.distrusted}
    newest = max([newest, *(step for report in reports.values() for step in report.holding.steps)])
    refused = {step for report in reports.values() for step in report.holding.refused}
    found = (_from_memory(reports, shards, distrusted, refused), _from_snapshots(reports, shards, distrusted, refused))
    plans = [plan for plan in found if plan is not None]
    if plans:
        best = max(plans, key=lambda plan: plan.target_step)  # the first of equals: memory
        return msgspec.structs.replace(best, lost_steps=newest - best.target_step)
    disk = _from_disk(reports)
    if disk is not None:
        return msgspec.structs.replace(disk, lost_steps=max(0, newest - disk.target_step))
    if not any(report.managed for report in reports.values()):
        return RestorePlan(0, None, origin=Origin.START)
    if all(report.holding.shard is None for report in reports.values()) and newest == 0:
        return RestorePlan(0, None, origin=Origin.START)
    return Impossible(_explain(reports, shards, distrusted), from_start=newest == 0)


def _group(reports: Reports, shard_of: Mapping[int, str]) -> _Shards:
    """The ranks of every shard, ascending. Where all that is known is one shard, the unknown ones are of it too."""
    told = {rank: report.holding.shard or shard_of.get(rank) for rank, report in reports.items()}
    known = sorted({shard for shard in told.values() if shard is not None})
    shards: _Shards = defaultdict(list)
    for rank in sorted(reports):
        shard = told[rank]
        if shard is None:
            shard = known[0] if len(known) == 1 else "" if not known else f"unknown shard of rank {rank}"
        shards[shard].append(rank)
    return shards


def _from_memory(reports: Reports, shards: _Shards, distrusted: set[int], refused: set[int]) -> RestorePlan | None:
    """The newest step that every shard has a holder of."""
    holders: dict[str, dict[int, list[int]]] = {}
    for shard, ranks in shards.items():
        by_step: dict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            for step in reports[rank].holding.steps if rank not in distrusted else ():
                by_step[step].append(rank)
        holders[shard] = {step: _certain(reports, found, step) for step, found in by_step.items()}
    common = set.intersection(*(set(by_step) for by_step in holders.values())) - refused
    if not common:
        return None
    target = max(common)
    transfers: list[Transfer] = []
    rollbacks: list[int] = []
    for shard, ranks in shards.items():
        found = holders[shard][target]
        sources, holds_it = _Sources(reports, found), set(found)
        for rank in ranks:
            if rank not in holds_it:
                transfers.append(Transfer(sources.pick(rank), rank))
            elif reports[rank].holding.step != target:
                rollbacks.append(rank)
    lowest = min(by_step[target][0] for by_step in holders.values())
    return RestorePlan(target, lowest, _in_order(transfers), tuple(sorted(rollbacks)))


def _certain(reports: Reports, holders: list[int], step: int) -> list[int]:
    """Those whose pass has ended, if there are any: what it did after the update, the others do not know."""
    certain = [rank for rank in holders if not (reports[rank].holding.presumed and reports[rank].holding.step == step)]
    return certain or holders


def _from_snapshots(reports: Reports, shards: _Shards, distrusted: set[int], refused: set[int]) -> RestorePlan | None:
    """The newest step of which a snapshot of every shard can be read by somebody."""
    shard_of = {rank: shard for shard, ranks in shards.items() for rank in ranks}
    keepers: dict[str, dict[int, list[tuple[int, int]]]] = {shard: defaultdict(list) for shard in shards}
    for keeper in sorted(reports.keys() - distrusted):
        for owner, step in reports[keeper].holding.snapshots:
            if owner in shard_of:
                keepers[shard_of[owner]][step].append((keeper, owner))
    common = set.intersection(*(set(by_step) for by_step in keepers.values())) - refused
    if not common:
        return None
    target = max(common)
    transfers: list[Transfer] = []
    for shard, ranks in shards.items():
        kept = set(keepers[shard][target])
        owner_kept_by: dict[int, int] = {}
        for keeper, owner in keepers[shard][target]:
            owner_kept_by.setdefault(keeper, owner)
        sources = _Sources(reports, sorted(owner_kept_by))
        for rank in ranks:
            if (rank, rank) in kept:
                transfers.append(Transfer(rank, rank, rank))
                continue
            keeper = rank if rank in owner_kept_by else sources.pick(rank)
            transfers.append(Transfer(keeper, rank, owner_kept_by[keeper]))
    return RestorePlan(target, None, _in_order(transfers), origin=Origin.SNAPSHOT)


def _from_disk(reports: Reports) -> RestorePlan | None:
    """The newest checkpoint that every rank can load."""
    steps = [report.holding.disk for report in reports.values() if report.holding.disk is not None]
    if len(steps) < len(reports):
        return None
    return RestorePlan(min(steps), None, origin=Origin.DISK)


class _Sources:
    """Who can give one shard. They take turns, so that nobody has two more receivers than another; of those whose turn
    it is, one on the receiver's node, of these the lowest. O(1) for each receiver."""

    def __init__(self, reports: Reports, ranks: list[int]) -> None:
        """`ranks`: ascending."""
        self._reports = reports
        self._ranks = ranks
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._left = set(self._ranks)
        self._in_order = iter(self._ranks)
        self._on_node: dict[int, deque[int]] | None = None

    def pick(self, receiver: int) -> int:
        if not self._left:
            self._begin_turn()
        chosen = self._here(self._reports[receiver].node)
        if chosen is None:
            chosen = next(rank for rank in self._in_order if rank in self._left)
        self._left.remove(chosen)
        return chosen

    def _here(self, node: int) -> int | None:
        """The lowest on this node whose turn it is."""
        if self._on_node is None:
            self._on_node = defaultdict(deque)
            for rank in self._ranks:
                self._on_node[self._reports[rank].node].append(rank)
        here = self._on_node.get(node, deque())
        while here and here[0] not in self._left:
            here.popleft()
        return here[0] if here else None


def _in_order(transfers: list[Transfer]) -> tuple[Transfer, ...]:
    return tuple(sorted(transfers, key=lambda transfer: transfer.receiver))


def _explain(reports: Reports, shards: _Shards, distrusted: set[int]) -> str:
    """What a person needs to hear: which state is gone, and what would have kept it."""
    gone = [
        ranks
        for ranks in shards.values()
        if not any(reports[rank].holding.steps for rank in ranks if rank not in distrusted)
    ]
    if not gone:
        held = [
            f"ranks {some(ranks)} hold step {some(sorted({s for r in ranks for s in reports[r].holding.steps}))}"
            for ranks in shards.values()
        ]
        return (
            f"there is no step that every shard has a whole state of ({_joined(held, '; ')}); "
            "rollback=True would have kept one"
        )
    lost = _joined([f"rank{'s' if len(ranks) > 1 else ''} {some(ranks)}" for ranks in gone], " and of ")
    torn = sorted({report.holding.torn for report in reports.values() if report.holding.torn})
    if torn:
        return (
            f"whoever holds the state of {lost} was between two changes of one step ({_joined(torn, '; ')}), and "
            "there is neither a snapshot nor a checkpoint of it. CheckpointManager(rollback=True) keeps the state "
            "before each update, snapshot_every and disk_path older ones; `with manager.update():` says what belongs "
            "together"
        )
    return (
        f"no process holds the state of {lost} any more, and there is neither a snapshot nor a checkpoint of it "
        "(CheckpointManager: snapshot_every, disk_path)"
    )


def _joined(parts: Sequence[str], between: str) -> str:
    """The first of them: a sentence must not grow with the world."""
    left = len(parts) - _SHARDS_NAMED
    return between.join([*parts[:_SHARDS_NAMED], *([f"{left} other shards"] if left > 0 else [])])
