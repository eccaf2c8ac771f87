"""What docs/frameworks.md and the examples show of Hugging Face's packages, run with faults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SNIPPET = re.compile(r"<!-- frame: hf/(\w+) -->\n```python\n(.*?)```", re.DOTALL)
SHOWN = dict(SNIPPET.findall((ROOT / "docs" / "frameworks.md").read_text()))
pytestmark = pytest.mark.timeout(900)


def test_every_frame_is_used():
    assert SHOWN.keys() == {path.stem for path in (HERE / "frames").glob("*.py")}


@pytest.mark.parametrize("frame", SHOWN)
def test_a_snippet_ends_with_faults_as_without(train, tmp_path, frame):
    shutil.copy(HERE / "workers" / "common.py", tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text((HERE / "frames" / f"{frame}.py").read_text().replace("# <snippet>\n", SHOWN[frame]))
    faults = "raise:rank=1,step=3,where=backward;kill:rank=2,step=6,where=forward"
    disturbed = train(script, faults=faults)
    assert len(disturbed.launch.recoveries) == 2, disturbed.launch.output
    assert disturbed.ranks == train(script).ranks


@pytest.mark.parametrize(("name", "form"), [("hf", "jsonl.gz"), ("accelerate", "arrow")])
def test_the_example_is_verified(name, form, tmp_path):
    """`hyperpodrun verify` says N of N."""
    script = ROOT / "examples" / name / "train.py"
    assert len(script.read_text().splitlines()) < 120
    verify = [sys.executable, "-m", "hyperpodrun", "verify", "--faults", "3", "--nproc-per-node=2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*verify, str(script), "--format", form], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 runs with a fault were equal" in ended.stdout, ended.stdout
