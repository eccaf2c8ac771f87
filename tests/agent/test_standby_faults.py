"""The standby source is lost, stuck or slow, at any moment: the job goes on or ends as it should, with no orphan."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def standbys_are_on(monkeypatch):
    """Also where the whole suite runs without them."""
    monkeypatch.setenv("HYPERPODRUN_STANDBY", "1")


WAITS = """
import os, sys, time
from pathlib import Path
if len(sys.argv) > 1:
    import torch  # the source imports it; a worker that is started cold need not, which would take seconds
Path(f"up.{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.01)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and Path("again").exists():
    sys.exit(1)
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def launch(start, script, tmp_path):
    """A launch whose log is a file that can be read meanwhile."""

    def begin(*options, body: str = WAITS, **environment):
        launched = start(*options, script(body), LOGLEVEL="DEBUG", **environment)
        launched.source = lambda: next(iter(sources(launched.pid)), None)
        return launched

    return begin


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or not ours to look at
        return b""


def sources(agent: int) -> list[int]:
    return [child for child in children(agent) if b"HYPERPODRUN_STANDBY_OPTIONS=" in environ(child)]


def marked(token: bytes) -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and token in environ(int(p.name))]


def token(pid: int) -> bytes:
    found = re.search(rb"HYPERPODRUN_JOB=\w+", environ(pid))
    assert found is not None
    return found[0]


def wait_for(condition, what: str, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return value


def waits_for_requests(source: int) -> bool:
    """Ten looks in a row find it asleep: not in its last preparations. If it was, the test would only be slower."""
    for _ in range(10):
        if Path(f"/proc/{source}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            return False
        time.sleep(0.01)
    return True


def ups(number: int = 0) -> list[int]:
    texts = [path.read_text() for path in Path().glob(f"up.*.{number}")]
    return [int(text) for text in texts if text]


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.5, 1.0, 1.5])
def test_a_source_killed_while_it_imports_or_forks_costs_no_rank(launch, delay):
    job = launch("--nproc-per-node=3")
    source = wait_for(job.source, "no source")
    mark = token(source)
    time.sleep(delay)
    os.kill(source, signal.SIGKILL)
    Path("go").touch()
    finished = job.wait(60)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("done") == 3
    assert marked(mark) == []


def test_a_source_killed_again_and_again_is_given_up(launch):
    job = launch("--nproc-per-node=2")
    seen = set()
    while len(seen) < 3:
        source = wait_for(lambda: job.source() not in {None, *seen} and job.source(), "no new source")
        seen.add(source)
        os.kill(source, signal.SIGKILL)
    Path("go").touch()
    finished = job.wait(60)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("done") == 2
    assert finished.stderr.count("standby-off") == 1, finished.output


def test_a_warm_source_that_dies_is_replaced_and_workers_do_not_notice(launch):
    job = launch("--nproc-per-node=2", "--max-restarts=1")
    wait_for(lambda: len(ups()) == 2, "no workers")
    first = job.source()
    os.kill(first, signal.SIGKILL)
    second = wait_for(lambda: job.source() not in (None, first) and job.source(), "no new source")
    assert all(Path(f"/proc/{pid}").exists() for pid in ups())
    Path("again").touch()
    Path("go").touch()
    finished = job.wait(60)
    assert finished.returncode == 0, finished.output
    assert second != first
    assert finished.stdout.count("done") == 2
    assert finished.stderr.count("hyperpodrun: forked") == 4, finished.output


def test_a_stopped_source_holds_nobody_up_for_long(launch):
    Path("last.py").write_text("from pathlib import Path\nPath('imported').touch()")
    job = launch("--nproc-per-node=2", "--max-restarts=1", "--preload=last")
    wait_for(lambda: len(ups()) == 2, "no workers")
    wait_for(Path("imported").exists, "the source has not imported everything")
    source = job.source()
    wait_for(lambda: waits_for_requests(source), "the source is not warm")
    os.kill(source, signal.SIGSTOP)
    Path("again").touch()
    Path("go").touch()
    finished = job.wait(100)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("done") == 2


@pytest.mark.parametrize("delay", [0.0, 0.2, 1.0, None])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=lambda signum: signum.name)
def test_nothing_is_left_when_the_agent_ends_while_workers_are_forked(launch, delay, signum):
    job = launch("--nproc-per-node=3", "--shutdown-timeout=5")
    source = wait_for(job.source, "no source")
    mark = token(source)
    if delay is None:
        wait_for(ups, "no worker")
    else:
        time.sleep(delay)
    os.kill(job.pid, signum)
    finished = job.wait(20)
    assert finished.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), finished.output
    wait_for(lambda: not marked(mark), "left over", 5)


def test_orphans_of_a_dead_forked_worker_die_and_those_of_a_living_one_live(launch):
    body = """
import os, subprocess, sys, time
from pathlib import Path
import torch
rank = os.environ["RANK"]
subprocess.Popen(["setsid", "sh", "-c", f"sleep 3600 & echo $! > daemon.{rank}; exit 0"]).wait()
pid = os.fork()  # no exec: its environment in /proc is what the worker's is
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        Path(f"forked.{rank}").write_text(f"{os.getpid()} ")
        time.sleep(3600)
    os._exit(0)
os.waitpid(pid, 0)
if rank == "1":
    while not Path("leave").exists():
        time.sleep(0.01)
    sys.exit(0)
while not Path("go").exists():
    time.sleep(0.01)
"""
    job = launch("--nproc-per-node=2", body=body)

    def pids(rank: int) -> list[int]:
        paths = [Path(f"{kind}.{rank}") for kind in ("daemon", "forked")]
        texts = [path.read_text() for path in paths if path.exists()]
        return (
            [int(text) for text in texts]
            if len(texts) == 2 and all(text.endswith(("\n", " ")) for text in texts)
            else []
        )

    wait_for(lambda: pids(0) and pids(1), "no orphans")
    Path("leave").touch()
    wait_for(lambda: not any(environ(pid) for pid in pids(1)), "an orphan of the dead worker lives", 10)
    time.sleep(0.2)
    assert all(environ(pid) for pid in pids(0)), "an orphan of the living worker was killed"
    Path("go").touch()
    assert job.wait(30).returncode == 0


