"""State that is not plain PyTorch's: a user's own provider, and several providers as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hyperpodrun.checkpointless.errors import RestoreError
from hyperpodrun.checkpointless.state.registry import Registry
from hyperpodrun.checkpointless.step.rollback import KeptState
from hyperpodrun.checkpointless.step.tracker import Learned
from hyperpodrun.checkpointless.transfer.buckets import Memory
from hyperpodrun.checkpointless.transfer.header import build, describe

WORKER = Path(__file__).parent / "workers" / "provider.py"
COMMAND = ("--nproc-per-node=2", "--inprocess-restart", WORKER)


@pytest.fixture(scope="module")
def undisturbed():
    return {}


@pytest.mark.parametrize("options", [[], ["--offload"]], ids=" ".join)
def test_a_provider_of_ones_own_is_restored_like_any_other(run, undisturbed, options):
    if not undisturbed:
        undisturbed["digest"] = run(*COMMAND).digest
    finished = run(*COMMAND, *options, "--fault", "kill:0:2", "--fault", "raise:1:4", "--fault", "kill:1:6")
    assert finished.returncode == 0, finished.output
    assert finished.digest == undisturbed["digest"]
    assert {row["state"] for row in finished.recoveries} == {"memory"}


class Part:
    """A provider of one tensor."""

    def __init__(self, value: float, note: str) -> None:
        self.tensor = torch.full((3,), value)
        self.note = note

    def shard(self):
        return self.note

    def named_tensors(self):
        return {"weight": self.tensor}

    def skeleton(self):
        return [("weight", "float32", (3,), "cpu")]

    def materialise(self, skeleton):
        if list(skeleton) != self.skeleton():
            raise RestoreError(f"not this part's: {skeleton}")

    def host_state(self):
        return {"note": self.note}

    def load_host_state(self, state):
        self.note = state["note"]

    def versions(self):
        return self.tensor._version

    def quiesce(self): ...

    def reset(self): ...

    def drop(self): ...


def trained(value: float, note: str) -> Registry:
    """A module with its optimizer after a step, and two parts beside them whose names could be taken for its own."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.full((2,), value)).sum().backward()
    optimizer.step()
    parts = {"a": Part(value, note), "b": Part(value + 1, f"{note}{note}")}
    return Registry({"model": model, "optimizer": optimizer, **parts})


def test_several_providers_move_as_one_state():
    source, receiver = trained(1.0, "x"), trained(5.0, "")
    assert source.state.shard() == "a::x,b::xx"
    header = describe(source, source.taker.take(7), Learned(), {})
    memory = build(receiver, header, 7)
    memory.fill_from(Memory(source.state.named_tensors()))
    assert {name: t.tolist() for name, t in receiver.state.named_tensors().items()} == {
        name: t.tolist() for name, t in source.state.named_tensors().items()
    }
    assert (receiver.objects["a"].note, receiver.objects["b"].note) == ("x", "xx")


def test_a_change_of_any_part_is_seen():
    registry = trained(1.0, "x")
    before = registry.state.versions()
    registry.objects["b"].tensor.add_(1)
    assert registry.state.versions() != before


def test_what_is_no_tensor_is_rolled_back_with_the_tensors():
    registry, kept = trained(1.0, "x"), KeptState()
    kept.keep(3, registry.state)
    registry.objects["a"].note = "later"
    registry.objects["a"].tensor.zero_()
    kept.go_back(3, registry.state)
    assert registry.objects["a"].note == "x"
    assert registry.objects["a"].tensor.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RestoreError, match="is of step 3, not of step 4"):
        kept.go_back(4, registry.state)
