"""`Memory` brings every tensor over, whatever its dtype and its layout, and touches nothing beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hyperpodrun.checkpointless.errors import RestoreError
from hyperpodrun.checkpointless.transfer import remote_memory
from hyperpodrun.checkpointless.transfer.buckets import Memory, cut, flat_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from layouts import DTYPES, LAYOUTS, bits, make

specs = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.sampled_from(LAYOUTS))
states = st.lists(specs, min_size=1, max_size=4)


def two_states(state):
    """Source and receiver by name, of the same layout and with other bytes; and the receiver's memory."""
    source = {str(at): make(*spec, seed=at)[0] for at, spec in enumerate(state)}
    made = {str(at): make(*spec, seed=100 + at) for at, spec in enumerate(state)}
    return source, {name: tensor for name, (tensor, _) in made.items()}, {name: row for name, (_, row) in made.items()}


def check(state, source, receiver, memory) -> None:
    """The tensors are the source's, and what lies between their elements is what it was."""
    for at, (name, tensor) in enumerate(source.items()):
        assert bits(receiver[name]) == bits(tensor)
        expected, everything = make(*state[at], seed=100 + at)
        if state[at][2] in ("dense", "reversed", "sliced", "stepped", "shifted"):
            expected.copy_(tensor)
            assert memory[name].tolist() == everything.tolist()


@settings(deadline=None)
@given(states)
def test_rows_are_as_long_as_the_elements_and_come_in_the_order_of_the_tensors(state):
    source, _, _ = two_states(state)
    rows = Memory(source).rows
    assert list(rows) == list(source)
    for name, row in rows.items():
        assert (row.dtype, row.dim(), row.numel()) == (torch.uint8, 1, source[name].numel() * source[name].itemsize)


@settings(deadline=None)
@given(states)
def test_what_a_memory_is_filled_from_another_with_lands_in_its_tensors(state):
    source, receiver, memory = two_states(state)
    Memory(receiver).fill_from(Memory(source))
    check(state, source, receiver, memory)


@settings(deadline=None)
@given(states)
def test_what_is_read_from_memory_lands_in_the_tensors(state):
    source, receiver, memory = two_states(state)
    there, here = Memory(source), Memory(receiver)
    read_own_memory(there, here)
    here.land()
    check(state, source, receiver, memory)


@settings(deadline=None)
@given(states, st.integers(1, 64))
def test_buckets_bring_every_layout_and_the_checksums_agree(state, limit):
    source, receiver, memory = two_states(state)
    there, here = Memory(source), Memory(receiver)
    for bucket in cut(there.sizes(), limit):
        data = torch.empty(bucket.nbytes, dtype=torch.uint8)
        there.gather(bucket, data)
        here.scatter(bucket, data)
        assert here.checksum(bucket).tolist() == there.checksum(bucket).tolist()
    here.land()
    check(state, source, receiver, memory)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 4), (2, 3, 4, 5)], ids=str)
def test_the_row_of_a_dense_tensor_is_its_own_memory(shape):
    for layout in ("dense", "reversed"):
        tensor, everything = make(torch.float32, shape, layout, 1)
        row = flat_bytes(tensor)
        assert row is not None
        assert row.data_ptr() == everything.data_ptr()
        assert row.tolist() == everything.tolist()


def test_channels_last_is_moved_in_its_own_order():
    tensor = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert Memory({"a": tensor}).rows["a"].data_ptr() == tensor.data_ptr()


def test_a_parameter_that_is_a_slice_keeps_its_layout_and_its_neighbours():
    big = torch.zeros(6, 8)
    parameter = torch.nn.Parameter(big[:, :4])
    Memory({"a": parameter}).fill_from(Memory({"a": torch.ones(6, 4)}))
    assert parameter.stride() == (8, 1)
    assert torch.equal(big, torch.cat([torch.ones(6, 4), torch.zeros(6, 4)], dim=1))


def test_a_sparse_tensor_is_refused_by_name():
    with pytest.raises(RestoreError, match=r"embedding.*strided"):
        Memory({"embedding": torch.eye(3).to_sparse()})


def read_own_memory(there: Memory, here: Memory) -> None:
    pairs = zip(there.rows.values(), here.rows.values(), strict=True)
    remote_memory.read_all(
        os.getpid(), [(one.data_ptr(), other.data_ptr(), one.numel()) for one, other in pairs], threads=2
    )
