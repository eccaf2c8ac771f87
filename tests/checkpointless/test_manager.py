"""What is registered, and what a manager says when that cannot be carried."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hyperpodrun.checkpointless.caller import NoCaller
from hyperpodrun.checkpointless.manager import CheckpointManager


class Counter:
    """Equal to any other one; but not the same."""

    def __init__(self) -> None:
        self.count = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_an_object_that_equals_the_registered_one_is_another_one_all_the_same():
    manager = CheckpointManager()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Counter(), Counter()
    for counter in (first, second):
        manager.register(model=model, optimizer=optimizer, counter=counter)
    assert manager.restore() == 0
    assert manager._registry is not None
    assert manager._registry.objects["counter"] is second


def test_a_further_registration_adds_to_what_was_registered_before_it():
    """In every entry to what was registered outside of the function; what another function has registered is gone."""
    manager = CheckpointManager()
    model, counter = torch.nn.Linear(1, 1), Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def names() -> set[str]:
        assert manager._registry is not None
        return set(manager._registry.objects)

    manager.register(model=model, optimizer=optimizer)
    for _ in range(2):  # the function is entered, and after a fault entered again
        manager.attach(NoCaller(), 1)
        manager.register(counter=counter)
        assert names() == {"model", "optimizer", "counter"}
        manager.register(counter=Counter())
        assert names() == {"model", "optimizer", "counter"}
        assert manager.restore() == 0
        manager.left()
    other = torch.nn.Linear(1, 1)
    manager.register(other=other)
    assert names() == {"other"}
    manager.begins_call(2)
    manager.attach(NoCaller(), 2)
    manager.register(counter=counter)
    assert names() == {"other", "counter"}


def test_an_update_before_the_first_step_is_nothing_to_be_carried():
    """Such as a warm-up of the optimizer while the script is set up."""
    manager = CheckpointManager()
    model = torch.nn.Linear(1, 1)
    manager.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with manager.update():
        pass
    assert manager.restore() == 0
    assert list(manager.steps(2)) == [0, 1]


def test_objects_that_offload_has_let_go_of_are_to_be_built_anew():
    manager = CheckpointManager(enable_offload=True)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager.register(model=model, optimizer=optimizer)
    for _ in manager.steps(1):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
    trained = model.weight.detach().clone()
    manager.on_restart(None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    with pytest.raises(RuntimeError, match="build and register them anew inside the wrapped function"):
        manager.restore()
    other = torch.nn.Linear(4, 4)
    manager.register(model=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    manager.restore()
    assert torch.equal(other.weight, trained)


@pytest.mark.parametrize(
    ("target", "why"),
    [(object(), "has no state_dict and load_state_dict"), (lambda: 1, "has no state_dict")],
    ids=["object", "function"],
)
def test_what_cannot_be_carried_is_refused_by_name(target, why):
    with pytest.raises(TypeError, match=rf"register\(data=\.\.\.\): .*{why}"):
        CheckpointManager().register(data=target)


@pytest.mark.parametrize("settings", [{"snapshot_every": 0}, {"disk_every": -1}], ids=repr)
def test_an_interval_below_one_is_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        CheckpointManager(**settings)


@pytest.mark.parametrize("mode", ["eager", "compiled", "eager first", "eager after all"])
def test_the_note_of_the_next_step_is_made_when_gradients_begin_to_flow(mode):
    """Once for every pass, and in a compiled module without a break of its graph."""
    seen: list[str] = []
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = CheckpointManager()
    manager.register(model=model, optimizer=optimizer)
    assert manager.restore() == 0
    foresee = manager._history.foresee
    manager._history.foresee = lambda *args: (seen.append("noted"), foresee(*args))[1]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=mode != "eager first")
    modules = {
        "eager": [model, model],
        "compiled": [compiled, compiled],
        "eager first": [model, compiled],
        "eager after all": [compiled, model],
    }[mode]
    for _, module in zip(manager.steps(2), modules, strict=True):
        for _ in range(2):
            module(torch.ones(1, 4)).sum().backward()
            assert seen == ["noted"] + ["gradient"] * 4
            seen.clear()
        optimizer.step()


def test_a_registered_model_can_be_copied_and_saved_whole():
    model = torch.nn.Linear(4, 4)
    manager = CheckpointManager()
    manager.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert manager.restore() == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        other(torch.ones(4)).sum().backward()
        assert torch.equal(other.weight, model.weight)
