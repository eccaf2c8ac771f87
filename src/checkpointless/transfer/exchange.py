"""State on its way from one rank to another, over the process group or straight out of the peer's memory.

The conversation: the receiver says where it runs; the source answers with the header (skeleton, note, where its
tensors are); the receiver builds what it lacks, and either reads the source's memory or asks for the buckets. It ends
with the receiver's last word, until which the source must not change anything.
Everything goes from point to point over an existing process group: a source that dies breaks it, which is a fault like
any other, and the next epoch's plan names the next source.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import torch

from ..errors import ChecksumError, RestoreError
from ..state.encoding import EncodingError, decode, encode
from . import remote_memory
from .buckets import BUCKET_BYTES, Bucket, Memory, cut
from .link import Link

_IN_FLIGHT = 4
_VOLLEY_BYTES = 256 << 20
_READ_BYTES = 32 << 20
_READ, _STREAM = 1, 2


class _Hello(msgspec.Struct, frozen=True):
    """The receiver's first word: the address space in which its pid means something, and its pid."""

    space: str
    pid: int


class _Way(msgspec.Struct, frozen=True):
    """How the source's tensors can be had: where each begins in the memory of `pid`, none if it cannot be read there;
    and the checksums of the buckets, none without `enable_checksum`."""

    pid: int
    addresses: list[int]
    sums: list[list[int]]


class _Answer(msgspec.Struct, frozen=True):
    """The source's answer."""

    state: dict[str, Any]
    way: _Way


_Word = TypeVar("_Word")


def send(link: Link, to: int, header: dict[str, Any], memory: Memory, *, checksum: bool) -> None:
    """Gives a state to rank `to`. `header`: what the receiver's `build` and `receive`'s caller want to know."""
    hello = _expect(link, to, _Hello)
    readable = hello.space == remote_memory.address_space() != "" and _all_on_cpu(memory)
    if readable:
        remote_memory.allow(hello.pid)
    try:
        _give(link, to, header, memory, readable=readable, checksum=checksum)
    finally:
        if readable:
            remote_memory.allow(0)


def _give(link: Link, to: int, header: dict[str, Any], memory: Memory, *, readable: bool, checksum: bool) -> None:
    buckets = cut(memory.sizes())
    addresses = [row.data_ptr() for row in memory.rows.values()] if readable else []
    sums = [memory.checksum(bucket).tolist() for bucket in buckets] if checksum else []
    way = {"pid": os.getpid(), "addresses": addresses, "sums": sums}
    link.send_bytes(encode({"state": header, "way": way}), to)
    if _expect(link, to, int) == _STREAM:
        _send_buckets(link, to, memory, buckets)
        _expect(link, to, int)


def receive(link: Link, source: int, build: Callable[[dict[str, Any]], Memory]) -> dict[str, Any]:
    """Takes a state from rank `source`: the header. `build` makes the tensors it describes, which then are filled.

    Raises RestoreError for a header that makes no sense, ChecksumError for wrong bytes, what the process group raises
    when the source is lost.
    """
    link.send_bytes(encode({"space": remote_memory.address_space(), "pid": os.getpid()}), source)
    answer = _expect(link, source, _Answer)
    way = answer.way
    memory = build(answer.state)
    buckets = cut(memory.sizes())
    if not _read_memory(way, memory):
        link.send_bytes(encode(_STREAM), source)
        _receive_buckets(link, source, memory, buckets)
    if way.sums and len(way.sums) != len(buckets):
        raise RestoreError(f"rank {source} counts {len(way.sums)} buckets, there are {len(buckets)}")
    for number, expected in enumerate(way.sums):
        if memory.checksum(buckets[number]).tolist() != expected:
            link.send_bytes(encode(_READ), source)  # the source is not to blame for waiting
            raise ChecksumError(source, number)
    link.send_bytes(encode(_READ), source)
    return answer.state


def _read_memory(way: _Way, memory: Memory) -> bool:
    """Copies every tensor from the source's process; False where that is not possible."""
    if len(way.addresses) != len(memory.rows) or not _all_on_cpu(memory):
        return False
    pieces = [
        (address + begin, row.data_ptr() + begin, min(_READ_BYTES, row.numel() - begin))
        for address, row in zip(way.addresses, memory.rows.values(), strict=True)
        for begin in range(0, row.numel(), _READ_BYTES)
    ]
    try:
        # New memory is made page by page as it is filled: that is work for more than one core. Leaving the block, also
        # by an interrupt, waits for the readers: none may write into a tensor that somebody has begun to use again.
        with ThreadPoolExecutor(_readers(), thread_name_prefix="hyperpodrun-restore") as readers:
            reads = [readers.submit(remote_memory.read, way.pid, *piece) for piece in pieces]
            try:
                for read in reads:
                    read.result()
            except BaseException:
                readers.shutdown(wait=True, cancel_futures=True)
                raise
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


def _send_buckets(link: Link, to: int, memory: Memory, buckets: Sequence[Bucket]) -> None:
    staging = _Staging(link)
    flying: deque[tuple[list[Any], list[torch.Tensor]]] = deque()
    for volley in _volleys(link, memory, buckets):
        if len(flying) == _IN_FLIGHT:
            _wait(flying.popleft()[0])
        rows = [_outgoing(link, memory, bucket, staging) for bucket in volley]
        flying.append((link.isend_all(rows, to), rows))
    for works, _ in flying:
        _wait(works)


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


def _receive_buckets(link: Link, source: int, memory: Memory, buckets: Sequence[Bucket]) -> None:
    staging = _Staging(link)
    flying: deque[tuple[list[Any], list[tuple[Bucket, torch.Tensor]]]] = deque()

    def land() -> None:
        works, staged = flying.popleft()
        _wait(works)
        for bucket, row in staged:
            memory.scatter(bucket, row)

    for volley in _volleys(link, memory, buckets):
        if len(flying) == _IN_FLIGHT:
            land()
        rows, staged = [], []
        for bucket in volley:
            row = _in_place(link, memory, bucket)
            if row is None:
                row = staging.row(bucket)
                staged.append((bucket, row))
            rows.append(row)
        flying.append((link.irecv_all(rows, source), staged))
    while flying:
        land()


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


def _expect(link: Link, source: int, kind: type[_Word]) -> _Word:
    """The peer's next word, of that type. Raises RestoreError."""
    try:
        return msgspec.convert(decode(link.receive_bytes(source)), kind)
    except (EncodingError, msgspec.ValidationError) as error:
        raise RestoreError(f"rank {source} sent what is not the word that was due: {error}") from error
