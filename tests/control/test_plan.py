"""Who gives state to whom, from what every rank reported at the barrier."""

from __future__ import annotations

from hyperpodrun.control.job.plan import Impossible, Report, make_plan
from hyperpodrun.protocol.plan import Holding, Origin, RestorePlan, Transfer
from hypothesis import given, settings
from hypothesis import strategies as st


def holds(step: int | None = None, kept: int | None = None, shard: str = "", node: int = 0, **more) -> Report:
    return Report(Holding(shard, step, kept, **more), managed=True, node=node)


NEW = Report(Holding(), managed=True)
TORN = holds()


def unmanaged(step: int | None = None) -> Report:
    return Report(Holding("", step))


def test_where_all_hold_the_same_step_nobody_receives():
    assert make_plan({0: holds(7), 1: holds(7)}) == RestorePlan(7, source=0)


def test_a_new_process_receives_from_a_holder():
    assert make_plan({0: NEW, 1: holds(7), 2: holds(7)}) == RestorePlan(7, 1, (Transfer(1, 0),))


def test_of_survivors_a_step_apart_the_newer_one_wins():
    plan = make_plan({0: holds(19), 1: holds(20), 2: holds(19), 3: holds(20)})
    assert plan == RestorePlan(20, 1, (Transfer(1, 0), Transfer(3, 2)))


def test_a_rank_torn_inside_its_update_receives():
    assert make_plan({0: TORN, 1: holds(20)}) == RestorePlan(20, 1, (Transfer(1, 0),))


def test_what_nobody_holds_any_more_is_counted_as_lost():
    assert make_plan({0: NEW, 1: holds(20)}, newest=21) == RestorePlan(20, 1, (Transfer(1, 0),), lost_steps=1)


def test_several_lost_ranks_are_spread_over_the_sources():
    plan = make_plan({0: NEW, 1: NEW, 2: NEW, 3: holds(4), 4: holds(4)})
    assert [(t.source, t.receiver) for t in plan.transfers] == [(3, 0), (4, 1), (3, 2)]


def test_a_source_on_the_same_node_is_preferred_to_another_with_as_little_to_do():
    reports = {0: holds(4, node=0), 1: holds(4, node=1), 2: Report(Holding(), managed=True, node=1)}
    assert make_plan(reports).transfers == (Transfer(1, 2),)


def test_shards_are_restored_from_their_own_replicas():
    reports = {0: NEW, 1: holds(5, shard="b"), 2: holds(5, shard="a"), 3: holds(5, shard="b")}
    assert make_plan(reports, {0: "a"}) == RestorePlan(5, 1, (Transfer(2, 0),))


def test_the_target_is_a_step_that_every_shard_has():
    reports = {0: NEW, 1: holds(6, 5, shard="b"), 2: holds(5, shard="a"), 3: holds(6, 5, shard="b")}
    plan = make_plan(reports, {0: "a"})
    assert plan == RestorePlan(5, 1, (Transfer(2, 0),), rollbacks=(1, 3), lost_steps=1)


def test_shards_a_step_apart_without_rollback_have_no_common_step():
    reports = {0: NEW, 1: holds(6, shard="b"), 2: holds(5, shard="a"), 3: holds(6, shard="b")}
    plan = make_plan(reports, {0: "a"})
    assert isinstance(plan, Impossible)
    assert "rollback=True would have kept one" in plan.reason


def test_all_torn_inside_their_update_roll_back():
    plan = make_plan({0: holds(None, 5), 1: holds(None, 5)}, newest=5)
    assert plan == RestorePlan(5, 0, rollbacks=(0, 1))
    assert make_plan({0: holds(6, 5), 1: NEW, 2: holds(5)}) == RestorePlan(6, 0, (Transfer(0, 1), Transfer(0, 2)))


def test_a_lost_shard_takes_everybody_back_to_the_newest_complete_snapshot():
    reports = {
        0: Report(Holding(), managed=True),
        1: holds(9, shard="b", snapshots=((1, 8), (0, 8), (0, 4), (1, 4))),
        2: Report(Holding(), managed=True),
        3: holds(9, shard="b", snapshots=((3, 8), (2, 4), (3, 4))),
    }
    plan = make_plan(reports, {0: "a", 2: "a"})
    assert (plan.target_step, plan.origin, plan.lost_steps) == (8, Origin.SNAPSHOT, 1)
    assert plan.transfers == (
        Transfer(1, 0, 0),
        Transfer(1, 1, 1),
        Transfer(1, 2, 0),
        Transfer(3, 3, 3),
    )


