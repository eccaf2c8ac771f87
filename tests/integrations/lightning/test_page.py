"""The snippets of docs/frameworks.md that need Lightning are run, with faults, and end as without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from outcomes import Outcome, difference, launch, read

FRAMES = Path(__file__).parent / "frames"
PAGE = Path(__file__).parents[3] / "docs" / "frameworks.md"
BLOCKS = dict(re.findall(r"<!-- frame: (lightning_\w+) -->\n```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
FAULTS = "kill:rank=1,step=3,where=backward;raise:rank=2,step=7,where=before-update"


def test_every_frame_has_its_snippet():
    assert {path.stem for path in FRAMES.glob("*.py")} == BLOCKS.keys()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("frame", BLOCKS)
def test_a_snippet_ends_with_faults_as_without(frame: str, tmp_path: Path):
    script = tmp_path / f"{frame}.py"
    script.write_text((FRAMES / script.name).read_text().replace("# <snippet>\n", BLOCKS[frame]))
    outcomes: list[Outcome] = []
    for name, faults in (("without", ""), ("with", FAULTS)):
        environment = {"HYPERPODRUN_INJECT": faults} if faults else {}
        code, said = launch(tmp_path / name, script, **environment)
        assert code == 0, said
        assert said.count("hyperpodrun: recovery ") == (2 if faults else 0), said
        outcomes.append(read(tmp_path / name))
    assert not difference(*outcomes)
