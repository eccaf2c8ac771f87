"""State on its way from one rank to another, over the process group or straight out of the peer's memory.

The conversation: the receiver says where it runs; the source answers with the header (skeleton, note, where its
tensors are); the receiver builds what it lacks, and either reads the source's memory or asks for the buckets. Then it
says that it is done, until which the source must not change anything. Checksums come last: who has to make them makes
them while the bytes are on their way.
Everything goes from point to point over an existing process group: a source that dies breaks it, which is a fault like
any other, and the next epoch's plan names the next source.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec
import torch

from ...protocol.values import EncodingError, decode, encode
from ..errors import ChecksumError, RestoreError
from . import remote_memory
from .buckets import BUCKET_BYTES, Bucket, Memory, cut
from .link import Link

_IN_FLIGHT = 4
_VOLLEY_BYTES = 256 << 20
_DONE, _STREAM = 1, 2


class _Hello(msgspec.Struct, frozen=True):
    """The receiver's first word: the address space in which its pid means something, and its pid."""

    space: str
    pid: int


class _Way(msgspec.Struct, frozen=True):
    """How the source's tensors can be had: where each begins in the memory of `pid`, none if it cannot be read there;
    and whether checksums of the buckets will follow."""

    pid: int
    addresses: list[int]
    summed: bool


class _Answer(msgspec.Struct, frozen=True):
    """The source's answer."""

    state: dict[str, Any]
    way: _Way


_Sums: TypeAlias = list[list[int]]
"""The checksums of all buckets, in order."""
_Word = TypeVar("_Word")


def send(link: Link, to: int, header: dict[str, Any], memory: Memory, *, checksum: bool) -> None:
    """Gives a state to rank `to`. `header`: what the receiver's `build` and `receive`'s caller want to know."""
    hello = _read_word(link.receive_bytes(to), to, _Hello)
    readable = hello.space == remote_memory.address_space() != "" and _all_on_cpu(memory)
    if readable:
        remote_memory.allow(hello.pid)
    try:
        _give(link, to, header, memory, readable=readable, checksum=checksum)
    finally:
        if readable:
            remote_memory.allow(0)


def _give(link: Link, to: int, header: dict[str, Any], memory: Memory, *, readable: bool, checksum: bool) -> None:
    addresses = [row.data_ptr() for row in memory.rows.values()] if readable else []
    way = {"pid": os.getpid(), "addresses": addresses, "summed": checksum}
    word = link.expect_bytes(to)
    link.send_bytes(encode({"state": header, "way": way}), to)
    buckets = cut(memory.sizes())
    sums = [memory.checksum(bucket).tolist() for bucket in buckets] if checksum and readable else []
    if _read_word(word(), to, int) == _STREAM:
        sums = _send_buckets(link, to, memory, buckets, checksum=checksum)
        _read_word(link.receive_bytes(to), to, int)
    if checksum:
        link.send_bytes(encode(sums), to)


def receive(link: Link, source: int, build: Callable[[dict[str, Any]], Memory]) -> dict[str, Any]:
    """Takes a state from rank `source`: the header. `build` makes the tensors it describes, which then are filled.

    Raises RestoreError for a header that makes no sense, ChecksumError for wrong bytes, what the process group raises
    when the source is lost.
    """
    answering = link.expect_bytes(source)
    link.send_bytes(encode({"space": remote_memory.address_space(), "pid": os.getpid()}), source)
    answer = _read_word(answering(), source, _Answer)
    way = answer.way
    memory = build(answer.state)
    sums: _Sums | None = None
    if not _read_memory(way, memory):
        link.send_bytes(encode(_STREAM), source)
        sums = _receive_buckets(link, source, memory, checksum=way.summed)
    link.send_bytes(encode(_DONE), source)
    if way.summed:
        if sums is None:
            sums = [memory.checksum(bucket).tolist() for bucket in cut(memory.sizes())]
        _compare(sums, _read_word(link.receive_bytes(source), source, _Sums), source)
    memory.land()
    return answer.state


def _compare(sums: _Sums, expected: _Sums, source: int) -> None:
    """Raises ChecksumError for the first bucket that has come with other bytes, RestoreError if there is none such."""
    if len(expected) != len(sums):
        raise RestoreError(f"rank {source} counts {len(expected)} buckets, there are {len(sums)}")
    for number, (one, other) in enumerate(zip(sums, expected, strict=True)):
        if one != other:
            raise ChecksumError(source, number)


