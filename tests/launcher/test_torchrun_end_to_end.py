"""The same worker under torchrun and under hyperpodrun: environment, files, output, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hyperpodrun.launcher import ChildFailedError, LaunchError, SignalException, main

TELLS_ENVIRONMENT = """
import json, os, sys
rank = int(os.environ["RANK"])
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    json.dump({"environment": dict(os.environ), "argv": sys.argv, "name": __name__}, file)
sys.stdout.write(f"out {rank}\\n")  # in one piece: torchrun's --tee shows what there is, also half a line
sys.stderr.write(f"err {rank}\\n")
"""
NAMES = """RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE
MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID
TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS TORCHELASTIC_SIGNALS_TO_HANDLE
CUDA_VISIBLE_DEVICES"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def launch(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ["--nproc-per-node=2", "--master-port={port}", "--master-addr=127.0.0.1", "--max-restarts=2", "-r3",
         "-t", "0:1"],
        ["--nproc_per_node", "2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:{port}", "--rdzv-id=job",
         "--role=trainer", "--tee=3", "--virtual-local-rank", "--local-ranks-filter=1",
         "--signals-to-h=SIGTERM,SIGUSR1",
         "--duplicate-stdout-filters=1", "--duplicate-stderr-filters=nothing,1"],
    ],
    ids=["static", "c10d"],
)  # fmt: skip
def test_the_same_worker_sees_and_leaves_the_same(tmp_path, free_port, script, options):
    worker = script(TELLS_ENVIRONMENT)
    seen = {}
    for module in ("torch.distributed.run", "hyperpodrun"):
        logs, told = tmp_path / f"logs-{module}", tmp_path / f"told-{module}"
        filled = [option.format(port=free_port()) for option in options]
        finished = launch(module, *filled, f"--log-dir={logs}", str(worker), str(told), "${local_rank}", "--flag")
        assert finished.returncode == 0, finished.stderr
        ports = [option.rpartition("=")[2].rpartition(":")[2] for option in filled if "port" in option]
        ranks = [json.loads(Path(f"{told}.{rank}").read_text()) for rank in (0, 1)]
        environments = [{name: rank["environment"].get(name) for name in NAMES.split()} for rank in ranks]
        for environment in environments:
            # Under c10d torchrun names this machine, and hyperpodrun, on a single node, its loopback address.
            assert environment.pop("MASTER_ADDR") == "127.0.0.1" or "job" in environment.values()
            assert environment.pop("MASTER_PORT") in ports or "job" in environment.values()
        files = {
            str(path.relative_to(logs)).partition("/")[2]: path.read_text()
            for path in logs.glob("*/**/*") if path.is_file()
        }  # fmt: skip
        (directory,) = [path for path in logs.iterdir() if path.is_dir()]
        seen[module] = {
            "environment": environments,
            "argv": [rank["argv"][2:] for rank in ranks],
            "main": [rank["name"] for rank in ranks],
            "files": files,
            "directory": directory.name.partition("_")[0],
            "stdout": sorted(finished.stdout.splitlines()),
            "stderr": sorted(line for line in finished.stderr.splitlines() if "err " in line),
        }
    assert seen["hyperpodrun"] == seen["torch.distributed.run"]


def test_the_store_listens_on_the_port_that_was_asked_for(run, script, free_port):
    worker = script(
        "import os, socket; socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])))"
    )
    port = free_port()
    body = worker.read_text() + "\nprint(os.environ['MASTER_PORT'])"
    worker.write_text(body)
    assert run(f"--master-port={port}", worker).stdout.strip() == str(port)
    assert run("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", worker).stdout.strip() == str(port)
    assert run("--standalone", worker).returncode == 0


RECORDED = """
import os, signal, sys, time
from torch.distributed.elastic.multiprocessing.errors import record
@record
def main():
    if os.environ["RANK"] == "1":
        raise ValueError("boom")
    time.sleep(3600)
main()
"""


