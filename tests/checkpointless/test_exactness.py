"""Runs with faults end bit for bit like the run without: a sample; `scripts/bench exactness` does all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"

_spec = importlib.util.spec_from_file_location("exactness", ROOT / "benchmarks" / "exactness.py")
exactness = importlib.util.module_from_spec(_spec)
sys.modules["exactness"] = exactness
_spec.loader.exec_module(exactness)


@pytest.fixture(scope="module")
def checker():
    return exactness.Checker(4)


@pytest.mark.parametrize("seed", range(1000, 1020))
def test_a_seeded_run_with_faults_ends_like_the_one_without(checker, seed):
    assert checker.check(seed) is None


def test_all_moments_and_kinds_are_among_the_seeds_of_the_sample():
    faults = [fault.split(":") for seed in range(1000, 1020) for fault in exactness.plan(seed, 4).faults]
    assert {kind for kind, _, _, _ in faults} == set(exactness.KINDS)
    assert {moment for _, _, _, moment in faults} >= {"forward", "allreduce", "begin", "inside", "restore"}


def test_a_rank_that_sends_wrong_bytes_is_not_used_again(run):
    options = ("--checksum", "--damaged=0", "--fault", "kill:3:6:forward")
    plain, disturbed = (
        run("--nproc-per-node=4", "--inprocess-restart", WORKERS / "exact.py", *o) for o in ((), options)
    )
    assert disturbed.returncode == 0, disturbed.output
    assert "from rank 0 has a wrong checksum" in disturbed.output
    assert disturbed.digest == plain.digest


def test_a_step_that_cannot_be_completed_everywhere_is_rolled_back(run):
    """Everybody is behind the update and none at the end of its step: what changes there must not be lost."""
    options = ("--rollback", "--fault", "kill:1:6:after")
    plain, disturbed = (
        run("--nproc-per-node=2", "--inprocess-restart", WORKERS / "exact.py", *o) for o in ((), options)
    )
    assert disturbed.returncode == 0, disturbed.output
    assert disturbed.digest == plain.digest
