"""A batch file gives back what was written, or says that it does not."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hyperpodrun.dataloader.errors import BatchTypeError, CacheCorruptError
from hyperpodrun.dataloader.storing import format
from hyperpodrun.dataloader.storing.encryption import Sealer
from hypothesis import given, settings
from hypothesis import strategies as st

LABEL = format.Label("stream", 3, 14)
DTYPES = [*format._DTYPES, torch.complex128]


def write(path: Path, batch: Any, state: Any = None, sealer: Sealer | None = None) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        assert format.write(fd, LABEL, batch, state, sealer) == path.stat().st_size
    finally:
        os.close(fd)


def read(path: Path, label: format.Label = LABEL, sealer: Sealer | None = None) -> format.Loaded:
    fd = os.open(path, os.O_RDONLY)
    try:
        return format.read(fd, label, sealer)
    finally:
        os.close(fd)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.contiguous().view(-1).view(torch.uint8).tolist()
            == right.contiguous().view(-1).view(torch.uint8).tolist()
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float):
        return left == right or (left != left and right != right)
    return bool(left == right)


TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    ).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 1000),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(), st.binary(), TENSORS
)
BATCHES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(0, 9)), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(BATCHES, st.one_of(st.none(), BATCHES))
def test_any_batch_comes_back(tmp_path_factory, batch, state):
    path = tmp_path_factory.getbasetemp() / "batch.safetensors"
    write(path, batch, state)
    loaded = read(path)
    assert same(batch, loaded.batch())
    assert same(state, loaded.state())


def test_numpy_and_named_things_come_back(tmp_path):
    pair = collections.namedtuple("Pair", "left right")
    batch = {"a": np.arange(6).reshape(2, 3), "s": np.float32(1.5), "p": pair(1, 2), "o": collections.OrderedDict(x=1)}
    batch |= {"t": np.array(["a", "bc"]), "i": 1 << 64, "k": {("x", 1): torch.ones(2)}}
    write(tmp_path / "b", batch)
    back = read(tmp_path / "b").batch()
    assert isinstance(back["a"], np.ndarray)
    assert (back["a"] == batch["a"]).all()
    assert type(back["s"]) is np.float32
    assert back["p"] == batch["p"]
    assert back["p"].right == 2
    assert type(back["o"]) is collections.OrderedDict
    assert back["t"].tolist() == ["a", "bc"]
    assert back["i"] == 1 << 64
    assert back["k"]["x", 1].tolist() == [1, 1]


def test_strided_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    batch = [base.t(), base[::2, 1::3], base.expand(2, 4, 6), torch.tensor([1 + 2j]).conj(), base.requires_grad_()]
    write(tmp_path / "b", batch)
    assert all(torch.equal(left, right) for left, right in zip(batch, read(tmp_path / "b").batch(), strict=True))


def test_any_safetensors_reader_opens_it(tmp_path):
    write(tmp_path / "b.safetensors", {"x": torch.arange(5), "y": [torch.ones(2, 3, dtype=torch.bfloat16)]})
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert sorted(tensors) == ["0", "1", "~batch", "~xxh3"]
    assert torch.equal(tensors["0"], torch.arange(5))
    assert torch.equal(tensors["1"], torch.ones(2, 3, dtype=torch.bfloat16))


def test_tensors_lie_in_the_file_and_are_aligned(tmp_path):
    write(tmp_path / "b", [torch.ones(3, dtype=torch.int8), torch.ones(5, dtype=torch.float64), torch.ones(1)])
    batch = read(tmp_path / "b").batch()
    for tensor in batch:
        assert tensor.data_ptr() % tensor.element_size() == 0
    before = (tmp_path / "b").read_bytes()
    batch[1].zero_()
    assert (tmp_path / "b").read_bytes() == before  # a change is the reader's own


class Odd(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"x": [object()]}, r"batch\['x'\]\[0\] is builtins.object"),
        (Odd(), "test_format.Odd"),
        (torch.nn.Parameter(torch.ones(1)), "torch.nn.parameter.Parameter"),
        (torch.ones(2).to_sparse(), "a sparse, nested or quantized tensor"),
        (torch.ones(1, device="meta"), "a tensor on meta"),
        (np.array([object()]), "a numpy array that holds objects"),
        ({object(): 1}, "a key of type builtins.object"),
        (lambda: None, "builtins.function"),
    ],
)
def test_anything_else_is_refused_with_its_type_and_place(tmp_path, batch, what):
    with pytest.raises(BatchTypeError, match=what):
        write(tmp_path / "b", batch)


@pytest.mark.parametrize("sealed", [False, True])
def test_no_flipped_bit_and_no_missing_byte_is_overlooked(tmp_path, sealed):
    sealer = Sealer(bytes(32)) if sealed else None
    path = tmp_path / "b"
    write(path, {"x": torch.arange(40), "y": "text"}, sealer=sealer)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CacheCorruptError):
            read(path, sealer=sealer)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CacheCorruptError):
            read(path, sealer=sealer)
    path.write_bytes(content + b"\0")
    with pytest.raises(CacheCorruptError):
        read(path, sealer=sealer)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_file_in_anothers_place_is_refused(tmp_path, sealed):
    sealer = Sealer(bytes(32)) if sealed else None
    write(tmp_path / "b", [1], sealer=sealer)
    for label in (format.Label("stream", 3, 15), format.Label("stream", 4, 14), format.Label("older", 3, 14)):
        with pytest.raises(CacheCorruptError):
            read(tmp_path / "b", label, sealer)


def test_sealed_files_need_their_key(tmp_path):
    write(tmp_path / "b", [torch.arange(3)], sealer=Sealer(bytes(32)))
    assert read(tmp_path / "b", sealer=Sealer(bytes(32))).batch()[0].tolist() == [0, 1, 2]
    with pytest.raises(CacheCorruptError, match="another key"):
        read(tmp_path / "b", sealer=Sealer(b"1" * 32))
    with pytest.raises(CacheCorruptError):
        read(tmp_path / "b")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_not_crashed_on(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError):
        read(path)
