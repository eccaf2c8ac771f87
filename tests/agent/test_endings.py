"""How a job ends: exit codes, signals, time limits, scripts before and after; output to the last byte."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

IGNORES_SIGTERM = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda signum, frame: print("heard", signum, flush=True))
pathlib.Path("up").touch()
while True:
    time.sleep(1)
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def wait_for_file(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_every_worker_succeeds(run, script):
    finished = run("--nproc-per-node=3", script("import os; os.write(1, os.environ['RANK'].encode())"))
    assert finished.returncode == 0, finished.output
    assert sorted(finished.stdout) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("sys.exit(3)", "rank 1 exited with code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "rank 1 was killed by signal 11"),
        ("raise ValueError('boom')", "rank 1 exited with code 1"),
    ],
)
@pytest.mark.parametrize("flag", [[], ["--inprocess-restart"]], ids=["plain", "in-process"])
def test_a_worker_without_hpwrapper_that_fails_ends_the_job_with_1(run, script, ending, reason, flag):
    body = f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(3600)"
    finished = run("--nproc-per-node=2", *flag, script(body))
    assert finished.returncode == 1, finished.output
    assert reason in finished.stderr
    assert finished.stderr.count("boom") <= 2, "the traceback is shown once"


def test_all_processes_are_started_anew_within_max_restarts(run, script):
    body = """
import os, sys
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"try {attempt}\\n".encode())
sys.exit(attempt != "2")
"""
    finished = run("--nproc-per-node=2", "--max-restarts=2", script(body))
    assert finished.returncode == 0, finished.output
    assert sorted(finished.stdout.splitlines())[-2:] == ["try 2", "try 2"]
    finished = run("--nproc-per-node=2", "--max-restarts=1", script(body))
    assert finished.returncode == 1, finished.output


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_reaches_the_workers_and_is_the_exit_code(start, script, tmp_path, signum):
    body = """
import pathlib, signal, sys, time
def stop(signum, frame):
    print("heard", signum, flush=True)
    sys.exit(0)
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, stop)
pathlib.Path("up").touch()
time.sleep(3600)
"""
    launch = start(script(body))
    wait_for_file(tmp_path / "up")
    os.kill(launch.pid, signum)
    finished = launch.wait(20)
    assert finished.returncode == 128 + signum, finished.output
    assert finished.stdout == f"heard {int(signum)}\n"


def test_workers_that_ignore_the_signal_are_killed_after_the_shutdown_timeout(start, script, tmp_path):
    launch = start("--shutdown-timeout=0.5", script(IGNORES_SIGTERM))
    wait_for_file(tmp_path / "up")
    os.kill(launch.pid, signal.SIGTERM)
    finished = launch.wait(10)
    assert finished.returncode == 143, finished.output
    assert finished.stdout == "heard 15\n"


SAVES_ITS_STATE = """
import os, pathlib, signal, sys, time
def stop(signum, frame):
    pathlib.Path(f"asked.{os.environ['RANK']}").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    pathlib.Path(f"saved.{os.environ['RANK']}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(f"up.{os.environ['RANK']}").touch()
time.sleep(3600)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_that_comes_by_two_ways_costs_no_checkpoint(start, script, tmp_path, second):
    launch = start("--nproc-per-node=2", "--shutdown-timeout=60", script(SAVES_ITS_STATE))
    for file in ("up.0", "up.1"):
        wait_for_file(tmp_path / file)
    os.kill(launch.pid, signal.SIGTERM)
    for file in ("asked.0", "asked.1"):
        wait_for_file(tmp_path / file)
    os.kill(launch.pid, second)
    time.sleep(0.2)  # in which a launcher that kills would have killed
    (tmp_path / "go").touch()
    finished = launch.wait(20)
    assert finished.returncode == 143, finished.output
    assert sorted(path.name for path in tmp_path.glob("saved.*")) == ["saved.0", "saved.1"]
    assert finished.stderr.count("hyperpodrun: signal name=") == 2


def test_a_second_ctrl_c_kills_at_once(start, script, tmp_path):
    launch = start("--shutdown-timeout=3600", script(IGNORES_SIGTERM.replace("SIGTERM", "SIGINT")))
    wait_for_file(tmp_path / "up")
    deadline = time.monotonic() + 30
    while launch.process.poll() is None and time.monotonic() < deadline:
        os.kill(launch.pid, signal.SIGINT)
        time.sleep(1.1)  # before that it counts as the same request, from when the launcher has seen the first
    assert launch.wait(10).returncode == 130


HEARS_SIGUSR1 = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
if rank != "1":
    signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path(f"heard.{rank}").touch())