def _read_memory(way: _Way, memory: Memory) -> bool:
    """Copies every tensor from the source's process; False where that is not possible."""
    if len(way.addresses) != len(memory.rows) or not _all_on_cpu(memory):
        return False
    rows = memory.rows.values()
    segments = [(address, row.data_ptr(), row.numel()) for address, row in zip(way.addresses, rows, strict=True)]
    try:
        remote_memory.read_all(way.pid, segments, threads=_readers())
    except PermissionError:
        return False
    except OSError as error:
        raise RestoreError(f"the memory of process {way.pid} cannot be read: {error}") from error
    return True


def _readers() -> int:
    """Threads that read at once: the cores this rank may take for itself."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4, len(os.sched_getaffinity(0)) * 2 // ranks))


def _volleys(link: Link, memory: Memory, buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """What is sent in one go, the same on both sides: buckets that travel in place are joined where that helps."""
    volley: list[Bucket] = []
    size = 0
    for bucket in buckets:
        joins = link.joins(bucket.device) and _in_place(link, memory, bucket) is not None
        if volley and not (joins and size + bucket.nbytes <= _VOLLEY_BYTES):
            yield volley
            volley, size = [], 0
        volley.append(bucket)
        size += bucket.nbytes if joins else _VOLLEY_BYTES
    if volley:
        yield volley


def _in_place(link: Link, memory: Memory, bucket: Bucket) -> torch.Tensor | None:
    """The bucket's bytes where they lie, if they can travel from and to there."""
    row = memory.view(bucket)
    return row if row is not None and row.device.type == link.wire_device(bucket.device).type else None


def _send_buckets(link: Link, to: int, memory: Memory, buckets: Sequence[Bucket], *, checksum: bool) -> _Sums:
    """Sends all buckets; their checksums, if they are wanted."""
    staging = _Staging(link)
    flying: deque[tuple[list[Any], list[torch.Tensor]]] = deque()
    sums: _Sums = []
    for volley in _volleys(link, memory, buckets):
        if len(flying) == _IN_FLIGHT:
            _wait(flying.popleft()[0])
        rows = [_outgoing(link, memory, bucket, staging) for bucket in volley]
        flying.append((link.isend_all(rows, to), rows))
        if checksum:
            sums += [memory.checksum(bucket).tolist() for bucket in volley]
    for works, _ in flying:
        _wait(works)
    return sums


def _outgoing(link: Link, memory: Memory, bucket: Bucket, staging: _Staging) -> torch.Tensor:
    """The bucket's bytes in one row, on the device from which they travel."""
    row = _in_place(link, memory, bucket)
    if row is not None:
        return row
    staged = staging.row(bucket)
    if bucket.device == staged.device.type:
        memory.gather(bucket, staged)
    else:
        staged.copy_(torch.cat([memory.rows[name][begin:end] for name, begin, end in bucket.pieces]))
    return staged


def _receive_buckets(link: Link, source: int, memory: Memory, *, checksum: bool) -> _Sums:
    """Receives all buckets; their checksums as they came, if they are wanted."""
    staging = _Staging(link)
    flying: deque[tuple[list[Any], list[Bucket], list[tuple[Bucket, torch.Tensor]]]] = deque()
    sums: _Sums = []

    def land() -> None:
        works, volley, staged = flying.popleft()
        _wait(works)
        for bucket, row in staged:
            memory.scatter(bucket, row)
        if checksum:
            sums.extend(memory.checksum(bucket).tolist() for bucket in volley)

    for volley in _volleys(link, memory, cut(memory.sizes())):
        if len(flying) == _IN_FLIGHT:
            land()
        rows, staged = [], []
        for bucket in volley:
            row = _in_place(link, memory, bucket)
            if row is None:
                row = staging.row(bucket)
                staged.append((bucket, row))
            rows.append(row)
        flying.append((link.irecv_all(rows, source), volley, staged))
    while flying:
        land()
    return sums


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


class _Staging:
    """Rows for buckets that cannot travel in place, as many as are in flight at once, used in turn."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._used = -1

    def row(self, bucket: Bucket) -> torch.Tensor:
        device = self._link.wire_device(bucket.device)
        rows = self._rows.setdefault(device.type, [])
        if len(rows) <= _IN_FLIGHT:
            rows.append(torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device))
            return rows[-1][: bucket.nbytes]
        self._used += 1
        return rows[self._used % len(rows)][: bucket.nbytes]


def _all_on_cpu(memory: Memory) -> bool:
    return all(row.device.type == "cpu" for row in memory.rows.values())


def _read_word(data: bytes, source: int, kind: type[_Word]) -> _Word:
    """What the peer has sent, as that type. Raises RestoreError."""
    try:
        return msgspec.convert(decode(data), kind)
    except (EncodingError, msgspec.ValidationError) as error:
        raise RestoreError(f"rank {source} sent what is not the word that was due: {error}") from error
