"""What the benchmarks share: running a launcher to its end, its peak memory, medians, tables and rows.

Owns every process it starts: a launcher over its deadline is ended, by pid, with all that came from it.
It knows nothing about what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import hyperpodrun
import psutil

LAUNCHERS = ("hyperpodrun", "torchrun")
BENCHMARKS = Path(__file__).resolve().parent
DEADLINE_S = 120.0
WITHIN_S = 270.0
"""A benchmark that was not told how often to measure is over by then, on a machine that can do one round in that."""
MOST_ROUNDS = 5
_BEGAN = time.monotonic()
_SAMPLE_MS = 5
_GRACE_S = 5.0

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # torchrun's default, one store for all attempts, is racy: a restart can read the last attempt's keys.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass(frozen=True)
class Finished:
    """A launcher that has ended. Times are of `time.monotonic_ns()`, which all processes of a host share."""

    started_ns: int
    ended_ns: int
    exit_code: int | None
    """None: it was over its deadline and was ended. Negative: the signal."""
    peak_rss_mb: float
    """Of the launcher's own process, in 10^6 bytes."""
    output: str

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.started_ns) / 1e9


class RunFailed(Exception):
    """A run is not what it should be; the sentence says why."""


def command(launcher: str, world_size: int, options: Sequence[str], script: str, *arguments: str) -> list[str]:
    """The command line of a launcher beside this interpreter, for a script of this directory."""
    path = Path(sys.executable).with_name(launcher)
    module = {"hyperpodrun": "hyperpodrun", "torchrun": "torch.distributed.run"}[launcher]
    return [
        *([str(path)] if path.exists() else [sys.executable, "-m", module]),
        "--standalone",
        f"--nproc-per-node={world_size}",
        *options,
        str(BENCHMARKS / script),
        *arguments,
    ]


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A directory from which `import hyperpodrun` gives the code of that commit."""
    git = ["git", "-C", str(BENCHMARKS)]
    with tempfile.TemporaryDirectory() as name:
        tree, imports = Path(name, "tree"), Path(name, "imports")
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            imports.mkdir()
            (imports / "hyperpodrun").symlink_to(tree / "src")
            yield imports
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def importing_from(code: Path | None) -> dict[str, str]:
    """The environment in which workers import the package of that directory; None: this one."""
    if code is None:
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])}


def require_code(facts: Sequence[Mapping[str, object]], code: Path | None) -> None:
    """Raises RunFailed where a worker has run other code: facts have a field `code`, the folder of its package."""
    expected = Path(hyperpodrun.__file__).parent if code is None else code / "hyperpodrun"
    if any(Path(str(fact["code"])).resolve() != expected.resolve() for fact in facts):
        raise RunFailed(f"the workers have not run the code of {expected}")


def run(
    arguments: Sequence[str],
    directory: Path,
    deadline_s: float = DEADLINE_S,
    meanwhile: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a launcher in a session of its own to its end. Its output goes to a file in `directory`.

    `meanwhile` is called every few milliseconds. `environment`: more variables than this process's own.
    """
    path = directory / "output.txt"
    environment = {**os.environ, **WORKER_ENVIRONMENT, **(environment or {})}
    # torch was compiled when it was installed; the project's own modules must be let keep their bytecode, too.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with path.open("wb") as output:
        started_ns = time.monotonic_ns()
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended, peak_kb = _watch(process, started_ns + int(deadline_s * 1e9), meanwhile)
            ended_ns = time.monotonic_ns()
        except BaseException:
            _end(process)
            raise
        if not ended:
            _end(process)
    exit_code = process.wait() if ended else None
    return Finished(started_ns, ended_ns, exit_code, peak_kb * 1024 / 1e6, path.read_text(errors="replace"))


