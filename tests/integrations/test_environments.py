"""The tests of each framework, in an environment of its own; what every environment can hold is tested in the suite."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FRAMEWORKS = sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in FRAMEWORKS])
def test_the_framework_recovers(name: str):
    made = subprocess.run([ROOT / "scripts" / "environment", name], stdout=subprocess.PIPE, text=True)
    assert made.returncode == 0, f"the environment of {name} could not be made: see above"
    python = made.stdout.split()[-1]
    environ = {**os.environ, "HYPERPODRUN_TEST_ENVIRONMENT": name}
    ended = subprocess.run([python, "-m", "pytest", "-v", str(HERE / name)], env=environ, cwd=ROOT)
    assert ended.returncode == 0, f"tests of {name} failed: see above"
