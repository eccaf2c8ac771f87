"""Which step can be gone back to, when an update is over, and what is learned of a loop."""

from __future__ import annotations

import msgspec
from hyperpodrun.checkpointless.step.tracker import UPDATE, Learned, StepTracker


def tracker_of(*movers: str, others: tuple[str, ...] = ()) -> StepTracker:
    tracker = StepTracker()
    tracker.trains(frozenset(movers), frozenset(others))
    return tracker


def one_pass(tracker: StepTracker, *movers: str, tail: str = "") -> None:
    """A pass in which these parts move in turn, the first of them an optimizer; `tail` changes after them."""
    tracker.begin()
    if movers:
        tracker.opens()
    for mover in movers:
        if tracker.moved(mover) and tracker.may_presume:
            tracker.presume()
    if tail:
        tracker.learned.tail.add(tail)
    tracker.end(updated=bool(movers))


def begin_and_move(tracker: StepTracker, *movers: str) -> bool:
    """Whether the update is presumed complete when these have moved."""
    tracker.begin()
    tracker.opens()
    for mover in movers:
        if tracker.moved(mover) and tracker.may_presume:
            tracker.presume()
    return tracker.presumed


def test_in_the_first_pass_an_update_lasts_until_the_end():
    tracker = tracker_of("optimizer")
    assert not begin_and_move(tracker, "optimizer")
    assert (tracker.point, tracker.opened) == (0, True)
    tracker.end(updated=True)
    assert (tracker.point, tracker.opened) == (1, False)


def test_a_loop_whose_tail_is_quiet_is_presumed_complete_with_the_last_that_moves():
    tracker = tracker_of("optimizer", "scheduler")
    one_pass(tracker, "optimizer", "scheduler")
    assert not begin_and_move(tracker, "optimizer")
    assert begin_and_move(tracker, "optimizer", "scheduler")
    assert (tracker.point, tracker.previous, tracker.opened) == (2, 1, False)


def test_a_tail_that_changes_something_makes_updates_last_to_the_end_for_good():
    tracker = tracker_of("optimizer")
    one_pass(tracker, "optimizer")
    one_pass(tracker, "optimizer", tail="average")
    for _ in range(3):
        one_pass(tracker, "optimizer")
    assert not begin_and_move(tracker, "optimizer")
    assert tracker.needs_kept


def test_a_registered_optimizer_that_has_not_moved_yet_is_waited_for():
    """It may move every third pass, and for the first time in this one."""
    tracker = tracker_of("generator", "discriminator")
    for _ in range(3):
        one_pass(tracker, "discriminator")
    assert not begin_and_move(tracker, "discriminator")
    assert "'generator' was still to change" in tracker.why_torn()
    assert tracker.needs_kept


def test_an_object_that_nobody_has_seen_change_may_change_at_any_moment():
    tracker = tracker_of("optimizer", others=("meter",))
    for _ in range(5):
        one_pass(tracker, "optimizer")
    assert not begin_and_move(tracker, "optimizer")
    tracker.learned.changed.add("meter")
    assert begin_and_move(tracker, "optimizer")


def test_an_object_that_has_not_changed_for_long_is_taken_not_to():
    tracker = tracker_of("optimizer", others=("frozen",))
    for _ in range(64):
        one_pass(tracker, "optimizer")
    assert begin_and_move(tracker, "optimizer")


def test_who_states_the_update_need_not_move_everything():
    tracker = tracker_of("optimizer", "scheduler of epochs")
    one_pass(tracker, "optimizer", UPDATE)
    assert begin_and_move(tracker, "optimizer", UPDATE)


def test_a_change_after_what_was_presumed_takes_it_back():
    tracker = tracker_of("optimizer")
    one_pass(tracker, "optimizer")
    assert begin_and_move(tracker, "optimizer")
    tracker.torn()
    assert (tracker.point, tracker.presumed, tracker.opened) == (1, False, True)
    tracker.end(updated=True)
    assert (tracker.point, tracker.previous) == (2, 1)


def test_a_backward_pass_between_two_changes_divides_the_step():
    tracker = tracker_of("generator", "discriminator")
    tracker.begin()
    tracker.divides()
    assert not tracker.learned.divided
    tracker.opens()
    tracker.moved("discriminator")
    tracker.divides()
    assert tracker.learned.divided


def test_passes_without_an_update_do_not_advance_the_point():
    tracker = tracker_of("optimizer")
    one_pass(tracker, "optimizer")
    for _ in range(3):
        one_pass(tracker)
    assert (tracker.point, tracker.index) == (1, 4)
    one_pass(tracker, "optimizer")
    assert (tracker.point, tracker.previous, tracker.index) == (5, 1, 5)


def test_going_to_a_step_forgets_an_update_that_was_open():
    tracker = tracker_of("optimizer")
    tracker.begin()
    tracker.opens()
    tracker.go_to(7)
    assert (tracker.index, tracker.point, tracker.opened) == (7, 7, False)


def test_what_was_learned_travels():
    tracker, other = tracker_of("optimizer"), tracker_of("optimizer")
    one_pass(tracker, "optimizer")
    other.learned = msgspec.convert(msgspec.to_builtins(tracker.learned), Learned)
    assert begin_and_move(other, "optimizer")


def test_passes_are_looked_at_closely_at_first_and_then_ever_more_rarely():
    tracker = tracker_of("optimizer")
    checked = []
    for number in range(70):
        if tracker.checks:
            checked.append(number)
        one_pass(tracker, "optimizer")
    assert checked == [0, 1, 2, 4, 8, 16, 32, 64]