def test_the_error_file_reaches_the_banner_and_the_launchers_own_error_file(tmp_path, run, script):
    own = tmp_path / "reply.json"
    finished = run("--nproc-per-node=2", script(RECORDED), TORCHELASTIC_ERROR_FILE=str(own))
    assert finished.returncode == 1, finished.output
    banner = finished.stderr[finished.stderr.index("Root Cause") :]
    assert "FAILED" in finished.stderr
    facts = [
        r"time +: \d{4}-",
        r"host +: \S+",
        r"rank +: 1 \(local_rank: 1\)",
        r"exitcode +: 1 \(pid: \d+\)",
        r"error_file: .*/attempt_0/1/error.json",
        r"traceback : Traceback",
        "ValueError: boom",
    ]
    assert [fact for fact in facts if not re.search(fact, banner)] == [], banner
    data = json.loads(own.read_text())
    assert data["message"]["message"] == "ValueError: boom"
    assert data["message"]["errorCode"] == 1
    (child,) = finished.log_dir.glob("*/attempt_0/1/error.json")
    assert "errorCode" not in json.loads(child.read_text())["message"]


def test_the_banner_names_the_first_cause_first_and_its_signal(run, script):
    body = """
import os, pathlib, signal, sys, time
if os.environ["RANK"] == "2":
    pathlib.Path("gone").touch()
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
while True:
    time.sleep(0.1)
"""
    finished = run("--nproc-per-node=3", "--shutdown-timeout=5", script(body))
    assert finished.returncode == 1
    root, _, others = finished.stderr.partition("Root Cause")[2].partition("Failures:")
    assert "rank      : 2 (local_rank: 2)" in root
    assert re.search(r"exitcode  : -9 \(pid: \d+\) \(SIGKILL\)", root)
    assert "exitcode  : 7" in others or "none but this one" in others


def test_main_returns_or_raises_and_never_exits(tmp_path, script, capfd):
    assert main(["--log-dir", str(tmp_path / "a"), str(script("pass"))]) is None
    body = "import os, sys; sys.exit(int(os.environ['RANK']) * 3)"
    with pytest.raises(ChildFailedError) as failed:
        main(["--log-dir", str(tmp_path / "b"), "--nproc-per-node=2", str(script(body))])
    rank, failure = failed.value.get_first_failure()
    assert (rank, failure.local_rank, failure.exitcode, failure.signal_name()) == (1, 1, 3, "<N/A>")
    assert failed.value.failures == {1: failure}
    assert failure.pid > 0
    assert failure.timestamp > 0
    assert failed.value.name == str(script(body))
    body = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(SignalException) as stopped:
        main(["--log-dir", str(tmp_path / "c"), str(script(body))])
    assert stopped.value.sigval == signal.SIGTERM
    assert isinstance(stopped.value, LaunchError)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
def test_sigterm_is_143_in_every_phase(start, script, seconds):
    launch = start("--nproc-per-node=2", script("import time; time.sleep(3600)"))
    time.sleep(seconds)  # whatever it is doing by then
    os.kill(launch.pid, signal.SIGTERM)
    # Before the interpreter has come to the first line of the launcher, the kernel's default is what a shell calls 143.
    finished = launch.wait(20)
    assert finished.returncode in (143, -signal.SIGTERM)
    assert finished.returncode == 143 or not finished.log_dir.exists(), finished.output


def test_a_shutdown_timeout_of_1_is_one_second(run, script):
    body = """
import os, pathlib, signal, sys, time
if os.environ["RANK"] == "1":
    while not pathlib.Path("deaf").exists():
        time.sleep(0.01)
    pathlib.Path("failed").write_text(str(time.monotonic()))
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("deaf").touch()
time.sleep(3600)
"""
    assert run("--nproc-per-node=2", "--shutdown-timeout", "1", script(body)).returncode == 1
    assert time.monotonic() - float(Path("failed").read_text()) < 3


