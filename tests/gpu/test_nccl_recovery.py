"""Four NCCL ranks, on one GPU if need be: every kind of fault, the result bit for bit that of the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_gpu")
GPT = Path(__file__).parents[2] / "examples" / "gpt" / "train.py"
RANKS, STEPS = 4, 40
MODES = {"eager": (), "compiled": ("--compile",)}
FAULTS = ("raise:rank=1,step=5", "kill:rank=0,step=12,where=backward", "assert:rank=3,step=20")
RESPAWNED = ((1, set()), (0, {0}), (3, {3}))
LIMIT_S = 200.0


def gpt(run, mode: str, *options: str):
    launcher = ("--nproc-per-node", str(RANKS), "--inprocess-restart")
    return run(*launcher, GPT, "--bf16", "--steps", str(STEPS), *MODES[mode], *options, timeout=LIMIT_S)


_undisturbed: dict[str, str] = {}


def digest_without_faults(run, mode: str) -> str:
    if mode not in _undisturbed:
        finished = gpt(run, mode)
        assert finished.returncode == 0, finished.output
        assert not finished.recoveries
        _undisturbed[mode] = finished.digest
    return _undisturbed[mode]


@pytest.mark.parametrize("mode", MODES)
def test_exceptions_deaths_and_device_side_asserts_leave_the_result_unchanged(run, mode):
    expected = digest_without_faults(run, mode)
    finished = gpt(run, mode, *(word for fault in FAULTS for word in ("--inject", fault)))
    assert finished.returncode == 0, finished.output
    assert len(finished.recoveries) == len(FAULTS), finished.output
    for row, (rank, respawned) in zip(finished.recoveries, RESPAWNED, strict=True):
        print(mode, row["cause"][:60], row["total_ms"], row["phases_ms"])
        assert (row["rank"], set(row["respawned"])) == (rank, respawned), finished.output
        assert row["completed"], finished.output
        for survivor, before in row["pids_before"].items():
            assert (row["pids_after"][survivor] == before) == (int(survivor) not in respawned), finished.output
    assert finished.digest == expected, finished.output


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_hangs_while_the_others_wait_in_a_collective_costs_no_process(run, mode):
    """torch's watchdog finds the collective overdue; nobody is killed by it, the sleeper included."""
    expected = digest_without_faults(run, mode)
    finished = gpt(run, mode, "--timeout", "20", "--inject", "hang:rank=1,step=12")
    assert finished.returncode == 0, finished.output
    (row,) = finished.recoveries
    print(mode, row["cause"][:80], row["total_ms"], row["phases_ms"])
    assert row["respawned"] == [], finished.output
    assert row["pids_before"] == row["pids_after"]
    assert "TIMEOUT" in row["cause"], finished.output
    assert finished.digest == expected, finished.output