KILLED = """
import os, signal
import torch
import torch.distributed as dist
from hyperpodrun import HPWrapper

@HPWrapper()
def main(caller=None):
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1" and os.environ["JOB_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    print(os.environ["RANK"], "ended", flush=True)

main()
"""


def test_a_killed_rank_comes_back_from_the_source_while_the_others_stay(launch):
    job = launch("--nproc-per-node=3", "--inprocess-restart", body=KILLED)
    finished = job.wait(60)
    assert finished.returncode == 0, finished.output
    assert finished.stderr.count("hyperpodrun: forked") == 4, finished.output
    assert [row["respawned"] for row in finished.recoveries] == [[1]]


COMPILES = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from hyperpodrun import HPWrapper
backend = "torch._inductor.compile_fx" in sys.modules

@HPWrapper()
def main(caller=None):
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1" and os.environ["JOB_RESTART_COUNT"] == "0":
        while not Path("go").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    if os.environ["RANK"] == "1":
        print("imported:", backend, flush=True)
        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2))

main()
"""


def log_of_a_kill_when(job, *events: str) -> str:
    """Lets rank 1 be killed as soon as the log has told of these events, in this order; the whole log."""
    lines = []
    for event in events:
        while event not in (line := job.process.stderr.readline()):
            assert line, "".join(lines)
            lines.append(line)
        lines.append(line)
    Path("go").touch()
    lines.append(job.process.stderr.read())
    assert job.process.wait(60) == 0, "".join(lines)
    return "".join(lines)


def launch_with_a_backend_that(launch, does: str):
    """A job that compiles, where the import of torch.compile's backend does this, too."""
    Path("finder.py").write_text(f"""
import sys, threading, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._inductor.compile_fx":
            {does}
sys.meta_path.insert(0, Finder())
""")
    return launch("--nproc-per-node=2", "--inprocess-restart", "--preload=finder", body=COMPILES)


def test_a_respawned_worker_of_a_job_that_compiles_finds_the_backend_imported(launch):
    job = launch("--nproc-per-node=2", "--inprocess-restart", body=COMPILES)
    log = log_of_a_kill_when(job, "standby-ready", "standby-ready")
    assert log.count("hyperpodrun: forked") == 3, log
    assert job.process.stdout.read() == "imported: True\n"


def test_a_worker_that_is_respawned_soon_does_not_wait_for_the_backend(launch):
    job = launch("--nproc-per-node=2", "--inprocess-restart", body=COMPILES)
    log = log_of_a_kill_when(job, "standby-ready")
    assert log.count("hyperpodrun: forked") == 3, log
    assert job.process.stdout.read() == "imported: False\n"


def test_a_worker_that_is_respawned_while_the_source_imports_waits_for_it(launch):
    """Longer than it would for a source that has nothing to do."""
    job = launch_with_a_backend_that(launch, "time.sleep(6)")
    log = log_of_a_kill_when(job, "standby-ready", "standby-busy")
    assert log.count("hyperpodrun: forked") == 3, log
    assert "cold-start" not in log
    assert "standby-s" not in log.replace("standby-source", ""), log  # neither slow nor stuck
    assert job.process.stdout.read() == "imported: True\n"


def test_a_source_that_the_backend_spoils_is_replaced_by_one_without(launch):
    job = launch_with_a_backend_that(launch, "threading.Thread(target=threading.Event().wait, daemon=True).start()")
    log = log_of_a_kill_when(job, "standby-ready", "standby-spoiled", "standby-ready")
    assert log.count("standby-spoiled") == 1, log
    assert log.count("standby-off") == log.count("standby-lost") == 0, log
    assert log.count("hyperpodrun: forked") == 3, log
    assert job.process.stdout.read() == "imported: False\n"


STARTED_LATE = """
import sys, torch
print("imported:", "torch._dynamo" in sys.modules, flush=True)
"""


def test_a_source_imports_nothing_that_workers_do_not_need_before_they_have_started(launch, script):
    """Where the other nodes are waited for, workers start when it is warm: not a second later, nor in competition."""
    waits = script("#!/bin/sh\nuntil [ -e go ]; do sleep 0.01; done\n", "waits.sh")
    waits.chmod(0o755)
    job = launch("--nproc-per-node=1", f"--pre-train-script={waits}", body=STARTED_LATE)
    log = log_of_a_kill_when(job, "standby-ready")
    assert log.count("hyperpodrun: forked") == 1, log
    assert job.process.stdout.read() == "imported: False\n"


@pytest.mark.parametrize("off", ["option", "variable"])
def test_standbys_can_be_turned_off(launch, off):
    options = ["--start-method=spawn"] if off == "option" else []
    environment = {"HYPERPODRUN_STANDBY": "0"} if off == "variable" else {}
    Path("go").touch()
    finished = launch(*options, **environment).wait(60)
    assert (finished.returncode, finished.stdout) == (0, "done\n"), finished.output
    assert "standby" not in finished.stderr
    assert "forked" not in finished.stderr
