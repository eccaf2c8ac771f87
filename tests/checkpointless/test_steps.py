"""What a step of a loop is, what a restart finds again, and what is said of loops that cannot be repeated."""

from __future__ import annotations

import pytest
import torch
from hyperpodrun import CheckpointManager, UnsupportedStateError
from hyperpodrun.checkpointless.caller import NoCaller
from hyperpodrun.checkpointless.state.generators import read_generators
from hyperpodrun.checkpointless.step.loaders import STARTS, LoaderStarts
from hyperpodrun.protocol.plan import Origin, RestorePlan
from torch import nn
from torch.utils.data import DataLoader


class Restarted(NoCaller):
    """After a fault that cost nobody anything."""

    def __init__(self, step: int) -> None:
        self.plan = RestorePlan(step, 0, origin=Origin.MEMORY)


class Training:
    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        self.manager = CheckpointManager(**settings)
        self.model = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.manager.register(model=self.model, optimizer=self.optimizer)
        self.manager.attach(NoCaller(), 1)
        self.manager.restore()

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()

    def train(self, steps: int) -> None:
        for _ in self.manager.steps(steps):
            self.update()

    def restart(self) -> int:
        self.manager.on_restart(None)
        self.manager.attach(Restarted(self.manager.holding().step), 1)
        return self.manager.restore()


def test_a_loop_that_begins_anew_after_a_restart_is_refused():
    training = Training()
    training.train(3)
    assert training.restart() == 3
    with pytest.raises(UnsupportedStateError, match=r"begin_step\(0\): step 3 is due, as restore\(\) has said"):
        training.manager.begin_step(0)
    training.manager.begin_step(3)


def test_a_loop_that_does_not_say_its_step_is_told_that_it_cannot_be_checked(caplog):
    training = Training()
    training.manager.begin_step()
    training.update()
    training.manager.end_step()
    assert not caplog.records
    training.restart()
    training.manager.begin_step()
    assert "restore() has said 1" in caplog.text


def test_a_checkpoint_that_the_script_loads_after_a_restore_changes_nothing(caplog):
    training = Training()
    old = {key: value.clone() for key, value in training.model.state_dict().items()}
    training.train(2)
    new = {key: value.clone() for key, value in training.model.state_dict().items()}
    training.restart()
    training.model.load_state_dict(old)
    training.optimizer.load_state_dict(torch.optim.SGD(training.model.parameters(), lr=9.0).state_dict())
    training.manager.begin_step(2)
    assert all(torch.equal(value, new[key]) for key, value in training.model.state_dict().items())
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    assert len(training.optimizer.state) == 2
    assert "model.load_state_dict() after restore() is left out" in caplog.text
    training.update()
    training.manager.end_step()
    training.model.load_state_dict(old)
    assert torch.equal(training.model.weight, old["weight"]), "within the steps it is the script's own business"


def test_a_checkpoint_that_the_script_loads_before_it_restores_changes_nothing():
    training = Training()
    old = {key: value.clone() for key, value in training.model.state_dict().items()}
    training.train(2)
    new = training.model.weight.clone()
    training.manager.on_restart(None)
    training.manager.attach(Restarted(2), 1)
    training.model.load_state_dict(old)
    assert training.manager.restore() == 2
    training.manager.begin_step(2)
    assert torch.equal(training.model.weight, new)


def test_weights_that_are_made_anew_before_a_restore_are_refused():
    training = Training()
    training.train(2)
    training.manager.on_restart(None)
    training.manager.attach(Restarted(2), 1)
    nn.init.ones_(training.model.weight)
    with pytest.raises(UnsupportedStateError, match=r"'model.weight' was changed between a restart and restore"):
        training.manager.restore()


def test_a_checkpoint_is_loaded_again_where_no_step_had_begun():
    """A fault between restore() and the first step: what the script loads there is what it begins with."""
    training = Training()
    training.manager.on_restart(None)
    training.manager.attach(Restarted(0), 1)
    assert training.manager.restore() == 0
    training.model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    training.manager.begin_step(0)
    assert training.model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_what_is_drawn_between_two_passes_is_part_of_the_next():
    training = Training()
    for step in range(2):
        torch.rand(1)
        training.manager.begin_step(step)
        drawn = torch.rand(1)
        training.update()
        training.manager.end_step()
    torch.rand(1)
    training.manager.begin_step(2)
    drawn = torch.rand(1)
    training.restart()
    torch.rand(9)
    training.manager.begin_step(2)
    assert torch.equal(torch.rand(1), drawn)


