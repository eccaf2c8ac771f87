"""What a step changes and nobody has registered is named, however the function reaches it, and nothing else is."""

from __future__ import annotations

import functools
import logging
import random
import types
from typing import NamedTuple

import numpy
import pytest
import torch
from hyperpodrun import CheckpointManager
from hyperpodrun.checkpointless.caller import NoCaller
from hyperpodrun.checkpointless.errors import UnsupportedStateError
from hyperpodrun.checkpointless.state.reachable import reach_from
from hyperpodrun.checkpointless.step.unregistered import UnregisteredWatch


class Holder:
    """Somebody's own object."""

    def __init__(self, **held):
        self.__dict__.update(held)


class Job(NamedTuple):
    device: str
    optimizer: object


def adam(module=None):
    return torch.optim.Adam((module or torch.nn.Linear(2, 2)).parameters())


def paths(function, *args, **kwargs):
    return {reached.path: reached.kind for reached in reach_from(function, args, kwargs, None)}


GLOBAL = torch.Generator()


def test_arguments_closures_globals_and_what_a_method_is_bound_to_are_reached():
    closed = adam()

    def function(job, *, scaler):
        return closed, GLOBAL

    found = paths(function, Job("cpu", adam()), scaler=torch.amp.GradScaler("cpu"))
    assert found == {
        "job.optimizer": "optimizer",
        "scaler": "gradient scaler",
        "closed": "optimizer",
        "GLOBAL": "generator",
    }

    class Trainer(Holder):
        def train(self):
            pass

    assert paths(Trainer(rng=numpy.random.default_rng(0)).train) == {"self.rng": "generator"}
    assert paths(functools.partial(lambda first: None, adam())) == {"partial.args[0]": "optimizer"}


def test_containers_and_plain_objects_are_looked_into_and_not_too_deep():
    def function(argument):
        pass

    tree = Holder(nested={"list": [torch.zeros(1)], 3: random.Random(0)}, deep=Holder(x=Holder(x=Holder(x=adam()))))
    assert paths(function, tree) == {
        "argument.nested['list'][0]": "tensor",
        "argument.nested[3]": "generator",
    }
    ring = Holder()
    ring.ring = ring
    assert paths(function, ring) == {}


def test_the_global_generators_are_carried_anyway():
    def function():
        return torch.default_generator, random._inst, numpy.random.mtrand._rand

    assert "generator" not in paths(function, [torch.default_generator, random._inst]).values()


@pytest.fixture
def model():
    return torch.nn.Linear(2, 2)


def watched(function, model, caplog, **registered):
    """The warnings while the function trains under a manager that is told of it."""
    manager = CheckpointManager()
    manager.register(model=model, **registered)
    manager.wraps(function, (manager,), {})
    with caplog.at_level(logging.WARNING, "hyperpodrun.checkpointless"):
        function(manager)
    return [record.getMessage() for record in caplog.records]


