"""State between two processes: bytes, buckets, checksums, and what does not belong there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hyperpodrun.checkpointless.errors import RestoreError
from hyperpodrun.checkpointless.state.provider import check_skeleton
from hyperpodrun.checkpointless.transfer.buckets import BUCKET_BYTES, Bucket, Memory, checksum, cut

WORKER = Path(__file__).parent / "workers" / "transfer.py"


def test_every_way_brings_the_same_bytes(run):
    finished = run("--nproc-per-node=2", WORKER)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("all as it should be") == 2


def test_buckets_cover_every_byte_once():
    sizes = [("a", 10, "cpu"), ("b", BUCKET_BYTES * 3 + 5, "cpu"), ("c", 0, "cpu"), ("d", BUCKET_BYTES // 5, "cpu")]
    sizes += [(f"small {i}", 1 << 20, "cpu") for i in range(40)]
    covered: dict[str, list[tuple[int, int]]] = {}
    for bucket in cut(sizes):
        assert 0 < bucket.nbytes <= BUCKET_BYTES
        for name, begin, end in bucket.pieces:
            covered.setdefault(name, []).append((begin, end))
    for name, nbytes, _ in sizes:
        at = 0
        for begin, end in covered.get(name, []):
            assert begin == at
            at = end
        assert at == nbytes


def test_tensors_of_different_devices_are_never_in_one_bucket():
    buckets = cut([("a", 4, "cpu"), ("b", 4, "cuda"), ("c", 4, "cpu")])
    assert [(bucket.device, [piece[0] for piece in bucket.pieces]) for bucket in buckets] == [
        ("cpu", ["a", "c"]),
        ("cuda", ["b"]),
    ]


@pytest.mark.parametrize("position", [0, 1, 999, 4096, 99_998])
def test_a_flipped_bit_changes_the_checksum(position):
    data = torch.randint(0, 256, (99_999,), dtype=torch.uint8)
    other = data.clone()
    other[position] ^= 1
    assert checksum(data).tolist() != checksum(other).tolist()
    assert checksum(data).tolist() == checksum(data.clone()).tolist()


def test_blocks_that_change_places_change_the_checksum():
    data = torch.randint(0, 256, (8192,), dtype=torch.uint8)
    assert checksum(data).tolist() != checksum(torch.cat([data[4096:], data[:4096]])).tolist()


def test_the_checksum_of_a_bucket_of_pieces_is_that_of_its_bytes():
    tensors = {"a": torch.arange(7, dtype=torch.uint8), "b": torch.arange(30, dtype=torch.int32)}
    memory = Memory(tensors)
    bucket = Bucket("cpu")
    bucket.add("a", 0, 7)
    bucket.add("b", 0, 120)
    assert memory.checksum(bucket).tolist() == checksum(torch.cat([memory.rows["a"], memory.rows["b"]])).tolist()


@pytest.mark.parametrize(
    "value",
    [None, [1], [("a", "float32", (1,))], [("a", "float32", (-1,), "cpu")], [("a", "float32", (1,), "disk")]],
    ids=repr,
)
def test_what_is_no_skeleton_is_refused(value):
    with pytest.raises(RestoreError):
        check_skeleton(value)