def test_weights_that_are_made_anew_after_a_restore_are_refused():
    training = Training()
    training.train(2)
    training.restart()
    nn.init.ones_(training.model.weight)
    with pytest.raises(UnsupportedStateError, match=r"'model.weight' was changed between restore"):
        training.manager.begin_step(2)


def test_an_update_that_no_hook_sees_is_seen_all_the_same():
    training = Training()
    for _ in training.manager.steps(2):
        with torch.no_grad():
            training.model.weight.mul_(0.9)
    assert training.manager.holding().step == 2


def test_a_change_before_a_fault_makes_the_step_torn():
    training = Training(rollback=False)
    training.train(3)
    training.manager.begin_step(3)
    with torch.no_grad():
        training.model.weight.mul_(0.9)
    training.manager.on_restart(None)
    holding = training.manager.holding()
    assert holding.step is None
    assert "in step 3 something registered had changed" in holding.torn


def test_a_fault_in_what_follows_the_update_finds_it_presumed_complete():
    training = Training()
    training.train(2)
    training.manager.begin_step(2)
    training.update()
    training.manager.on_restart(None)
    holding = training.manager.holding()
    assert (holding.step, holding.presumed) == (3, True)


def test_a_change_in_what_follows_the_update_is_not_presumed_away():
    training = Training()
    training.train(2)
    training.manager.begin_step(2)
    training.update()
    torch.rand(1)
    training.manager.on_restart(None)
    assert training.manager.holding().step is None


def test_a_parameter_group_that_is_registered_again_is_carried():
    training = Training()
    extra = nn.Linear(2, 2)
    training.optimizer.add_param_group({"params": list(extra.parameters())})
    training.manager.register(model=training.model, optimizer=training.optimizer)
    names = list(training.manager._registry.state.named_tensors())
    assert "optimizer.1.0" in names


def test_the_state_is_kept_where_a_loop_needs_it_and_nowhere_else(caplog):
    quiet, loud = Training(), Training()
    quiet.train(4)
    assert quiet.manager.holding().kept is None
    for _ in loud.manager.steps(4):
        loud.update()
        with torch.no_grad():
            loud.model.bias.clamp_(-1, 1)
    assert loud.manager.holding().kept == 3
    assert "changes after the update" in caplog.text


class Forgetful(torch.optim.SGD):
    """Keeps slow weights in a list, and its state_dict says nothing of them."""

    def step(self, closure=None):
        super().step(closure)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


