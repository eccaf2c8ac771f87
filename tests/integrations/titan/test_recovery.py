"""torchtitan's trainer on its debug model: with a killed rank and an exception anywhere it ends as without."""

from __future__ import annotations

import random
import re

import pytest
from conftest import EXAMPLE, RANKS  # type: ignore[import-not-found]

pytestmark = pytest.mark.timeout(1200)
PLACES = ("forward", "backward", "before-update", "in-update", "after-update")
STEPS = 5
LAYOUTS = {"hsdp": ("--replicate=2",), "replicate": ("--replicate=4",)}


def drawn(seed: int) -> str:
    """A rank that is killed and an exception, in either order, each anywhere in one half of the training."""
    draw = random.Random(seed)
    kinds = draw.sample(["kill", "raise"], 2)
    halves = (range(2), range(2, STEPS - 1))
    return ";".join(
        f"{kind}:rank={draw.randrange(RANKS)},step={draw.choice(half)},where={draw.choice(PLACES)}"
        for kind, half in zip(kinds, halves, strict=True)
    )


def same(trained, expected, faults):
    """Losses, step count and state of every rank, after every step."""
    assert len(trained.launch.recoveries) == len(trained.fired) == len(faults.split(";")), trained.launch.output
    assert trained.last == expected.last, faults
    assert len(trained.last) == RANKS
    assert trained.losses == expected.losses, faults
    for place, found in trained.digests.items():
        assert found == expected.digests[place], (faults, place)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_faults_anywhere_change_nothing(train, undisturbed, layout, seed):
    arguments = (f"--steps={STEPS}", *LAYOUTS[layout])
    expected = undisturbed(*arguments)
    assert {step for step, _ in expected.last.values()} == {STEPS - 1}
    assert all(len(found) == 1 for found in expected.losses.values())
    assert len(expected.losses) == RANKS * STEPS
    faults = drawn(seed)
    same(train(*arguments, faults=faults), expected, faults)


def test_without_the_copy_a_killed_rank_comes_out_different(train, undisturbed):
    """The negative control: these comparisons do see what is not carried."""
    arguments = (f"--steps={STEPS}", *LAYOUTS["hsdp"])
    ended = train(*arguments, "--skip-copy", faults="kill:rank=1,step=2,where=forward", returncode=None)
    assert ended.fired, ended.launch.output
    assert ended.last != undisturbed(*arguments).last


def test_data_metrics_checkpoints_and_validation_are_neither_lost_nor_doubled(train, undisturbed):
    """With accumulation and with processes that load data. The rank that writes the metrics is lost."""
    more = ("--steps=6", "--save-every=2", "--validate-every=3", "--global-batch-size=16", "--workers=1")
    arguments = (*more, "--tensorboard")
    faults = "kill:rank=0,step=3,where=in-update;raise:rank=1,step=4,where=backward"
    expected, ended = undisturbed(*arguments), train(*arguments, faults=faults)
    same(ended, expected, faults)
    assert _scalars(ended) == _scalars(expected)
    assert _checkpoints(ended) == _checkpoints(expected) == ["step-2", "step-4", "step-6"]


def _checkpoints(trained):
    return sorted(path.parent.name for path in (trained.folder / "checkpoint").glob("*/.metadata"))


def _scalars(trained):
    """By tag: steps and values, of what does not depend on the clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (trained.folder / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "loss" in tag or tag in ("grad_norm", "n_tokens_seen")]
    assert len(tags) >= 5
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_a_checkpoint_of_its_own_is_where_training_begins_and_not_what_a_restart_loads(train, tmp_path):
    """Training that goes on from a checkpoint recovers as well; its steps are the checkpoint's and those after it."""
    first = train("--steps=2", "--save-every=2")
    more = ("--steps=5", "--save-every=2", "--load-from", str(first.folder / "checkpoint" / "step-2"))
    faults = "kill:rank=3,step=1,where=backward"
    expected, ended = train(*more), train(*more, faults=faults)
    assert sorted({step for _, step in expected.losses}) == [3, 4, 5]
    same(ended, expected, faults)


def test_verify_says_that_the_example_recovers(verify):
    code, said = verify("--faults=2", f"--nproc-per-node={RANKS}", str(EXAMPLE / "train.py"), "--steps=4")
    assert code == 0, said
    assert re.search(r"2 of 2 runs with a fault were equal", said), said
