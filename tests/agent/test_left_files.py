"""What killed processes leave in shared memory and among temporary files: gone with them, and nothing of others is."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hyperpodrun.agent import directories
from hyperpodrun.agent.directories import make_owned, remove_orphaned

SHM = Path("/dev/shm")
LEAVES = """
import os, pathlib, signal, sys, time
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=4096)
names = [block.name]
if "torch" in sys.argv:
    import torch
    torch.multiprocessing.set_sharing_strategy("file_system")
    shared = torch.ones(1000).share_memory_()
    names.append(shared.untyped_storage()._share_filename_cpu_()[1].decode().lstrip("/"))
    from multiprocessing.util import get_temp_dir
    pathlib.Path("pymp").write_text(get_temp_dir())
assert all(pathlib.Path("/dev/shm", name).exists() for name in names), names
told = pathlib.Path("made." + os.environ["TORCHELASTIC_RESTART_COUNT"])
told.with_suffix(".tmp" + told.suffix).write_text(" ".join(names))
told.with_suffix(".tmp" + told.suffix).rename(told)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "exit" in sys.argv:
    os._exit(3)
if "wait" in sys.argv:
    time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own has a name too long for sockets
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def made(tmp_path: Path) -> list[Path]:
    """What the workers have made in shared memory."""
    return [SHM / name for path in tmp_path.glob("made.?") for name in path.read_text().split()]


def test_shared_memory_of_killed_ranks_is_taken_away(run, script, tmp_path, temporary):
    finished = run("--max-restarts=1", script(LEAVES), "torch", "kill")
    assert finished.returncode == 0, finished.output
    assert len(made(tmp_path)) == 4
    assert [path for path in made(tmp_path) if path.exists()] == []
    assert list(temporary.rglob("pymp-*")) == []
    assert Path((tmp_path / "pymp").read_text()).is_relative_to(temporary)


