"""Trainings of four ranks with torchtitan's trainer, and what each rank has to say of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "examples" / "titan"
RANKS = 4
PRELOAD = "cpu,torchtitan.trainer,torchtitan.models.llama3.config_registry,torchtitan.hf_datasets.text_datasets"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(EXAMPLE),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # with that thread of pyarrow's nothing could be preloaded
    "HYPERPODRUN_TESTING": "1",
}
UNSEEDED = {"generator.python", "generator.numpy"}
"""torchtitan seeds neither, and nothing here draws from them."""


@dataclass
class Trained:
    """A training that is over."""

    launch: Any
    folder: Path
    digests: dict[tuple[int, int], dict[str, str]]
    """By rank and step: of everything that is registered, the trainer's own step included. The last time counts."""
    losses: dict[tuple[int, int], set[str]]
    """By rank and step: those in the metrics, to the last bit. One, also where the step was repeated."""
    fired: list[str]

    @property
    def last(self) -> dict[int, tuple[int, dict[str, str]]]:
        """By rank: its last step, and the state after it."""
        return {rank: (step, found) for (rank, step), found in sorted(self.digests.items())}


@pytest.fixture(scope="module")
def train(start_any_time, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """train(*arguments, faults="...", script=...): to its end."""

    def run(
        *arguments: str, faults: str = "", script: Path = HERE / "worker.py", returncode: int | None = 0
    ) -> Trained:
        folder = tmp_path_factory.mktemp("training")
        environment = {
            **ENVIRONMENT,
            "HYPERPODRUN_TRACE": str(folder / "trace"),
            "HYPERPODRUN_INJECT": faults,
            "LOSSES": str(folder),
        }
        options = ["--standalone", f"--nproc-per-node={RANKS}", "--inprocess-restart", f"--preload={PRELOAD}"]
        launch = start_any_time(*options, script, "--folder", folder, *arguments, **environment).wait(500)
        assert returncode in (None, launch.returncode), launch.output
        return read(launch, folder)

    return run


def read(launch: Any, folder: Path) -> Trained:
    trained = Trained(launch, folder, {}, {}, [])
    for rank in range(RANKS):
        for row in _rows(folder / "trace" / f"rank-{rank}.jsonl"):
            if "step" in row:
                found = {name: digest for name, digest in row["digests"].items() if name not in UNSEEDED}
                trained.digests[rank, row["step"]] = found
            elif "fired" in row:
                trained.fired.append(row["fired"])
        for row in _rows(folder / f"losses-{rank}.jsonl"):
            trained.losses.setdefault((rank, row["step"]), set()).add(row["loss"])
    return trained


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(train) -> Callable[..., Trained]:
    """undisturbed(*arguments): the training without a fault, made once."""
    known: dict[tuple[str, ...], Trained] = {}

    def made(*arguments: str) -> Trained:
        if arguments not in known:
            known[arguments] = train(*arguments)
        return known[arguments]

    return made


@pytest.fixture
def verify(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """verify(*arguments): `hyperpodrun verify`, its exit code and what it says."""

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "hyperpodrun", "verify", *arguments]
        environment = {**os.environ, **ENVIRONMENT}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100)
        return ended.returncode, ended.stdout + ended.stderr

    return run
