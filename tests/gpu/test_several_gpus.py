"""A rank on each GPU: NCCL then moves data between the GPUs directly, out of one process's memory into another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

GPT = Path(__file__).parents[2] / "examples" / "gpt" / "train.py"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_exception_and_a_death_leave_the_result_unchanged(run):
    ranks = str(torch.cuda.device_count())
    job = ("--nproc-per-node", ranks, "--inprocess-restart", GPT, "--bf16", "--steps", "30")
    undisturbed = run(*job, timeout=120)
    assert undisturbed.returncode == 0, undisturbed.output
    faults = ("--inject", "raise:rank=1,step=6", "--inject", "kill:rank=0,step=14,where=backward")
    finished = run(*job, *faults, timeout=120)
    assert finished.returncode == 0, finished.output
    for row in finished.recoveries:
        print("several GPUs", row["cause"][:60], row["total_ms"], row["phases_ms"])
    assert [row["respawned"] for row in finished.recoveries] == [[], [0]], finished.output
    assert finished.digest == undisturbed.digest, finished.output