LOADS = """
import os, pathlib, signal, sys, time
from multiprocessing import Process, current_process, reduction, resource_sharer, util

def serve():  # as a DataLoader worker does that sends descriptors
    address = resource_sharer.DupFd(0)._id
    pathlib.Path("pymp.tmp").write_text(util.get_temp_dir())
    pathlib.Path("pymp.tmp").rename("pymp." + os.environ["TORCHELASTIC_RESTART_COUNT"])
    time.sleep(3600)

Process(target=serve).start()
while not pathlib.Path("pymp." + os.environ["TORCHELASTIC_RESTART_COUNT"]).exists():
    time.sleep(0.01)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3600)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_folders_of_killed_children_go_with_them_in_any_script(start, script, tmp_path, temporary, signum):
    (temporary / "pymp-others").mkdir()
    launch = start("--start-method=spawn", "--max-restarts=1", "--shutdown-timeout=0", script(LOADS))
    wait_until((tmp_path / "pymp.1").exists, 30, "the second worker did not come up")
    first, second = (Path((tmp_path / f"pymp.{attempt}").read_text()) for attempt in (0, 1))
    assert second.parent == temporary
    wait_until(lambda: not first.exists(), 5, "the folder of the first is left")
    assert second.exists(), "it is in use"
    os.kill(launch.pid, signum)
    launch.wait(30)
    wait_until(lambda: not second.exists(), 5, "the folder of the second is left")
    assert (temporary / "pymp-others").exists()


@pytest.mark.parametrize("how", ["exit", "SIGTERM", "SIGKILL"])
def test_shared_memory_is_taken_away_however_the_job_ends(start, script, tmp_path, how):
    launch = start("--start-method=spawn", "--shutdown-timeout=0", script(LEAVES), "exit" if how == "exit" else "wait")
    if how != "exit":
        wait_until((tmp_path / "made.0").exists, 30, "the worker did not come up")
        os.kill(launch.pid, getattr(signal, how))
    launch.wait(30)
    assert len(made(tmp_path)) == 1
    wait_until(lambda: not any(path.exists() for path in made(tmp_path)), 5, "left over")


def test_the_next_launch_removes_what_a_killed_one_and_its_keeper_have_left(start, run, script, tmp_path, temporary):
    waits = script(
        "import os, time, pathlib\n"
        "pathlib.Path('up.new').write_text(os.environ['HYPERPODRUN_STATE'])\n"
        "pathlib.Path('up.new').rename('up')\n"
        "time.sleep(3600)\n"
    )
    launch = start("--inprocess-restart", waits)
    wait_until((tmp_path / "up").exists, 30, "the worker did not come up")
    children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
    (keeper,) = [pid for pid in children if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    left = [*temporary.glob("hyperpodrun-*"), Path((tmp_path / "up").read_text())]
    os.kill(int(keeper), signal.SIGSTOP)  # so that it cannot see the end of the agent before its own
    os.kill(launch.pid, signal.SIGKILL)
    os.kill(int(keeper), signal.SIGKILL)
    launch.wait(10)
    assert len(left) == 2
    assert all(path.exists() for path in left)
    finished = run(script("import time; time.sleep(1)", "short.py"))
    assert finished.returncode == 0, finished.output
    assert [path for path in left if path.exists()] == []
    assert all(f"orphan-removed path={path}" in finished.stderr for path in left), finished.stderr


def test_only_what_nobody_holds_is_removed(tmp_path, monkeypatch):
    def orphan(name: str, token: str = "t") -> Path:
        owned = make_owned(tmp_path, name, token)
        (owned.path / "sub").mkdir()
        (owned.path / "sub" / "file").touch()
        os.close(owned.proof)
        return owned.path

    def sweep() -> set[Path]:
        return set(remove_orphaned(iter([tmp_path, tmp_path / "nothing"]), ("job-",)))

    held = make_owned(tmp_path, "job-", "token")
    inherited = os.dup(held.proof)  # as the keeper has it
    gone, other_name = orphan("job-"), orphan("another-")
    (tmp_path / "job-without-proof").mkdir()
    (tmp_path / "job-file").touch()
    (tmp_path / "job-link").symlink_to(other_name)
    unlocked = tmp_path / "job-unfinished"
    unlocked.mkdir()
    (unlocked / ".owner.new").touch()
    monkeypatch.setattr(directories, "_boot", lambda: "another machine, or before its reboot")
    elsewhere = orphan("job-")
    monkeypatch.undo()
    assert sweep() == {gone}
    assert not gone.exists()
    os.close(held.proof)
    assert sweep() == set()
    os.close(inherited)
    assert sweep() == {held.path}
    theirs = orphan("job-")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep() == set()
    assert all(path.exists() for path in (other_name, elsewhere, theirs, unlocked, tmp_path / "job-without-proof"))


def test_where_there_are_no_locks_a_directory_is_never_taken_for_orphaned(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    owned = make_owned(tmp_path, "job-", "token")
    monkeypatch.undo()
    assert owned.proof is None
    assert remove_orphaned(iter([tmp_path]), ("job-",)) == []
    owned.remove()
    assert not owned.path.exists()


def test_without_room_in_memory_the_jobs_state_is_kept_elsewhere_and_that_is_said(script, tmp_path, temporary):
    program = """
import sys
from pathlib import Path
from hyperpodrun.agent.node import directories
from hyperpodrun.launcher import entry_point

full, nowhere = Path("/proc/no-room"), Path("/proc/no-room-either")
directories.in_memory = lambda: full
if sys.argv[1] == "nowhere":
    directories.temporary = lambda: nowhere
sys.argv[1:] = ["--inprocess-restart", "--start-method=spawn", sys.argv[2]]
entry_point()
"""
    worker = script("import os; print(os.environ.get('HYPERPODRUN_STATE'), flush=True)")
    for where, event in (("elsewhere", "state-directory path="), ("nowhere", "state-directory-off reason=")):
        command = [sys.executable, "-c", program, where, str(worker)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, finished.stderr
        assert event in finished.stderr
        assert "/proc/no-room" in finished.stderr
        assert finished.stdout.startswith(f"{temporary}/hyperpodrun-state-" if where == "elsewhere" else "None")
