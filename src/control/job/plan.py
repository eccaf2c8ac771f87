"""Who gives state to whom in a new epoch, decided from what every rank reported at the barrier.

The order of preference: the newest step that is whole in memory for every shard, then the newest snapshot, then disk.
Going on from an older state than the newest one is never silent: the plan counts the steps it loses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from ...protocol.plan import Holding, Origin, RestorePlan, Transfer


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
        sources = holders[shard][target]
        load: Counter[int] = Counter()
        for rank in ranks:
            if rank not in sources:
                transfers.append(Transfer(_pick(reports, sources, rank, load), rank))
            elif reports[rank].holding.step != target:
                rollbacks.append(rank)
    lowest = min(rank for by_step in holders.values() for rank in by_step[target])
    return RestorePlan(target, lowest, _in_order(transfers), tuple(sorted(rollbacks)))


def _certain(reports: Reports, holders: list[int], step: int) -> list[int]:
    """Those whose pass has ended, if there are any: what it did after the update, the others do not know."""
    certain = [rank for rank in holders if not (reports[rank].holding.presumed and reports[rank].holding.step == step)]
    return certain or holders


def _from_snapshots(reports: Reports, shards: _Shards, distrusted: set[int], refused: set[int]) -> RestorePlan | None:
    """The newest step of which a snapshot of every shard can be read by somebody."""
    keepers: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for shard, members in shards.items():
        by_step: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for keeper in sorted(reports.keys() - distrusted):
            for owner, step in reports[keeper].holding.snapshots:
                if owner in members:
                    by_step[step].append((keeper, owner))
        keepers[shard] = by_step
    common = set.intersection(*(set(by_step) for by_step in keepers.values())) - refused
    if not common:
        return None
    target = max(common)
    transfers: list[Transfer] = []
    for shard, members in shards.items():
        owner_kept_by: dict[int, int] = {}
        for keeper, owner in keepers[shard][target]:
            owner_kept_by.setdefault(keeper, owner)
        load: Counter[int] = Counter()
        for rank in members:
            if (rank, rank) in keepers[shard][target]:
                transfers.append(Transfer(rank, rank, rank))
                continue
            keeper = rank if rank in owner_kept_by else _pick(reports, sorted(owner_kept_by), rank, load)
            transfers.append(Transfer(keeper, rank, owner_kept_by[keeper]))
    return RestorePlan(target, None, _in_order(transfers), origin=Origin.SNAPSHOT)


def _from_disk(reports: Reports) -> RestorePlan | None:
    """The newest checkpoint that every rank can load."""
    steps = [report.holding.disk for report in reports.values() if report.holding.disk is not None]
    if len(steps) < len(reports):
        return None
    return RestorePlan(min(steps), None, origin=Origin.DISK)


def _pick(reports: Reports, sources: Iterable[int], receiver: int, load: Counter[int]) -> int:
    """The source with the least to send, of these one on the receiver's node, of these the lowest."""
    node = reports[receiver].node
    chosen = min(sources, key=lambda rank: (load[rank], reports[rank].node != node, rank))
    load[chosen] += 1
    return chosen


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
        held = "; ".join(
            f"ranks {_names(ranks)} hold step {_names(sorted({s for r in ranks for s in reports[r].holding.steps}))}"
            for ranks in shards.values()
        )
        return f"there is no step that every shard has a whole state of ({held}); rollback=True would have kept one"
    lost = " and of ".join(f"rank{'s' if len(ranks) > 1 else ''} {_names(ranks)}" for ranks in gone)
    torn = sorted({report.holding.torn for report in reports.values() if report.holding.torn})
    if torn:
        return (
            f"whoever holds the state of {lost} was between two changes of one step ({'; '.join(torn)}), and there is "
            "neither a snapshot nor a checkpoint of it. CheckpointManager(rollback=True) keeps the state before each "
            "update, snapshot_every and disk_path older ones; `with manager.update():` says what belongs together"
        )
    return (
        f"no process holds the state of {lost} any more, and there is neither a snapshot nor a checkpoint of it "
        "(CheckpointManager: snapshot_every, disk_path)"
    )


def _names(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
