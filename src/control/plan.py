"""Who gives state to whom in a new epoch, decided from what every rank reported at the barrier."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..protocol.plan import RestorePlan


class Report(msgspec.Struct, frozen=True):
    """A rank at the barrier: optimizer steps completed, is its state whole, is its process new."""

    step: int
    healthy: bool
    fresh: bool


def make_plan(reports: Mapping[int, Report]) -> RestorePlan:
    """The plan for data parallel ranks, all of which hold the same state.

    Survivors of one fault can differ by one step: the newest state wins, because going forward loses nothing.
    The lowest rank that holds it is the source. With no holder at all training starts afresh.
    """
    holders = {rank: report.step for rank, report in reports.items() if report.healthy and not report.fresh}
    if not holders:
        return RestorePlan(target_step=0, source=None, receivers=())
    target = max(holders.values())
    current = sorted(rank for rank, step in holders.items() if step == target)
    receivers = tuple(sorted(set(reports) - set(current)))
    return RestorePlan(target_step=target, source=current[0], receivers=receivers)