def test_what_an_optimizer_keeps_beside_its_state_is_named(caplog):
    manager, model = CheckpointManager(), nn.Linear(2, 2)
    optimizer = Forgetful(model.parameters(), lr=0.1)
    manager.register(model=model, optimizer=optimizer)
    for _ in manager.steps(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert "'optimizer.slow/0', 'optimizer.slow/1' changes in training" in caplog.text
    assert caplog.text.count("optimizer.slow/0") == 1


def test_a_function_that_is_entered_again_finds_the_generators_it_had():
    training = Training()
    training.manager.begins_call(2)
    training.manager.attach(NoCaller(), 2)
    first = torch.rand(3)
    training.manager.restore()
    for _ in training.manager.steps(2):
        training.update()
    torch.rand(5)
    training.manager.on_restart(None)
    training.manager.attach(Restarted(2), 2)
    assert torch.equal(torch.rand(3), first)


@pytest.fixture
def starts():
    STARTS.listen()
    yield STARTS
    STARTS.leave()


def order(iterator) -> list[int]:
    return torch.cat(list(iterator)).tolist()


def test_an_order_that_is_begun_again_is_the_one_that_was_under_way(starts: LoaderStarts):
    loader = DataLoader(torch.arange(12), batch_size=3, shuffle=True)
    list(loader)  # an epoch that is over
    iterator = iter(loader)
    seen = next(iterator)
    under_way = starts.under_way()
    assert [what for what, _ in under_way] == ["DataLoader 4", "RandomSampler 12"]
    rest = order(iterator)
    torch.rand(3)
    starts.repeats(under_way)
    for _ in range(2):  # from the first epoch on, or from this one
        assert order(loader) == [*seen.tolist(), *rest]


class Position:
    """Of a loader that begins when it is asked where it is, as a stateful one does."""

    def __init__(self) -> None:
        self.iterator = None

    def state_dict(self):
        if self.iterator is None:
            self.iterator = iter(DataLoader(torch.arange(100)))
        return {"given": self.iterator._num_yielded}

    def load_state_dict(self, state) -> None:
        self.iterator = None


def test_a_loader_that_begins_when_it_is_registered_is_under_way():
    """A fault after an update that is presumed complete: what the loader draws on its way back is not the loop's."""

    def enter(caller: NoCaller) -> None:
        manager.attach(caller, 1)
        manager.register(model=model, optimizer=optimizer, position=Position())
        manager.restore()

    def update() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    STARTS.leave()
    manager, model = CheckpointManager(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    enter(NoCaller())
    for step in range(70):  # until it is known that the position does not change after the update
        manager.begin_step(step)
        update()
        manager.end_step()
    manager.begin_step(70)
    update()
    expected = torch.get_rng_state()
    assert manager.holding().presumed
    manager.on_restart(None)
    enter(Restarted(71))
    manager.begin_step(71)
    assert torch.equal(torch.get_rng_state(), expected)
    STARTS.leave()


def test_a_container_of_registered_optimizers_need_not_be_registered():
    class Container(torch.optim.Optimizer):
        def __init__(self, optimizers) -> None:
            self.optimizers = optimizers
            super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

        def step(self) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

    training = Training()
    container = Container([training.optimizer])
    for _ in training.manager.steps(2):
        training.model(torch.ones(1, 2)).sum().backward()
        container.step()
    container.state["slow weights"] = torch.zeros(1)
    with pytest.raises(UnsupportedStateError, match=r"a Container trains .model\.weight., which is registered"):
        container.step()


def test_what_is_at_its_end_is_not_under_way(starts: LoaderStarts):
    iterator = iter(DataLoader(torch.arange(4), batch_size=2, shuffle=True))
    next(iterator)
    assert starts.under_way()
    next(iterator)
    assert starts.under_way() == ()


def test_an_order_with_a_generator_of_its_own_is_nobody_elses_business(starts: LoaderStarts):
    iterator = iter(DataLoader(torch.arange(4), shuffle=True, generator=torch.Generator().manual_seed(1)))
    next(iterator)
    assert starts.under_way() == ()


def test_what_begins_in_the_repeated_step_draws_as_it_does_anyway(starts: LoaderStarts):
    base = read_generators()["torch"]
    loader = DataLoader(torch.arange(12), batch_size=3, shuffle=True)
    fresh = order(loader)
    starts.repeats(())
    starts.in_step(base)
    torch.rand(7)
    assert order(loader) == fresh
    assert order(loader) == fresh, "one that was only passed over does not count"
    starts.arrived()
    assert order(loader) != fresh


def test_a_loop_that_went_back_to_its_very_place_draws_there_as_it_did():
    """Another loader begins in the step, before its forward pass, and one that began steps ago is under way."""

    def drawn(disturbed: bool) -> torch.Tensor:
        training = Training()
        data, other = DataLoader(range(8), shuffle=True), DataLoader(range(3), shuffle=True)
        batches, steps = iter(data), training.manager.steps(9)
        next(steps), next(batches)
        training.update()
        next(steps)
        if disturbed:
            training.restart()
            batches, steps = iter(data), training.manager.steps(9)
            next(batches), next(steps)
            training.manager.settle()
        list(other)
        training.update()
        return torch.rand(3)

    assert torch.equal(drawn(disturbed=True), drawn(disturbed=False))


def test_a_loop_that_found_its_end_on_the_way_was_not_left_before_it():
    training = Training()
    steps = training.manager.steps(1 << 62)
    for _ in range(2):
        next(steps)
        training.update()
    next(steps)
    assert training.manager.left().startswith("it left manager.steps")
    training.manager.end_steps()
    assert training.manager.left() == ""
