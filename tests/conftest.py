"""Launching real jobs in tests, and leaving out what this machine cannot run.

Every process that is started here is ended here, and nothing outlives its test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# A runner in the background, or under nohup, ignores these, and what it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(_signum, signal.SIG_DFL)


@dataclass
class Finished:
    """A launch that is over."""

    returncode: int
    stdout: str
    stderr: str
    log_dir: Path
    recoveries: list[dict] = field(default_factory=list)

    @property
    def digest(self) -> str:
        lines = [line for line in self.stdout.splitlines() if line.startswith("digest ")]
        assert len(lines) == 1, self.output
        return lines[0]

    @property
    def output(self) -> str:
        return f"exit code {self.returncode}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Launch:
    """One running `hyperpodrun`."""

    def __init__(self, arguments: list[str], log_dir: Path, environment: dict[str, str]) -> None:
        self.log_dir = log_dir
        command = [sys.executable, "-m", "hyperpodrun", "--log-dir", str(log_dir), *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float = 90.0) -> Finished:
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            stdout, stderr = self.process.communicate()
            raise AssertionError(f"still running after {timeout} s\n{stdout}\n{stderr}") from None
        rows = self.log_dir / "recoveries.jsonl"
        recoveries = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        return Finished(self.process.returncode, stdout, stderr, self.log_dir, recoveries)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)


Launcher = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launcher]:
    """start(*arguments, **environment): a launch in the background."""
    yield from launcher_in(tmp_path)


@pytest.fixture(scope="module")
def start_any_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The same for launches that several tests of a module look at."""
    yield from launcher_in(tmp_path_factory.mktemp("launches"))


def launcher_in(directory: Path) -> Iterator[Launcher]:
    launches: list[Launch] = []

    def begin(*arguments: str | Path, **environment: str) -> Launch:
        log_dir = directory / f"logs-{len(launches)}"
        launches.append(Launch([str(argument) for argument in arguments], log_dir, environment))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.kill()
        launch.process.communicate()


@pytest.fixture
def run(start: Launcher) -> Callable[..., Finished]:
    """run(*arguments, **environment): a launch to its end."""

    def to_the_end(*arguments: str | Path, timeout: float = 90.0, **environment: str) -> Finished:
        return start(*arguments, **environment).wait(timeout)

    return to_the_end


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """script(text): a worker script in a file."""

    def write(text: str, name: str = "worker.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def free_port() -> Callable[[], int]:
    """free_port(): a port that nobody listened on a moment ago."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


# ---- what a machine may lack ---------------------------------------------------------------------------------------
# The suite needs no root, no Debian package, no GPU and no second environment. What does is in a folder of its own, or
# has the mark, of one of these names. It runs where it can; `--with NAME` makes a reason to leave it out a failure.


def _no_namespaces() -> str | None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from namespaces import why_not

    return why_not()


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "there is no NVIDIA GPU, or torch is not built for CUDA"


_FRAMEWORKS = sorted(path.parent.name for path in (Path(__file__).parent / "integrations").glob("*/requirements.txt"))
EXTRAS: dict[str, Callable[[], str | None]] = {
    "cluster": _no_namespaces,
    "gpu": _no_gpu,
    "clients": lambda: "a second environment, for which Hugging Face's libraries are downloaded",
    "more": lambda: "minutes, for further members of kinds of which the suite has one",
    **{name: lambda: "an environment of its own, for which packages are downloaded" for name in _FRAMEWORKS},
}
"""What may be left out: why this machine cannot run it, or should not unasked."""
ONLY_IF_ASKED = {"clients", "more", *_FRAMEWORKS}
_reasons: dict[str, str | None] = {}
_left_out: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--with",
        action="append",
        default=[],
        choices=sorted(EXTRAS),
        dest="extras",
        help="run these, too, and fail where they cannot run",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in EXTRAS:
        config.addinivalue_line("markers", f"{name}: left out where it cannot run; scripts/test --with {name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in EXTRAS.keys() - ONLY_IF_ASKED:
            item.add_marker(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in EXTRAS:
        if item.get_closest_marker(name) is None:
            continue
        asked = name in item.config.getoption("extras")
        if name not in _reasons:
            _reasons[name] = None if asked and name in ONLY_IF_ASKED else EXTRAS[name]()
        if _reasons[name] is not None and asked:
            pytest.fail(f"--with {name}: {_reasons[name]}", pytrace=False)
        if _reasons[name] is not None:
            _left_out[name] = _left_out.get(name, 0) + 1
            pytest.skip(f"{_reasons[name]} (scripts/test --with {name})")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in sorted(_left_out.items()):
        terminalreporter.write_line(f"left out: {count} of {name}: {_reasons[name]} (scripts/test --with {name})")
