"""Sharded state: a lost rank's shard comes from its replica, a lost shard from a snapshot, from disk, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exactness import Plan

WORKER = Path(__file__).parent / "workers" / "hsdp.py"
BOTH_HOLDERS = "kill:0+2:8:forward"


@pytest.fixture(scope="module")
def undisturbed():
    return {}


def hsdp(run, *options: str):
    return run("--nproc-per-node=4", "--inprocess-restart", WORKER, *options)


def digest_without_faults(run, undisturbed) -> str:
    if "digest" not in undisturbed:
        finished = hsdp(run)
        assert finished.returncode == 0, finished.output
        undisturbed["digest"] = finished.digest
    return undisturbed["digest"]


def with_faults(*faults: str, optimizer: str = "") -> Plan:
    return Plan(WORKER.name, ("--rollback", *([optimizer] if optimizer else [])), faults)


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(with_faults("raise:1:5:forward", "kill:2:8:before"), marks=pytest.mark.more),
        with_faults("kill:3:2:inside", "kill:0:6:between"),
        with_faults("kill:1:0:before", "raise:2:4:inside", "kill:3:9:forward"),
        with_faults("kill:0+1:5:forward", "kill:2+3:7:inside"),
        pytest.param(with_faults("kill:0+3:3:between"), marks=pytest.mark.more),
        # ZeroRedundancyOptimizer sends parts of the model inside its step: a fault there needs rollback.
        with_faults("kill:3:5:forward", "kill:0:7:part", optimizer="--zero"),
        with_faults("raise:1:4:part", "kill:0+3:6:before", optimizer="--zero"),
        pytest.param(with_faults("kill:2:3:inside", optimizer="--zero"), marks=pytest.mark.more),
    ],
    ids=str,
)
def test_a_lost_rank_has_its_shard_from_its_replica(runs, wanted):
    assert (wrong := runs.wrong(wanted)) is None, wrong
    assert {row["state"] for row in runs.ended(wanted).recoveries} == {"memory"}


def test_offloaded_state_comes_back(run, undisturbed):
    finished = hsdp(run, "--offload", "--rollback", "--fault", "kill:0:4:forward", "--fault", "raise:3:7:inside")
    assert finished.returncode == 0, finished.output
    assert finished.digest == digest_without_faults(run, undisturbed)


def test_a_lost_shard_takes_the_job_back_to_the_last_snapshot(run, undisturbed):
    finished = hsdp(run, "--snapshot-every=3", "--fault", BOTH_HOLDERS)
    assert finished.returncode == 0, finished.output
    assert finished.digest == digest_without_faults(run, undisturbed)
    (recovery,) = finished.recoveries
    assert recovery["state"] == "snapshot"
    assert recovery["lost_steps"] in (2, 5)  # the snapshot of step 6, or of 3 where that was not complete


def test_without_snapshots_it_goes_back_to_disk(run, undisturbed, tmp_path):
    finished = hsdp(run, "--disk", str(tmp_path / "checkpoints"), "--fault", BOTH_HOLDERS)
    assert finished.returncode == 0, finished.output
    assert finished.digest == digest_without_faults(run, undisturbed)
    (recovery,) = finished.recoveries
    assert recovery["state"] == "disk"
    assert recovery["lost_steps"] >= 2


def test_a_new_job_goes_on_from_disk(run, undisturbed, tmp_path):
    disk = ("--disk", str(tmp_path / "checkpoints"))
    assert hsdp(run, *disk, "--steps=6").returncode == 0
    finished = hsdp(run, *disk)
    assert finished.returncode == 0, finished.output
    assert finished.digest == digest_without_faults(run, undisturbed)


def test_a_checkpoint_that_cannot_be_written_or_read_costs_neither_training_nor_the_one_before(
    run, undisturbed, tmp_path
):
    path = tmp_path / "checkpoints"
    path.mkdir()
    (path / "step-6").write_text("in the way")
    finished = hsdp(run, "--disk", str(path), "--steps=8")
    assert finished.returncode == 0, finished.output
    assert "a checkpoint on disk failed" in finished.output
    (path / "step-6").unlink()
    shutil.copytree(path / "step-3", path / "step-6")
    for part in (path / "step-6").glob("*.distcp"):
        part.write_bytes(b"")
    finished = hsdp(run, "--disk", str(path))
    assert finished.returncode == 0, finished.output
    assert "step-6 cannot be read" in finished.output
    assert finished.digest == digest_without_faults(run, undisturbed)


def test_with_neither_the_job_ends_and_says_what_is_gone(run):
    finished = hsdp(run, "--fault", BOTH_HOLDERS)
    assert finished.returncode == 1, finished.output
    assert "no process holds the state of ranks 0, 2 any more" in finished.stderr
    assert "digest" not in finished.stdout
