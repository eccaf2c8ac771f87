"""What register() takes, what it refuses and how it says so, and that what it takes is carried."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from hyperpodrun import StateProvider, UnsupportedStateError
from hyperpodrun.checkpointless.state.fingerprint import different, digest, fingerprints
from hyperpodrun.checkpointless.state.optimizers import parts_of
from hyperpodrun.checkpointless.state.registry import Registry
from hyperpodrun.checkpointless.state.tree import rebuild, structure, tensors_in
from hyperpodrun.checkpointless.step.tracker import Learned
from hyperpodrun.checkpointless.transfer.buckets import Memory
from hyperpodrun.checkpointless.transfer.header import Header, build, describe, read_small_state
from hyperpodrun.protocol.values import EncodingError, decode, encode
from torch import nn
from torch.optim import lr_scheduler


def move(source: Registry, receiver: Registry) -> None:
    """All that a receiver gets from a peer."""
    told = decode(encode(describe(source, source.taker.take(3), Learned(), {}).as_dict()))
    header = Header.from_dict(told)
    build(receiver, header, 3).fill_from(Memory(source.state.named_tensors()))
    receiver.taker.put_back(read_small_state(header))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def contents(value) -> list:
    return [tensor.tolist() for _, tensor in tensors_in(value, "")]


OPTIMIZERS = {
    kind: {
        "SGD": {"momentum": 0.9},
        "LBFGS": {"max_iter": 3},
    }.get(kind, {})
    for kind in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_new_process_gets_the_whole_state_of_every_optimizer_of_torch(kind):
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3)
        return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **OPTIMIZERS[kind])

    (model, optimizer), (other, others) = make(), make()
    x = torch.ones(1, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    source = Registry({"model": model, "optimizer": optimizer})
    move(source, Registry({"model": other, "optimizer": others}))
    assert contents(others.state_dict()) == contents(optimizer.state_dict())
    assert contents(other.state_dict()) == contents(model.state_dict())


SCHEDULERS = [
    kind
    for kind in vars(lr_scheduler).values()
    if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not kind.__name__.startswith("_")
]


@pytest.mark.parametrize(
    "kind", [kind for kind in SCHEDULERS if kind.__name__ != "LRScheduler"], ids=lambda k: k.__name__
)
def test_every_scheduler_of_torch_can_be_registered(kind):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = [lr_scheduler.StepLR(optimizer, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    arguments = {
        "LambdaLR": (lambda step: 0.9**step,),
        "MultiplicativeLR": (lambda step: 0.9,),
        "StepLR": (2,),
        "MultiStepLR": ([2, 4],),
        "ExponentialLR": (0.9,),
        "SequentialLR": (parts, [3]),
        "CosineAnnealingLR": (10,),
        "ChainedScheduler": (),
        "CyclicLR": (0.01, 0.1),
        "CosineAnnealingWarmRestarts": (5,),
        "OneCycleLR": (0.1, 10),
        "SWALR": (0.1,),
    }.get(kind.__name__, ())
    scheduler = kind(parts) if kind.__name__ == "ChainedScheduler" else kind(optimizer, *arguments)
    Registry({"model": model, "optimizer": optimizer, "scheduler": scheduler})


class Lookahead(torch.optim.Optimizer):
    """Has an optimizer inside, and state of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()


def test_optimizers_inside_others_are_found():
    model = nn.Linear(2, 2)
    inner = torch.optim.Adam(model.parameters())
    assert parts_of("opt", inner) == {"opt": inner}
    outer = Lookahead(inner)
    assert parts_of("opt", outer) == {"opt": outer, "opt.inner": inner}


def test_a_wrapper_is_carried_with_what_is_inside_it():
    def make():
        model = nn.Linear(2, 2)
        return model, Lookahead(torch.optim.Adam(model.parameters()))

    (model, outer), (other, others) = make(), make()
    trained(model, outer, torch.ones(1, 2))
    move(Registry({"m": model, "o": outer}), Registry({"m": other, "o": others}))
    assert contents(others.inner.state_dict()) == contents(outer.inner.state_dict())
    assert [s["slow"].tolist() for s in others.state.values()] == [s["slow"].tolist() for s in outer.state.values()]


