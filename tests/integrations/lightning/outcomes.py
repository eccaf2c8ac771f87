"""One launch of `worker.py`, and all that it leaves: digests of every step, results, metrics, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from hyperpodrun.testing.digests import digests

RANKS = 4
PRELOAD = "--preload=lightning,torchmetrics"
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Outcome:
    """What a run without the fault and one with it must have in common."""

    steps: dict[int, dict[int, dict[str, str]]] = field(default_factory=dict)
    """By rank and step; one that is repeated counts as it was the last time."""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    metrics: str = ""
    checkpoints: dict[str, Any] = field(default_factory=dict)


def launch(directory: Path, script: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hyperpodrun", f"--nproc-per-node={RANKS}", "--inprocess-restart", PRELOAD]
    ended = subprocess.run(
        [*command, "--log-dir", str(directory / "log"), str(script), *arguments],
        env={**os.environ, "HYPERPODRUN_TESTING": "1", "HYPERPODRUN_TRACE": str(directory / "trace"), **environment},
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    return ended.returncode, ended.stdout


def train(directory: Path, mode: str, **environment: str) -> tuple[Outcome, str]:
    """An outcome, and what was said on the way."""
    code, said = launch(directory, WORKER, mode, **environment)
    assert code == 0, said
    return read(directory), said


def read(directory: Path) -> Outcome:
    found = Outcome(metrics="\n".join(path.read_text() for path in sorted(directory.glob("**/metrics.csv*"))))
    for rank in range(RANKS):
        lines = (directory / "trace" / f"rank-{rank}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found.steps[rank] = {row["step"]: row["digests"] for row in rows if "step" in row}
        found.results[rank] = {row["result"]: row["digests"] for row in rows if "result" in row}
    for path in sorted((directory / "saved").rglob("*")):
        if path.is_file():
            found.checkpoints[str(path.relative_to(directory))] = _contents(path)
    return found


def _contents(path: Path) -> Any:
    if path.suffix != ".ckpt":  # of a directory that torch.distributed.checkpoint has written
        return xxhash.xxh3_64_hexdigest(path.read_bytes()) if path.suffix == ".distcp" else None
    saved = torch.load(path, weights_only=False)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step")
    return digests("", {name: saved[name] for name in names})


def difference(one: Outcome, other: Outcome) -> str:
    """What differs first, as a sentence; nothing if they are equal."""
    for rank, steps in one.steps.items():
        if max(steps) != max(other.steps[rank]):
            return f"rank {rank} trained {max(steps) + 1} and {max(other.steps[rank]) + 1} steps"
        for step, named in sorted(steps.items()):
            if step not in other.steps[rank]:  # it was lost when it had trained on it, and so had the others
                continue
            names = [name for name in named.keys() | other.steps[rank][step].keys()
                     if named.get(name) != other.steps[rank][step].get(name)]  # fmt: skip
            if names:
                return f"rank {rank}, step {step}: {sorted(names)[:5]}"
        if one.results[rank] != other.results[rank]:
            return f"rank {rank}: results"
    if one.metrics != other.metrics:
        return f"rows of metrics:\n{one.metrics}\n{other.metrics}"
    if one.checkpoints.keys() != other.checkpoints.keys():
        return f"files: {one.checkpoints.keys() ^ other.checkpoints.keys()}"
    names = [name for name, contents in one.checkpoints.items() if contents != other.checkpoints[name]]
    return f"contents of {names}" if names else ""
