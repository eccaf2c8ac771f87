"""Every kind of fault in every place: the job recovers, survivors keep their processes, the result is unchanged.

Several faults share one launch, as starting processes is what costs time here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GPT = Path(__file__).parents[2] / "examples" / "gpt" / "train.py"
SMALL = ("--layers", "2", "--width", "64", "--batch-size", "2", "--block-size", "32")
PLACES = ("forward", "backward", "optimizer", "between")


def gpt(run, ranks: int, steps: int, *injections: str, options: tuple[str, ...] = ()):
    inject = [word for injection in injections for word in ("--inject", injection)]
    launcher = (f"--nproc-per-node={ranks}", "--inprocess-restart")
    return run(*launcher, GPT, "--steps", str(steps), *SMALL, *options, *inject)


_undisturbed: dict[tuple[int, int], str] = {}


def digest_without_faults(run, ranks: int, steps: int) -> str:
    key = (ranks, steps)
    if key not in _undisturbed:
        finished = gpt(run, ranks, steps)
        assert finished.returncode == 0, finished.output
        assert not finished.recoveries
        _undisturbed[key] = finished.digest
    return _undisturbed[key]


def assert_recovered(finished, expected: list[tuple[int, set[int]]]) -> None:
    """`expected`: for every fault the rank to blame and the ranks that had to be respawned."""
    assert finished.returncode == 0, finished.output
    assert len(finished.recoveries) == len(expected), finished.output
    for row, (rank, respawned) in zip(finished.recoveries, expected, strict=True):
        assert row["rank"] == rank, finished.output
        assert set(row["respawned"]) == respawned, finished.output
        for survivor, before in row["pids_before"].items():
            assert (row["pids_after"][survivor] == before) == (int(survivor) not in respawned), finished.output
        assert row["completed"]
        assert all(value is not None for value in row["phases_ms"].values())
        assert row["total_ms"] == pytest.approx(sum(row["phases_ms"].values()), abs=0.1)


def test_exceptions_in_every_place_leave_all_processes_and_the_result(run):
    faults = [f"raise:rank={index % 2},step={4 + 4 * index},where={where}" for index, where in enumerate(PLACES)]
    finished = gpt(run, 2, 24, *faults)
    assert_recovered(finished, [(index % 2, set()) for index in range(4)])
    assert finished.digest == digest_without_faults(run, 2, 24)


@pytest.mark.parametrize("kind", ["kill", "segv", "exit"])
@pytest.mark.parametrize("pair", [PLACES[:2], PLACES[2:]], ids="-".join)
def test_a_lost_process_is_respawned_alone_and_the_result_is_unchanged(run, kind, pair):
    faults = [f"{kind}:rank={rank},step={6 + 8 * rank},where={where}" for rank, where in enumerate(pair)]
    finished = gpt(run, 2, 24, *faults)
    assert_recovered(finished, [(0, {0}), (1, {1})])
    assert finished.digest == digest_without_faults(run, 2, 24)


def test_the_readmes_run_with_an_exception_and_the_death_of_rank_0(run):
    finished = gpt(run, 4, 40, "raise:rank=1,step=10", "kill:rank=0,step=20,where=backward")
    assert_recovered(finished, [(1, set()), (0, {0})])
    assert finished.digest == digest_without_faults(run, 4, 40)


def test_several_ranks_lost_at_once_are_one_fault(run):
    kills = [f"kill:rank={rank},step=9,where=between" for rank in (0, 2)]
    finished = gpt(run, 4, 40, *kills, "raise:rank=3,step=10,where=backward")
    assert finished.returncode == 0, finished.output
    # The news of any of them can reach another rank before that comes to its own fault.
    struck = {int(rank) for rank in re.findall(r"injecting kill: rank (\d)", finished.stderr)}
    assert finished.recoveries
    assert {rank for row in finished.recoveries for rank in row["respawned"]} == struck, finished.output
    assert finished.digest == digest_without_faults(run, 4, 40)


def test_a_rank_that_hangs_while_the_others_wait_for_it_costs_no_process(run):
    finished = gpt(run, 2, 24, "hang:rank=1,step=6", options=("--timeout", "3"))
    assert_recovered(finished, [(0, set())])  # the one who waits is the one who can say so
    assert finished.digest == digest_without_faults(run, 2, 24)


def test_every_entry_finds_torch_and_its_nccl_settings_as_the_first_one_did(run, script):
    finished = run("--nproc-per-node=2", "--inprocess-restart", script("""
import os
import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper

@HPWrapper()
def main(caller: HPCallWrapper):
    dist.init_process_group("gloo")
    dist.barrier()
    caller.step_completed()
    found = torch.is_grad_enabled(), os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
    os.write(1, f"{caller.epoch} {found}\\n".encode())
    torch.no_grad().__enter__()
    if caller.epoch < 2:
        dist.barrier()
        raise RuntimeError("boom")

main()
os.write(1, f"after {os.environ['TORCH_NCCL_ASYNC_ERROR_HANDLING']}\\n".encode())
"""))  # fmt: skip
    assert finished.returncode == 0, finished.output
    inside = [f"{epoch} (True, '0')" for epoch in range(3)]
    assert sorted(finished.stdout.splitlines()) == sorted([*inside, "after 1"] * 2), finished.output
