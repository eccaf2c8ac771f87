"""Where the launch's own files go when TMPDIR is wrong, and that a start that fails leaves none of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hyperpodrun.agent import directories
from hyperpodrun.agent.config import LaunchConfig
from hyperpodrun.agent.node import directories as node_directories
from hyperpodrun.agent.node import local
from hyperpodrun.agent.output.console import Console


@pytest.fixture
def wrong(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place where no temporary file can be written."""
    match request.param:
        case "missing":
            return tmp_path / "missing"
        case "a file":
            (tmp_path / "file").touch()
            return tmp_path / "file"
        case "read-only":  # also for root
            return Path("/proc")
    raise AssertionError


@pytest.mark.parametrize("wrong", ["missing", "a file", "read-only"], indirect=True)
def test_a_wrong_tmpdir_falls_back_as_tempfile_does(monkeypatch: pytest.MonkeyPatch, wrong: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(wrong))
    monkeypatch.delenv("TEMP", raising=False)
    monkeypatch.delenv("TMP", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert directories.temporary() == Path(tempfile.gettempdir())
    assert directories.temporary_for_sockets() == Path("/tmp")
    with tempfile.TemporaryDirectory(dir="/tmp") as other:
        monkeypatch.setenv("TEMP", other)
        assert directories.temporary() == directories.temporary_for_sockets() == Path(other)


@pytest.mark.parametrize("name", ["\N{SNOWMAN}" * 30, "\udcff", "x" * 80], ids=["many bytes", "no text", "long"])
def test_sockets_go_where_their_paths_have_room(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        place = Path(parent) / name
        place.mkdir()
        monkeypatch.setenv("TMPDIR", str(place))
        monkeypatch.delenv("TEMP", raising=False)
        monkeypatch.delenv("TMP", raising=False)
        assert directories.temporary() == place
        assert directories.temporary_for_sockets() == Path("/tmp")
        assert not list(place.iterdir())


def test_nowhere_to_write_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "_places", lambda: [Path("/proc"), Path("/missing")])
    with pytest.raises(OSError, match=r"can be written nowhere: /proc, /missing \(TMPDIR\)"):
        directories.temporary()


@pytest.mark.parametrize("failing", ["DataHost", "Workers", "with_script_in"])
def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more")

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(node_directories, "in_memory", lambda: Path(name))
        monkeypatch.setattr(local, failing, fail)
        console = Console()
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="no more"):
            local.LocalNode(LaunchConfig(("x",), inprocess_restart=True), console, lambda event: None)
        assert os.listdir(name) == []
        if failing != "Workers":  # the data host's socket is closed with its object
            assert set(os.listdir("/proc/self/fd")) == before


def test_a_launch_with_a_wrong_tmpdir_runs_and_one_that_cannot_start_leaves_nothing(run, script, tmp_path) -> None:
    finished = run(script("print('ran')"), TMPDIR=str(tmp_path / "missing"))
    assert (finished.returncode, finished.stdout) == (0, "ran\n"), finished.output
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        finished = run("--log-dir=", script(""), TMPDIR=name, PYTHON_EXEC="/no/python")
        assert finished.returncode == 1, finished.output
        assert "cannot start the workers" in finished.stderr
        assert os.listdir(name) == []
