"""docs/torchrun.md names every option there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from hyperpodrun.launcher import command

PAGE = (Path(__file__).parents[2] / "docs/torchrun.md").read_text()
ROWS = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|")]
TORCHRUNS = [action.option_strings for action in torchrun.get_args_parser()._actions if action.option_strings]


@pytest.mark.parametrize("names", TORCHRUNS, ids=lambda names: max(names, key=len))
def test_every_option_of_the_installed_torchrun_has_a_row(names):
    wanted = {name.replace("_", "-").replace("----", "--") for name in names}
    assert any(all(f"`{name}`" in row for name in wanted) for row in ROWS), f"no row of docs/torchrun.md is for {names}"


@pytest.mark.parametrize("names", TORCHRUNS, ids=lambda names: max(names, key=len))
def test_every_option_of_the_installed_torchrun_is_declared(names):
    ours = {name for parameter in command.launcher.params for name in parameter.opts} | {"-h", "--help"}
    assert {name for name in names if "_" not in name} <= ours


def test_every_option_of_ours_is_on_the_page():
    missing = [
        p.opts for p in command.launcher.params if p.opts[0].startswith("-") and max(p.opts, key=len) not in PAGE
    ]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [names for names in missing if max(names, key=len) not in readme] == []
