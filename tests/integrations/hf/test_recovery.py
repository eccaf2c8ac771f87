"""Real trainings of four ranks: with a killed rank or an exception anywhere they end as without, bit for bit."""

from __future__ import annotations

import pytest
from conftest import drawn  # type: ignore[import-not-found]

pytestmark = pytest.mark.timeout(900)
STEPS = {"trainer.py": (15, lambda step: True), "loop.py": (27, lambda step: step % 9 in (1, 3, 5, 7, 8))}
"""How many there are: updates of a Trainer's run, batches of a loop's; and which of them have an update."""


@pytest.mark.parametrize("kind", ["kill", "raise"])
@pytest.mark.parametrize("worker", ["trainer.py", "loop.py"])
def test_a_fault_anywhere_changes_nothing(train, undisturbed, worker, kind, seed):
    fault = drawn(kind, seed, *STEPS[worker])
    ended = train(worker, faults=fault)
    assert len(ended.launch.recoveries) == 1, (fault, ended.launch.output)
    assert ended.ranks == undisturbed(worker), fault


@pytest.mark.parametrize("arguments", [["--plain"], []], ids=["client", "recoverable"])
@pytest.mark.parametrize("worker", ["trainer.py", "loop.py"])
def test_under_a_plain_launcher_the_numbers_are_the_same(train, undisturbed, worker, arguments):
    """Those of a client that knows nothing of hyperpodrun, and of one that could recover."""
    assert train(worker, *arguments, mode="--max-restarts=0").ranks == undisturbed(worker)


@pytest.mark.parametrize("worker", ["trainer.py", "loop.py"])
def test_without_the_copy_a_killed_rank_comes_out_different(train, undisturbed, worker):
    """The negative control: these comparisons do see what is not carried."""
    ended = train(worker, "--skip-copy", faults="kill:rank=1,step=9,where=forward", returncode=None)
    assert ended.ranks != undisturbed(worker)


@pytest.mark.parametrize(
    ("worker", "arguments"),
    [
        ("trainer.py", ["--fail-evaluation=6"]),
        ("trainer.py", ["--fail-evaluation=15"]),
        ("loop.py", ["--fail-evaluation=1"]),
        ("loop.py", ["--fail-evaluation=2"]),
    ],
    ids=["trainer", "trainer-last", "loop", "loop-last"],
)
def test_an_evaluation_that_fails_is_repeated_once_and_not_lost(train, undisturbed, worker, arguments):
    ended = train(worker, *arguments)
    assert len(ended.launch.recoveries) == 1, ended.launch.output
    assert ended.ranks == undisturbed(worker)


@pytest.mark.parametrize("worker", ["trainer.py", "loop.py"])
def test_noise_drawn_without_workers_is_the_same(train, undisturbed, worker):
    """A batch is then made in the process itself, one ahead, from the generators that dropout draws from."""
    faults = "kill:rank=2,step=7,where=backward;raise:rank=0,step=11,where=forward;raise:rank=1,step=11,where=backward"
    ended = train(worker, "--workers=0", faults=faults)
    assert len(ended.launch.recoveries) == 3, ended.launch.output
    assert ended.ranks == undisturbed(worker, "--workers=0")


@pytest.mark.parametrize(
    ("worker", "arguments", "step"), [("trainer.py", ["--drawn-order"], 5), ("loop.py", [], 9)], ids=["trainer", "loop"]
)
def test_the_order_of_an_epoch_is_found_again_in_its_first_step(train, undisturbed, worker, arguments, step):
    faults = f"kill:rank=0,step={step},where=forward;raise:rank=1,step={2 * step},where=forward"
    assert train(worker, *arguments, faults=faults).ranks == undisturbed(worker, *arguments)


@pytest.mark.parametrize(("worker", "step"), [("trainer.py", 9), ("loop.py", 8)], ids=["trainer", "loop"])
def test_the_last_batch_of_an_epoch_is_the_same(train, undisturbed, worker, step):
    """accelerate holds it back: the iterator it came from is at its end already."""
    faults = f"raise:rank=0,step={step},where=forward;kill:rank=1,step={step},where=backward"
    assert train(worker, faults=faults).ranks == undisturbed(worker)


def test_an_order_is_found_again_after_an_evaluation_at_the_end_of_an_epoch(train, undisturbed):
    arguments = ["--drawn-order", "--epochs=5"]
    ended = train("trainer.py", *arguments, "--fail-evaluation=15")
    assert ended.ranks == undisturbed("trainer.py", *arguments)


def test_adapters_recover(train, undisturbed):
    ended = train("trainer.py", "--lora", faults="kill:rank=3,step=6,where=in-update;raise:rank=1,step=9")
    assert len(ended.launch.recoveries) == 2, ended.launch.output
    assert ended.ranks == undisturbed("trainer.py", "--lora")


def test_an_end_in_the_middle_of_an_epoch_is_found_again(train, undisturbed):
    arguments = ["--max-steps=8"]
    ended = train("trainer.py", *arguments, faults="kill:rank=0,step=7,where=after-update;raise:rank=1,step=7")
    assert ended.ranks == undisturbed("trainer.py", *arguments)


def test_loggers_are_told_once(train):
    """Of a log that is repeated, the printer is told once."""
    ended = train("trainer.py", "--fail-evaluation=6")
    lines = [line for line in ended.launch.stdout.splitlines() if line.startswith("{'loss'")]
    assert len(lines) == 7, ended.launch.stdout
