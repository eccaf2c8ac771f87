"""The agents of a pair are killed and started again, as a pod is: the other alone is no majority, and both are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = """
import os, pathlib, time
pathlib.Path(f"up.{os.environ['JOB_RESTART_COUNT']}.{os.environ['RANK']}").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("restarted", [0, 1], ids=["the leader", "the follower"])
def test_a_pair_trains_again_when_one_agent_is_started_again(
    tmp_path: Path,
    free_port: Callable[[], int],
    script: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    restarted: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    options = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=1", "--start-method=spawn"]
    worker = script(WORKER)
    environment = os.environ | {"HPCT_PORT_BASE": str(port)}

    def start(node: int) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"node.{node}", "ab") as log:
            command = [sys.executable, "-m", "hyperpodrun", *options, worker]
            return subprocess.Popen(command, stderr=log, env=environment)

    def logs() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("node.*")))

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, logs()
            time.sleep(0.01)

    nodes = [start(0)]
    try:
        wait_for(lambda: _listens(port))
        nodes.append(start(1))
        wait_for(lambda: len(list(tmp_path.glob("up.0.*"))) == 2)
        nodes[restarted].kill()
        nodes[restarted].wait()
        nodes[restarted] = start(restarted)
        wait_for(lambda: len(list(tmp_path.glob("up.1.*"))) == 2)
        (tmp_path / "go").touch()
        assert [node.wait(60) for node in nodes] == [0, 0], logs()
    finally:
        for node in nodes:
            node.kill()
    assert "began-again" in logs()


def _listens(port: int) -> bool:
    import socket

    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
