"""Every run has its own copy of the working directory."""

from __future__ import annotations

import os

import pytest
from hyperpodrun.launcher import UsageError
from hyperpodrun.verify import workspace


@pytest.fixture
def source(tmp_path):
    source = tmp_path / "source"
    for directory in ("package", "data", ".venv", "__pycache__"):
        (source / directory).mkdir(parents=True)
        (source / directory / "file").write_text(directory)
    (source / "train.py").write_text("pass")
    (source / ".env").write_text("A=1")
    (tmp_path / "outside").write_text("outside")
    (source / "out").symlink_to("../outside")
    (source / "in").symlink_to("package/file")
    return source


def test_a_copy_has_all_but_the_directories_of_tools_and_what_is_shared(source, tmp_path):
    place = workspace.make(tmp_path / "run", source, (source / "data",))
    assert sorted(os.listdir(place.directory)) == [".env", "data", "in", "out", "package", "train.py"]
    assert os.readlink(place.directory / "data") == str(source / "data")
    (place.directory / "in").write_text("changed")
    assert (source / "package" / "file").read_text() == "package"
    assert (place.directory / "package" / "file").read_text() == "changed"
    assert (place.directory / "out").read_text() == "outside"


def test_home_and_temporary_directory_are_the_runs_own(source, tmp_path):
    environment = workspace.make(tmp_path / "run", source, ()).environment()
    assert environment["HOME"] == str(tmp_path / "run" / "home")
    assert environment["TMPDIR"] == str(tmp_path / "run" / "tmp")
    assert environment["PATH"] == os.environ["PATH"]


def test_what_is_too_large_to_copy_is_refused_unless_it_is_shared(source, monkeypatch):
    monkeypatch.setattr(workspace, "_LARGEST", 1000)
    with (source / "data" / "large").open("wb") as file:
        file.truncate(2000)
    with pytest.raises(UsageError, match="--share"):
        workspace.measure(source, ())
    files, size = workspace.measure(source, (source / "data",))
    assert files == 5
    assert size < 1000
