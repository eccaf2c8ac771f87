"""Values as bytes: what comes back, what is refused, and that garbage is an error and nothing else."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections import Counter, OrderedDict

import numpy
import pytest
import torch
from hyperpodrun.protocol.values import EncodingError, decode, encode, put_together, take_apart
from hypothesis import given, settings
from hypothesis import strategies as st

ROUND: list[object] = []
ROUND.append(ROUND)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(-(2**63), 2**63), inner)
    ),
    max_leaves=20,
)


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(PLAIN)
def test_plain_values_come_back_with_their_types(value):
    back = decode(encode(value))
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        Counter({3: 2, 9: 1}),
        OrderedDict([("b", 1), ("a", [2])]),
        {1, 2, 3},
        frozenset({"x"}),
        random.getstate(),
        10**40,
        {(1, "a"): 2, 10**40: 3, None: 4},
        float("inf"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_come_back(value):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_tensors_come_back(dtype, shape):
    value = torch.ones(shape, dtype=dtype)
    back = decode(encode({"tensor": value}))["tensor"]
    assert back.dtype == dtype
    assert torch.equal(back, value)


def test_numpy_arrays_and_scalars_come_back():
    back = decode(encode([numpy.arange(6, dtype=numpy.int16).reshape(2, 3), numpy.float64(0.5)]))
    assert back[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back[0].dtype == numpy.int16
    assert type(back[1]) is numpy.float64


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"scheduler": {"lr": lambda step: step}}, "function at ['scheduler']['lr']"),
        ([1, [object()]], "object at [1][0]"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (numpy.array([object()]), "holds objects"),
        ({"x": {object(): 3}}, "a key of type builtins.object at ['x']"),
        ({torch.ones(1): 3}, "a key of type torch.Tensor"),
        (torch.ones(1, device="meta"), "a tensor on meta"),
        (numpy.ma.array([1, 2], mask=[True, False]), "numpy.ma.MaskedArray"),
        (numpy.zeros(1, dtype=[("a", "i4")]), "a numpy array of records"),
        (ROUND, "what refers to itself"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value,
)
def test_what_has_no_encoding_is_named(value, where):
    with pytest.raises(EncodingError, match=where.replace("[", r"\[").replace("]", r"\]")):
        encode(value)


def test_a_conjugate_comes_back_as_it_looks():
    value = torch.tensor([1 + 2j]).conj()
    assert torch.equal(decode(encode(value)), value)
    assert decode(encode(value.imag)).item() == -2, "a single element, of stride 2, negated"


def test_plain_values_need_no_torch():
    text = "import sys; from hyperpodrun.protocol.values import decode, encode; "
    text += "assert decode(encode((1, {2}))) == (1, {2}); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_tensors_laid_apart_are_the_very_ones():
    tensors: list[torch.Tensor] = [torch.zeros(1)]
    value = ({"a": torch.arange(3)}, numpy.arange(2), torch.ones(1), "x")
    structure = take_apart(value, tensors)
    assert len(tensors) == 4
    back = put_together(structure, tensors)
    assert back[0]["a"] is tensors[1]
    back[1][0] = 7
    assert tensors[2].tolist() == value[1].tolist() == [7, 1], "one memory"
    with pytest.raises(EncodingError):
        put_together(structure, tensors[:2])


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_an_error_and_nothing_else(data):
    with contextlib.suppress(EncodingError):
        decode(data)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_changed_bytes_are_an_error_or_data(position, byte):
    data = bytearray(encode({"a": torch.arange(4), "b": (1, [numpy.ones(3)]), "c": Counter("ab"), "d": 10**30}))
    data[position % len(data)] = byte
    with contextlib.suppress(EncodingError):
        decode(bytes(data))
