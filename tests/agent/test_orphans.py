"""Nothing of a job outlives it: workers, their DataLoader workers, what left their session; however the agent ends."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

WORKER = """
import os, subprocess, sys, time
from pathlib import Path
import torch

os.chdir(os.environ["ROOM"])

class Slow(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, index): return torch.ones(1)

loader = iter(torch.utils.data.DataLoader(Slow(), num_workers=2))
next(loader)
# One that leaves the session, and its parent: only the mark in its environment is left to find it by.
subprocess.Popen(["setsid", "sh", "-c", "sleep 3600 & echo $! > daemon; exit 0"]).wait()
pids = [os.getpid(), *(w.pid for w in loader._workers), int(Path("daemon").read_text())]
Path("pids.tmp").write_text(" ".join(map(str, pids)))
Path("pids.tmp").rename("pids")
time.sleep(3600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_no_process_of_the_job_is_left_when_the_agent_ends(start, script, tmp_path, signum):
    launches = {}
    for name, flag in (("plain", []), ("in-process", ["--inprocess-restart"])):  # at the same time
        room = tmp_path / name
        room.mkdir()
        launches[room] = start("--shutdown-timeout=1", *flag, script(WORKER), ROOM=str(room))
    for room in launches:
        wait_until((room / "pids").exists, 60, "the worker did not come up")
    for room, launch in launches.items():
        pids = [int(pid) for pid in (room / "pids").read_text().split()]
        assert all(alive(pid) for pid in pids)
        os.kill(launch.pid, signum)
        finished = launch.wait(20)
        wait_until(lambda: not any(alive(pid) for pid in pids), 2, f"left: {[p for p in pids if alive(p)]}")  # noqa: B023
        expected = -signal.SIGKILL if signum == signal.SIGKILL else 128 + signum
        assert finished.returncode == expected, finished.output


def test_what_a_killed_worker_started_dies_with_it_while_the_job_goes_on(run, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = run(
        "--max-restarts=1",
        script(
            """
import os, signal, subprocess, time
from pathlib import Path

def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    in_session = subprocess.Popen(["sleep", "3600"])
    subprocess.Popen(["setsid", "sh", "-c", "sleep 3600 & echo $! > daemon; exit 0"]).wait()
    Path("first").write_text(f"{in_session.pid} {Path('daemon').read_text()}")
    os.kill(os.getpid(), signal.SIGKILL)
deadline = time.monotonic() + 5
while not all(gone(int(pid)) for pid in Path("first").read_text().split()):
    assert time.monotonic() < deadline, "left over"
    time.sleep(0.01)
print("clean")
"""
        ),
    )
    assert finished.returncode == 0, finished.output
    assert finished.stdout == "clean\n"


def test_a_lost_keeper_is_replaced(start, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = start(script("import time, pathlib; pathlib.Path('up').touch(); time.sleep(3600)"))
    wait_until((tmp_path / "up").exists, 20, "the worker did not come up")

    def keepers() -> list[int]:
        children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [pid for pid, line in lines.items() if b"keeper.py" in line]

    (first,) = keepers()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(keepers()) == 1 and keepers() != [first], 5, "no new keeper")
    os.kill(launch.pid, signal.SIGKILL)
    launch.wait(10)


def test_the_agents_directory_is_removed_even_when_it_is_killed(start, script, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own has a name too long for sockets
        monkeypatch.setenv("TMPDIR", name)
        check_directory(start, script, tmp_path, monkeypatch, Path(name))


def check_directory(start, script, tmp_path, monkeypatch, temporary):
    monkeypatch.chdir(tmp_path)
    launch = start("--inprocess-restart", script("import time, pathlib; pathlib.Path('up').touch(); time.sleep(3600)"))
    wait_until((tmp_path / "up").exists, 20, "the worker did not come up")
    (directory,) = temporary.glob("hyperpodrun-*")
    assert directory.stat().st_mode & 0o777 == 0o700
    os.kill(launch.pid, signal.SIGKILL)
    launch.wait(10)
    wait_until(lambda: not directory.exists(), 5, "the directory is still there")
