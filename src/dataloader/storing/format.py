"""The file of one batch: a safetensors file that carries its structure, its place and a checksum.

Any safetensors reader opens it. Beside the batch's tensors, named "0", "1", ..., there are two of bytes:

    "~batch"  msgpack of `Label` (which stream, which batch) and the structure (`protocol/values/`)
    "~xxh3"   the last 16 bytes: XXH3-128 of everything before them

The order of tensors is that of their element size, so that each is aligned, and the data begin at a multiple of 64.
XXH3 runs at the memory's speed; the CRC of the standard library would take longer than to make a tokenised batch.
safetensors' own functions would copy each batch twice on the way out; here it goes from where it was collated to the
page cache in one `writev`, and is mapped on the way in. The mapping is private and writable: a training loop may
change its batch in place, and nobody else sees it.

With a key, the whole file is the one tensor of a safetensors file: AES-256-GCM (`encryption.py`), then mapped no more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import msgspec
import torch
import xxhash

from ...protocol import values
from ..errors import BatchTypeError, CacheCorruptError
from .encryption import Sealer

VERSION = 2
_ALIGNMENT = 64
_DIGEST_BYTES = 16
_MAX_HEADER_BYTES = 16 << 20
_MAX_BUFFERS = 512  # of one writev; the kernel takes 1024

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_METADATA = {"format": "hyperpodrun.batch", "version": str(VERSION)}


class Label(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose batch a file is. `stream` is its directory's mark: two jobs never share one."""

    stream: str
    epoch: int
    index: int


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Contents(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    label: Label
    structure: bytes
    state: bytes | None
    """The structure of the source's own state after this batch, where it has one."""


_encode_json = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(_Entry).decode
_encode_contents = msgspec.msgpack.Encoder().encode
_decode_contents = msgspec.msgpack.Decoder(_Contents).decode


class Loaded:
    """What a file held."""

    __slots__ = ("_contents", "_tensors")

    def __init__(self, contents: _Contents, tensors: list[torch.Tensor]) -> None:
        self._contents = contents
        self._tensors = tensors

    def batch(self) -> Any:
        return values.put_together(self._contents.structure, self._tensors)

    @property
    def has_state(self) -> bool:
        return self._contents.state is not None

    def state(self) -> Any:
        """The source's own state after this batch; None if it has none."""
        return None if self._contents.state is None else values.put_together(self._contents.state, self._tensors)


def write(fd: int, label: Label, batch: Any, state: Any = None, sealer: Sealer | None = None) -> int:
    """Writes a batch to an empty file; gives its size in bytes. Raises BatchTypeError, OSError (no space, ...)."""
    buffers, keep = _buffers(label, batch, state)
    if sealer is not None:
        buffers = sealer.seal(buffers, _encode_contents(label))
    total = sum(len(buffer) for buffer in buffers)
    write_all(fd, buffers)
    del keep
    return total


def read(fd: int, label: Label, sealer: Sealer | None = None) -> Loaded:
    """Maps a file and checks all of it. Raises CacheCorruptError when it is not the batch of that label."""
    size = os.fstat(fd).st_size
    if size < 8 + _DIGEST_BYTES:
        raise CacheCorruptError(f"{size} bytes are too few for a batch")
    memory: Any = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if sealer is not None:
        memory = sealer.open(memory, _encode_contents(label))
        size = len(memory)
    view = memoryview(memory)
    if xxhash.xxh3_128_digest(view[: size - _DIGEST_BYTES]) != view[size - _DIGEST_BYTES :]:
        raise CacheCorruptError("its checksum is not that of its content")
    try:
        loaded = _parse(memory, view, size)
    except (msgspec.MsgspecError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CacheCorruptError(f"{type(error).__name__}: {error}") from None
    if loaded._contents.label != label:
        raise CacheCorruptError(f"it is {loaded._contents.label}, not {label}")
    return loaded


def _buffers(label: Label, batch: Any, state: Any) -> tuple[list[Any], list[torch.Tensor]]:
    tensors: list[torch.Tensor] = []
    structure = _take_apart("batch", batch, tensors)
    packed_state = None if state is None else _take_apart("the loader's state", state, tensors)
    contents = _encode_contents(_Contents(label, structure, packed_state))
    header: dict[str, Any] = {"__metadata__": _METADATA}
    buffers: list[Any] = [b""]
    offset = 0
    for number in sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size()):
        tensor = tensors[number]
        shape = list(tensor.shape)
        if tensor.dtype is torch.complex128:  # safetensors has no name for it: two doubles, told by its name
            name, dtype = f"{number}c", "F64"
            shape.append(2)
        else:
            name, dtype = str(number), _DTYPES.get(tensor.dtype, "")
            if not dtype:
                raise BatchTypeError(f"a tensor of {tensor.dtype} cannot be in a cached batch")
        end = offset + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        if end > offset:
            buffers.append((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        offset = end
    for name, length in (("~batch", len(contents)), ("~xxh3", _DIGEST_BYTES)):
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": (offset, offset + length)}
        offset += length
    text = _encode_json(header)
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    buffers[0] = len(text).to_bytes(8, "little") + text
    buffers.append(contents)
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    buffers.append(digest.digest())
    return buffers, tensors


def _take_apart(what: str, value: Any, tensors: list[torch.Tensor]) -> bytes:
    try:
        return values.take_apart(value, tensors)
    except values.NotPlainError as error:
        raise BatchTypeError(
            f"{what}{error.where} is {error.what}: a cached batch can hold tensors on the CPU, numpy arrays, None, "
            "bool, int, float, str, bytes, and lists, tuples and dicts of these; make it one of them in the collate "
            "function"
        ) from None


def write_all(fd: int, buffers: list[Any]) -> None:
    """Writes buffers, one after the other, to the end. Raises OSError."""
    pending = [memoryview(buffer).cast("B") for buffer in buffers]
    while pending:
        written = os.writev(fd, pending[:_MAX_BUFFERS])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def _parse(memory: Any, view: memoryview, size: int) -> Loaded:
    length = int.from_bytes(view[:8], "little")
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes")
    header = _decode_header(view[8 : 8 + length])
    metadata = msgspec.json.decode(header.pop("__metadata__"), type=dict[str, str])
    if metadata != _METADATA:
        raise ValueError(f"it says of itself {metadata}, not {_METADATA}")
    begin = 8 + length
    place = _decode_entry(header.pop("~batch")).data_offsets
    header.pop("~xxh3")
    contents = _decode_contents(view[begin + place[0] : begin + place[1]])
    tensors: dict[int, torch.Tensor] = {}
    for name, raw in header.items():
        entry = _decode_entry(raw)
        number = int(name.removesuffix("c"))
        tensors[number] = _tensor(memory, size, begin, entry)
        if name.endswith("c"):
            tensors[number] = torch.view_as_complex(tensors[number])
    return Loaded(contents, [tensors[i] for i in range(len(tensors))])


def _tensor(memory: Any, size: int, begin: int, entry: _Entry) -> torch.Tensor:
    dtype = _BY_NAME[entry.dtype]
    count = 1
    for length in entry.shape:
        if length < 0:
            raise ValueError(f"a shape of {entry.shape}")
        count *= length
    first, last = entry.data_offsets
    if not 0 <= first <= last or begin + last > size or last - first != count * dtype.itemsize:
        raise ValueError(f"{entry.shape} of {entry.dtype} at {entry.data_offsets} in a file of {size} bytes")
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin + first).view(entry.shape)
