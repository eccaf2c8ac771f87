"""In which order gradients have arrived belongs to the state of a step, and noting it costs nothing afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hyperpodrun.checkpointless.arrivals import ArrivalOrder, ArrivalOrders, Known, key_of, trained
from hyperpodrun.checkpointless.caller import NoCaller
from hyperpodrun.checkpointless.manager import CheckpointManager
from torch.nn.parallel import DistributedDataParallel


def two_layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def backward(model: torch.nn.Module) -> None:
    model(torch.ones(1, 2)).sum().backward()


def always() -> bool:
    return True


def test_the_order_is_noted_and_no_parameter_keeps_an_empty_dictionary_of_hooks():
    model = two_layers()
    order = ArrivalOrder()
    order.watch(trained(model), always)
    backward(model)
    order.step_ends(1)
    assert order.known is not None
    assert sorted(order.known.indices) == [0, 1, 2, 3]
    assert order.known.indices[0] in (2, 3)  # the last layer's gradients are there first
    assert [parameter._post_accumulate_grad_hooks for parameter in model.parameters()] == [None] * 4


def test_a_hook_of_the_users_stays():
    model, seen = torch.nn.Linear(2, 2), []
    model.weight.register_post_accumulate_grad_hook(seen.append)
    order = ArrivalOrder()
    order.watch(trained(model), always)
    order.step_ends(1)
    backward(model)
    assert len(seen) == 1


def test_gradients_that_are_not_exchanged_tell_nothing():
    model, exchanged = two_layers(), []
    order = ArrivalOrder()
    order.watch(trained(model), lambda: bool(exchanged))
    backward(model)
    order.step_ends(1)
    assert order.known is None
    exchanged.append(True)
    backward(model)
    order.step_ends(2)
    assert order.known is not None
    assert order.known.since == 2


def test_who_goes_back_before_the_first_exchange_has_no_order():
    """The run without the fault had none there: its first buckets are those of a new DDP."""
    model = two_layers()
    order = ArrivalOrder()
    order.watch(trained(model), always)
    backward(model)
    order.step_ends(1)
    assert order.at(0) is None
    assert order.at(1) == order.known
    order.go_to(0)
    assert order.known is None


def test_every_ddp_has_its_own_and_each_goes_along_with_the_state():
    generator, critic = two_layers(), torch.nn.Linear(2, 1)
    names = {id(value): f"g {number}" for number, value in enumerate(generator.parameters())}
    names |= {id(value): f"c {number}" for number, value in enumerate(critic.parameters())}
    mine, other = ArrivalOrders(), ArrivalOrders()
    keys = [key_of(trained(model), names) for model in (generator, critic)]
    for key, model in zip(keys, (generator, critic), strict=True):
        mine.of(key).watch(trained(model), always)
    for model in (generator, critic):
        backward(model)
    mine.step_ends(4)
    assert set(mine.told(4)) == set(keys)
    assert mine.told(3) == {}
    other.of("of a model that is no more").learn(Known(1, [0]))
    other.adopt(mine.told(4))
    assert other.told(4) == mine.told(4)


def test_two_models_of_one_shape_are_told_apart_by_their_names():
    one, two = two_layers(), two_layers()
    names = {id(value): f"{number}" for model in (one, two) for number, value in enumerate(model.parameters())}
    assert key_of(trained(one), names) == key_of(trained(two), names)
    names |= {id(value): f"two {number}" for number, value in enumerate(two.parameters())}
    assert key_of(trained(one), names) != key_of(trained(two), names)
    one[0].weight.requires_grad_(False)
    assert key_of(trained(one), {}) != key_of(trained(two), {})


class Interrupted(Exception):
    pass


class LeavesAtTheEnd(NoCaller):
    """A fault is heard of in the pass and waits until its end, where the pass is left."""

    def close_pass(self) -> None:
        raise Interrupted


@pytest.mark.parametrize("caller", [NoCaller(), LeavesAtTheEnd()], ids=["ended", "left"])
def test_whoever_holds_a_step_knows_the_order_of_it(caller: NoCaller):
    """A step counts from the moment its pass ends, also where the rank is called away at that very moment."""
    manager, model = CheckpointManager(), two_layers()
    manager.attach(caller, 1)
    manager.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    manager.restore()
    manager._orders.of("ddp").watch(trained(model), always)
    manager.begin_step()
    backward(model)
    assert manager._registry is not None
    next(iter(manager._registry.optimizers.values())).step()
    try:
        manager.end_step()
    except Interrupted:
        manager.on_restart(None)
    assert manager.holding().step == 1
    assert set(manager._orders.told(1)) == {"ddp"}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ddp_that_cannot_be_arranged_is_told_of_once(one_rank: None, caplog: pytest.LogCaptureFixture):
    for early in (False, True):
        manager, model = CheckpointManager(), two_layers()
        manager.attach(NoCaller(), 1)
        manager.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2):
            if early:
                made = DistributedDataParallel(model)
            manager.restore()
            if not early:
                made = DistributedDataParallel(model)
            assert made.module is model
        assert caplog.text.count("was made before restore()") == early
        manager.left()
