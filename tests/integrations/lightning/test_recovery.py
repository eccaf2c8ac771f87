"""Real trainings with Lightning, on four ranks, end with a fault bit for bit as without one: weights, optimizers, the
trainer's position, metrics, results of every rank, rows of the logger, files of checkpoints and what is in them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hyperpodrun.testing import PLACES
from outcomes import RANKS, Outcome, difference, train

STEPS = 18


class Undisturbed:
    """Outcomes without a fault, each run once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Outcome] = {}

    def __call__(self, mode: str) -> Outcome:
        if mode not in self._known:
            self._known[mode], _ = train(self._directory / mode, mode)
            assert all(len(steps) == STEPS for steps in self._known[mode].steps.values())
        return self._known[mode]

    def checkpoint(self, mode: str) -> Path:
        """One that was saved in the middle of an epoch."""
        self(mode)
        return self._directory / mode / "saved" / "epochs" / "epoch=1-step=4.ckpt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def drawn(mode: str, seed: int) -> str:
    """A killed rank, and an exception some steps later, at places that those steps come to: every second batch has an
    update. The last step is spared, so that all have a last state."""
    chance = random.Random(f"{mode} {seed}")
    places = chance.choice(list(PLACES)), chance.choice([place for place in PLACES if place != "after-update"])
    steps = sorted(chance.sample(range(0, STEPS - 2, 2), 2))
    late = [place in ("before-update", "in-update") or chance.randrange(2) for place in places]
    faults = zip(("kill", "raise"), places, steps, late, strict=True)
    return ";".join(
        f"{kind}:rank={chance.randrange(RANKS)},step={step + late},where={place}" for kind, place, step, late in faults
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["ddp", "ddp-epoch", "fsdp", "manual"])
def test_a_killed_rank_and_an_exception_change_nothing(mode: str, seed: int, undisturbed: Undisturbed, tmp_path: Path):
    faults = drawn(mode, seed)
    outcome, said = train(tmp_path, mode, HYPERPODRUN_INJECT=faults)
    assert said.count("hyperpodrun: recovery ") == 2, f"{faults}\n{said}"
    assert not difference(undisturbed(mode), outcome), f"{faults}\n{said}"


HOOKS = {"batch_end": 7, "validation_end": 11, "epoch_start": 5, "epoch_end": 11, "save": 3}
"""By hook, a batch after which it is called."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_rank_killed_in_a_hook_changes_nothing(hook: str, mode: str, undisturbed: Undisturbed, tmp_path: Path):
    rank = list(HOOKS).index(hook) % 2  # every other time the one that logs and saves
    outcome, said = train(tmp_path, mode, FAULT=f"kill:rank={rank},step={HOOKS[hook]}@{hook}")
    assert said.count("hyperpodrun: recovery ") == 1, said
    assert not difference(undisturbed(mode), outcome), said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_without_the_copy_the_outcome_is_another(mode: str, undisturbed: Undisturbed, tmp_path: Path):
    faults = "kill:rank=2,step=9,where=backward"
    outcome, said = train(tmp_path, mode, HYPERPODRUN_INJECT=faults, WITHOUT_COPY="1")
    assert "hyperpodrun: recovery " in said
    assert difference(undisturbed(mode), outcome)


@pytest.mark.timeout(600)
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_faults_as_without(undisturbed: Undisturbed, tmp_path: Path):
    settings = {"RESUME": str(undisturbed.checkpoint("ddp"))}
    outcome, _ = train(tmp_path / "without", "ddp", **settings)
    assert len(outcome.steps[0]) < STEPS
    settings["HYPERPODRUN_INJECT"] = "kill:rank=1,step=3,where=backward;raise:rank=0,step=7,where=before-update"
    disturbed, said = train(tmp_path / "with", "ddp", **settings)
    assert said.count("hyperpodrun: recovery ") == 2, said
    assert not difference(outcome, disturbed)