def test_the_layout_of_a_tensor_is_kept():
    model, other = (nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    optimizer, others = (torch.optim.Adam(m.parameters()) for m in (model, other))
    trained(model, optimizer, torch.ones(1, 2, 4, 4))
    move(Registry({"m": model, "o": optimizer}), Registry({"m": other, "o": others}))
    for one, two in zip(optimizer.state[model.weight].values(), others.state[other.weight].values(), strict=True):
        assert (one.tolist(), one.stride()) == (two.tolist(), two.stride())


def test_bytes_in_another_order_than_ones_own_are_put_in_their_places():
    model, other = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Conv2d(2, 3, 3)
    move(Registry({"m": model}), Registry({"m": other}))
    assert other.weight.tolist() == model.weight.tolist()


class Counting(nn.Linear):
    count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


class Hidden(nn.Linear):
    """Puts into its state_dict what is neither parameter nor buffer."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}table"] = torch.zeros(3)


class FullyShardedDataParallel(nn.Module):
    """By its name, which is all that is asked."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)


class Odd(torch.optim.SGD):
    """Has in its state_dict what cannot be sent."""

    def state_dict(self):
        return {**super().state_dict(), "schedule": lambda step: step}


class Strange(torch.optim.SGD):
    """Keeps state for a tensor that it does not train."""


def strange(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = Strange(model.parameters(), lr=0.1)
    optimizer.state[torch.zeros(5)]["mean"] = torch.zeros(5)
    return optimizer


def sparse() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.eye(2).to_sparse())
    return module


REFUSALS = {
    "register(it=...): 'table' in the module's state_dict() is neither a parameter nor a buffer": lambda: Hidden(2, 2),
    "register(it=...): it is wrapped in FullyShardedDataParallel (FSDP1)": FullyShardedDataParallel,
    "register(it=...): 'inner' is wrapped in FullyShardedDataParallel (FSDP1)": lambda: nn.ModuleDict(
        {"inner": FullyShardedDataParallel()}
    ),
    "register(it=...): 'weight' has no shape yet": lambda: nn.LazyLinear(2),
    "register(it=...): the tensor 'mask' is sparse_coo": sparse,
    "register(it=...): the tensor 'weight' is without memory (on the meta device)": lambda: nn.Linear(
        2, 2, device="meta"
    ),
    "register(it=...): builtins.function at ['schedule'] cannot be carried": lambda: Odd(
        nn.Linear(1, 1).parameters(), 0.1
    ),
    "keeps state for a tensor of shape [5] that is in none of its parameter groups": lambda: strange(nn.Linear(1, 1)),
    "register(it=...): a object has no state_dict and load_state_dict": object,
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_cannot_be_carried_is_refused_by_name(sentence):
    with pytest.raises(UnsupportedStateError) as refused:
        Registry({"it": REFUSALS[sentence]()})
    assert sentence in str(refused.value)
    assert refused.value.ends_job


class Fused(nn.Linear):
    """Its checkpoints have its weight in parts; `more`: and something beside them."""

    def __init__(self, more: bool = False) -> None:
        super().__init__(3, 4, bias=False)
        self.more, self.asked = more, 0
        self.register_state_dict_post_hook(self._split)

    @staticmethod
    def _split(module, told, prefix, _) -> None:
        module.asked += 1
        first, second = told.pop(f"{prefix}weight").chunk(2)
        told |= {f"{prefix}first": first.clone(), f"{prefix}second": second.clone()}
        if module.more:
            told[f"{prefix}table"] = torch.ones(3)


def test_a_parameter_that_checkpoints_have_in_parts_is_carried_as_what_it_is():
    module = Fused()
    wrapped = nn.Sequential(nn.Module())
    wrapped[0]._checkpoint_wrapped_module = module
    registry = Registry({"net": wrapped})
    assert list(registry.state.named_tensors()) == ["net.0._checkpoint_wrapped_module.weight"]
    registry.prove()
    assert module.asked == 1, "what it gives could need all ranks, which are not there later"


def test_what_a_hook_adds_beside_the_parts_of_a_parameter_is_refused():
    with pytest.raises(UnsupportedStateError, match="in the module's state_dict\\(\\) is neither a parameter nor"):
        Registry({"net": nn.Sequential(Fused(more=True))})


def test_extra_state_is_part_of_the_small_state():
    module = Counting(2, 2)
    registry = Registry({"net": module})
    module.count = 7
    small = registry.taker.take(1)
    module.count = 9
    assert registry.taker.changed(small) == {"local net.extra_state"}
    registry.taker.put_back(small)
    assert module.count == 7


def test_a_buffer_is_that_of_its_name_whatever_tensor_it_is():
    module = nn.BatchNorm1d(3)
    registry = Registry({"norm": module})
    module.running_mean = torch.ones(3)
    small = registry.taker.take(1)
    module.double()
    module.running_mean = torch.full((3,), 5.0)
    registry.taker.put_back(small)
    assert module.running_mean.tolist() == [1.0] * 3


class Weights:
    """Has the methods of a StateProvider that have no default, and inherits from nothing."""

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((3,), value)
        self.heard: list[str] = []

    def named_tensors(self):
        return {"tensor": self.tensor}

    def materialise(self, skeleton):
        assert [name for name, _, _, _ in skeleton] == ["tensor"]

    def versions(self):
        return self.tensor._version

    def arrived(self):
        self.heard.append("arrived")


def test_a_provider_need_not_inherit_nor_have_every_method():
    one, other = Weights(1.0), Weights(2.0)
    source, receiver = Registry({"own": one}), Registry({"own": other})
    assert isinstance(one, StateProvider)
    move(source, receiver)
    receiver.state.arrived()
    assert other.tensor.tolist() == one.tensor.tolist()
    assert other.heard == ["arrived"]


def test_what_is_built_of_many_kinds_comes_back_as_it_was():
    value = {
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "queue": deque([1, 2], maxlen=4),
        "ordered": OrderedDict(b=1, a=2),
        "counts": defaultdict(list, {3: [1, 2]}),
        "complex": 1 + 2j,
    }
    back = decode(encode(value))
    assert back == value
    assert [type(item) for item in back.values()] == [type(item) for item in value.values()]
    assert back["queue"].maxlen == 4
    assert back["counts"].default_factory is list


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_an_encoded_tensor_keeps_the_order_of_its_memory(order):
    tensor = torch.arange(24.0).view(2, 3, 4).permute(order)
    back = decode(encode(tensor))
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_a_layout_that_makes_no_sense_is_refused():
    import msgspec

    with pytest.raises(EncodingError):
        decode(
            msgspec.msgpack.encode(
                msgspec.msgpack.Ext(2, msgspec.msgpack.encode(["float32", [2], b"\0" * 8, "cpu", [1, 2]]))
            )
        )


def test_a_value_is_taken_apart_into_tensors_and_put_together_again():
    value = {"a": [torch.ones(2), (1, torch.zeros(1))], 3: {"x": None}}
    tensors = dict(tensors_in(value, "p"))
    assert list(tensors) == ["p/a/0", "p/a/1/1"]
    back = rebuild(structure(value, "p"), lambda path, sharded: tensors[path])
    assert back["a"][0] is value["a"][0]
    assert back["a"][1] == (1, value["a"][1][1])
    assert back[3] == {"x": None}


def test_every_change_of_content_is_seen():
    tensors = {
        "a": torch.zeros(1000),
        "b": torch.zeros(3, 5).t(),
        "empty": torch.zeros(0),
        "one": torch.ones(1).expand(4),
    }
    before, whole = fingerprints(tensors), digest(tensors)
    tensors["a"].data[999] = 1e-30
    assert different(before, fingerprints(tensors)) == ["a"]
    assert digest(tensors) != whole
