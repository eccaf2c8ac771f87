"""Real clients train under hyperpodrun: those that need torch alone, and if asked for all, in their own environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("mode", [[], ["--inprocess-restart"]], ids=["plain", "in-process"])
@pytest.mark.parametrize("client", ["checkpoint", pytest.param("multiprocessing", marks=pytest.mark.more)])
def test_client_works(run, client, mode):
    finished = run("--nproc-per-node=2", *mode, HERE / f"{client}_client.py", timeout=110)
    assert finished.returncode == 0, finished.output
    assert "trained: " in finished.stdout


@pytest.mark.clients
@pytest.mark.timeout(1800)
def test_every_client_trains():
    finished = subprocess.run([HERE.parents[1] / "scripts" / "check-clients"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
