"""What it costs to be launched: hyperpodrun beside torchrun, taking turns on the same machine.

    python benchmarks/launch.py [--runs N] [--world-sizes 1,2,4,8] [--scripts print,ddp,idle] [--json FILE]

print: a script that only prints; wall time from the launcher's start to its exit.
ddp: a script that does one DDP step (gloo); from the launcher's start to that step's end on the last rank.
idle: a script that imports torch and waits; the memory of all workers together (PSS) and of what they were
forked from, in MB instead of seconds. Only when asked for.
Beside each the peak resident memory of the launcher's process, without its workers: the largest of all runs.
A run counts only if the launcher exited 0 and every rank did its part. If one does not, the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import harness
import psutil
from harness import Finished, RunFailed

SCRIPTS = ("print", "ddp", "idle")
_SETTLED_S = 0.5


@dataclass(frozen=True)
class Case:
    """What is compared between launchers."""

    script: str
    world_size: int


@dataclass
class Results:
    """Of one launcher in one case."""

    seconds: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    failed: int = 0


def main() -> int:
    """Runs everything, prints the table."""
    args = parse_args()
    print(f"launch: {harness.describe_machine()}\n")
    results: dict[tuple[Case, str], Results] = {}
    for script in args.scripts:
        if not args.quick:  # the first run of all reads files that the next ones find in the page cache
            for launcher in args.launchers:
                measure(Case(script, 1), launcher, args.inprocess_restart, "unmeasured", Results())
        for world_size in args.world_sizes:
            results.update({(Case(script, world_size), launcher): Results() for launcher in args.launchers})
    for number in harness.rounds(args.runs):
        for (case, launcher), found in results.items():
            measure(case, launcher, args.inprocess_restart, f"run {number + 1}", found)
    print(comparison(args.launchers, results))
    harness.write_rows(args.json, [row(*key, result) for key, result in results.items()])
    failed = sum(result.failed for result in results.values())
    print(f"\n{failed} runs failed" if failed else "\nevery run was verified")
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Launch time and memory of hyperpodrun beside torchrun.")
    harness.add_common_options(parser, world_sizes="1,2,4,8")
    parser.add_argument("--scripts", type=harness.comma_separated(harness.one_of(SCRIPTS)), default="print,ddp")
    parser.add_argument(
        "--inprocess-restart",
        action="store_true",
        help="give hyperpodrun that option: it then loads more",
    )
    args = parser.parse_args()
    if args.quick:
        args.runs = 1
    return args


def measure(case: Case, launcher: str, inprocess_restart: bool, run: str, results: Results) -> None:
    """One run, added to the results."""
    name = f"{launcher} {case.script}, {case.world_size} ranks, {run}"
    directory = Path(tempfile.mkdtemp(prefix="launch-"))
    options = [f"--log-dir={directory / 'logs'}"]
    if inprocess_restart and launcher == "hyperpodrun":
        options.append("--inprocess-restart")
    line = harness.command(launcher, case.world_size, options, f"launch_{case.script}.py", str(directory))
    try:
        idle = IdleWorkers(case.world_size, directory) if case.script == "idle" else None
        finished = harness.run(line, directory, meanwhile=idle)
        harness.require_success(finished)
        if idle is not None:
            seconds = idle.result()
        else:
            check = printed_seconds if case.script == "print" else stepped_seconds
            seconds = check(case.world_size, finished, directory)
        if finished.peak_rss_mb <= 0:
            raise RunFailed("the launcher's memory could not be read")
        results.seconds.append(seconds)
        results.rss_mb.append(finished.peak_rss_mb)
        unit = "s" if idle is None else "MB of all workers"
        harness.progress(f"{name}: {seconds:.3f} {unit}, {finished.peak_rss_mb:.0f} MB")
    except RunFailed as error:
        results.failed += 1
        harness.progress(f"{name}: FAILED: {error}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class IdleWorkers:
    """Measures the memory of workers that have come up, and then lets them go."""

    def __init__(self, world_size: int, directory: Path) -> None:
        self._world_size = world_size
        self._directory = directory
        self._settled_at: float | None = None
        self._pss_mb: float | None = None

    def __call__(self) -> None:
        pids = [int(path.suffix[1:]) for path in self._directory.glob("idle.*")]
        if self._pss_mb is not None or len(pids) < self._world_size:
            return
        if self._settled_at is None:
            self._settled_at = time.monotonic() + _SETTLED_S
        sources = {child.pid for pid in pids for child in standby_sources(pid)}
        if time.monotonic() >= self._settled_at:
            self._pss_mb = sum(harness.pss_mb(pid) for pid in {*pids, *sources})
            (self._directory / "measured").touch()

    def result(self) -> float:
        if self._pss_mb is None:
            raise RunFailed("not every rank came up")
        return self._pss_mb


def standby_sources(worker: int) -> list[psutil.Process]:
    """What the workers of a launcher are forked from: it runs the same command, but is no rank."""
    launcher = psutil.Process(worker).parent()
    command = psutil.Process(worker).cmdline()
    assert launcher is not None
    return [child for child in launcher.children() if child.cmdline() == command and "RANK" not in child.environ()]


def printed_seconds(world_size: int, finished: Finished, directory: Path) -> float:
    """To the launcher's exit. Raises RunFailed unless every rank has printed once."""
    ranks = sorted(int(rank) for rank in re.findall(rf"rank (\d+) of {world_size} is here", finished.output))
    if ranks != list(range(world_size)):
        raise RunFailed(f"ranks {ranks} have printed, not each of {world_size} once")
    return finished.seconds


def stepped_seconds(world_size: int, finished: Finished, directory: Path) -> float:
    """To the last rank's first step. Raises RunFailed unless every rank has completed one."""
    times = [int(path.read_text()) for path in directory.glob("stepped.*")]
    if len(times) != world_size:
        raise RunFailed(f"{len(times)} of {world_size} ranks completed a step")
    return (max(times) - finished.started_ns) / 1e9


def comparison(launchers: list[str], results: dict[tuple[Case, str], Results]) -> str:
    """The table of times and memory."""
    both = set(harness.LAUNCHERS) <= set(launchers)
    header = ["script", "ranks", *(f"{name}, s" for name in launchers), *(["share"] if both else [])]
    header += [f"{name}, MB" for name in launchers]
    lines = []
    for case in dict.fromkeys(case for case, _ in results):
        of_case = [results[case, launcher] for launcher in launchers]
        cells = [with_failures(result) for result in of_case]
        if both:
            ours, theirs = (harness.median(results[case, name].seconds) for name in harness.LAUNCHERS)
            cells.append(f"{ours / theirs:.3f}" if ours and theirs else "-")
        cells += [f"{max(result.rss_mb):.1f}" if result.rss_mb else "-" for result in of_case]
        lines.append([case.script, str(case.world_size), *cells])
    return harness.table(header, lines)


def with_failures(result: Results) -> str:
    """The spread, and how many runs are not in it."""
    total = result.failed + len(result.seconds)
    return harness.spread(result.seconds) + (f" ({result.failed} of {total} failed)" if result.failed else "")


def row(case: Case, launcher: str, result: Results) -> dict[str, object]:
    """For --json."""
    return {
        "benchmark": "launch",
        "launcher": launcher,
        "script": case.script,
        "world_size": case.world_size,
        "median_s": harness.median(result.seconds),
        "rss_mb": round(max(result.rss_mb), 1) if result.rss_mb else None,
    }


if __name__ == "__main__":
    sys.exit(main())
