"""What can be said of Lightning's part without Lightning; the rest is in lightning/, in its environment."""

from __future__ import annotations

import importlib.util
import sys
import warnings

import pytest
from hyperpodrun import UnsupportedStateError
from hyperpodrun.integrations.lightning import CheckpointlessStrategy, recoverable
from hyperpodrun.integrations.lightning.files import Files
from hyperpodrun.integrations.lightning.loggers import _keep_rows
from hyperpodrun.integrations.lightning.plain import plain, relocated


def test_without_lightning_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hyperpodrun.integrations.lightning.strategies", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"^Lightning is not installed: pip install 'hyperpodrun\[lightning\]'$"
    ):
        from hyperpodrun.integrations.lightning import CheckpointlessDDPStrategy  # noqa: F401


def test_importing_it_imports_no_lightning():
    if importlib.util.find_spec("lightning") is None:
        assert not {"lightning", "pytorch_lightning"} & sys.modules.keys()


def test_a_strategy_outside_of_a_recoverable_function_is_refused():
    with pytest.raises(UnsupportedStateError, match="put @recoverable before the function"):
        CheckpointlessStrategy()

    @recoverable
    def inside(x: int) -> int:
        CheckpointlessStrategy()
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process it is said that nobody has started this one
        assert inside(1) == 2


def test_what_cannot_be_carried_is_refused_by_name():
    with pytest.raises(UnsupportedStateError, match=r"callback Mine: .*; let its state_dict\(\) give plain values"):
        plain({"a": [object()]}, "callback Mine")


def test_paths_move_with_the_directory(tmp_path):
    state = {"/old/a.ckpt": 1.5, "best": "/old/b.ckpt", "all": ["/old/c.ckpt", 3], "path": tmp_path}
    moved = relocated(relocated(state, "/old", "<dir>"), "<dir>", "/new")
    assert moved == {"/new/a.ckpt": 1.5, "best": "/new/b.ckpt", "all": ["/new/c.ckpt", 3], "path": str(tmp_path)}


def test_a_file_that_only_an_interrupted_attempt_has_written_is_left_over(tmp_path):
    known, unknown, old = (tmp_path / name for name in ("known.ckpt", "unknown.ckpt", "old.ckpt"))
    for path in (known, unknown, old):
        path.touch()
    files = Files()
    files.saved(known)
    assert [files.is_left_over(path) for path in (known, unknown, tmp_path / "none.ckpt")] == [False, True, False]
    files.began = old.stat().st_mtime + 10
    assert not files.is_left_over(old)
    again = Files()
    again.write(files.read())
    assert not again.is_left_over(known)


def test_rows_of_an_interrupted_attempt_and_its_columns_go(tmp_path):
    aside, target = tmp_path / "aside", tmp_path / "metrics.csv"
    aside.write_text("extra,loss,step\r\n,1.0,0\r\n,2.0,1\r\n5,3.0,2\r\n")
    _keep_rows(aside, target, ["loss", "step"], 2)
    assert target.read_bytes() == b"loss,step\r\n1.0,0\r\n2.0,1\r\n"
