"""Wherever the other rank is when a fault comes, both recover in their processes; many wrapped functions in a row."""

from __future__ import annotations

from pathlib import Path

WORKER = Path(__file__).parent / "workers" / "moments.py"

ONE_ATTEMPT = {"nothing_fails"}
THREE_ATTEMPTS = {"second_fault_at_once_in_the_next_epoch"}


def test_both_ranks_recover_in_process_wherever_they_are(run):
    finished = run("--nproc-per-node=2", "--inprocess-restart", WORKER, timeout=110)
    assert finished.returncode == 0, finished.output
    lines = [line.split(" ", 4) for line in finished.stdout.splitlines()]
    names = {line[0] for line in lines}
    assert len(names) == WORKER.read_text().count("\n@moment\n"), finished.output
    assert len(lines) == 2 * len(names), finished.output
    assert len({(line[1], line[2]) for line in lines}) == 2, "a process was replaced"
    for name, _, _, attempts, _ in lines:
        expected = 1 if name in ONE_ATTEMPT else 3 if name in THREE_ATTEMPTS else 2
        assert attempts == f"attempts={expected}", (name, finished.output)
    said = {(name, rank): value for name, rank, _, _, value in lines}
    assert said["peer_is_in_a_critical_section", "rank=1"] == "finished=1", "the section was not let finish"
    assert said["peer_has_returned_already", "rank=1"] == "in time"
    assert said["user_signal_handlers_work", "rank=0"] == "heard=4"
    assert all(row["scope"] == "in-process" for row in finished.recoveries)