def test_a_snapshot_that_came_with_wrong_bytes_is_had_from_another_keeper_or_from_disk():
    snapshots = ((0, 4), (1, 4))
    reports = {
        0: Report(Holding(distrusted=(1,), disk=2), managed=True),
        1: Report(Holding("b", snapshots=snapshots, disk=2), managed=True),
        2: Report(Holding("b", snapshots=snapshots, disk=2), managed=True),
    }
    plan = make_plan(reports, {0: "a"})
    assert plan.transfers == (Transfer(2, 0, 0), Transfer(2, 1, 1), Transfer(2, 2, 1))
    del reports[2]
    assert make_plan(reports, {0: "a"}, newest=5) == RestorePlan(2, None, origin=Origin.DISK, lost_steps=3)


def test_memory_is_preferred_to_a_snapshot_of_the_same_step():
    assert make_plan({0: holds(8, snapshots=((0, 8),)), 1: NEW}).origin is Origin.MEMORY


def test_disk_is_the_last_resort_and_everybody_must_have_it():
    lost = Report(Holding(disk=4), managed=True)
    plan = make_plan({0: lost, 1: Report(Holding(disk=6), managed=True)}, newest=9)
    assert plan == RestorePlan(4, None, origin=Origin.DISK, lost_steps=5)
    assert isinstance(make_plan({0: lost, 1: Report(Holding(shard=""), managed=True)}, newest=9), Impossible)


def test_with_nothing_left_the_job_says_what_is_gone():
    plan = make_plan({0: NEW, 1: holds(9, shard="b"), 2: NEW}, {0: "a", 2: "a"})
    assert isinstance(plan, Impossible)
    assert not plan.from_start
    assert "the state of ranks 0, 2 " in plan.reason
    assert "snapshot_every" in plan.reason


def test_before_the_first_step_is_complete_nothing_can_be_lost():
    plan = make_plan({0: TORN, 1: TORN})
    assert isinstance(plan, Impossible)
    assert plan.from_start
    assert make_plan({0: NEW, 1: NEW}) == RestorePlan(0, None, origin=Origin.START)


def test_a_rank_that_sent_wrong_bytes_is_not_believed_again():
    reports = {0: holds(9), 1: Report(Holding("", distrusted=(0,)), managed=True), 2: holds(9)}
    assert make_plan(reports) == RestorePlan(9, 2, (Transfer(2, 0), Transfer(2, 1)))


def test_without_a_manager_training_starts_afresh_where_nobody_holds_anything():
    assert make_plan({0: unmanaged(), 1: unmanaged()}, newest=20).origin is Origin.START
    assert make_plan({0: unmanaged(), 1: unmanaged(5)}) == RestorePlan(5, 1, (Transfer(1, 0),))


SHARDS = st.sampled_from(["a", "b"])
STEP = st.none() | st.integers(0, 3)
SNAPSHOTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=4, unique=True).map(tuple)
REPORTS = st.builds(
    lambda shard, step, kept, snapshots, disk, distrusted, node: Report(
        Holding(shard, step, kept, snapshots, disk, distrusted), True, node
    ),
    SHARDS,
    STEP,
    STEP,
    SNAPSHOTS,
    st.none() | st.integers(0, 2),
    st.sampled_from([(), (), (), (0,), (1,)]),
    st.integers(0, 1),
)


@settings(derandomize=True, deadline=None, database=None, max_examples=500)
@given(st.dictionaries(st.integers(0, 5), REPORTS, min_size=1))
def test_every_rank_ends_at_the_target_and_who_gives_has_it(reports: dict[int, Report]):
    plan = make_plan(reports)
    shards = {rank: told.holding.shard for rank, told in reports.items()}
    distrusted = {rank for told in reports.values() for rank in told.holding.distrusted}
    trusted = {rank: told for rank, told in reports.items() if rank not in distrusted}
    in_memory = [
        {step for rank, told in trusted.items() if shards[rank] == shard for step in told.holding.steps}
        for shard in set(shards.values())
    ]
    common = set.intersection(*in_memory)
    if isinstance(plan, Impossible):
        assert not common
        return
    if plan.origin is Origin.DISK:
        assert all(told.holding.disk is not None for told in reports.values())
        assert not common
        return
    assert plan.target_step >= max(common, default=0)
    for rank, told in reports.items():
        transfer = plan.source_of(rank)
        if plan.origin is Origin.MEMORY and transfer is None:
            assert (told.holding.step != plan.target_step) == (rank in plan.rollbacks)
            assert plan.target_step in told.holding.steps
            continue
        assert transfer is not None
        assert transfer.source not in distrusted
        given_by = reports[transfer.source].holding
        if plan.origin is Origin.MEMORY:
            assert shards[transfer.source] == shards[rank]
            assert plan.target_step in given_by.steps
        else:
            assert shards.get(transfer.owner, shards[rank]) == shards[rank]
            assert (transfer.owner, plan.target_step) in given_by.snapshots
