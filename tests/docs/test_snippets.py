"""Every Python snippet of the documentation is run, with faults, and ends bit for bit as without.

    <!-- frame: NAME -->      in front of a ```python block: frames/NAME.py makes a training of it

A frame is an ordinary script with a line `# <snippet>`; the snippet's text is put there as the page has it, indented as
that line is. Blocks of one page with the same frame fill its lines in their order. The frame brings what the snippet
leaves open, says with `faulty` which model meets the faults, and ends with `finish`; see snippet_harness.py. Where two
ranks, or the two faults, are not what it is about, a line `# ranks: 4` or `# faults: kill` of the frame says so.
Frames whose names begin with a framework's, `lightning_ddp`, are run in its environment (tests/integrations/lightning).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FRAMES = HERE / "frames"
HARNESS = HERE / "snippet_harness.py"
ELSEWHERE = tuple(f"{path.parent.name}_" for path in (ROOT / "tests" / "integrations").glob("*/requirements.txt"))
DEFAULTS = {"ranks": "2", "faults": "raise,kill"}
SCOPES = {"raise": "in-process", "kill": "respawn"}
MARK = re.compile(r"^( *)# <snippet>\n", re.MULTILINE)
SETTING = re.compile(r"^# (ranks|faults): (\S+)$", re.MULTILINE)
FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*).*$")
FRAME = re.compile(r"^ *<!-- frame: (\w+) -->$")


@dataclass(frozen=True)
class Snippet:
    """One Python block of a page."""

    page: Path
    line: int
    frame: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> Iterator[Path]:
    """The repository's own markdown."""
    for directory, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("build", "out"))
        yield from (Path(directory) / name for name in sorted(files) if name.endswith(".md"))


def snippets(page: Path) -> list[Snippet]:
    """Its blocks of Python, under whatever name the language goes."""
    found, before = [], ""
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        fence = FENCE.match(line)
        if fence:
            block = []
            for _, inside in lines:
                if inside.strip() == fence["fence"]:
                    break
                block.append(inside)
            if fence["language"].lower().startswith(("py", "ipython")):
                frame = FRAME.match(before)
                text = textwrap.dedent("\n".join(block)) + "\n"
                found.append(Snippet(page, number, frame[1] if frame else None, text))
        if line.strip():
            before = line
    return found


def trainings() -> dict[tuple[Path, str], list[Snippet]]:
    """The snippets of one page that share a frame are one training."""
    found: dict[tuple[Path, str], list[Snippet]] = defaultdict(list)
    for page in pages():
        for snippet in snippets(page):
            if snippet.frame is not None and not snippet.frame.startswith(ELSEWHERE):
                found[page, snippet.frame].append(snippet)
    return found


def completed(frame: str, parts: list[Snippet]) -> str:
    """The frame with the snippets in it. Raises ValueError if it has more or fewer places than there are snippets."""
    text = (FRAMES / f"{frame}.py").read_text()
    if len(MARK.findall(text)) != len(parts):
        shown = ", ".join(map(str, parts))
        raise ValueError(f"frames/{frame}.py has {len(MARK.findall(text))} lines `# <snippet>` for {shown}")
    left = iter(parts)
    return MARK.sub(lambda mark: textwrap.indent(next(left).text, mark[1]), text)


def test_every_snippet_of_the_documentation_has_a_frame():
    bare = [str(snippet) for page in pages() for snippet in snippets(page) if snippet.frame is None]
    assert not bare, "no test runs these: name a frame in the line before (see the beginning of this file)"


def test_every_frame_takes_the_snippets_that_name_it():
    for (_, frame), parts in trainings().items():
        compile(completed(frame, parts), f"frames/{frame}.py", "exec")
    unused = {path.stem for path in FRAMES.glob("*.py")} - {frame for _, frame in trainings()}
    assert not unused, "no page has a snippet for these frames"


def test_snippets_are_found_however_they_are_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na\n```\n<!-- frame: one -->\n\n~~~py\nb\n~~~\n"
        "- in a list\n\n  <!-- frame: two -->\n  ````Python title=x\n  if c:\n\n      ```\n  ````\n"
        "```sh\n<!-- frame: no -->\n```\n"
    )
    found = [(snippet.line, snippet.frame, snippet.text) for snippet in snippets(page)]
    assert found == [(1, None, "a\n"), (6, "one", "b\n"), (12, "two", "if c:\n\n    ```\n")]


@pytest.mark.parametrize(
    ("frame", "parts"),
    [pytest.param(frame, parts, id=f"{page.name}-{frame}") for (page, frame), parts in trainings().items()],
)
def test_a_snippet_ends_with_faults_as_without(frame, parts, start, tmp_path):
    shutil.copy(HARNESS, tmp_path)
    script = tmp_path / f"{frame}.py"
    script.write_text(completed(frame, parts))
    settings = {**DEFAULTS, **dict(SETTING.findall(script.read_text()))}
    shown = ", ".join(map(str, parts))
    launches = {}
    for faults in ("", settings["faults"]):  # at the same time: most of either is waiting for imports
        ends = tmp_path / f"ends-{faults}"
        ends.mkdir()
        launch = ["--standalone", f"--nproc-per-node={settings['ranks']}", "--inprocess-restart", script]
        launches[faults] = start(*launch, DOC_FAULTS=faults, DOC_OUT=str(ends)), ends
    states = []
    for faults, (launch, ends) in launches.items():
        finished = launch.wait()
        assert finished.returncode == 0, f"{shown}\n{finished.output}"
        expected = [SCOPES[kind] for kind in faults.split(",") if kind]
        assert [row["scope"] for row in finished.recoveries] == expected, f"{shown}\n{finished.output}"
        ranks = [json.loads((ends / f"rank-{rank}.json").read_text()) for rank in range(int(settings["ranks"]))]
        states.append({(rank, name): state[name] for rank, state in enumerate(ranks) for name in state})
    undisturbed, disturbed = states
    other = [key for key in undisturbed.keys() | disturbed.keys() if undisturbed.get(key) != disturbed.get(key)]
    assert not other, f"{shown}: these (of rank, name) do not end as without faults"