class Decaying(torch.optim.SGD):
    """An optimizer beside the training: what it trains is nobody's, and it keeps a momentum of it."""

    def __init__(self):
        super().__init__([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)

    def decay(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones(2)
        self.step()


def train(model, optimizer, manager, extra=lambda: None):
    for _ in manager.steps(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        extra()


def test_a_forgotten_optimizer_of_registered_weights_is_refused(model, caplog):
    optimizer = adam(model)

    def main(manager):
        train(model, optimizer, manager)

    before = model.weight.clone()
    with pytest.raises(UnsupportedStateError, match=r"Adam trains 'model.weight'.*manager.register\(..., optimizer="):
        watched(main, model, caplog)
    assert torch.equal(model.weight, before)


def test_a_forgotten_optimizer_of_other_weights_is_named_once_with_the_remedy(model, caplog):
    optimizer, other = adam(model), Decaying()

    def main(manager):
        train(model, optimizer, manager, other.decay)

    said = watched(main, model, caplog, optimizer=optimizer)
    assert len(said) == 1
    assert "step 0 changed the optimizer other, which is not registered: register(other=other)" in said[0]


def test_a_function_that_is_called_again_says_nothing_twice(model, caplog):
    optimizer, other = adam(model), Decaying()

    def main(manager):
        train(model, optimizer, manager, other.decay)
        manager.begins_call(2)
        manager.wraps(main, (manager,), {})
        manager.attach(NoCaller(), 2)
        train(model, optimizer, manager, other.decay)

    assert len(watched(main, model, caplog, optimizer=optimizer)) == 1


def test_nothing_is_said_where_everything_is_registered(model, caplog):
    optimizer = adam(model)
    wrapped = torch.nn.Sequential(model)  # as DDP: another module around the registered one
    parts = [model.weight, model.weight.data]

    def main(manager):
        train(wrapped, optimizer, manager, lambda: parts)

    assert watched(main, model, caplog, optimizer=optimizer) == []


def test_a_local_variable_is_found_in_the_frames_between_the_function_and_the_loop(model, caplog):
    optimizer = adam(model)

    def main(manager):
        generator, total, unused = torch.Generator(), torch.zeros(1), torch.zeros(1)

        def body():
            torch.rand(1, generator=generator)
            total.add_(1)

        train(model, optimizer, manager, body)
        return unused

    said = watched(main, model, caplog, optimizer=optimizer)
    assert len(said) == 2
    assert "the generator generator" in said[0]
    assert "the tensor total" in said[1]
    assert "buffer of a registered module" in said[1]


def test_a_second_model_is_named_as_a_whole(model, caplog):
    optimizer, average = adam(model), torch.optim.swa_utils.AveragedModel(model)

    def main(manager):
        train(model, optimizer, manager, lambda: average.update_parameters(model))

    (said,) = watched(main, model, caplog, optimizer=optimizer)
    assert "the module average" in said
    assert "register(average=average)" in said


def test_only_the_first_passes_are_looked_at_and_nothing_is_held_over_them(model, caplog):
    optimizer, late = adam(model), torch.zeros(1)

    def main(manager):
        for step in manager.steps(4):
            if step > 1:
                late.add_(1)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        (watch,) = [observer for observer in manager._observers if isinstance(observer, UnregisteredWatch)]
        assert watch._wrapped is None
        assert watch._before == []

    assert watched(main, model, caplog, optimizer=optimizer) == []


def test_in_a_traced_run_every_pass_is_looked_at(model, monkeypatch, tmp_path):
    monkeypatch.setenv("HYPERPODRUN_TRACE", str(tmp_path))
    optimizer, late = adam(model), torch.zeros(1)

    def main(manager):
        for step in manager.steps(4):
            if step > 1:
                late.add_(1)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    manager = CheckpointManager()
    manager.register(model=model, optimizer=optimizer)
    manager.wraps(main, (manager,), {})
    main(manager)
    lines = (tmp_path / "rank-0.jsonl").read_text().splitlines()
    assert [line for line in lines if "step 2 changed the tensor late" in line]


def test_what_cannot_be_looked_at_does_not_stop_training(model, caplog):
    class Odd:
        @property
        def __dict__(self):
            raise RuntimeError("do not look")

    odd, optimizer = Odd(), adam(model)

    def main(manager):
        train(model, optimizer, manager, lambda: odd)

    assert watched(main, model, caplog, optimizer=optimizer) == []


def test_a_locals_dictionary_that_the_script_keeps_is_left_alone(model, caplog):
    optimizer = adam(model)

    def main(manager):
        kept = locals()
        train(model, optimizer, manager)
        assert kept["manager"] is manager

    assert watched(main, model, caplog, optimizer=optimizer) == []


def test_foreign_objects_are_not_opened():
    def function(argument):
        pass

    assert paths(function, types.SimpleNamespace(x=adam())) == {"argument.x": "optimizer"}
    assert paths(function, logging.getLogger()) == {}