def test_an_early_finisher_ends_nothing_and_a_later_failure_still_fails_the_job(run, script):
    body = """
import os, pathlib, sys, time
if os.environ["RANK"] == "0":
    pathlib.Path("done").touch()
    sys.exit(0)
while not pathlib.Path("done").exists():
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(int(sys.argv[1]))
"""
    assert run("--nproc-per-node=2", script(body), "0").returncode == 0
    (Path("done")).unlink()
    assert run("--nproc-per-node=2", script(body), "4").returncode == 1


def test_twelve_ranks_in_a_tee_map(run, script):
    maps = ",".join(f"{rank}:{1 if rank % 2 else 0}" for rank in range(12))
    finished = run(
        "--nproc-per-node=12", f"--tee={maps}", "--redirects=3", script("import os; print(os.environ['RANK'])")
    )
    assert sorted(finished.stdout.split()) == sorted(f"[default{rank}]:{rank}" for rank in range(1, 12, 2))


def test_local_ranks_filter_hides_the_console_only(run, script):
    body = "import os; print('rank', os.environ['RANK'])"
    finished = run("--nproc-per-node=3", "--local-ranks-filter=1", "--redirects=0:1", script(body))
    assert finished.stdout == "rank 1\n"
    (file,) = finished.log_dir.glob("*/attempt_0/0/stdout.log")
    assert file.read_text() == "rank 0\n"


def test_log_line_prefix_template(run, script):
    body = "import os; print('rank', os.environ['RANK'])"
    template = "<${role_name}/${rank}/${local_rank}/${other}> "
    finished = run("--tee=3", script(body), TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=template)
    assert finished.stdout == "<default/0/0/${other}> rank 0\n"
    newer = "--log-line-prefix-template=${hostname}:${rank}: "  # torch 2.14's
    finished = run("--tee=3", newer, script(body), TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=template)
    assert finished.stdout == f"{socket.gethostname()}:0: rank 0\n"


