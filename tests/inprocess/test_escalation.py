"""When survivors cannot simply go on: lost and stuck processes, unfit ones, budgets, and faults without end."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """
import ctypes, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from hyperpodrun import HPWrapper, HPCallWrapper, HealthCheck, HealthCheckError

RANK, FIRST = int(os.environ["RANK"]), os.environ["JOB_RESTART_COUNT"] == "0"

def say(text):
    os.write(1, f"{text} rank={RANK}\\n".encode())

def work(caller):
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(10))
    caller.step_completed()
    say(f"worked epoch={caller.epoch}")
"""


@pytest.fixture
def job(run, script):
    def launch(body: str, *options: str, timeout: float = 60.0):
        return run("--nproc-per-node=2", "--inprocess-restart", *options, script(HEAD + body), timeout=timeout)

    return launch


def test_a_rank_killed_while_the_other_waits_in_init_is_replaced(job):
    finished = job("""
@HPWrapper()
def main(caller: HPCallWrapper):
    if caller.epoch == 0 and RANK == 0:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    work(caller)
main()
""")
    assert finished.returncode == 0, finished.output
    (row,) = finished.recoveries
    assert (row["rank"], row["respawned"]) == (0, [0])


def test_both_ranks_killed_at_once_are_replaced(job):
    finished = job("""
@HPWrapper()
def main(caller: HPCallWrapper):
    if caller.epoch == 0:
        with caller.atomic():  # or the news of the other's death would come first
            Path(__file__).with_name(f"here.{caller.rank}").touch()
            while not Path(__file__).with_name(f"here.{1 - caller.rank}").exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
    work(caller)
main()
""")
    assert finished.returncode == 0, finished.output
    assert {rank for row in finished.recoveries for rank in row["respawned"]} == {0, 1}


def test_a_new_process_that_dies_while_it_starts_is_replaced_again(job):
    finished = job(
        """
if not FIRST and not Path("died").exists():
    Path("died").touch()
    os._exit(1)
@HPWrapper()
def main(caller: HPCallWrapper):
    if FIRST and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    work(caller)
main()
""".replace('"died"', 'sys.argv[0] + ".died"')
    )
    assert finished.returncode == 0, finished.output
    assert "worked epoch=2" in finished.stdout


def test_a_process_stuck_with_the_gil_is_killed_after_the_inprocess_timeout(job):
    finished = job(
        """
@HPWrapper()
def main(caller: HPCallWrapper):
    if caller.epoch == 0:
        if RANK == 0:
            time.sleep(0.2)
            raise RuntimeError("boom")
        ctypes.PyDLL(None).usleep.argtypes = [ctypes.c_uint]
        while True:
            ctypes.PyDLL(None).poll(None, 0, 3600_000)
    work(caller)
main()
""",
        "--inprocess-timeout=10",
    )
    assert finished.returncode == 0, finished.output
    assert "kill rank=1" in finished.stderr
    assert finished.recoveries[0]["respawned"] == [1]


def test_a_process_that_is_stopped_is_killed_after_its_abort_timeout(job):
    finished = job("""
@HPWrapper(abort_timeout=2)
def main(caller: HPCallWrapper):
    if caller.epoch == 0:
        if RANK == 0:
            time.sleep(0.2)
            raise RuntimeError("boom")
        os.kill(os.getpid(), signal.SIGSTOP)
    work(caller)
main()
""")
    assert finished.returncode == 0, finished.output
    assert finished.recoveries[0]["respawned"] == [1]


@pytest.mark.parametrize("argument", ["health_check=Unfit()", "finalize=fails"])
def test_an_unfit_process_is_replaced(job, argument):
    finished = job(f"""
class Unfit(HealthCheck):
    def __call__(self, caller):
        if RANK == 1:
            raise HealthCheckError("unfit on purpose")

def fails(caller):
    if RANK == 1:
        raise ValueError("unfit on purpose")

@HPWrapper({argument})
def main(caller: HPCallWrapper):
    if caller.epoch == 0:
        raise RuntimeError("boom")
    work(caller)
