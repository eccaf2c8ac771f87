"""Are the numbers of a run with faults those of the run without? Many runs, seeded, every one compared bit for bit.

    scripts/bench exactness --runs 200 [--first SEED] [--world-size 4]

Each run has one to three faults of random kind, rank and moment: in the forward pass, in the middle of the bucketed
all-reduce, between it and the optimizer, inside the optimizer's step, after it, at the end of the pass, during the
restore of the fault before. A run that ends otherwise than the undisturbed one, or through disk, fails.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).parents[1] / "tests" / "checkpointless" / "workers" / "exact.py"
KINDS = ("raise", "kill", "exit")
MOMENTS = ("forward", "allreduce", "before", "begin", "inside", "after", "between")
STEPS = 12


@dataclass(frozen=True)
class Plan:
    """One run: its options for the worker, and its faults in order."""

    options: tuple[str, ...]
    faults: tuple[str, ...]


def plan(seed: int, world_size: int) -> Plan:
    """The faults of a seed. Never so many at once that nobody would hold the state."""
    dice = random.Random(seed)
    options: list[str] = []
    if dice.random() < 0.3:
        options.append("--rebuild")
    if dice.random() < 0.3:
        options.append("--checksum")
    if dice.random() < 0.3:
        options.append("--accumulate=3")
    step, faults = 0, []
    for number in range(dice.randint(1, 3)):
        rank = dice.randrange(world_size)
        moments = ["restore"] if number and dice.random() < 0.3 else MOMENTS
        step = dice.randint(max(1, step), STEPS - 1)
        if "--accumulate=3" in options:
            step = step // 3 * 3 + 2  # the pass that updates, where all the moments are
        faults.append(f"{dice.choice(KINDS)}:{rank}:{step}:{dice.choice(moments)}")
    return Plan(tuple(options), tuple(faults))


def launch(world_size: int, options: tuple[str, ...], faults: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """One job under hyperpodrun."""
    words = [word for fault in faults for word in ("--fault", fault)]
    return subprocess.run(
        [
            *(sys.executable, "-m", "hyperpodrun", f"--nproc-per-node={world_size}", "--inprocess-restart"),
            *(str(WORKER), f"--steps={STEPS}", *options, *words),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )


def digest(finished: subprocess.CompletedProcess[str]) -> str | None:
    """What the job ended with; None if it did not."""
    found = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("digest ")]
    return found[0] if finished.returncode == 0 and len(found) == 1 else None


class Checker:
    """Runs seeds and compares each with the undisturbed run of the same options."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._undisturbed: dict[bool, str | None] = {}

    def check(self, seed: int) -> str | None:
        """None if the seed's run ends as it should, else what happened."""
        wanted = plan(seed, self._world_size)
        accumulates = "--accumulate=3" in wanted.options
        if accumulates not in self._undisturbed:
            options = ("--accumulate=3",) if accumulates else ()
            self._undisturbed[accumulates] = digest(launch(self._world_size, options))
        expected = self._undisturbed[accumulates]
        finished = launch(self._world_size, wanted.options, wanted.faults)
        fired = finished.stderr.count("fault ") > 0
        if expected is not None and digest(finished) == expected and fired:
            return None
        why = "no fault fired" if not fired else f"exit code {finished.returncode}, digest {digest(finished)}"
        return f"seed {seed}, {' '.join(wanted.options)} {' '.join(wanted.faults)}: {why}\n{finished.stderr[-4000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bit for bit: runs with faults beside runs without.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--world-size", type=int, default=4)
    args = parser.parse_args()
    checker, failed, began = Checker(args.world_size), 0, time.monotonic()
    for seed in range(args.first, args.first + args.runs):
        wrong = checker.check(seed)
        if wrong is not None:
            failed += 1
            print(wrong, flush=True)
    print(f"{args.runs - failed} of {args.runs} runs bit for bit equal, in {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
