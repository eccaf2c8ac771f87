"""Snapshots as files, and on their way to another node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hyperpodrun.checkpointless.errors import RestoreError
from hyperpodrun.checkpointless.state.provider import specify
from hyperpodrun.checkpointless.step.tracker import Learned
from hyperpodrun.checkpointless.transfer.buckets import Memory
from hyperpodrun.checkpointless.transfer.header import Header
from hyperpodrun.checkpointless.transfer.snapshot_files import SnapshotFiles, contents, inventory

WORKER = Path(__file__).parent / "workers" / "buddies.py"


def publish(files: SnapshotFiles, owner: int, step: int) -> Path:
    tensors = {"weight": torch.full((5, 3), float(step)), "flags": torch.tensor([True, False])}
    header = Header(step, specify(tensors), {}, {}, b"", (0, b""), Learned(), {})
    return files.publish(owner, step, contents(header, Memory(tensors)))


def test_buddies_stay_in_step_whatever_one_of_them_leaves_out(run):
    finished = run("--nproc-per-node=2", "--inprocess-restart", WORKER)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("all as it should be") == 2


def test_the_last_two_are_kept_and_what_a_rollback_has_overtaken_goes(tmp_path):
    files = SnapshotFiles(tmp_path, 0)
    for step in (4, 8, 12):
        publish(files, 0, step)
    publish(files, 1, 4)
    assert inventory(tmp_path) == [(0, 12), (0, 8), (1, 4)]
    publish(files, 0, 6)
    assert inventory(tmp_path) == [(0, 6), (1, 4)]


def test_a_copy_that_is_left_half_way_is_no_snapshot(tmp_path):
    files = SnapshotFiles(tmp_path, 0)

    def chunks():
        yield b"HPSNAP01"
        raise OSError("memory is full")

    with pytest.raises(OSError, match="memory is full"):
        files.publish(0, 4, chunks())
    assert inventory(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 10, 40, -1])
def test_a_snapshot_that_is_cut_short_is_refused(tmp_path, keep):
    files = SnapshotFiles(tmp_path, 0)
    path = publish(files, 0, 4)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RestoreError, match="snapshot-0-4"):
        files.load(0, 4)


def test_a_damaged_header_is_refused(tmp_path):
    files = SnapshotFiles(tmp_path, 0)
    path = publish(files, 0, 4)
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    with pytest.raises(RestoreError, match="is damaged"):
        files.load(0, 4)
    assert inventory(tmp_path) == []  # the next plan is made without it


def test_there_is_no_snapshot_where_there_is_no_file(tmp_path):
    with pytest.raises(RestoreError, match="cannot be read"):
        SnapshotFiles(tmp_path, 0).load(3, 4)
