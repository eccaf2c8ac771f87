"""Lightning's trainer with MMAPDataModule: the example, with and without a rank that is lost, ends with one digest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lightning" / "train.py"


def digest(directory: Path, *arguments: str) -> str:
    """Of a launch of its own: this one is only where it happens."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HYPERPODRUN", "RANK"))}
    options = [f"--directory={directory}", f"--cache-dir={directory}-cache", *arguments]
    ended = subprocess.run(
        [sys.executable, "-m", "hyperpodrun", "--nproc-per-node=2", "--max-restarts=1", str(EXAMPLE), *options],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return re.findall(r"^digest (\w+)$", ended.stdout, re.MULTILINE)[0]


if os.environ["RANK"] == "0":
    with tempfile.TemporaryDirectory() as directory:
        whole = digest(Path(directory) / "whole")
        assert digest(Path(directory) / "killed", "--kill=rank=1,step=12") == whole
        assert digest(Path(directory) / "direct", "--no-cache") != ""
    print(f"trained: digest {whole}, with and without a lost rank", flush=True)
