"""The TCPStore wire protocol of torch: bytes to typed requests, and replies to bytes.

Owns the framing and the size limits. It never does I/O, never looks at what a key means, and never trusts a
length it was sent. `server.py` feeds it; `keyspace.py` answers the requests with the encoders below.

Every request starts with one byte, the query type. What follows is a fixed row of fields, or a count and
then that row so many times; `_SHAPES` is that table and the only place that knows it. Integers are
little-endian; a key or a value is a u64 length and the bytes. VALIDATE, SET, APPEND, MULTI_SET and
QUEUE_PUSH have no answer.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import requests as rq
from .repeated import Repeated

VALIDATION_MAGIC = 0x3C85F7CE

# The answer to a WAIT or a BARRIER.
STOP_WAITING = b"\x00"
WAIT_CANCELED = b"\x01"
# The answer to a CHECK.
READY = b"\x00"
NOT_READY = b"\x01"


class QueryType(enum.IntEnum):
    """First byte of a request; torch has only ever appended to this list."""

    VALIDATE = 0
    SET = 1
    COMPARE_SET = 2
    GET = 3
    ADD = 4
    CHECK = 5
    WAIT = 6
    GETNUMKEYS = 7
    DELETE_KEY = 8
    APPEND = 9
    MULTI_GET = 10
    MULTI_SET = 11
    CANCEL_WAIT = 12
    PING = 13
    QUEUE_PUSH = 14
    QUEUE_POP = 15
    QUEUE_LEN = 16
    LIST_KEYS = 17
    BARRIER = 18


class WireError(Exception):
    """The peer sent something that is not this protocol, or too much of it; the message is one sentence."""


@dataclass(frozen=True)
class Limits:
    """What one connection may ask for. `request` bounds the keys and values of one request, or answer, together,
    `store` all that a store holds for all of them."""

    key: int = 64 << 10
    value: int = 256 << 20
    count: int = 1 << 20
    request: int = 513 << 20
    store: int = 1 << 30


# A field is a number of this format, or a key or a value (its name, for messages).
_Field = struct.Struct | str
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_U64 = struct.Struct("<Q")


def _validate(fields: list[Any]) -> rq.Validate:
    if fields[0] != VALIDATION_MAGIC:
        raise WireError(f"the connection opened with {fields[0]:#010x} in place of the TCPStore magic number")
    return rq.Validate()


def _plain(kind: Callable[..., rq.Request]) -> Callable[[list[Any]], rq.Request]:
    return lambda fields: kind(*fields)


def _keys(kind: Callable[[tuple[bytes, ...]], rq.Request]) -> Callable[[list[Any]], rq.Request]:
    return lambda fields: kind(tuple(fields))


@dataclass(frozen=True)
class _Shape:
    build: Callable[[list[Any]], rq.Request]
    row: tuple[_Field, ...] = ()
    counted: bool = False


_SHAPES: dict[int, _Shape] = {
    QueryType.VALIDATE: _Shape(_validate, (_U32,)),
    QueryType.SET: _Shape(_plain(rq.Set), ("key", "value")),
    QueryType.COMPARE_SET: _Shape(_plain(rq.CompareSet), ("key", "value", "value")),
    QueryType.GET: _Shape(_plain(rq.Get), ("key",)),
    QueryType.ADD: _Shape(_plain(rq.Add), ("key", _I64)),
    QueryType.CHECK: _Shape(_keys(rq.Check), ("key",), counted=True),
    QueryType.WAIT: _Shape(_keys(rq.Wait), ("key",), counted=True),
    QueryType.GETNUMKEYS: _Shape(_plain(rq.NumKeys)),
    QueryType.DELETE_KEY: _Shape(_plain(rq.DeleteKey), ("key",)),
    QueryType.APPEND: _Shape(_plain(rq.Append), ("key", "value")),
    QueryType.MULTI_GET: _Shape(_keys(rq.MultiGet), ("key",), counted=True),
    QueryType.MULTI_SET: _Shape(
        lambda fields: rq.MultiSet(tuple(zip(fields[::2], fields[1::2], strict=True))),
        ("key", "value"),
        counted=True,
    ),
    QueryType.CANCEL_WAIT: _Shape(_plain(rq.CancelWait)),
    QueryType.PING: _Shape(_plain(rq.Ping), (_U32,)),
    QueryType.QUEUE_PUSH: _Shape(_plain(rq.QueuePush), ("key", "value")),
    QueryType.QUEUE_POP: _Shape(_plain(rq.QueuePop), ("key",)),
    QueryType.QUEUE_LEN: _Shape(_plain(rq.QueueLen), ("key",)),
    QueryType.LIST_KEYS: _Shape(_plain(rq.ListKeys)),
    QueryType.BARRIER: _Shape(_plain(rq.Barrier), ("key", _I64)),
}


class RequestParser:
    """Bytes in, requests out, for one connection.

    Every field is read once, however the bytes are cut, so slow delivery costs nothing and a large value is
    copied once. After a `WireError` the stream has lost its meaning: close it.
    """

    def __init__(self, limits: Limits, repeated: Repeated | None = None) -> None:
        self._limits = limits
        self._repeated = Repeated() if repeated is None else repeated
        self._buffer = bytearray()
        self._at = 0
        self._validated = False
        self._begin()

    def _begin(self) -> None:
        self._shape: _Shape | None = None
        self._code = -1
        self._fields: list[Any] = []
        self._expected = -1  # fields of this request; -1 while its count is not known
        self._length = -1  # of the key or value being read; -1 while not known
        self._size = 0  # keys and values of this request together

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet part of a field."""
        return len(self._buffer) - self._at

    @property
    def held(self) -> int:
        """Bytes fed of which no request has been made yet."""
        return len(self._buffer) - self._at + self._size - max(self._length, 0)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take in bytes; call `next_request` until it is dry before the next feed, or they pile up."""
        self._buffer += data

    def next_request(self) -> rq.Request | None:
        """The next complete request, or None until more is fed."""
        if self._shape is None:
            if self._at == len(self._buffer):
                self._compact()
                return None
            if self._validated:
                known = self._repeated.find(self._buffer, self._at)
                if known is not None:
                    if known.size <= self.buffered:
                        self._at += known.size
                        return known.request
                    self._compact()  # so far it is that one: the rest is on its way
                    return None
            self._start(self._buffer[self._at])
            self._at += 1
        shape = self._shape
        assert shape is not None
        if self._expected < 0:
            count = self._number(_U64)
            if count is None:
                return None
            if count > self._limits.count:
                raise WireError(f"a request for {count} keys is over the limit of {self._limits.count}")
            self._expected = count * len(shape.row)
        fields, row = self._fields, shape.row
        while len(fields) < self._expected:
            kind = row[len(fields) % len(row)]
            field = self._blob(kind) if isinstance(kind, str) else self._number(kind)
            if field is None:
                return None
            fields.append(field)
        request = shape.build(fields)
        if shape.counted and len(row) == 1:
            self._repeated.note(self._code, fields, self._size, request)
        self._begin()
        return request

    def _start(self, code: int) -> None:
        shape = _SHAPES.get(code)
        if shape is None:
            raise WireError(f"query type {code} is unknown")
        if code == QueryType.VALIDATE and self._validated:
            raise WireError("VALIDATE came twice")
        if code != QueryType.VALIDATE and not self._validated:
            raise WireError(f"query type {code} came before VALIDATE")
        self._validated = True
        self._code = code
        self._shape = shape
        if not shape.counted:
            self._expected = len(shape.row)

    def _number(self, kind: struct.Struct) -> int | None:
        end = self._at + kind.size
        if end > len(self._buffer):
            self._compact()
            return None
        value: int = kind.unpack_from(self._buffer, self._at)[0]
        self._at = end
        return value

    def _blob(self, kind: str) -> bytes | None:
        if self._length < 0:
            length = self._number(_U64)
            if length is None:
                return None
            limit = self._limits.key if kind == "key" else self._limits.value
            if length > limit:
                raise WireError(f"a {kind} of {length} bytes is over the limit of {limit}")
            self._size += length
            if self._size > self._limits.request:
                raise WireError(f"a request of {self._size} bytes is over the limit of {self._limits.request}")
            self._length = length
        at, end = self._at, self._at + self._length
        if end > len(self._buffer):
            self._compact()
            return None
        with memoryview(self._buffer) as view:
            blob = bytes(view[at:end])
        self._at, self._length = end, -1
        return blob

    def _compact(self) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._at = 0


def encode_u32(number: int) -> bytes:
    """The answer to a PING."""
    return _U32.pack(number)


def encode_i64(number: int) -> bytes:
    """The answer of every request that counts."""
    return _I64.pack(number)


def encode_blobs(blobs: Iterable[bytes | bytearray]) -> list[bytes]:
    """Values or keys one after the other, as buffers that share the memory of what they send."""
    buffers: list[bytes] = []
    for blob in blobs:
        buffers += (_U64.pack(len(blob)), bytes(blob))
    return buffers


def decode_i64(data: bytes) -> int:
    """The number of `encode_i64`. Raises WireError."""
    if len(data) != _I64.size:
        raise WireError(f"{len(data)} bytes where a number was expected")
    number: int = _I64.unpack(data)[0]
    return number


def decode_blobs(data: bytes) -> list[bytes]:
    """What `encode_blobs` was given. Raises WireError."""
    blobs, at = [], 0
    while at < len(data):
        end = at + _U64.size
        if end > len(data):
            raise WireError("a length is cut short")
        at = end + int(_U64.unpack_from(data, end - _U64.size)[0])
        if at > len(data):
            raise WireError("a value is cut short")
        blobs.append(data[end:at])
    return blobs
