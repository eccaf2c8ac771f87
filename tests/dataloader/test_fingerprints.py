"""A stream is of what the objects in its factory hold: other data under an old name is never given out."""

from __future__ import annotations

import collections
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hyperpodrun.dataloader.reading.fingerprints import of_contents, of_recipe
from torch.utils.data import DataLoader


class Fold:
    """Which part of the data is read."""

    def __init__(self, first: int, rank: int = 0) -> None:
        self.first, self.rank = first, rank


def part_of(fold: Fold) -> Any:
    return DataLoader(range(fold.first, fold.first + 40), batch_size=4)


def first_of(loader: Any) -> int:
    return int(next(iter(loader))[0])


def test_another_object_under_the_same_name_gives_its_own_data(load):
    assert first_of(load(functools.partial(part_of, Fold(100)))) == 100
    assert first_of(load(functools.partial(part_of, Fold(200)))) == 200
    assert first_of(load(functools.partial(part_of, Fold(100)))) == 100


def test_what_was_made_of_other_data_is_not_used_by_another_process(load):
    loader = load(functools.partial(part_of, Fold(100)))
    assert first_of(loader) == 100
    loader.close()  # nobody reads
    assert in_another_process(load, Fold(200)) == 200


def test_readers_that_share_a_stream_may_hold_something_of_their_own(load):
    loader = load(functools.partial(part_of, Fold(100, rank=0)))
    assert first_of(loader) == 100
    producer = loader._opened().pid
    assert in_another_process(load, Fold(100, rank=1)) == 100
    assert load(functools.partial(part_of, Fold(100, rank=0)))._opened().pid == producer


def in_another_process(load: Any, fold: Fold) -> int:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            from hyperpodrun.dataloader.reading import connection

            connection._read_before.clear()  # as a new process
            os.write(write, str(first_of(load(functools.partial(part_of, fold)))).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as file:
        return int(file.read() or -1)


@pytest.fixture(autouse=True)
def one_job(monkeypatch):
    for name, value in (("MASTER_ADDR", "contents"), ("MASTER_PORT", str(os.getpid())), ("RANK", "0")):
        monkeypatch.setenv(name, value)


Pair = collections.namedtuple("Pair", "left right")
EQUAL = "Held(tags={'a', 'b', 'c', 'd'}, path=Path('/data'), sizes={'x': 1, 'y': [1, 2.5]}, rows=torch.arange(6))"


class Held(SimpleNamespace):
    pass


def made(text: str) -> Any:
    return eval(text, {"Held": Held, "Path": Path, "torch": torch, "np": np, "Pair": Pair})


def test_it_is_the_same_in_every_process():
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fingerprints as t; "
    script += f"print(t.of_contents(t.made({EQUAL!r})))"
    for seed in ("1", "2"):
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert ended.stdout.strip() == of_contents(made(EQUAL)), ended.stderr


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Held(a=1)", "Held(a=2)"),
        ("Held(a=Held(b=1))", "Held(a=Held(b=2))"),
        ("Held(a=1)", "Held(b=1)"),
        ("[1, 2]", "[2, 1]"),
        ("{'a', 'b'}", "{'a', 'c'}"),
        ("Path('/a')", "Path('/b')"),
        ("torch.zeros(3)", "torch.ones(3)"),
        ("torch.zeros(4)", "torch.zeros(2, 2)"),
        ("torch.arange(4.0)[::2][:1]", "torch.arange(1, 5.0)[::2][:1]"),
        ("torch.tensor([1j]).conj()", "torch.tensor([1j])"),
        ("torch.zeros(2, dtype=torch.bfloat16)", "torch.ones(2, dtype=torch.bfloat16)"),
        ("np.zeros(3)", "np.ones(3)"),
        ("Pair(1, 2)", "Pair(1, 3)"),
    ],
)
def test_what_differs_is_told_apart(left, right):
    assert of_contents(made(left)) == of_contents(made(left))
    assert of_contents(made(left)) != of_contents(made(right))


def test_a_recipe_is_its_functions_and_plain_arguments_in_full():
    held = functools.partial(part_of, Fold(100), rows=list(range(10**5)))
    assert of_recipe(held) == of_recipe(functools.partial(part_of, Fold(200), rows=list(range(10**5))))
    assert of_recipe(held) != of_recipe(functools.partial(part_of, Fold(100), rows=[*range(10**5 - 1), 0]))
    assert of_recipe(held) != of_recipe(functools.partial(first_of, Fold(100), rows=list(range(10**5))))


def test_what_is_large_or_refers_to_itself_is_described_in_a_moment():
    loop: list[Any] = [1]
    loop.append(loop)
    assert of_contents(loop) == of_contents(loop)
    assert of_contents(list(range(10**6))) != of_contents(list(range(10**6 + 1)))
