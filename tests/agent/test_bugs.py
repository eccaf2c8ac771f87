"""An error in the agent itself ends the job: it is told, nothing is left, and the exit code is not 0."""

from __future__ import annotations

import subprocess
import sys


def test_an_internal_error_ends_the_job_and_its_processes(tmp_path):
    program = """
import sys
from hyperpodrun.agent.workers import Workers
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
