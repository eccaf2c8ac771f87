"""Loops of frameworks: what they do between two steps, and providers that carry plain values only."""

from __future__ import annotations

import pytest
import torch
from hyperpodrun import CheckpointManager, UnsupportedStateError
from hyperpodrun.checkpointless.caller import NoCaller
from hyperpodrun.checkpointless.state.provider import StateProvider
from hyperpodrun.protocol.plan import Origin, RestorePlan
from torch import nn


class Values(StateProvider):
    """Of a loop: what all ranks share, and this rank's own."""

    def __init__(self) -> None:
        self.shared, self.own = 0, 0

    def named_tensors(self):
        return {}

    def materialise(self, skeleton):
        pass

    def versions(self):
        return 0

    def host_state(self):
        return {"shared": self.shared}

    def load_host_state(self, state):
        self.shared = state["shared"]

    def rank_state(self):
        return {"own": self.own}

    def load_rank_state(self, state):
        self.own = state["own"]


class Restarted(NoCaller):
    def __init__(self, step: int) -> None:
        self.plan = RestorePlan(step, 0, origin=Origin.MEMORY)


class Training:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.manager = CheckpointManager()
        self.model = nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.values = Values()
        self.manager.register(model=self.model, optimizer=self.optimizer, values=self.values)
        self.manager.attach(NoCaller(), 1)
        self.manager.restore()

    def step(self, number: int, **settings: bool) -> None:
        self.manager.begin_step(number, **settings)
        self.optimizer.zero_grad()
        self.values.own = number + 1
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.manager.end_step()

    def restart(self) -> int:
        self.manager.on_restart(None)
        self.manager.attach(Restarted(self.manager.holding().step), 1)
        return self.manager.restore()


def test_what_lies_between_two_steps_has_been_done_where_the_step_has_begun():
    training = Training()
    for number in range(3):
        training.step(number, settled=True)
    assert training.restart() == 3
    assert not training.manager.noted().begun
    assert training.values.own == 3
    torch.rand(1)  # an evaluation
    training.values.own = 30
    drawn = torch.get_rng_state()
    training.manager.begin_step(3, settled=True)
    torch.rand(1)
    training.values.own = 4
    assert training.restart() == 3
    noted = training.manager.noted()
    assert noted.begun
    assert training.values.own == 30
    assert torch.equal(noted.generators["torch"], drawn)


def test_a_settled_step_begins_with_what_the_loop_has_brought_there():
    training = Training()
    training.step(0, settled=True)
    training.restart()
    training.values.own = 10
    torch.manual_seed(5)
    state = torch.get_rng_state()
    training.manager.begin_step(1, settled=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert training.values.own == 10


def test_a_step_that_is_not_settled_refuses_what_has_moved_before_it():
    training = Training()
    training.step(0)
    training.restart()
    training.values.own = 10
    with pytest.raises(UnsupportedStateError, match="moved between restore"):
        training.manager.begin_step(1)


def test_an_optimizer_that_loads_what_it_has_is_not_told_that_this_is_left_out(caplog):
    """As accelerate has it, for tensors to be on its device."""
    training = Training()
    training.step(0, settled=True)
    training.restart()
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    assert not caplog.records
    other = torch.optim.AdamW(training.model.parameters())
    training.optimizer.load_state_dict(other.state_dict())
    assert "optimizer.load_state_dict() after restore() is left out" in caplog.text


def test_a_provider_without_tensors_is_no_reason_to_keep_the_state_before_each_update():
    """Nothing of it can be seen to change; that is not something yet to be seen."""
    training = Training()
    for number in range(2):
        training.step(number, settled=True)
    assert not training.manager._tracker.unseen
    assert not training.manager._tracker.needs_kept, training.manager._tracker.why_kept()
