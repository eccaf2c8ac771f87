"""The clients that need torch alone; `scripts/check-clients` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("mode", [[], ["--inprocess-restart"]], ids=["plain", "in-process"])
@pytest.mark.parametrize("client", ["checkpoint", "multiprocessing"])
def test_client_works(run, client, mode):
    finished = run("--nproc-per-node=2", *mode, HERE / f"{client}_client.py", timeout=110)
    assert finished.returncode == 0, finished.output
    assert "trained: " in finished.stdout
