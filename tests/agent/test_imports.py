"""Whether a script imports torch is found by reading it: in itself, in its own modules, in what they import."""

from __future__ import annotations

import sys

import pytest
from hyperpodrun.agent.workers import imports
from hyperpodrun.agent.workers.imports import Imports, PythonCommand, scan


@pytest.fixture
def files(tmp_path, monkeypatch):
    """files({name: text}): written; the directory is the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(texts: dict[str, str]) -> None:
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch", Imports.TORCH),
        ("if True:\n    import os, torch.nn as nn, sys", Imports.TORCH),
        ("from torch import nn", Imports.TORCH),
        ("from torch.nn.parallel import DistributedDataParallel as DDP", Imports.ALL),
        ("import torch\noptimizer = torch.optim.SGD([])", Imports.ALL),
        ("from transformers import Trainer", Imports.ALL),
        ("import torch\nmodel = torch.compile(model)\nfrom torch.optim import SGD", Imports.COMPILER),
        ("from hyperpodrun import HPWrapper", Imports.TORCH),
        ("import json, os\nfrom pathlib import Path", Imports.NOTHING),
        ("# import torch\ntext = 'import torch'", Imports.NOTHING),
        ("import torchlight", Imports.NOTHING),
        ("import no_such_module", Imports.NOTHING),
        ("this is = no Python\nimport torch", Imports.TORCH),
        ("", Imports.NOTHING),
    ],
)
def test_in_the_script_itself(files, text, found):
    files({"train.py": text})
    assert scan(PythonCommand("train.py", module=False)) is found


@pytest.mark.parametrize(
    "texts",
    [
        {"train.py": "import helper", "helper.py": "import torch"},
        {"train.py": "from pack.sub import f", "pack/__init__.py": "", "pack/sub.py": "import torch"},
        {"train.py": "from pack import sub", "pack/__init__.py": "", "pack/sub.py": "import torch"},
        {"train.py": "import pack", "pack/__init__.py": "from . import sub", "pack/sub.py": "import torch"},
        {"train.py": "import pack.a.b", "pack/a/b.py": "from ..c import x", "pack/c.py": "import torch"},
        {"train.py": "import deep.er.names", "deep/er/names.py": "import torch"},
        {"train.py": "import first", "first.py": "import second", "second.py": "import first, torch"},
    ],
)
def test_in_the_modules_beside_it(files, texts):
    files(texts)
    assert scan(PythonCommand("train.py", module=False)) is Imports.TORCH


def test_modules_packages_and_directories(files):
    files({"pack/__init__.py": "", "pack/__main__.py": "import torch", "pack/tool.py": "import torch"})
    for target, module in (("pack", True), ("pack.tool", True), ("pack", False), ("pack/tool.py", False)):
        assert scan(PythonCommand(target, module=module)) is Imports.TORCH


def test_own_modules_come_before_installed_packages_whose_budget_is_small(files, monkeypatch):
    monkeypatch.setattr(imports, "_INSTALLED_BUDGET_S", 0.0)
    monkeypatch.setattr(imports, "_OWN_BUDGET_S", 60.0)
    files({"train.py": "import hypothesis\nimport helper", "helper.py": "import deeper", "deeper.py": "import torch"})
    assert scan(PythonCommand("train.py", module=False)) is Imports.TORCH
    files({"deeper.py": ""})
    assert scan(PythonCommand("train.py", module=False)) is Imports.UNKNOWN


def test_what_is_another_interpreter_or_has_other_flags_is_left_alone():
    assert PythonCommand.parse((sys.executable, "-u", "x.py", "-m")) == PythonCommand("x.py", module=False)
    assert PythonCommand.parse((sys.executable, "-u", "-m", "x")) == PythonCommand("x", module=True)
    for other in (("x.py",), ("-u",), ("-u", "-m")):
        assert PythonCommand.parse((sys.executable, *other)) is None
    assert PythonCommand.parse(("/bin/sh", "-u", "x.py")) is None
