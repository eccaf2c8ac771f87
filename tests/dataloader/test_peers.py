"""A rank whose cache is cold gets its first batches from a rank of another node that reads the same stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sources
import torch
from hyperpodrun.dataloader.errors import CacheCorruptError, ProducerError
from hyperpodrun.dataloader.reading import peers, warming
from hyperpodrun.dataloader.reading.warming import Report, Transfer, plan
from test_loader import plain

WORKER = Path(__file__).parent / "workers" / "peers.py"
FIRST = 5


@pytest.mark.parametrize(("source", "sealed"), [("shuffled", "sealed"), ("stream", "open"), ("stateful_both", "open")])
def test_the_first_batches_come_from_a_peer_and_the_rest_from_the_own_producer(load, tmp_path, source, sealed):
    expected = plain(list(load(getattr(sources, source), seed=3)))[FIRST:]
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, str(WORKER), str(tmp_path), rank, source, sealed]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [(*process.communicate(timeout=90), process.returncode) for process in ranks]
    assert [code for _, _, code in ended] == [0, 0], ended
    said = [json.loads(stdout) for stdout, _, _ in ended]
    assert [rank["read"] for rank in said] == [expected, expected]
    assert [rank["opened_early"] for rank in said] == [True, False], "the cold rank's producer made nothing"


# ---- the plan ------------------------------------------------------------------------------------------------------


def report(stream: str = "a", index: int = 5, sizes: tuple[int, ...] = (), seed: int = 1, digest: str = "d") -> Report:
    return Report(stream, digest, seed, (None, index), (0, index) if sizes else None, sizes)


def test_those_who_have_give_to_those_who_have_not_in_turn():
    reports = [report(sizes=(10, 10)), report(), report(), report("b"), report(sizes=(10, 10, 10)), report()]
    assert plan(reports) == (
        Transfer(0, 1, (0, 5), 2),
        Transfer(4, 2, (0, 5), 3),
        Transfer(0, 5, (0, 5), 2),
    )


def test_nothing_is_given_to_who_wants_something_else():
    have = report(sizes=(10,))
    assert plan([have, report("b"), report(index=6), report(seed=2), report(digest="e")]) == ()


def test_nothing_is_carried_where_all_are_cold_or_all_are_warm():
    assert plan([report()] * 4) == ()
    assert plan([report(sizes=(1,))] * 4) == ()


def test_no_more_is_carried_than_is_worth_it():
    half = warming.MOST_BYTES // 2
    assert plan([report(sizes=(half, half, 1)), report()])[0].count == 2
    assert plan([report(sizes=(warming.MOST_BYTES + 1,)), report()]) == ()
    assert plan([report(sizes=(1,) * 40), report()])[0].count == warming.MOST_BATCHES


# ---- what arrives --------------------------------------------------------------------------------------------------


def test_a_report_that_is_none_is_an_error_that_says_so():
    with pytest.raises(ProducerError, match="rank 3 of the model-parallel group does not say what it reads"):
        peers._report(3, bytes(1024))


def test_a_batch_that_changes_on_its_way_is_refused():
    row = torch.frombuffer(bytearray(b"HPBATCH1" * 40), dtype=torch.uint8)
    with pytest.raises(CacheCorruptError, match="did not arrive as it was sent"):
        peers._unpacked((0, 5), row)


def test_a_group_without_torch_distributed_is_refused(load):
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised"):
        load(sources.shuffled, model_parallel_group=object())
