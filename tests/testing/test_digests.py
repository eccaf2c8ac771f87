"""Digests are equal exactly where state is."""

from __future__ import annotations

import numpy
import pytest
import torch
from hyperpodrun.testing.digests import digests, of_tensor

MATRIX = torch.arange(6.0).view(2, 3)


def test_how_a_tensor_lies_in_memory_is_no_part_of_it():
    assert of_tensor(MATRIX) == of_tensor(MATRIX.t().contiguous().t()) == of_tensor(torch.stack([MATRIX] * 2)[1])


@pytest.mark.parametrize(
    "other",
    [MATRIX.view(3, 2), MATRIX.view(torch.int32), MATRIX.double(), torch.nextafter(MATRIX, MATRIX + 1), MATRIX[:1]],
    ids=["shape", "type", "width", "last bit", "part"],
)
def test_shape_type_and_every_bit_are(other):
    assert of_tensor(other) != of_tensor(MATRIX)


def test_minus_zero_and_not_a_number_are_compared_by_their_bits():
    assert of_tensor(torch.tensor([0.0])) != of_tensor(torch.tensor([-0.0]))
    assert of_tensor(torch.ones(4)[::4]) == of_tensor(torch.ones(1))  # one element, of another stride
    assert of_tensor(torch.tensor([float("nan")])) == of_tensor(torch.tensor([float("nan")]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(True),
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.ones(2, requires_grad=True),
        torch.ones(2, device="meta"),
    ],
    ids=lambda tensor: f"{tensor.dtype}, {tensor.layout}, {tuple(tensor.shape)}",
)
def test_every_kind_of_tensor_has_one(tensor):
    assert of_tensor(tensor) == of_tensor(tensor.clone())


def test_a_state_has_a_digest_for_everything_in_it_whatever_the_order_of_its_keys():
    state = {"step": 3, "moments": [torch.ones(2), torch.zeros(2)], "name": "adam", "array": numpy.arange(3)}
    found = digests("optimizer", state)
    assert found == digests("optimizer", dict(reversed(state.items())))
    assert {"optimizer.step", "optimizer.moments.0", "optimizer.moments.1", "optimizer.array"} <= found.keys()
    changed = digests("optimizer", {**state, "moments": [torch.ones(2), torch.ones(2)]})
    assert [name for name in found if found[name] != changed[name]] == ["optimizer.moments.1"]
    assert digests("x", 1) != digests("x", 1.0) != digests("x", True)
