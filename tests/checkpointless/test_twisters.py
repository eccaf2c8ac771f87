"""Whether a global generator has been used is seen from a few bytes of memory, or from its whole state."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from hyperpodrun.checkpointless.state import generators, twisters

DRAWS = [
    lambda: random.random(),
    lambda: random.gauss(0, 1),
    lambda: random.seed(3),
    lambda: numpy.random.rand(),
    lambda: numpy.random.randn(),
    lambda: numpy.random.seed(3),
    lambda: torch.rand(1),
    lambda: torch.randn(1),
    lambda: torch.randn(1, dtype=torch.double),
    lambda: torch.nn.functional.dropout(torch.ones(4)),
    lambda: torch.randperm(3),
    lambda: torch.manual_seed(3),
]


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not looked yet."""
    monkeypatch.setattr(generators, "_generators", generators._Generators())


@pytest.mark.parametrize("windows", [True, False], ids=["by windows", "by states"])
def test_states_are_the_same_object_until_one_is_used(fresh, monkeypatch, windows):
    if not windows:
        monkeypatch.setattr(twisters, "of_torch", lambda: None)
    for draw in DRAWS * 2:
        before = generators.read_generators()
        assert generators.read_generators() is before
        draw()
        after = generators.read_generators()
        assert after is not before
        assert generators.read_generators() is after
    assert (generators._generators._twisters["torch"].window is not None) == windows


def test_the_second_of_a_pair_of_deviates_is_seen_to_be_used_up(fresh):
    for draw in (lambda: random.gauss(0, 1), numpy.random.randn, lambda: torch.randn(1)):
        for _ in range(4):
            before = generators.read_generators()
            draw()
            assert generators.read_generators() is not before


def test_another_generator_for_numpy_is_noticed(fresh):
    before = generators.read_generators()
    kept = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.MT19937(5))
        assert generators.read_generators()["numpy"] is not before["numpy"]
        drawn = generators.read_generators()
        numpy.random.rand()
        assert generators.read_generators() is not drawn
        numpy.random.set_bit_generator(numpy.random.PCG64(5))
        state = generators.read_generators()["numpy"]
        numpy.random.rand()
        assert generators.read_generators()["numpy"] is not state
    finally:
        numpy.random.set_bit_generator(kept)


def test_a_whole_turn_of_the_twister_is_seen(fresh):
    """After 624 words its position is what it was."""
    for turn in (
        lambda: [random.getrandbits(32) for _ in range(624)],
        lambda: numpy.random.bytes(4 * 624),
        lambda: torch.empty(624, dtype=torch.int32).random_(),
    ):
        before = generators.read_generators()
        turn()
        assert generators.read_generators() is not before


def test_memory_that_looks_otherwise_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(twisters, "_seeded_words", lambda seed: iter([1] * 624))
    assert twisters.of_torch() is None
    assert twisters._read(0, 8) == b""