main()
""")
    assert finished.returncode == 0, finished.output
    assert finished.recoveries[0]["respawned"] == [1]
    assert finished.stderr.count("Traceback (most recent call last)") == 1


def test_a_fault_without_progress_ends_the_job_with_the_first_traceback(job):
    finished = job("""
@HPWrapper()
def main(caller: HPCallWrapper):
    if RANK == 1:
        raise KeyError(f"attempt {caller.epoch}")
    time.sleep(3600)
main()
""")
    assert finished.returncode == 93, finished.output
    assert finished.stderr.count("Traceback") == 1
    first_frame = finished.stderr.partition("Traceback (most recent call last):\n")[2].partition("\n")[0]
    assert "worker.py" in first_frame, finished.stderr
    assert "KeyError: 'attempt 0'" in finished.stderr
    assert len(finished.recoveries) == 2


def test_faults_with_progress_go_on_for_ever(job):
    finished = job("""
@HPWrapper()
def main(caller: HPCallWrapper):
    work(caller)
    if caller.epoch < 8:
        dist.barrier()
        raise RuntimeError("boom")
main()
""")
    assert finished.returncode == 0, finished.output
    assert len(finished.recoveries) == 8


PROGRESS_THEN_BOOM = """
@HPWrapper()
def main(caller: HPCallWrapper):
    work(caller)
    if caller.epoch < 3:
        dist.barrier()
        raise RuntimeError("boom")
main()
"""


def test_max_inprocess_restarts_ends_the_job_or_restarts_its_processes(job):
    finished = job(PROGRESS_THEN_BOOM, "--max-inprocess-restarts=1")
    assert finished.returncode == 1, finished.output
    assert finished.stderr.count("Traceback") == 1
    finished = job(PROGRESS_THEN_BOOM, "--max-inprocess-restarts=2", "--max-restarts=1")
    assert finished.returncode == 0, finished.output
    assert [row["scope"] for row in finished.recoveries] == ["in-process", "in-process", "process"]


def test_a_death_after_a_wrapped_function_has_finished_needs_new_processes(job):
    body = """
@HPWrapper()
def first(caller: HPCallWrapper):
    work(caller)
    dist.destroy_process_group()

@HPWrapper()
def second(caller: HPCallWrapper):
    if FIRST and RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    work(caller)

first()
second()
"""
    finished = job(body)
    assert finished.returncode == 1, finished.output
    assert "after 1 wrapped function(s) had finished" in finished.stderr
    finished = job(body, "--max-restarts=1")
    assert finished.returncode == 0, finished.output
    assert finished.recoveries[-1]["scope"] == "process"


def test_sys_exit_with_a_code_ends_the_process_and_it_is_replaced(job):
    finished = job("""
@HPWrapper()
def main(caller: HPCallWrapper):
    if caller.epoch == 0 and RANK == 0:
        sys.exit(3)
    work(caller)
main()
""")
    assert finished.returncode == 0, finished.output
    (row,) = finished.recoveries
    assert (row["cause"], row["respawned"]) == ("exited with code 3", [0])


def test_without_the_launcher_the_function_runs_once_with_one_warning(script):
    path = script("""
from typing import Optional
from hyperpodrun import HPWrapper, HPCallWrapper

@HPWrapper()
def main(value, caller: Optional[HPCallWrapper] = None):
    with caller.atomic(), caller.restoring():
        print("value", value, caller.epoch, caller.plan, caller.inprocess)
    return value

assert main(1) == 1
assert main(2) == 2
""")
    finished = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=30)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "value 1 0 None False\nvalue 2 0 None False\n"
    assert finished.stderr.count("HPWrapper: not started by") == 1


def test_without_the_flag_a_fault_is_what_it_is_under_torchrun(run, script):
    body = """
@HPWrapper()
def main(caller: HPCallWrapper):
    raise ValueError("boom")
main()
"""
    finished = run("--nproc-per-node=1", script(HEAD + body))
    assert finished.returncode == 1
    assert finished.stderr.count("ValueError: boom") == 1
