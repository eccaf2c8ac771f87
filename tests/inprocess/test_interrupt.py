"""The gate: one exception, in user code and nowhere else."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

import pytest
from hyperpodrun.inprocess.interrupt import INTERRUPT_SIGNAL, Interrupted, InterruptGate
from hyperpodrun.inprocess.update_lock import ParameterUpdateLock


@pytest.fixture
def gate():
    import signal

    before, hook = signal.getsignal(INTERRUPT_SIGNAL), sys.unraisablehook
    gate = InterruptGate()
    gate.install()
    gate.reset()
    yield gate
    signal.signal(INTERRUPT_SIGNAL, before)
    sys.unraisablehook = hook


@contextlib.contextmanager
def interrupted_user_code(gate: InterruptGate):
    """User code as the re-entry loop runs it; it must be left by an interrupt."""
    try:
        try:
            gate.enter()
            yield
        finally:
            gate.leave()
    except Interrupted:
        gate.leave()
        return
    raise AssertionError("not interrupted")


class Monitor(threading.Thread):
    """Runs `action` once the main thread says it is ready, and joins at the end."""

    def __init__(self, action) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self._action = action
        self.start()

    def run(self) -> None:
        assert self.ready.wait(10)
        self._action()


def stay() -> None:
    """User code that never ends. In short sleeps: a signal that comes just before a long one is seen only after it."""
    while True:
        time.sleep(0.01)


def test_a_request_while_outside_is_raised_at_the_entrance(gate):
    gate.request()
    try:
        gate.enter()
    except Interrupted:
        gate.leave()
    else:
        raise AssertionError("not interrupted")


def test_a_request_for_the_last_epoch_is_void_after_a_reset(gate):
    gate.request()
    gate.reset()
    gate.enter()
    gate.leave()


def test_nothing_is_raised_outside(gate):
    gate.enter()
    gate.leave()
    monitor = Monitor(lambda: [gate.request() for _ in range(50)])
    monitor.ready.set()
    monitor.join(10)
    assert not monitor.is_alive()


def test_a_sleeping_main_thread_is_interrupted_at_once(gate):
    left = threading.Event()

    def ask() -> None:  # as the real monitor does: again and again, for the first time may have been too early
        gate.request()
        while not left.wait(0.05):
            gate.insist(force=False)

    monitor = Monitor(ask)
    started = time.monotonic()
    with interrupted_user_code(gate):
        monitor.ready.set()
        time.sleep(60)
    left.set()
    assert time.monotonic() - started < 30


def test_a_storm_of_requests_raises_once(gate):
    monitor = Monitor(lambda: [gate.request() or gate.insist(force=False) for _ in range(200)])
    raised = 0
    try:
        try:
            gate.enter()
            monitor.ready.set()
            time.sleep(60)
        finally:
            gate.leave()
    except Interrupted:
        gate.leave()
        raised += 1
    monitor.join(10)
    assert raised == 1


def test_a_swallowed_exception_is_raised_again_without_being_asked_for(gate):
    swallowed = 0
    monitor = Monitor(gate.request)
    with interrupted_user_code(gate):
        monitor.ready.set()
        with contextlib.suppress(Interrupted):
            stay()
        swallowed += 1
        stay()
    assert swallowed <= 1


def test_an_exception_on_its_way_through_clean_up_is_not_raised_a_second_time(gate):
    monitor = Monitor(lambda: [gate.request(), *[gate.insist(force=False) for _ in range(20)]])
    cleaned = []
    with interrupted_user_code(gate):
        try:
            monitor.ready.set()
            stay()
        finally:
            monitor.join(10)  # all the other signals arrive in here
            cleaned.append(True)
    assert cleaned == [True]


def test_an_exception_that_was_put_away_comes_again_when_forced(gate):
    kept = []
    monitor = Monitor(gate.request)
    with interrupted_user_code(gate):
        monitor.ready.set()
        try:
            stay()
        except Interrupted as interrupted:
            kept.append(interrupted)
        forcing = Monitor(lambda: gate.insist(force=True))
        forcing.ready.set()
        stay()
    assert len(kept) == 1


def test_a_critical_section_ends_before_the_interrupt(gate):
    done = []
    monitor = Monitor(gate.request)
    with interrupted_user_code(gate):
        gate.enter_section()
        gate.enter_section()
        monitor.ready.set()
        monitor.join(10)
        done.append("inner")
        gate.leave_section()
        done.append("outer")
        gate.leave_section()
        done.append("never")
    assert done == ["inner", "outer"]


def test_waiting_for_a_section_ends_with_the_section(gate):
    waits: list[bool] = []
    monitor = Monitor(lambda: waits.append(gate.wait_for_section(10)))
    gate.enter()
    gate.enter_section()
    monitor.ready.set()
    while not gate._watching_section:
        time.sleep(0.001)
    gate.leave_section()
    monitor.join(10)
    gate.leave()
    assert waits == [True]


def test_whoever_waits_for_a_section_is_told_before_an_interrupt_can_come(gate):
    """One in the midst of telling would leave the event's lock taken, and the next one to wait waiting for ever."""
    told: list[str] = []

    class Told(threading.Event):
        def set(self) -> None:
            told.append("begins")
            gate.request()
            super().set()
            told.append("ends")

    gate._section_left, gate._watching_section = Told(), True
    with interrupted_user_code(gate):
        gate.enter_section()
        gate.leave_section()
    assert told[:2] == ["begins", "ends"]


