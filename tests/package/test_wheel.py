"""The package as people get it: built, installed into an environment of its own, launched with a fault.

That environment lies outside the clone and holds what the wheel's metadata asks for, and nothing else: the installed
files of those distributions are linked into it, so that nothing is downloaded and nothing else can be imported.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TRAIN = Path(__file__).parent / "train.py"
NOT_IN_A_CLONE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
OPTIONAL = {
    "accelerate": ("accelerate", "hf"),
    "cryptography": ("cryptography", "encryption"),
    "transformers": ("transformers", "hf"),
    "yaml": ("pyyaml", "hf"),
}
"""What src/ imports where somebody asks for it: the package it is of, and the extra that brings it."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this clone, and the wheel that is built of that sdist, as an index would have them."""
    directory = tmp_path_factory.mktemp("built")
    # A copy: setuptools leaves build/ in the clone, and would put into a wheel what it once has put there.
    shutil.copytree(ROOT, directory / "clone", ignore=NOT_IN_A_CLONE)
    program = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def build(what: str, source: Path) -> Path:
        command = [sys.executable, "-c", program, what, str(directory)]
        finished = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return next(directory.glob("*.tar.gz" if what == "build_sdist" else "*.whl"))

    sdist = build("build_sdist", directory / "clone")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked")  # our own, of a moment ago
    return sdist, build("build_wheel", next((directory / "unpacked").iterdir()))


@pytest.fixture(scope="module")
def about(built: tuple[Path, Path]) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(built[1]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def required(about: Message, extra: str = "") -> list[Requirement]:
    """What pip installs beside it; with an extra only what that adds."""
    found = [Requirement(text) for text in about.get_all("Requires-Dist", [])]
    plain = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return plain if not extra else [r for r in found if r.marker and r.marker.evaluate({"extra": extra})]


def with_their_own(requirements: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The distributions that are installed here for them and for what they need in turn."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in found:
            found[name] = metadata.distribution(requirement.name)
            needed = [Requirement(text) for text in found[name].requires or []]
            extras = ["", *requirement.extras]
            waiting += [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], about: Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, and all that its metadata asks for."""
    home = tmp_path_factory.mktemp("people") / "env"
    venv.create(home, with_pip=True, symlinks=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for distribution in with_their_own(required(about)).values():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = packages / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))
    install = [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index", built[1]]
    finished = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return home


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert packed == {f"hyperpodrun/{path.relative_to(ROOT / 'src')}" for path in here}
    assert {"hyperpodrun/py.typed", "hyperpodrun/standby/hook/sitecustomize.py"} <= packed


def test_the_sdist_has_what_the_wheel_is_built_of_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "src/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples", "docs"))]


def test_what_is_imported_is_what_is_required(about):
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Attribute) and node.attr == "numpy":
                imported.add("numpy")  # torch imports it for Tensor.numpy(), and does not require it
    imported -= {*sys.stdlib_module_names, "hyperpodrun"}
    distributions = metadata.packages_distributions()
    named = {distributions[name][0].lower().replace("_", "-") for name in imported - set(OPTIONAL)}
    assert {requirement.name for requirement in required(about)} == named
    for name, (package, extra) in OPTIONAL.items():
        assert name in imported
        assert package in {requirement.name for requirement in required(about, extra)}


def test_the_metadata_says_what_pip_and_an_index_ask_for(about):
    assert about["Name"] == "hyperpodrun"
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert str(about.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    assert {"kubernetes", "lightning", "hf", "titan", "encryption", "dev"} == set(about.get_all("Provides-Extra", []))


def test_the_installed_package_recovers_from_a_killed_rank(environment, tmp_path):
    shutil.copy(TRAIN, tmp_path)
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    launch = ["--standalone", "--nproc-per-node=2", "--inprocess-restart"]
    ended = {}
    for name, kill in (("undisturbed", []), ("killed", ["5"])):
        (tmp_path / name).mkdir()
        command = [environment / "bin" / "hyperpodrun", *launch, "--log-dir", tmp_path / name / "logs"]
        finished = subprocess.run(
            [*map(str, command), "train.py", name, *kill],
            cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "standby-off" not in finished.stderr
        assert finished.stderr.count("1 recovery") == len(kill), finished.stderr
        lines = [(tmp_path / name / f"rank-{rank}").read_text().split() for rank in (0, 1)]
        ended[name] = [digest for digest, _ in lines]
        for _, file in lines:
            assert Path(file).is_relative_to(environment)
    assert ended["killed"] == ended["undisturbed"]
