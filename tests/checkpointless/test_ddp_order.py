"""What watches the arrival of gradients costs nothing once it has seen them."""

from __future__ import annotations

import types

import torch
from hyperpodrun.checkpointless.ddp import ArrivalOrder


def test_the_order_is_noted_and_no_parameter_keeps_an_empty_dictionary_of_hooks():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    order = ArrivalOrder()
    order.watch(types.SimpleNamespace(module=model, require_backward_grad_sync=True))
    model(torch.ones(1, 2)).sum().backward()
    order.first_step_done()
    assert order.indices is not None
    assert sorted(order.indices) == [0, 1, 2, 3]
    assert order.indices[0] in (2, 3)  # the last layer's gradients are there first
    assert [parameter._post_accumulate_grad_hooks for parameter in model.parameters()] == [None] * 4


def test_a_hook_of_the_users_stays():
    model, seen = torch.nn.Linear(2, 2), []
    model.weight.register_post_accumulate_grad_hook(seen.append)
    order = ArrivalOrder()
    order.watch(types.SimpleNamespace(module=model, require_backward_grad_sync=True))
    order.first_step_done()
    model(torch.ones(1, 2)).sum().backward()
    assert len(seen) == 1
