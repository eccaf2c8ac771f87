"""What is said of a recovery: the step it goes on with, and the time of a new process by its own name."""

from __future__ import annotations

from hyperpodrun.agent.output.recovery_report import Recovery, RecoveryReport, line, table
from hyperpodrun.control.job.commands import Cause
from hyperpodrun.protocol.messages import Arrive, Stepped
from hyperpodrun.protocol.plan import RestorePlan

MS = 10**6


def recover(cause: Cause, *, respawned: bool) -> Recovery:
    """A survivor and another rank come back, that one 300 ms later when it is a new process."""
    report = RecoveryReport("run", 2)
    report.failed(0, cause, 10 * MS, 11 * MS, {0: 100, 1: 101})
    survivor = Arrive(0, 1, 20, True, notified_ns=12 * MS, aborted_ns=13 * MS, unwound_ns=14 * MS)
    report.arrived(survivor, 15 * MS)
    if respawned:
        report.respawned(1, 201)
        report.arrived(Arrive(-1, 1, 0, True), 314 * MS)
    else:
        report.arrived(survivor, 314 * MS)
    report.started(1, None, RestorePlan(20, 0), 315 * MS, 316 * MS)
    for rank in (0, 1):
        recovery = report.stepped(rank, Stepped(1, 21, 317 * MS, 318 * MS, 320 * MS), None)
    assert recovery is not None
    return recovery


def test_the_step_is_in_the_line_and_the_new_process_has_a_phase_of_its_own():
    recovery = recover(Cause("death", 1, "was killed by signal 9"), respawned=True)
    said = line(recovery)
    assert (said["step"], said["start_ms"], said["barrier_ms"]) == (20, "300.0", "1.0")
    assert sum(value or 0.0 for value in recovery.phases_ms.values()) == recovery.total_ms
    assert b'"step":20' in recovery.as_json()


def test_an_exception_has_no_new_process_to_wait_for():
    said = line(recover(Cause("exception", 1, "ValueError: boom"), respawned=False))
    assert "start_ms" not in said
    assert said["barrier_ms"] == "301.0"


def test_a_cause_cannot_speak_to_the_terminal():
    assert "\x1b" not in table([recover(Cause("exception", 1, "a\x1b[2Jb"), respawned=False)])


def test_a_restart_of_all_processes_leaves_the_recovery_before_it_in_the_report():
    report = RecoveryReport("run", 2)
    report.failed(0, Cause("exception", 1, "first"), 10 * MS, 11 * MS, {})
    report.started(1, None, None, 12 * MS, 13 * MS)
    assert report.stepped(0, Stepped(1, 1, 14 * MS, 14 * MS, 15 * MS), None) is None  # rank 1 has yet to tell its step
    assert report.overtaken() is not None
    report.restarted(Cause("exception", 0, "second"), {})
    assert [(row.scope, row.cause) for row in report.recoveries] == [("in-process", "first"), ("process", "second")]


def test_a_restart_of_all_processes_because_of_a_fault_is_told_once():
    report = RecoveryReport("run", 2)
    report.failed(0, Cause("exception", 1, "only"), 10 * MS, 11 * MS, {})
    assert report.overtaken() is None
    report.restarted(Cause("exception", 1, "only"), {})
    assert [row.scope for row in report.recoveries] == ["process"]
