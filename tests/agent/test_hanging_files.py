"""A file system or a resolver that hangs: the agent hears signals, starts and ends its workers all the same."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hyperpodrun.agent.output.disk import Disk, DiskHangs
from hyperpodrun.rendezvous.addresses import resolve
from hyperpodrun.rendezvous.resolver import Resolver

LAUNCHER = """
import os, sys, time
from pathlib import Path
from hyperpodrun.agent.output import logs
from hyperpodrun.launcher import entry_point

TOUCHES = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.listdir", "os.scandir"}
here, logs_at = os.getpid(), sys.argv[1]

def hang(event, arguments):
    # As a network file system whose server is gone: nothing comes back below the log directory.
    if event in TOUCHES and os.getpid() == here and str(arguments[0]).startswith(logs_at):
        while os.path.exists("hang"):
            os.close(os.open("stuck", os.O_CREAT | os.O_WRONLY))
            time.sleep(0.01)

logs._OPEN_LIMIT_S = float(sys.argv[2])
sys.addaudithook(hang)
sys.argv[1:] = ["--log-dir", sys.argv[1], "--start-method=spawn", *sys.argv[3:]]
entry_point()
"""
FAILS_ONCE = """
import os, pathlib, sys
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("attempt", attempt, flush=True)
if attempt == "0":
    pathlib.Path("hang").touch()
    sys.exit(3)
"""


class Launched:
    """A launcher below whose log directory nothing comes back while there is a file `hang`."""

    def __init__(self, limit: float, *arguments: object) -> None:
        self._stderr = open("stderr", "wb")  # noqa: SIM115  # until the test is over
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(Path("logs").absolute()), str(limit), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    @property
    def stderr(self) -> str:
        return Path("stderr").read_text()

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + 60
        while not Path(path).exists():
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def end(self) -> str:
        return self.process.communicate(timeout=25)[0]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Launched]]:
    monkeypatch.chdir(tmp_path)
    launches: list[Launched] = []

    def begin(*arguments: object) -> Launched:
        launches.append(Launched(*arguments))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.process.kill()
        launch.process.communicate()
        launch._stderr.close()


def test_a_process_whose_files_do_not_open_is_started_without_them(launched, script):
    launch = launched(0.3, "--max-restarts=1", "--redirects=3", script(FAILS_ONCE))
    assert launch.end() == "attempt 1\n", launch.stderr
    assert launch.process.returncode == 0, launch.stderr
    assert "log-directory-hangs path=" in launch.stderr
    assert 'without="logs of attempt_1, local rank 0"' in launch.stderr


def test_a_signal_is_heard_while_the_log_directory_hangs(launched, script):
    launch = launched(600, "--max-restarts=1", "--redirects=3", "--shutdown-timeout=1", script(FAILS_ONCE))
    launch.wait_for("stuck")
    launch.process.send_signal(signal.SIGTERM)
    launch.end()
    assert launch.process.returncode == 128 + signal.SIGTERM, launch.stderr


def test_a_signal_is_heard_while_the_log_directory_hangs_from_the_beginning(launched, script, tmp_path):
    (tmp_path / "hang").touch()
    launch = launched(600, script("print('never')"))
    launch.wait_for("stuck")
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == ""
    assert launch.process.returncode == 128 + signal.SIGTERM, launch.stderr


def test_a_job_fails_with_its_cause_also_when_its_error_file_cannot_be_read(launched, script):
    worker = script("import pathlib, sys\npathlib.Path('hang').touch()\nsys.exit(7)\n")
    launch = launched(600, worker)
    launch.end()
    assert launch.process.returncode == 1, launch.stderr
    assert "exitcode  : 7" in launch.stderr


def test_while_one_operation_hangs_those_after_it_are_given_up_at_once():
    disk, gate = Disk(), threading.Event()
    assert disk.call(lambda: "result", 20) == "result"
    with pytest.raises(ZeroDivisionError):
        disk.call(lambda: 1 // 0, 20)
    with pytest.raises(DiskHangs):
        disk.call(gate.wait, 0.05)
    with pytest.raises(DiskHangs):
        disk.call(lambda: "another", 600)
    gate.set()
    assert disk.begin(lambda: None).over.wait(20)
    assert disk.call(lambda: "it has come back", 20) == "it has come back"


@pytest.fixture
def hanging_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What it was asked. It answers when the test is over."""
    gate, asked = threading.Event(), []

    def hang(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        gate.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield asked
    gate.set()


def test_a_resolver_that_hangs_does_not_keep_the_event_loop_from_ending(hanging_resolver):
    async def ask() -> None:
        resolver = Resolver()
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await resolver.look_up("host", 1, 0.02)

    loop_ends = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
    loop_ends.start()
    loop_ends.join(20)
    assert not loop_ends.is_alive()
    assert hanging_resolver == ["host"], "the same name is not asked for twice at once"


def test_signals_are_heard_while_a_name_is_looked_up(hanging_resolver):
    def heard(*_: object) -> None:
        raise KeyError("heard")

    before = signal.signal(signal.SIGALRM, heard)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyError, match="heard"):
            resolve("host")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
