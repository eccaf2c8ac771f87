"""Launches that several files look at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture
def both_succeed() -> Callable[[Sequence[str], Path], list[str]]:
    """both_succeed(options, worker): what two agents of one job have written to stderr; both end with 0."""

    def launch(options: Sequence[str], worker: Path) -> list[str]:
        nodes = [
            subprocess.Popen([sys.executable, "-m", "hyperpodrun", *options, worker], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            errors = [node.communicate(timeout=90)[1] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        assert [node.returncode for node in nodes] == [0, 0], errors
        return errors

    return launch
