"""Runs with faults end bit for bit like the run without: a sample; `scripts/bench exactness` does all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"

SAMPLE = range(1000, 1020)

_spec = importlib.util.spec_from_file_location("exactness", ROOT / "benchmarks" / "exactness.py")
exactness = importlib.util.module_from_spec(_spec)
sys.modules["exactness"] = exactness
_spec.loader.exec_module(exactness)


@pytest.fixture(scope="module")
def checker():
    return exactness.Checker()


@pytest.fixture(scope="module")
def hsdp_checker():
    return exactness.Checker(hsdp=True)


@pytest.fixture(scope="module")
def undisturbed():
    """What a run without faults ends with, by world size."""
    return {}


def digest_without_faults(run, undisturbed, world_size: int) -> str:
    if world_size not in undisturbed:
        finished = run(f"--nproc-per-node={world_size}", "--inprocess-restart", WORKERS / "exact.py")
        assert finished.returncode == 0, finished.output
        undisturbed[world_size] = finished.digest
    return undisturbed[world_size]


@pytest.mark.parametrize("seed", SAMPLE)
def test_a_seeded_run_with_faults_ends_like_the_one_without(checker, seed):
    assert checker.check(seed) is None


def test_all_moments_and_kinds_are_among_the_seeds_of_the_sample():
    faults = [fault.split(":") for seed in SAMPLE for fault in exactness.plan(seed).faults]
    assert {kind for kind, _, _, _ in faults} == set(exactness.KINDS)
    assert {moment for _, _, _, moment in faults} >= set(exactness.MOMENTS)
    assert len({moment for _, _, _, moment in faults} & set(exactness.RESTORE_MOMENTS)) > 1


@pytest.mark.parametrize("seed", range(5))
def test_a_seeded_run_of_sharded_training_ends_like_the_one_without(hsdp_checker, seed):
    """Five more with faults that were thought of are in test_shards.py."""
    assert hsdp_checker.check(seed) is None


def test_the_scale_of_gradients_and_the_steps_it_leaves_out_are_repeated(run):
    """It overflows in the first steps, so that there are updates in which the scale alone changes."""
    command = ("--nproc-per-node=2", "--inprocess-restart", WORKERS / "exact.py", "--scaler=3e38")
    faults = ("--fault", "kill:1:1:after", "--fault", "raise:0:5:before", "--fault", "kill:0:8:after")
    plain, disturbed = run(*command), run(*command, "--rebuild", "--rollback", *faults)
    assert disturbed.returncode == 0, disturbed.output
    assert disturbed.digest == plain.digest
    assert plain.stdout.count("is left out") > 1


def test_a_rank_that_sends_wrong_bytes_is_not_used_again(run, undisturbed):
    options = ("--checksum", "--damaged=0", "--fault", "kill:3:6:forward")
    disturbed = run("--nproc-per-node=4", "--inprocess-restart", WORKERS / "exact.py", *options)
    assert disturbed.returncode == 0, disturbed.output
    assert "from rank 0 has a wrong checksum" in disturbed.output
    assert disturbed.digest == digest_without_faults(run, undisturbed, 4)


def test_a_step_that_cannot_be_completed_everywhere_is_rolled_back(run, undisturbed):
    """Everybody is behind the update and none at the end of its step: what changes there must not be lost."""
    options = ("--rollback", "--fault", "kill:1:6:after")
    disturbed = run("--nproc-per-node=2", "--inprocess-restart", WORKERS / "exact.py", *options)
    assert disturbed.returncode == 0, disturbed.output
    assert disturbed.digest == digest_without_faults(run, undisturbed, 2)


@pytest.mark.parametrize(
    ("world_size", "options", "faults"),
    [
        (2, [], ["kill:1:5:forward", "kill:1::receiving", "exit:1::restore"]),
        (2, ["--rebuild"], ["kill:1:5:forward", "raise:1::receiving", "raise:0::restore"]),
        (2, ["--rebuild", "--offload"], ["kill:0:5:inside", "kill:0::receiving", "raise:1::restore"]),
        (2, ["--stream"], ["kill:1:5:forward", "raise:0::sending"]),
        (4, [], ["kill:3:5:forward", "kill:3::source"]),
        (4, ["--stream"], ["kill:3:5:forward", "kill:0::sending"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_in_a_restore_costs_no_state_but_that_of_who_was_receiving(
    run, undisturbed, world_size, options, faults
):
    """With two ranks the source is the only holder: what befalls the restore must not make it doubt itself."""
    words = [word for fault in faults for word in ("--fault", fault)]
    command = (f"--nproc-per-node={world_size}", "--inprocess-restart", WORKERS / "exact.py")
    disturbed = run(*command, *options, *words)
    assert disturbed.returncode == 0, disturbed.output
    assert disturbed.digest == digest_without_faults(run, undisturbed, world_size)
    assert disturbed.stderr.count("fault ") == len(faults)
    assert [row["state"] for row in disturbed.recoveries if row.get("state")] == ["memory"] * len(faults)
