"""examples/lightning/train.py: with faults as without, its batches prepared here or by a process that outlives it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "lightning" / "train.py"
FAULTS = "kill:rank=1,step=12,where=backward;raise:rank=0,step=25,where=before-update"


def run(directory: Path, *arguments: str) -> str:
    """What it said."""
    directory.mkdir()
    command = [sys.executable, "-m", "hyperpodrun", "--log-dir", str(directory / "log"), "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, "--inprocess-restart", str(EXAMPLE), *arguments, "--directory", str(directory / "run")],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cached", [False, True], ids=["loaded here", "cached"])
def test_the_example_ends_with_faults_as_without(cached: bool, tmp_path: Path):
    digests = []
    for name, faults in (("without", []), ("with", ["--inject", FAULTS])):
        cache = ["--mmap-cache", str(tmp_path / f"cache-{name}")] if cached else []
        said = run(tmp_path / name, *faults, *cache)
        assert said.count("hyperpodrun: recovery ") == (2 if faults else 0), said
        digests += re.findall(r"^digest (\w+)$", said, re.MULTILINE)
    assert len(digests) == 2
    assert digests[0] == digests[1]


@pytest.mark.timeout(600)
def test_verify_finds_nothing(tmp_path: Path):
    command = [sys.executable, "-m", "hyperpodrun", "verify", "--faults", "3", "--nproc-per-node=2", str(EXAMPLE)]
    ended = subprocess.run([*command, "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 runs with a fault were equal" in ended.stdout