def test_python_exec_and_run_path(run, script, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho instead\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    assert run(script("print('it runs')"), PYTHON_EXEC=str(other)).stdout == "instead\nit runs\n"
    body = "import sys\nprint(__name__, sys.argv[1:], sys.path[0] == sys.argv[2])\nraise KeyError('k')"
    finished = run("--run-path", script(body), "a", tmp_path / "elsewhere")
    assert finished.stdout.startswith("__main__ ['a', ")
    (file,) = finished.log_dir.glob("*/attempt_0/0/error.json")
    assert "KeyError" in file.read_text()


def test_signals_to_handle_are_passed_on_and_end_the_job(start, script, tmp_path):
    body = """
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(print("heard", flush=True)))
pathlib.Path("up").touch()
time.sleep(3600)
"""
    launch = start("--signals-to-handle=SIGTERM,SIGUSR1", script(body))
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(launch.pid, signal.SIGUSR1)
    finished = launch.wait(20)
    assert (finished.returncode, finished.stdout) == (128 + signal.SIGUSR1, "heard\n")


def test_virtual_local_rank_maps_the_visible_devices(run, script):
    body = """
import os
text = " ".join(os.environ[name] for name in ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"))
os.write(1, f"{text}\\n".encode())
"""
    finished = run("--nproc-per-node=2", "--virtual-local-rank", script(body), CUDA_VISIBLE_DEVICES="5, 3")
    assert sorted(finished.stdout.splitlines()) == ["0 0 5", "1 0 3"]
    refused = run("--nproc-per-node=2", "--virtual-local-rank", script(body), CUDA_VISIBLE_DEVICES="5")
    assert refused.returncode == 2


def test_events_go_to_the_console_when_asked_for(script):
    worker = script("pass")
    names = ("state", "global_rank", "group_rank", "group_world_size", "role", "rdzv_backend", "local_rank",
             "role_rank", "role_world_size", "agent_restarts", "raw_error")  # fmt: skip
    told = {}
    for module in ("torch.distributed.run", "hyperpodrun"):
        finished = launch(module, "--event-log-handler=console", "--nproc-per-node=2", "--role=trainer", str(worker))
        told[module] = []
        for line in finished.stderr.splitlines():
            if "torchelastic.worker.status" in line:
                event = json.loads(line)
                facts = event["metadata"] | json.loads(event["metadata"]["metadata"])
                told[module].append((event["source"], *(str(facts.get(name)) for name in names)))
    # torchrun has two more, of its rendezvous.
    theirs = [event for event in told["torch.distributed.run"] if event[1] in ("START", "SUCCEEDED")]
    assert sorted(told["hyperpodrun"]) == sorted(theirs)
    assert told["hyperpodrun"][-1][:2] == ("AGENT", "SUCCEEDED")


def test_log_dir_dev_null_writes_no_file(tmp_path, script):
    finished = launch(
        "hyperpodrun",
        "--log-dir=/dev/null",
        "--tee=3",
        str(script("import os; print(repr(os.environ['TORCHELASTIC_ERROR_FILE']))")),
    )
    assert (finished.returncode, finished.stdout) == (0, "''\n"), finished.stderr


def test_omp_num_threads_is_1_for_several_workers_with_a_notice_and_left_alone_otherwise(run, script, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    worker = script("import os; os.write(1, (os.environ.get('OMP_NUM_THREADS', 'unset') + '\\n').encode())")
    several = run("--nproc-per-node=2", worker)
    assert several.stdout == "1\n1\n"
    assert several.stderr.count("OMP_NUM_THREADS") == 1
    assert run(worker).stdout == "unset\n"
    given = run("--nproc-per-node=2", worker, OMP_NUM_THREADS="3")
    assert (given.stdout, given.stderr) == ("3\n3\n", "")


def test_main_leaves_the_program_around_it_as_it_was(script):
    """On a thread, as Spark and Ray call it, where no signal can be handled; beside other children of the program."""
    program = f"""
import ctypes, os, signal, subprocess, threading
from hyperpodrun.launcher import ChildFailedError, main

def launch(code):
    try:
        main(["--nproc-per-node=2", {str(script("import sys; sys.exit(int(sys.argv[1]))"))!r}, code])
    except ChildFailedError as error:
        codes.append(error.get_first_failure()[1].exitcode)

codes = []
others = [subprocess.Popen(["sh", "-c", "exit 5"], start_new_session=own_session) for own_session in (True, False)]
signal.signal(signal.SIGCHLD, lambda *_: None)
installed = signal.getsignal(signal.SIGCHLD)
thread = threading.Thread(target=launch, args=("3",))
thread.start()
others.append(subprocess.Popen(["sh", "-c", "exit 5"]))
thread.join()
launch("4")
assert codes == [3, 4], codes
assert [other.wait() for other in others] == [5, 5, 5]
assert signal.getsignal(signal.SIGCHLD) is installed
subreaper = ctypes.c_int()
ctypes.CDLL(None).prctl(37, ctypes.byref(subreaper))
assert subreaper.value == 0
try:
    left = os.waitpid(-1, os.WNOHANG)
    raise AssertionError(left)
except ChildProcessError:
    pass
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("no-signals") == 1


def test_dollars_in_arguments_are_replaced_in_forked_and_in_new_processes(run, script):
    worker = script(
        "import os, sys\nos.write(1, f'{sys.argv[1:]}\\n'.encode())\n"
        "if len(sys.argv) > 9:\n    import torch  # only the source of forks does, as the text may need it\n"
    )
    same = run("--nproc-per-node=2", worker, "a$$b", "$HOME", LOGLEVEL="DEBUG", HYPERPODRUN_STANDBY="1")
    assert same.stdout == "['a$b', '$HOME']\n" * 2
    assert same.stderr.count("hyperpodrun: forked") == 2, same.output
    own = run("--nproc-per-node=2", worker, "${local_rank}", LOGLEVEL="DEBUG", HYPERPODRUN_STANDBY="1")
    assert sorted(own.stdout.splitlines()) == ["['0']", "['1']"]
    assert own.stderr.count("each rank has a command of its own") == 1, own.output
