"""Notes of what a step touches: what goes into a rank's own record, and what is refused as a note."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from hyperpodrun.checkpointless.state.generators import read_generators, write_generators
from hyperpodrun.checkpointless.state.small import SmallStateTaker
from hyperpodrun.checkpointless.state.stateful import is_object_in, read_object, write_object
from hyperpodrun.protocol.values import EncodingError, encode


def test_a_large_table_does_not_keep_small_buffers_out_of_the_record():
    """Batch norm's statistics differ from rank to rank; a table of 16 MB is the same everywhere."""
    taker = SmallStateTaker()
    buffers = {"table": torch.zeros(4 << 20), "mean": torch.arange(3.0), "count": torch.tensor(7)}
    taker.set_buffers({name: (buffers, name) for name in buffers})
    recorded = SmallStateTaker.from_bytes(1, taker.local_bytes(taker.take(1)))
    assert {name: contents.tolist() for name, (_, contents) in recorded.buffers.items()} == {
        "mean": [0.0, 1.0, 2.0],
        "count": 7,
    }
    assert set(SmallStateTaker.from_bytes(1, taker.whole_bytes(taker.take(1))).buffers) == {"table", "mean", "count"}


@pytest.mark.parametrize("value", [{}, [], {"generators": 1, "buffers": {}, "local": {}, "shared": {}}], ids=repr)
def test_what_is_no_note_is_refused(value):
    with pytest.raises(EncodingError):
        SmallStateTaker.from_bytes(1, encode(value))


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.shuffle([1, 2, 3]),
        lambda: random.seed(3),
        lambda: numpy.random.rand(),
        lambda: numpy.random.randn(),
        lambda: torch.rand(1),
        lambda: torch.randn(1),
    ],
    ids=["random", "gauss", "shuffle", "seed", "rand", "randn", "torch.rand", "torch.randn"],
)
def test_every_draw_from_a_global_generator_is_noticed_and_can_be_repeated(draw: Callable[[], object]):
    """Their states are looked at cheaply, three times in a step; twice the same draw also uses up what one keeps."""
    taker = SmallStateTaker()
    for _ in range(3):
        note = taker.take(1)
        assert not taker.changed(note)
        kept = read_generators()
        draw()
        assert taker.changed(note)
        first = (random.gauss(0, 1), numpy.random.randn(), torch.randn(1).item())
        write_generators(kept)
        assert not taker.changed(note)
        draw()
        assert (random.gauss(0, 1), numpy.random.randn(), torch.randn(1).item()) == first


def test_an_optimizers_noted_hyperparameters_do_not_change_with_it():
    """A learning rate that is a tensor is changed in place."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
    rate, state = optimizer.param_groups[0]["lr"], read_object(optimizer)
    assert is_object_in(optimizer, state)
    rate.fill_(0.25)
    assert not is_object_in(optimizer, state)
    write_object(optimizer, state)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


@pytest.mark.parametrize(
    ("target", "change"),
    [
        (random.Random(1), lambda target: target.random()),
        (torch.Generator(), lambda target: torch.rand(1, generator=target)),
        (numpy.random.default_rng(1), lambda target: target.random()),
        (torch.optim.SGD([torch.ones(1)], lr=1.0), lambda target: target.param_groups[0].update(lr=2.0)),
        (torch.optim.SGD([torch.ones(1)], lr=1.0), lambda target: target.param_groups[0].update(initial_lr=1.0)),
        (
            torch.optim.SGD([torch.ones(1)], lr=1.0),
            lambda target: target.add_param_group({"params": [torch.zeros(1)]}),
        ),
        (
            torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), 5),
            lambda target: setattr(target, "last_epoch", 3),
        ),
    ],
    ids=["random", "generator", "numpy", "rate", "new key", "new group", "scheduler"],
)
def test_a_change_of_a_registered_object_is_noticed(target, change):
    state = read_object(target)
    assert is_object_in(target, state)
    change(target)
    assert not is_object_in(target, state)
    assert is_object_in(target, read_object(target))
