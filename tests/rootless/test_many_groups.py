"""Hundreds of process groups in one epoch, on one node and on two, with a fault among them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = str(Path(__file__).parent / "workers" / "many_groups.py")
SAID = re.compile(r"^(?:\[.*?\]:)?epoch (\d+): rank (\d+) of 8 is in (\d+) groups$", re.MULTILINE)


def check(output: str, count: int) -> None:
    """All ranks have made their groups in the epoch after the fault, and in no other."""
    found = SAID.findall(output)
    assert sorted((int(epoch), int(rank)) for epoch, rank, _ in found) == [(1, rank) for rank in range(8)], output
    assert sum(int(groups) for *_, groups in found) >= 2 * count, output  # of two ranks at least


@pytest.mark.timeout(150)
def test_a_fault_among_256_groups_of_eight_ranks(run: Callable[..., Any]) -> None:
    finished = run(
        "--standalone", "--nproc-per-node=8", "--inprocess-restart", WORKER, "256", "middle",
        timeout=140, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    check(finished.stdout, 256)
    assert "in the middle of its groups" in finished.stderr


@pytest.mark.timeout(150)
@pytest.mark.parametrize("rootless", ["1", "0"])
def test_a_fault_among_groups_of_two_nodes(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, rootless: str
) -> None:
    monkeypatch.setenv("HPCT_USE_ROOTLESS", rootless)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [
        sys.executable, "-m", "hyperpodrun", "--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--nproc-per-node=4", "--inprocess-restart", WORKER, "48", "middle",
    ]  # fmt: skip
    outputs = [tmp_path / f"node-{node}" for node in range(2)]
    nodes = []
    for path in outputs:
        with path.open("wb") as file:
            nodes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [node.wait(140) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    output = "".join(path.read_text() for path in outputs)
    assert codes == [0, 0], output
    check(output, 48)
