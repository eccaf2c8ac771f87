"""The snippets of docs/frameworks.md that need torchtitan are run, with faults, and end as without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FRAMES = Path(__file__).parent / "frames"
PAGE = Path(__file__).parents[3] / "docs" / "frameworks.md"
BLOCKS = dict(re.findall(r"<!-- frame: (titan_\w+) -->\n```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
FAULTS = "kill:rank=1,step=1,where=backward;raise:rank=2,step=2,where=before-update"


def test_every_frame_has_its_snippet():
    assert {path.stem for path in FRAMES.glob("*.py")} == BLOCKS.keys()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("frame", BLOCKS)
def test_a_snippet_ends_with_faults_as_without(train, frame: str, tmp_path: Path):
    script = tmp_path / f"{frame}.py"
    script.write_text((FRAMES / script.name).read_text().replace("# <snippet>\n", BLOCKS[frame]))
    expected, ended = (train("--steps=4", faults=faults, script=script) for faults in ("", FAULTS))
    assert len(ended.launch.recoveries) == 2, ended.launch.output
    assert ended.last == expected.last
    assert len(ended.last) == 4