pathlib.Path(f"up.{rank}").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("shell", [False, True], ids=["python", "below a shell"])
def test_sigusr1_reaches_the_workers_that_handle_it_and_the_job_goes_on(start, script, tmp_path, shell):
    worker = script(HEARS_SIGUSR1)
    command = ["--no-python", "sh", "-c", f"{sys.executable} {worker}; exit $?"] if shell else [worker]
    launch = start("--nproc-per-node=3", *command)
    for rank in range(3):
        wait_for_file(tmp_path / f"up.{rank}")
    os.kill(launch.pid, signal.SIGUSR1)
    for rank in (0, 2):
        wait_for_file(tmp_path / f"heard.{rank}")
    (tmp_path / "go").touch()
    finished = launch.wait(20)
    assert finished.returncode == 0, finished.output
    assert "hyperpodrun: signal name=SIGUSR1 told=0,2 no_handler=1" in finished.stderr


def test_the_shutdown_timeout_holds_for_failures_too(run, script):
    body = IGNORES_SIGTERM.replace("while True", "import os\nif os.environ['RANK'] == '0': sys.exit(5)\nwhile True")
    finished = run("--nproc-per-node=2", "--shutdown-timeout=0.5", script(body), timeout=10)
    assert finished.returncode == 1, finished.output


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start, script, tmp_path, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        body = """
import time
from pathlib import Path
Path("up").touch()
while not Path("go").exists():
    time.sleep(0.01)
"""
        launch = start(script(body))
    finally:
        signal.signal(signal.SIGHUP, previous)
    wait_for_file(tmp_path / "up")
    os.kill(launch.pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert launch.wait(20).returncode == 0


def test_scripts_run_before_and_after_training(run, script, tmp_path):
    before = executable(tmp_path / "before.sh", "#!/bin/sh\necho before $#:$1:$2 >> order\n")
    after = executable(tmp_path / "after.sh", "#!/bin/sh\necho after $# >> order\n")
    body = "import os, sys; open('order', 'a').write('train\\n'); sys.exit(os.environ['JOB_RESTART_COUNT'] == '0')"
    finished = run(
        "--max-restarts=1", "--pre-train-script", before, "--pre-train-args", "a 'b c'",
        "--post-train-script", after, script(body),
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    expected = ["before 2:a:b c", "train", "before 2:a:b c", "train", "after 0"]
    assert (tmp_path / "order").read_text().splitlines() == expected


@pytest.mark.parametrize("which", ["pre", "post"])
def test_a_script_that_fails_fails_the_job(run, script, tmp_path, which):
    failing = executable(tmp_path / "fails.sh", "#!/bin/sh\nexit 7\n")
    finished = run(f"--{which}-train-script", failing, script("print('trained')"))
    assert finished.returncode == 1, finished.output
    assert f"the {which}-train script exited with code 7" in finished.stderr
    assert finished.stdout == ("" if which == "pre" else "trained\n")


def test_teed_output_is_complete_and_prefixed_and_redirected_output_is_exact(run, script):
    body = """
import os, sys
rank = os.environ["RANK"]
for i in range(20000):
    print(rank, i)
sys.stdout.write("no newline at the end")
sys.stderr.write(f"error of {rank}\\n")
sys.stdout.flush()
os._exit(0)
"""
    finished = run("--nproc-per-node=2", "--tee=0:1,1:3", "--redirects=0:3", script(body))
    assert finished.returncode == 0, finished.output
    lines = finished.stdout.splitlines()
    for rank in (0, 1):
        expected = [f"{rank} {i}" for i in range(20000)] + ["no newline at the end"]
        prefix = f"[default{rank}]:"
        shown = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        assert shown == expected
        (file,) = finished.log_dir.glob(f"*/attempt_0/{rank}/stdout.log")
        assert file.read_text() == "\n".join(expected)
        (file,) = finished.log_dir.glob(f"*/attempt_0/{rank}/stderr.log")
        assert file.read_text() == f"error of {rank}\n"
    assert "[default1]:error of 1" in finished.stderr
    assert "error of 0" not in finished.stderr


def test_logs_of_earlier_attempts_are_kept(run, script):
    body = "import os, sys; print('attempt', os.environ['JOB_RESTART_COUNT']); sys.exit(1)"
    finished = run("--max-restarts=2", "--redirects=1", script(body))
    texts = {path.parts[-3]: path.read_text() for path in finished.log_dir.glob("*/attempt_*/0/stdout.log")}
    assert texts == {f"attempt_{n}": f"attempt {n}\n" for n in range(3)}


def test_a_background_process_that_holds_the_pipe_does_not_hold_the_job(run, script):
    body = "import subprocess; subprocess.Popen(['sleep', '3600']); print('done')"
    finished = run("--tee=3", script(body), timeout=20)
    assert finished.returncode == 0, finished.output
    assert finished.stdout == "[default0]:done\n"
