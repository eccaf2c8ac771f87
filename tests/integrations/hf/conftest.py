"""Trainings of four ranks with Hugging Face's packages, and what each rank has to say at their end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RANKS = 4
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a process with a thread of Arrow's is not forked from
}
PRELOAD = "transformers.trainer,transformers.models.gpt2.modeling_gpt2,accelerate"
"""Imported once: a launch, and a replaced process, begins in a second or two."""
PLACES = ("forward", "backward", "before-update", "in-update", "after-update")


def drawn(kind: str, seed: int, steps: int, updates: Callable[[int], bool]) -> str:
    """A fault of that kind, anywhere. `updates`: whether a step has an update, in which there are more places."""
    draw = random.Random(f"{kind} {seed}")
    rank, step = draw.randrange(RANKS), draw.randrange(steps)
    return f"{kind}:rank={rank},step={step},where={draw.choice(PLACES if updates(step) else PLACES[:2])}"


@dataclass
class Trained:
    """A training that is over: the outcomes of its ranks, and the launch."""

    ranks: list[dict[str, Any]]
    launch: Any


@pytest.fixture(scope="module")
def train(start_any_time, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """train(worker, *arguments, faults="..."): to its end."""

    def run(
        worker: str | Path,
        *arguments: str,
        faults: str = "",
        mode: str = "--inprocess-restart",
        returncode: int | None = 0,
    ) -> Trained:
        outcome = tmp_path_factory.mktemp("outcome")
        environment = {**ENVIRONMENT, "OUTCOME": str(outcome)}
        if faults:
            environment |= {"HYPERPODRUN_TESTING": "1", "HYPERPODRUN_INJECT": faults}
        options = [f"--nproc-per-node={RANKS}", mode, f"--preload={PRELOAD}"]
        ended = start_any_time(*options, HERE / "workers" / worker, *arguments, **environment).wait(400)
        assert returncode in (None, ended.returncode), ended.output
        written = [outcome / f"rank-{rank}.json" for rank in range(RANKS)]
        ranks = [json.loads(path.read_text()) for path in written if path.exists()]
        return Trained(ranks, ended)

    return run


@pytest.fixture(scope="module")
def undisturbed(train) -> Callable[..., list[dict[str, Any]]]:
    """undisturbed(worker, *arguments): the outcomes without a fault, made once."""
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def outcomes(worker: str, *arguments: str) -> list[dict[str, Any]]:
        key = (worker, *arguments)
        if key not in known:
            known[key] = train(worker, *arguments).ranks
        return known[key]

    return outcomes
