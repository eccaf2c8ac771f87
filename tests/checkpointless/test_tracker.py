"""Which step can be gone back to, and when an update is complete."""

from __future__ import annotations

from hyperpodrun.checkpointless.step.tracker import StepTracker


def one_pass(tracker: StepTracker, *movers: str, changed: bool | None = False) -> None:
    """A pass in which these parts move in turn, the first of them an optimizer."""
    tracker.begin()
    if movers:
        tracker.opens()
    for mover in movers:
        if tracker.moved(mover) and tracker.may_complete:
            tracker.complete()
    tracker.end(changed)


def test_in_the_first_passes_an_update_lasts_until_the_end_of_its_pass():
    tracker = StepTracker()
    tracker.begin()
    assert tracker.opens()
    assert not tracker.moved("optimizer")
    assert tracker.updating
    assert tracker.end(None)
    assert (tracker.point, tracker.updating) == (1, False)


def test_a_loop_whose_tail_is_quiet_completes_with_the_last_that_moves():
    tracker = StepTracker()
    for _ in range(2):
        one_pass(tracker, "optimizer", "scheduler")
    tracker.begin()
    tracker.opens()
    assert not tracker.moved("optimizer")
    assert tracker.moved("scheduler")
    assert tracker.may_complete


def test_a_tail_that_changes_something_makes_updates_last_to_the_end_for_good():
    tracker = StepTracker()
    for changed in (False, True, False, False):
        one_pass(tracker, "optimizer", changed=changed)
    assert not tracker.may_complete


def test_a_second_optimizer_is_waited_for():
    tracker = StepTracker()
    for _ in range(2):
        one_pass(tracker, "generator", "discriminator")
    tracker.begin()
    assert tracker.opens()
    assert not tracker.moved("generator")
    assert not tracker.opens()
    assert tracker.moved("discriminator")


def test_passes_without_an_update_do_not_advance_the_point():
    tracker = StepTracker()
    one_pass(tracker, "optimizer")
    for _ in range(3):
        one_pass(tracker)
    assert (tracker.point, tracker.index) == (1, 4)
    one_pass(tracker, "optimizer")
    assert (tracker.point, tracker.previous, tracker.index) == (5, 1, 5)


def test_going_to_a_step_forgets_an_update_that_was_open():
    tracker = StepTracker()
    tracker.begin()
    tracker.opens()
    tracker.go_to(7)
    assert (tracker.index, tracker.point, tracker.updating) == (7, 7, False)


def test_what_was_learned_travels():
    tracker, other = StepTracker(), StepTracker()
    for _ in range(2):
        one_pass(tracker, "optimizer")
    other.learn(*tracker.learned())
    other.begin()
    other.opens()
    assert other.moved("optimizer")
    assert other.may_complete
