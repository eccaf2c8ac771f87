"""Every command that the documentation shows is run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS_THIS = {"./scripts/test"}


def commands() -> list[str]:
    found: list[str] = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found += [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [command for command in found if command not in RUNS_THIS]


def injecting() -> list[str]:
    """The README's example with faults; it has a test of its own."""
    return next(shlex.split(command) for command in commands() if "--inject" in command)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_readme_shows_the_two_commands_there_are():
    text = (ROOT / "README.md").read_text()
    assert "./scripts/test" in text
    assert sum(command.startswith("./hyperpodrun") for command in commands()) >= 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "command", [c for c in commands() if shlex.split(c) != injecting()], ids=lambda command: command[:60]
)
def test_a_command_of_the_documentation_works(command):
    finished = run(shlex.split(command))
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"


@pytest.mark.timeout(400)
def test_the_readmes_faults_do_not_change_the_digest():
    command = injecting()
    with ThreadPoolExecutor() as at_once:  # most of either is waiting for imports
        disturbed, undisturbed = at_once.map(run, (command, command[: command.index("--inject")]))
    assert disturbed.returncode == undisturbed.returncode == 0, disturbed.stderr + undisturbed.stderr
    assert "2 recoveries:" in disturbed.stderr, disturbed.stderr
    digests = [line for text in (disturbed, undisturbed) for line in text.stdout.splitlines() if "digest" in line]
    assert len(digests) == 2, disturbed.stdout
    assert digests[0] == digests[1]


@pytest.mark.timeout(400)
def test_the_code_is_linted_and_typed():
    finished = run([str(ROOT / "scripts" / "lint")])
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_scripts_are_executable():
    for script in ["hyperpodrun", ".ci/run", *(f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir())]:
        assert os.access(ROOT / script, os.X_OK), script
