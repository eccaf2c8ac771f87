"""What an interrupted context manager leaves switched, and what torch's NCCL threads are told while a function runs."""

from __future__ import annotations

import os

import pytest
import torch
from hyperpodrun.inprocess.aborts.nccl import surviving_errors
from hyperpodrun.inprocess.torch_modes import TorchModes


def _everything() -> tuple[object, ...]:
    torch.autocast_increment_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.autocast_decrement_nesting(),
    )


@pytest.mark.parametrize(
    "manager",
    [
        torch.no_grad(),
        torch.autocast("cpu", torch.float16),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ],
    ids=["no_grad", "autocast", "autocast-without-cache"],
)
def test_what_was_entered_and_never_left_is_as_before(manager):
    before = _everything()
    modes = TorchModes.now()
    manager.__enter__()
    assert _everything() != before
    modes.restore()
    assert _everything() == before


def test_weights_cached_by_an_autocast_that_was_never_left_are_not_used_again():
    layer = torch.nn.Linear(4, 4, bias=False)
    modes = TorchModes.now()
    torch.autocast("cpu", torch.bfloat16).__enter__()
    layer(torch.ones(1, 4))  # caches a copy of the weights in bfloat16
    modes.restore()
    with torch.no_grad():
        layer.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 4)).count_nonzero() == 0


@pytest.mark.parametrize(
    ("given", "within"),
    [({}, "0"), ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "0"), ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}, "2")],
    ids=["unset", "tear-down", "clean-up"],
)
def test_torchs_nccl_threads_leave_the_process_alone_for_as_long_as_the_function_runs(monkeypatch, given, within):
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # the user's own wish
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with surviving_errors():
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == within
        assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "0"
        assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert dict(os.environ) == before
