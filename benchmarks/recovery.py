"""How long a job stands still after a fault: hyperpodrun beside torchrun, taking turns on the same machine.

    python benchmarks/recovery.py [--runs N] [--world-sizes 2,4] [--faults raise,kill] [--json FILE]

Measured: from the fault's instant, told by the rank that breaks, to the first step after it, on the last
rank. torchrun starts all processes again and they load a checkpoint. hyperpodrun restarts in process;
after a kill it forks the one missing process from its standby; that gets its state from a survivor.
A run counts only if the job exited 0, recovered exactly once in the way that it should, and ended with
the very weights of an undisturbed run. One that does not is a null in its row's runs, and makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from harness import RunFailed

FAULTS = ("raise", "kill")
FAULT_RANK = 1
FAULT_STEP = 30
STEPS = 40
LAUNCHER_OPTIONS = {"hyperpodrun": ["--inprocess-restart"], "torchrun": ["--max-restarts=3"]}


@dataclass(frozen=True)
class Case:
    """What is compared between launchers."""

    world_size: int
    fault: str


@dataclass
class Results:
    """Of one launcher in one case."""

    runs: list[float | None] = field(default_factory=list)
    """Seconds; None: failed."""
    step_ms: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def verified(self) -> list[float]:
        return [seconds for seconds in self.runs if seconds is not None]


class Journals:
    """What the workers of one run wrote down."""

    def __init__(self, directory: Path) -> None:
        self.facts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in directory.glob("*.json"):
            row = json.loads(path.read_text())
            self.facts[row["fact"]].append(row)

    def of_attempt(self, fact: str, attempt: int) -> dict[int, dict[str, Any]]:
        """By rank."""
        return {row["rank"]: row for row in self.facts[fact] if row["attempt"] == attempt}

    def digest(self, world_size: int) -> str:
        """Of the final weights, which must be the same on every rank."""
        digests = {row["digest"] for row in self.facts["ended"]}
        if len(self.facts["ended"]) != world_size or len(digests) != 1:
            raise RunFailed(f"{len(self.facts['ended'])} ranks ended, with {len(digests)} different results")
        return str(digests.pop())

    def step_ms(self) -> float:
        return statistics.median(float(row["step_ms"]) for row in self.facts["ended"])


def main() -> int:
    """Runs everything, prints the tables."""
    args = parse_args()
    print(f"recovery: {harness.describe_machine()}\n")
    results: dict[tuple[Case, str], Results] = {}
    references: dict[int, str] = {}
    for world_size in args.world_sizes:
        references[world_size] = undisturbed_digest(args.launchers[0], world_size)
        for fault in args.faults:
            results.update({(Case(world_size, fault), launcher): Results() for launcher in args.launchers})
    for number in harness.rounds(args.runs):
        for (case, launcher), found in results.items():
            measure(case, launcher, references[case.world_size], number, found)
    cases = list(dict.fromkeys(case for case, _ in results))
    print(comparison(cases, args.launchers, results))
    if "hyperpodrun" in args.launchers:
        print("\nphases of hyperpodrun's recoveries, medians in ms")
        print(phases(cases, results))
    harness.write_rows(args.json, [row(*key, result) for key, result in results.items()])
    failed = sum(seconds is None for result in results.values() for seconds in result.runs)
    print(f"\n{failed} runs failed" if failed else "\nevery run was verified")
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Recovery time of hyperpodrun beside torchrun.")
    harness.add_common_options(parser, world_sizes="2,4")
    parser.add_argument("--faults", type=harness.comma_separated(harness.one_of(FAULTS)), default=",".join(FAULTS))
    args = parser.parse_args()
    if min(args.world_sizes) <= FAULT_RANK:
        parser.error(f"argument --world-sizes: rank {FAULT_RANK} breaks, so there must be at least {FAULT_RANK + 1}")
    if args.quick:
        args.runs = 1
    return args


def undisturbed_digest(launcher: str, world_size: int) -> str:
    """What every run must end with. Also brings files into the page cache before anything is measured."""
    directory = Path(tempfile.mkdtemp(prefix="recovery-"))
    try:
        finished = launch(launcher, world_size, "none", directory)
        harness.require_success(finished)
        digest = Journals(directory).digest(world_size)
    except RunFailed as error:
        raise SystemExit(f"the undisturbed run under {launcher} failed: {error}") from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    harness.progress(f"{launcher} undisturbed, {world_size} ranks: digest {digest[:16]}")
    return digest


def launch(launcher: str, world_size: int, fault: str, directory: Path) -> harness.Finished:
    """One job, whose workers write their journals to `directory`."""
    options = [*LAUNCHER_OPTIONS[launcher], f"--log-dir={directory / 'logs'}"]
    arguments = [f"--directory={directory}", f"--fault={fault}", f"--steps={STEPS}"]
    arguments += [f"--fault-rank={FAULT_RANK}", f"--fault-step={FAULT_STEP}"]
    if launcher == "hyperpodrun":
        arguments.append("--inprocess")
    line = harness.command(launcher, world_size, options, "recovery_worker.py", *arguments)
    return harness.run(line, directory)


def measure(case: Case, launcher: str, reference: str, number: int, results: Results) -> None:
    """One run, added to the results."""
    name = f"{launcher} {case.fault}, {case.world_size} ranks, run {number + 1}"
    directory = Path(tempfile.mkdtemp(prefix="recovery-"))
    try:
        finished = launch(launcher, case.world_size, case.fault, directory)
        harness.require_success(finished)
        journals = Journals(directory)
        seconds = recovery_seconds(case, launcher, journals)
        if journals.digest(case.world_size) != reference:
            raise RunFailed("the final weights differ from those of an undisturbed run")
        if launcher == "hyperpodrun":
            add_phases(directory / "logs" / "recoveries.jsonl", results)
        results.runs.append(seconds)
        results.step_ms.append(journals.step_ms())
        harness.progress(f"{name}: {seconds:.3f} s")
    except RunFailed as error:
        results.runs.append(None)
        harness.progress(f"{name}: FAILED: {error}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def recovery_seconds(case: Case, launcher: str, journals: Journals) -> float:
    """From the fault to the last rank's first step. Raises RunFailed unless that was one proper recovery."""
    ranks = set(range(case.world_size))
    before, after = journals.of_attempt("stepped", 0), journals.of_attempt("stepped", 1)
    attempts = sorted({fact["attempt"] for fact in journals.facts["stepped"]})
    if len(journals.facts["fault"]) != 1 or attempts != [0, 1] or set(before) != ranks or set(after) != ranks:
        faults = len(journals.facts["fault"])
        raise RunFailed(
            f"not one recovery: {faults} faults, steps by {sorted(before)} in attempt 0 and by "
            f"{sorted(after)} in attempt 1, attempts {attempts}"
        )
    replaced = {rank for rank in ranks if before[rank]["pid"] != after[rank]["pid"]}
    expected = ranks if launcher == "torchrun" else {FAULT_RANK} if case.fault == "kill" else set()
    if replaced != expected:
        raise RunFailed(f"the processes of ranks {sorted(replaced)} are new, not those of {sorted(expected)}")
    stepped_ns = max(step["ns"] for step in after.values())
    return float(stepped_ns - journals.facts["fault"][0]["ns"]) / 1e9


