"""Who gives state to whom, from what every rank reported at the barrier."""

from __future__ import annotations

from hyperpodrun.control.plan import Report, make_plan
from hyperpodrun.protocol.plan import RestorePlan
from hypothesis import given, settings
from hypothesis import strategies as st


def holds(step: int) -> Report:
    return Report(step, healthy=True, fresh=False)


def interrupted(step: int) -> Report:
    return Report(step, healthy=False, fresh=False)


NEW = Report(0, healthy=True, fresh=True)


def test_where_all_hold_the_same_step_nobody_receives():
    assert make_plan({0: holds(7), 1: holds(7)}) == RestorePlan(7, source=0, receivers=())


def test_a_new_process_receives_from_the_lowest_holder():
    assert make_plan({0: NEW, 1: holds(7), 2: holds(7)}) == RestorePlan(7, source=1, receivers=(0,))


def test_of_survivors_a_step_apart_the_newer_one_wins():
    plan = make_plan({0: holds(19), 1: holds(20), 2: holds(19), 3: holds(20)})
    assert plan == RestorePlan(20, source=1, receivers=(0, 2))


def test_a_rank_interrupted_inside_its_update_receives_even_if_it_was_ahead():
    assert make_plan({0: interrupted(21), 1: holds(20)}) == RestorePlan(20, source=1, receivers=(0,))


def test_a_new_process_is_no_holder_even_of_step_zero():
    assert make_plan({0: NEW, 1: holds(0)}) == RestorePlan(0, source=1, receivers=(0,))


def test_the_only_holder_gives_to_all():
    reports = {0: NEW, 1: interrupted(5), 2: holds(4), 3: NEW}
    assert make_plan(reports) == RestorePlan(4, source=2, receivers=(0, 1, 3))


def test_without_a_holder_training_starts_afresh():
    nothing = RestorePlan(0, source=None, receivers=())
    assert make_plan({0: NEW, 1: NEW}) == nothing
    assert make_plan({0: interrupted(20), 1: NEW}) == nothing


REPORTS = st.builds(Report, step=st.integers(0, 3), healthy=st.booleans(), fresh=st.booleans())


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(st.dictionaries(st.integers(0, 7), REPORTS, min_size=1))
def test_every_rank_holds_the_target_or_receives_it(reports: dict[int, Report]):
    plan = make_plan(reports)
    whole = {rank: told.step for rank, told in reports.items() if told.healthy and not told.fresh}
    if not whole:
        assert plan.source is None
        return
    assert plan.target_step == max(whole.values())
    assert whole[plan.source] == plan.target_step
    holders = {rank for rank, step in whole.items() if step == plan.target_step}
    assert plan.source == min(holders)
    assert set(plan.receivers) == set(reports) - holders
