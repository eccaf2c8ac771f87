"""Run under hyperpodrun by fault_runs.py: reads batches, writes down what it got, and breaks what it is told to break.

A rank goes on after the last batch that it wrote down. Arguments: a directory, and the run as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import family
import sources
from hyperpodrun import CacheResumeMMAPConfig, HPCallWrapper, HPWrapper, MMAPDataLoader

FACTORIES = {
    "shuffled": functools.partial(sources.shuffled, 80, 2),
    "stream": functools.partial(sources.stream, 120),
    "stateful": functools.partial(sources.stateful_loader, 2),
    "both": sources.stateful_both,
    "slow": functools.partial(sources.numbers, 80, 2, 2, 0.002, shuffle=True),
}


def digest(batch: Any) -> str:
    value = hashlib.sha256()
    for part in batch:
        value.update(part.numpy().tobytes())
    return value.hexdigest()[:16]


class Faults:
    """Those of this rank that have not happened yet. A file tells that one has."""

    def __init__(self, directory: Path, rank: int, faults: list[dict[str, Any]]) -> None:
        self._due = [(directory / f"fault-{i}", fault) for i, fault in enumerate(faults) if fault["rank"] == rank]

    def at(self, step: int, where: str, loader: MMAPDataLoader) -> None:
        for file, fault in self._due:
            if fault["step"] == step and fault["where"] == where and not file.exists():
                file.touch()
                self._cause(fault, loader)

    def _cause(self, fault: dict[str, Any], loader: MMAPDataLoader) -> None:
        if fault["what"] == "raise":
            raise RuntimeError("injected")
        if fault["what"] == "worker":
            pids = [os.getpid()]
        else:
            producer = family.producer_of(loader)
            pids = {
                "producer": [producer],
                "fetcher": family.fetchers_of(producer)[:1],
                "host": [family.host_of(producer)],
            }[fault["what"]]
        if fault["where"] == "during":  # while the main thread is in next()
            delay = random.Random(fault["step"]).uniform(0, 0.004)
            threading.Thread(target=strike, args=(pids, delay), daemon=True).start()
        else:
            strike(pids, 0.0)


def strike(pids: list[int], delay: float) -> None:
    time.sleep(delay)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read(directory: Path, run: dict[str, Any], rank: int) -> None:
    config = CacheResumeMMAPConfig(cache_dir=run["cache"], prefetch_length=4, lookback_length=2, batch_timeout=60)
    loader = MMAPDataLoader(FACTORIES[run["source"]], config, seed=11, data_rank="shared" if run["shared"] else rank)
    faults = Faults(directory, rank, run["faults"])
    path = directory / f"rank-{rank}"
    with path.open("a+") as file:
        file.seek(0)
        step = len(file.readlines())
        loader.seek(step)
        batches = iter(loader)
        while step < run["steps"]:
            faults.at(step, "before", loader)
            faults.at(step, "during", loader)
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(loader)
                continue
            faults.at(step, "after", loader)
            os.write(file.fileno(), f"{step} {digest(batch)}\n".encode())  # at once or not at all
            step += 1


@HPWrapper()
def run_main(directory: Path, run: dict[str, Any], caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    read(directory, run, caller.rank)


if __name__ == "__main__":
    plan = json.loads(sys.argv[2])
    if plan["in_process"]:
        run_main(Path(sys.argv[1]), plan)
    else:
        read(Path(sys.argv[1]), plan, int(os.environ["RANK"]))
