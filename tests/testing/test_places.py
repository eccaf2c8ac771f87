"""Faults that the environment asks for fire where they say, once each, and the run ends as if they had not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "places.py"
PLACES = ("forward", "backward", "before-update", "in-update", "after-update")
UNSEEDED = ("generator.numpy", "generator.python")
FOUND = {
    "forward": "gradients=False changed=False moved=False",
    "backward": "gradients=False changed=False moved=False",
    "before-update": "gradients=True changed=False moved=False",
    "in-update": "gradients=True changed=True moved=False",
    "after-update": "gradients=True changed=True moved=True",
}


@pytest.fixture
def train(run, tmp_path):
    """train(faults, *arguments): the worker on two ranks, its traces by rank."""

    def training(faults: str, *arguments: str):
        trace = tmp_path / f"trace-{len(list(tmp_path.glob('trace-*')))}"
        finished = run(
            *("--nproc-per-node=2", "--inprocess-restart", WORKER, *arguments),
            HYPERPODRUN_TESTING="1",
            HYPERPODRUN_INJECT=faults,
            HYPERPODRUN_TRACE=str(trace),
        )
        assert finished.returncode == 0, finished.output
        rows = {rank: [json.loads(line) for line in _lines(trace, rank)] for rank in (0, 1)}
        return finished, rows

    return training


def _lines(trace: Path, rank: int) -> list[str]:
    return (trace / f"rank-{rank}.jsonl").read_text().splitlines()


def _last(rows: list[dict]) -> dict[int, dict[str, str]]:
    """By step: the digests that count, without those of generators that nobody seeds."""
    return {
        row["step"]: {name: row["digests"][name] for name in row["digests"] if name not in UNSEEDED}
        for row in rows
        if "step" in row
    }


def test_each_fault_fires_where_it_says_and_the_run_ends_as_if_it_had_not(train):
    faults = ";".join(f"raise:rank=1,step={step},where={place}" for step, place in enumerate(PLACES, 3))
    disturbed, rows = train(f"{faults};kill:rank=0,step=8,where=in-update")
    undisturbed, expected = train("")
    said = [line for line in disturbed.stdout.splitlines() if not line.startswith("end")]
    ends = [line for line in disturbed.stdout.splitlines() if line.startswith("end")]
    assert said == [f"{place} {FOUND[place]}" for place in PLACES], disturbed.output
    assert len(disturbed.recoveries) == len(PLACES) + 1, disturbed.output
    assert sorted(ends) == sorted(undisturbed.stdout.splitlines()), disturbed.output
    assert "TESTING: this job is broken on purpose" in disturbed.stderr
    assert "TESTING" not in undisturbed.stderr
    for rank in (0, 1):
        ours, theirs = _last(rows[rank]), _last(expected[rank])
        assert all(ours[step] == theirs[step] for step in ours), rank
        assert max(ours) == max(theirs) == 9
        assert [row["places"] for row in expected[rank] if "places" in row] == [list(PLACES)] * 10
        assert [row["result"] for row in rows[rank] if "result" in row] == ["result"]
    assert [row["fired"] for row in rows[0] if "fired" in row] == ["kill:rank=0,step=8,where=in-update"]


def test_a_compiled_module_is_not_hooked_into_and_its_forward_fault_fires_with_the_first_gradient(train):
    """fullgraph=True would refuse a hook that breaks the graph."""
    disturbed, rows = train("raise:rank=1,step=3,where=forward;kill:rank=0,step=5,where=backward", "--compile")
    assert f"forward {FOUND['backward']}" in disturbed.stdout
    assert len(disturbed.recoveries) == 2, disturbed.output
    places = [row["places"] for row in rows[0] if "places" in row]
    assert all(set(PLACES) == set(found) for found in places)


def test_faults_are_refused_by_the_launcher_and_by_a_worker_unless_this_is_a_test(run):
    refused = run(WORKER, HYPERPODRUN_INJECT="kill:rank=0,step=1")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert "HYPERPODRUN_TESTING=1 is not" in refused.stderr
    program = "import hyperpodrun; hyperpodrun.CheckpointManager()"
    worker = subprocess.run(
        [sys.executable, "-c", program],
        env={"HYPERPODRUN_INJECT": "kill:rank=0,step=1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert worker.returncode == 1
    assert "HYPERPODRUN_TESTING=1 is not" in worker.stderr
