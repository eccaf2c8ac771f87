"""Batches per second, and the wait for the first one after a restart: MMAPDataLoader beside torch's loaders.

    .venv/bin/python benchmarks/dataloader.py [--workloads tiny] [--runs 3] [--steps 0,1000,100000] [--json FILE]

Each workload is read by torch's DataLoader (two persistent workers; resumes by skipping forward), by torchdata's
StatefulDataLoader (resumes from its state dict) and by MMAPDataLoader over the same DataLoader (resumes by `seek`,
after the process that read before was killed). All give the same batch for a step: their digests are compared, except
StatefulDataLoader's, whose order is its own. Every measurement is a process of its own; the kinds take turns.

`first_batch_s`: from the loader's construction, imports done, to batch `resume_step`. A resume that would take longer
than --limit is not waited for: its row says null. `batches_per_s` and `cpu_s` (CPU seconds of all processes together
per 1,000 batches) are of the steady state, where the reader does nothing else; they are in the rows of the first step.

--cold measures something else: a node that replaces another one, where there is neither a producer nor a cache. Its
first batch is made by its own producer, or comes from a rank of another node that has it (model_parallel_group): two
processes with hosts and caches of their own, connected over loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

KINDS = ("torch", "stateful", "mmap")
NAMES = {"torch": "DataLoader", "stateful": "StatefulDataLoader", "mmap": "MMAPDataLoader"}
STEADY = {"tiny": 2000, "text": 1000, "images": 100}
WORKER = harness.BENCHMARKS / "dataloader_worker.py"


@dataclass
class Found:
    """What was measured of one workload, by kind; a resume that took too long is None."""

    steady: dict[str, list[dict[str, Any]]]
    first: dict[int, dict[str, list[dict[str, Any] | None]]]


class Runs:
    """Starts the processes of one benchmark; those of one launch share a host, as under torchrun."""

    def __init__(self, directory: Path, limit: float) -> None:
        self._directory = directory
        self._limit = limit
        self._launches = 0

    def environment(self) -> dict[str, str]:
        self._launches += 1
        return {
            **os.environ,
            **harness.WORKER_ENVIRONMENT,
            "BENCHMARK_CACHE": str(self._directory / "cache"),
            "HYPERPODRUN_BENCHMARK": f"{os.getpid()}-{self._launches}",
            "MASTER_ADDR": "benchmark",
            "MASTER_PORT": f"{os.getpid()}{self._launches}",
            "RANK": "0",
        }

    def run(self, environment: dict[str, str], *arguments: str) -> dict[str, Any] | None:
        """The row that a worker prints; None if it is over the limit. Raises RunFailed."""
        process = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=self._limit + 60)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
        if process.returncode != 0:
            raise harness.RunFailed(f"{arguments}: exit code {process.returncode}\n{stderr[-3000:]}")
        row: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
        return row

    @contextlib.contextmanager
    def killed_reader(self, environment: dict[str, str], workload: str, step: int) -> Iterator[None]:
        """A process that has read batch `step - 1` with ours, and was killed."""
        process = subprocess.Popen(
            [sys.executable, str(WORKER), "mmap", workload, "leave", str(max(0, step - 1))],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        keeper = subprocess.Popen(
            [sys.executable, str(WORKER), "mmap", workload, "stay", "0"],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert keeper.stdout is not None
            for line in (process.stdout.readline(), keeper.stdout.readline()):
                if line != "ready\n":
                    raise harness.RunFailed(
                        f"the reader of {workload} that is to be killed did not get ready: {line!r}"
                    )
            process.kill()
            process.wait()
            yield
        finally:
            for each in (process, keeper):  # the host, which holds their pipes, ends with the last of them
                each.kill()
            for each in (process, keeper):
                each.communicate()

    def first(self, kind: str, workload: str, step: int) -> dict[str, Any] | None:
        environment = self.environment()
        if kind == "mmap":
            with self.killed_reader(environment, workload, step):
                return self.run(environment, kind, workload, "first", str(step))
        state: tuple[str, ...] = ()
        if kind == "stateful" and step:
            file = self._directory / f"{workload}-{step}.state"
            if not file.exists() and self.run(environment, kind, workload, "save", str(step), str(file)) is None:
                return None
            state = (str(file),)
        return self.run(environment, kind, workload, "first", str(step), *state)

    def cold(self, workload: str, step: int, share: bool) -> dict[str, Any]:
        """The row of the rank whose node is new."""
        arguments = ["mmap", workload, "cold", str(step)]
        with tempfile.TemporaryDirectory() as directory:
            ranks = []
            for rank in (0, 1):
                command = [sys.executable, str(WORKER), *arguments, directory, str(rank), *(["share"] if share else [])]
                ranks.append(subprocess.Popen(command, env=self.environment(), stdout=subprocess.PIPE, text=True))
            try:
                said = [process.communicate(timeout=self._limit)[0] for process in ranks]
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
        if any(process.returncode for process in ranks):
            raise harness.RunFailed(f"{arguments}: exit codes {[process.returncode for process in ranks]}")
        rows = [json.loads(text.strip().splitlines()[-1]) for text in said]
        if rows[0]["digest"] != rows[1]["digest"]:
            raise harness.RunFailed(f"{arguments}: the two ranks did not read the same batch")
        found: dict[str, Any] = rows[1]
        return found

    def steady(self, kind: str, workload: str, batches: int) -> dict[str, Any]:
        row = self.run(self.environment(), kind, workload, "steady", str(batches))
        if row is None:
            raise harness.RunFailed(f"{kind}, {workload}: {batches} batches took longer than the limit")
        return row


def measure(options: argparse.Namespace, runs: Runs) -> list[dict[str, Any]]:
    """Everything once in each round."""
    found = {
        workload: Found(
            {kind: [] for kind in options.loaders},
            {step: {kind: [] for kind in options.loaders} for step in options.steps},
        )
        for workload in options.workloads
    }
    for number in harness.rounds(options.runs):
        for workload, results in found.items():
            measure_once(options, runs, workload, results, number)
    rows = []
    for workload, results in found.items():
        for step, first in results.first.items():
            verify(workload, step, first)
            for kind in options.loaders:
                steady = results.steady[kind] if step == options.steps[0] else []
                rows.append(row(kind, workload, step, first[kind], steady))
    return rows


def measure_once(options: argparse.Namespace, runs: Runs, workload: str, results: Found, number: int) -> None:
    batches = STEADY[workload] // (10 if options.quick else 1)
    for kind in options.loaders:
        results.steady[kind].append(runs.steady(kind, workload, batches))
    harness.progress(f"{workload}: throughput, run {number + 1}")
    for step, first in results.first.items():
        for kind in options.loaders:
            hopeless = first[kind][:1] == [None] or (number and step >= 10_000 and kind != "mmap")
            if not hopeless:
                first[kind].append(runs.first(kind, workload, step))
        harness.progress(f"{workload}: first batch at {step}, run {number + 1}")


def measure_cold(options: argparse.Namespace, runs: Runs) -> list[dict[str, Any]]:
    """The first batch of a new node: made by its own producer, or from a peer; they take turns."""
    times: dict[tuple[str, str], list[float]] = {
        (workload, source): [] for workload in options.workloads for source in ("producer", "peer")
    }
    for number in harness.rounds(options.runs):
        for (workload, source), found in times.items():
            found.append(runs.cold(workload, options.steps[-1], source == "peer")["first_batch_s"])
            harness.progress(f"{workload}: a cold node, from its {source}, run {number + 1}")
    return [
        {
            "benchmark": "dataloader-cold", "loader": NAMES["mmap"], "workload": workload, "from": source,
            "resume_step": options.steps[-1], "first_batch_s": harness.median(found), "runs": found,
        }
        for (workload, source), found in times.items()
    ]  # fmt: skip


def verify(workload: str, step: int, first: dict[str, list[dict[str, Any] | None]]) -> None:
    """The batch of a step is one and the same, whoever gave it and how often."""
    for kind in first:
        digests = {result["digest"] for result in first[kind] if result is not None}
        if workload == "images":  # cropped at random: of its own in every kind; ours must still be one
            wrong = kind == "mmap" and len(digests) > 1
        elif kind == "stateful":
            wrong = False
        else:
            wrong = len(digests | {r["digest"] for r in first.get("mmap", []) if r is not None}) > 1
        if wrong:
            raise harness.RunFailed(f"{workload}, step {step}: {NAMES[kind]} did not give the batch that it should")


def row(
    kind: str, workload: str, step: int, first: list[dict[str, Any] | None], steady: list[dict[str, Any]]
) -> dict[str, Any]:
    times = [result["first_batch_s"] for result in first if result is not None]
    return {
        "benchmark": "dataloader",
        "loader": NAMES[kind],
        "workload": workload,
        "resume_step": step,
        "first_batch_s": harness.median(times),
        "batches_per_s": harness.median([result["batches_per_s"] for result in steady]),
        "cpu_s": harness.median([result["cpu_s"] for result in steady]),
        "memory_mb": harness.median([result["memory_mb"] for result in steady]),
        "runs": times,
    }


def report(rows: list[dict[str, Any]], limit: float) -> str:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        (
            row["workload"],
            row["loader"],
            str(row["resume_step"]),
            f"{row['first_batch_s'] * 1000:.2f}" if row["first_batch_s"] is not None else f"> {limit * 1000:.0f}",
            number(row["batches_per_s"], 0),
            number(row["cpu_s"], 2),
            number(row["memory_mb"], 0),
        )
        for row in rows
    ]
    header = ("workload", "loader", "step", "first batch ms", "batches/s", "CPU s per 1,000", "memory MB")
    return harness.table(header, lines)


def report_cold(rows: list[dict[str, Any]]) -> str:
    lines = [
        (row["workload"], str(row["resume_step"]), row["from"], f"{row['first_batch_s'] * 1000:.0f}") for row in rows
    ]
    return harness.table(("workload", "step", "first batch from", "ms"), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_runs_option(parser)
    parser.add_argument(
        "--workloads", type=harness.comma_separated(harness.one_of(tuple(STEADY))), default=",".join(STEADY)
    )
    parser.add_argument("--loaders", type=harness.comma_separated(harness.one_of(KINDS)), default=",".join(KINDS))
    steps = "where to resume (default: 0,500); at 100000 torch's loaders take minutes, each"
    parser.add_argument("--steps", type=harness.comma_separated(int), default="0,500", help=steps)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds to wait for a resume (default: 240)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="one short run each: does it work at all?")
    parser.add_argument("--cold", action="store_true", help="measure a node without a cache instead")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.steps = 1, [50]
    print(harness.describe_machine())
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        runs = Runs(Path(directory), options.limit)
        rows = measure_cold(options, runs) if options.cold else measure(options, runs)
    print(report_cold(rows) if options.cold else report(rows, options.limit))
    print("every run was verified: the same batch for the same step")
    harness.write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
