"""Seeded runs with faults: whatever breaks, every rank reads the batches that it would have read.

    python tests/dataloader/fault_runs.py --runs 50

A seed decides the source, whether ranks share a stream, how they are restarted, and one to three faults: a worker that
is killed or raises, a producer, a fetcher or the host of producers that is killed; before, while and after a batch is
read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "workers" / "reading.py"
RANKS = 2
STEPS = 100


def plan(seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    in_process = chance.random() < 0.6
    kinds = ["worker", "producer", "fetcher", "host", *(["raise"] if in_process else [])]
    faults = []
    for _ in range(chance.randint(1, 3)):
        what = chance.choice(kinds)
        where = chance.choice(["before", "during", "after"] if what != "raise" else ["before", "after"])
        faults.append(
            {"rank": chance.randrange(RANKS), "step": chance.randrange(1, STEPS), "what": what, "where": where}
        )
    return {
        "source": chance.choice(["shuffled", "stream", "stateful", "both", "slow"]),
        "shared": chance.random() < 0.4,
        "in_process": in_process,
        "steps": STEPS,
        "faults": faults,
    }


def launch(run: dict[str, Any], directory: Path, timeout: float = 120.0) -> tuple[list[list[str]], str]:
    """(what each rank read, the launcher's output). Raises AssertionError when the launch fails."""
    directory.mkdir()
    options = ["--inprocess-restart"] if run["in_process"] else [f"--max-restarts={len(run['faults']) + 1}"]
    command = [sys.executable, "-m", "hyperpodrun", f"--nproc-per-node={RANKS}", *options]
    command += ["--log-dir", str(directory / "logs"), str(WORKER), str(directory), json.dumps(run)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, f"{run}\n{output}"
    return [(directory / f"rank-{rank}").read_text().splitlines() for rank in range(RANKS)], output


def check(seed: int, directory: Path) -> str:
    """One run beside the undisturbed one. Raises AssertionError when what was read differs."""
    run = {**plan(seed), "cache": str(directory / "cache")}
    undisturbed, _ = launch({**run, "faults": []}, directory / "undisturbed")
    disturbed, output = launch(run, directory / "disturbed")
    happened = len(list((directory / "disturbed").glob("fault-*")))
    assert happened == len(run["faults"]), f"{happened} of {run['faults']} happened"
    for rank in range(RANKS):
        numbers = [int(line.split()[0]) for line in undisturbed[rank]]
        assert numbers == list(range(STEPS))
        assert disturbed[rank] == undisturbed[rank], f"seed {seed}, rank {rank}: {run}\n{output}"
    left = [path.name for path in (directory / "cache").iterdir()]
    assert not left, f"seed {seed}: {left} was left behind"
    return f"{run['source']}, {'one stream' if run['shared'] else 'two streams'}, " + ", ".join(
        f"{fault['what']} {fault['where']} {fault['step']}" for fault in run["faults"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for seed in range(options.first_seed, options.first_seed + options.runs):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                what = "as undisturbed: " + check(seed, Path(directory))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed += 1
                what = f"FAILED: {error}"
        print(f"seed {seed} ({time.monotonic() - began:.1f} s) {what}", flush=True)
    print(f"{options.runs - failed} of {options.runs} runs read what the undisturbed run read")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
