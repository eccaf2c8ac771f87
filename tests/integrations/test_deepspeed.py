"""DeepSpeed is refused in one sentence: where it is registered, and where it is found in use. Without the package: its
classes are known by their module's name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hyperpodrun import CheckpointManager, UnsupportedStateError
from hyperpodrun.protocol.deepspeed import DeepSpeedInUse, refuse_in_use
from torch.optim.optimizer import register_optimizer_step_pre_hook

INSTEAD = "train with FSDP2 (torch.distributed.fsdp.fully_shard), or take HPWrapper away"


def made(monkeypatch, module: str, source: str) -> types.ModuleType:
    """A module of DeepSpeed's name."""
    found = types.ModuleType(module)
    exec(source, vars(found))
    for name in ("deepspeed", module):
        monkeypatch.setitem(sys.modules, name, found)
    return found


@pytest.fixture
def engine(monkeypatch):
    """As deepspeed.runtime.engine: a module that has an optimizer step."""
    return made(
        monkeypatch,
        "deepspeed.runtime.engine",
        """
import torch
class DeepSpeedEngine(torch.nn.Module):
    def __init__(self, module, optimizer):
        super().__init__()
        self.module, self.optimizer = module, optimizer
    def step(self):
        self.optimizer.step()
class DeepSpeedZeroOptimizer:
    param_groups = []
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass
class WarmupLR(DeepSpeedZeroOptimizer):
    pass
""",
    )


def an_engine(engine):
    model = torch.nn.Linear(2, 2)
    return engine.DeepSpeedEngine(model, torch.optim.AdamW(model.parameters()))


def test_an_engine_and_its_optimizer_cannot_be_registered(engine):
    class Mine(engine.DeepSpeedEngine):
        pass

    targets = {
        "engine": an_engine(engine),
        "inside": torch.nn.Sequential(an_engine(engine)),
        "mine": Mine(torch.nn.Linear(2, 2), None),
        "optimizer": engine.DeepSpeedZeroOptimizer(),
    }
    for name, target in targets.items():
        with pytest.raises(UnsupportedStateError) as refused:
            CheckpointManager().register(**{name: target})
        assert str(refused.value).startswith(f"register({name}=...): a ")
        assert INSTEAD in str(refused.value)
        assert "belongs to DeepSpeed" in str(refused.value)


def test_its_schedulers_and_kernels_are_no_engine(monkeypatch):
    scheduler = made(monkeypatch, "deepspeed.runtime.lr_schedulers", "class WarmupLR:\n pass").WarmupLR()
    scheduler.state_dict, scheduler.load_state_dict = dict, lambda state: None
    adam = made(monkeypatch, "deepspeed.ops.adam", "import torch\nclass FusedAdam(torch.optim.AdamW):\n pass").FusedAdam
    model = torch.nn.Linear(2, 2)
    CheckpointManager().register(model=model, optimizer=adam(model.parameters()), scheduler=scheduler)


def test_an_engine_in_use_is_found_when_it_has_an_optimizer_step(engine):
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    hook = register_optimizer_step_pre_hook(lambda *_: refuse_in_use())
    try:
        with pytest.raises(DeepSpeedInUse, match="the function under HPWrapper trains with DeepSpeed") as refused:
            engine.DeepSpeedEngine(model, optimizer).step()
        assert torch.equal(model.weight, before)
        assert INSTEAD in str(refused.value)
        optimizer.step()  # of a script that only imports it
    finally:
        hook.remove()


WORKER = """
import sys, types, torch
module = types.ModuleType("deepspeed.runtime.engine")
exec("def step(optimizer):\\n optimizer.step()", vars(module))
sys.modules["deepspeed"] = module
from hyperpodrun import HPWrapper

@HPWrapper()
def main():
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    module.step(torch.optim.SGD(model.parameters(), lr=0.1))

main()
"""


def test_a_job_that_trains_with_it_ends_at_once_and_says_what_to_do(run, script):
    finished = run("--standalone", "--inprocess-restart", script(WORKER))
    assert finished.returncode == 93, finished.output
    assert not finished.recoveries
    assert INSTEAD in finished.stderr
