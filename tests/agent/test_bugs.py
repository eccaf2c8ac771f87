"""Errors in the agent and around it: each is told, nothing is left, and a failed job's exit code is not 0."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_an_internal_error_ends_the_job_and_its_processes(tmp_path):
    program = """
import sys
from hyperpodrun.agent.workers.workers import Workers
from hyperpodrun.launcher import entry_point

def broken(self, worker, child):
    raise ZeroDivisionError("a bug")

Workers._on_exit = broken
sys.argv[1:] = ["--nproc-per-node=2", "--no-python", "sh", "-c", "test $RANK = 0 || exec sleep 3600"]
entry_point()
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert finished.returncode == 1
    assert "internal error of hyperpodrun" in finished.stderr
    assert finished.stderr.count("ZeroDivisionError: a bug") == 1


def test_a_program_that_is_gone_when_it_is_to_be_started_again_is_told_in_a_sentence(run, tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nrm "$0"\nexit 1\n')
    program.chmod(0o755)
    finished = run("--max-restarts=1", "--no-python", program)
    assert finished.returncode == 1, finished.output
    assert f"cannot go on: {program}: No such file or directory" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_failed_job_is_one_also_where_the_launcher_was_started_to_ignore_its_children(start):
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then takes dead children away by itself
    try:
        launch = start("--nproc-per-node=2", "--no-python", "sh", "-c", "exit 3")
    finally:
        signal.signal(signal.SIGCHLD, previous)
    finished = launch.wait(30)
    assert finished.returncode == 1, finished.output
    assert "exited with code 3" in finished.stderr