def test_waiting_for_a_section_that_hangs_ends_after_several_times_its_usual_length(gate):
    gate.enter()
    gate.enter_section()
    gate.leave_section()
    gate.enter_section()
    waits: list[bool] = []
    monitor = Monitor(lambda: waits.append(gate.wait_for_section(3600)))
    monitor.ready.set()
    monitor.join(30)
    gate.leave()
    assert waits == [False]


def test_a_pass_that_has_begun_to_change_things_ends_before_the_interrupt(gate):
    done = []
    monitor = Monitor(gate.request)
    with interrupted_user_code(gate):
        gate.open_pass()
        monitor.ready.set()
        monitor.join(10)
        done.append("the rest of the pass")
        gate.close_pass()
        done.append("never")
    assert done == ["the rest of the pass"]


def test_waiting_for_a_pass_ends_with_it(gate):
    monitor = Monitor(lambda: gate.wait_for_pass(3600))
    gate.enter()
    gate._longest_pass = 900.0
    gate.open_pass()
    gate._pass_patience = 900.0
    monitor.ready.set()
    while not gate._watching_section:
        time.sleep(0.001)
    gate.close_pass()
    monitor.join(10)
    assert not monitor.is_alive()
    gate.leave()


def test_a_pass_that_does_not_end_is_given_up_and_interrupted(gate):
    def give_up() -> None:
        gate.request()
        gate.wait_for_pass(3600)
        gate.insist(force=False)

    monitor = Monitor(give_up)
    with interrupted_user_code(gate):
        gate.open_pass()
        gate.close_pass()
        gate.open_pass()
        gate.presume_pass()
        monitor.ready.set()
        stay()


def test_a_section_ends_with_the_frame_that_it_was_opened_for(gate):
    """An optimizer's step that raises calls no hook at its end; who catches that can be interrupted all the same."""

    def step() -> None:
        gate.enter_section(sys._getframe())
        raise ValueError("no loss")

    monitor = Monitor(gate.request)
    with interrupted_user_code(gate):
        with pytest.raises(ValueError, match="no loss"):
            step()
        monitor.ready.set()
        stay()


def test_nobody_waits_for_a_section_whose_frame_was_left(gate):
    def step() -> None:
        gate.enter_section(sys._getframe())

    waits: list[bool] = []
    gate.enter()
    step()
    monitor = Monitor(lambda: waits.append(gate.wait_for_section(3600)))
    monitor.ready.set()
    monitor.join(30)
    gate.leave()
    assert waits == [True]


def test_an_update_that_raised_leaves_an_unhealthy_state_until_it_is_restored(gate):
    lock = ParameterUpdateLock(gate)
    with lock:
        assert not lock.is_healthy()
    assert lock.is_healthy()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    assert not lock.is_healthy()
    lock.restored(7)
    assert (lock.is_healthy(), lock.steps) == (True, 7)


def test_an_update_that_is_left_open_is_unhealthy(gate):
    lock = ParameterUpdateLock(gate)
    lock.__enter__()
    lock.force_release()
    assert not lock.is_healthy()
    lock.begin_restore(9)
    assert (lock.is_healthy(), lock.steps) == (False, 9)
    lock.restored()
    assert lock.is_healthy()