def require_success(finished: Finished) -> None:
    """Raises RunFailed, with the end of the output, unless the launcher exited 0 in time."""
    if finished.exit_code == 0:
        return
    how = "over its deadline" if finished.exit_code is None else f"exit code {finished.exit_code}"
    lines = "\n    ".join(finished.output.strip().splitlines()[-15:])
    raise RunFailed(f"{how}; the end of its output:\n    {lines}")


def _watch(
    process: subprocess.Popen[bytes], deadline_ns: int, meanwhile: Callable[[], None] | None
) -> tuple[bool, int]:
    """(whether it has ended, its peak RSS in kB).

    The peak is sampled from /proc: `ru_maxrss` would be that of the largest process among the launcher and
    the workers it waited for.
    """
    peak_kb = 0
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while time.monotonic_ns() < deadline_ns:
            peak_kb = max(peak_kb, _high_water_kb(process.pid))
            if meanwhile is not None:
                meanwhile()
            if poll.poll(_SAMPLE_MS):
                return True, peak_kb
        return False, peak_kb
    finally:
        os.close(pidfd)


def _high_water_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            status = file.read()
    except OSError:
        return 0
    begin = status.find(b"VmHWM:")
    return int(status[begin:].split(None, 2)[1]) if begin >= 0 else 0  # a zombie has no memory


def pss_mb(pid: int) -> float:
    """Memory of a process, a page that several have counted in parts, in 10^6 bytes."""
    with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        text = file.read()
    return int(text[text.find(b"\nPss:") :].split(None, 2)[1]) * 1024 / 1e6


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a launcher and everything that came from it: asks it first, as it knows its workers best."""
    try:
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_GRACE_S)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone meanwhile; psutil notices a reused pid
            member.kill()
    process.wait()


def rounds(runs: int | None) -> Iterator[int]:
    """Numbers the rounds, in each of which everything is measured once.

    `runs`: how many. None: up to MOST_ROUNDS, and no more than end in time, going by the longest so far.
    """
    longest = 0.0
    for number in range(runs or MOST_ROUNDS):
        began = time.monotonic()
        yield number
        now = time.monotonic()
        longest = max(longest, now - began)
        if runs is None and now - _BEGAN + longest > WITHIN_S:
            if number + 1 < MOST_ROUNDS:
                progress(f"{number + 1} rounds: one more would not be over in {WITHIN_S:.0f} s; --runs N does more")
            return


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    """How often everything is measured."""
    text = f"rounds, however long they take (default: up to {MOST_ROUNDS} that end within {WITHIN_S:.0f} s)"
    parser.add_argument("--runs", type=positive, help=text)


def add_common_options(parser: argparse.ArgumentParser, world_sizes: str) -> None:
    """The options that all benchmarks have."""
    add_runs_option(parser)
    parser.add_argument("--world-sizes", type=comma_separated(positive), default=world_sizes, metavar="N,...")
    parser.add_argument("--launchers", type=comma_separated(one_of(LAUNCHERS)), default=",".join(LAUNCHERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="one run each: does it work at all?")


def positive(text: str) -> int:
    """An option's value: a number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """An option's value: one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def comma_separated(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An option's value: several, separated by commas."""

    def parse_all(text: str) -> list[object]:
        return [parse(item) for item in text.split(",")]

    return parse_all


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median [min, max]`, or `failed`."""
    if not values:
        return "failed"
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> str:
    """How many times the baseline's median is ours."""
    return f"{statistics.median(baseline) / statistics.median(ours):.1f}x" if baseline and ours else "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in cells)


def describe_machine() -> str:
    """What figures need beside them to mean anything."""
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} at the start, "
        f"Python {platform.python_version()}, torch {version('torch')}, hyperpodrun {hyperpodrun.__version__}"
    )


def progress(text: str) -> None:
    """A line for people, who may wait for minutes; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def write_rows(path: Path | None, rows: Sequence[Mapping[str, object]]) -> None:
    """The rows as one JSON list, a row a line."""
    if path is not None:
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