def add_phases(path: Path, results: Results) -> None:
    """What the launcher's own report says of the recovery."""
    recoveries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(recoveries) != 1 or not recoveries[0]["completed"]:
        raise RunFailed(f"the launcher reports {len(recoveries)} recoveries, not one that completed")
    for name, value in {**recoveries[0]["phases_ms"], "total": recoveries[0]["total_ms"]}.items():
        results.phases[name].append(value or 0.0)


def comparison(cases: list[Case], launchers: list[str], results: dict[tuple[Case, str], Results]) -> str:
    """The table of recovery times."""
    both = set(harness.LAUNCHERS) <= set(launchers)
    header = [
        "fault",
        "ranks",
        *(f"{name}, s" for name in launchers),
        *(["ratio"] if both else []),
        "step, ms",
    ]
    lines = []
    for case in cases:
        of_case = [results[case, launcher] for launcher in launchers]
        cells = [with_failures(result) for result in of_case]
        if both:
            cells.append(harness.ratio(results[case, "torchrun"].verified, results[case, "hyperpodrun"].verified))
        step_ms = harness.median([value for result in of_case for value in result.step_ms])
        lines.append([case.fault, str(case.world_size), *cells, "-" if step_ms is None else f"{step_ms:.0f}"])
    return harness.table(header, lines)


def with_failures(result: Results) -> str:
    """The spread, and how many runs are not in it."""
    failed = len(result.runs) - len(result.verified)
    return harness.spread(result.verified) + (f" ({failed} of {len(result.runs)} failed)" if failed else "")


def phases(cases: list[Case], results: dict[tuple[Case, str], Results]) -> str:
    """The table of phases. Their total and the measured time differ by the benchmark's own writing."""
    names = list(next((r.phases for r in results.values() if r.phases), {}))
    lines = []
    for case in cases:
        of_case = results[case, "hyperpodrun"]
        if of_case.phases:
            values = [statistics.median(of_case.phases[name]) for name in names]
            measured = statistics.median(of_case.verified) * 1e3
            lines.append([case.fault, str(case.world_size), *(f"{v:.1f}" for v in values), f"{measured:.1f}"])
    return harness.table(["fault", "ranks", *names, "measured"], lines)


def row(case: Case, launcher: str, result: Results) -> dict[str, object]:
    """For --json."""
    return {
        "benchmark": "recovery",
        "launcher": launcher,
        "fault": case.fault,
        "world_size": case.world_size,
        "median_s": harness.median(result.verified),
        "runs": result.runs,
    }


if __name__ == "__main__":
    sys.exit(main())
