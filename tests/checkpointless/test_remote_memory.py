"""Reading another process's memory; here it is this one's, which the same call reads."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hyperpodrun.checkpointless.transfer import remote_memory
from hypothesis import given, settings
from hypothesis import strategies as st

sizes = st.lists(st.integers(0, 70), max_size=20)


def rows(sizes: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[remote_memory.Segment]]:
    """Random rows of bytes, empty ones of the same sizes, and how the ones get into the others."""
    there = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    here = [torch.zeros_like(row) for row in there]
    segments = [(one.data_ptr(), other.data_ptr(), one.numel()) for one, other in zip(there, here, strict=True)]
    return there, here, segments


def limit(monkeypatch: pytest.MonkeyPatch, nbytes: int, segments: int = 1024) -> None:
    monkeypatch.setattr(remote_memory, "_BATCH_BYTES", nbytes)
    monkeypatch.setattr(remote_memory, "_BATCH_SEGMENTS", segments)


@settings(deadline=None)
@given(sizes, st.integers(1, 100), st.integers(1, 4), st.integers(1, 3))
def test_every_byte_is_read_whatever_the_portions(sizes, nbytes, count, threads):
    there, here, segments = rows(sizes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        limit(monkeypatch, nbytes, count)
        for batch in remote_memory.batches(segments):
            assert 0 < len(batch) <= count
            assert 0 < sum(segment[2] for segment in batch) <= nbytes
        remote_memory.read_all(os.getpid(), segments, threads=threads)
    assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))


@settings(deadline=None)
@given(sizes.filter(any), st.data())
def test_a_call_that_reads_less_than_it_was_asked_for_is_repeated(sizes, data):
    there, here, segments = rows(sizes)
    readv = remote_memory._readv

    def short(pid, local, _, remote, *rest):
        return readv(pid, local, 1, remote, 1, 0) if data.draw(st.booleans()) else readv(pid, local, _, remote, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(remote_memory, "_readv", short)
        remote_memory.read_all(os.getpid(), segments, threads=1)
    assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))


@settings(deadline=None)
@given(sizes, st.integers(0, 2000))
def test_what_is_left_of_a_batch_is_all_that_was_not_read(sizes, count):
    batch = [(1000 * at, 5000 * at, size) for at, size in enumerate(sizes) if size]
    left = list(remote_memory._rest(batch, count))
    read = {(remote + i, local + i) for remote, local, size in batch for i in range(size)}
    rest = {(remote + i, local + i) for remote, local, size in left for i in range(size)}
    assert rest <= read
    assert len(rest) == max(0, len(read) - count)


def test_memory_that_is_not_there_is_an_error():
    row = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(OSError, match="Bad address"):
        remote_memory.read_all(os.getpid(), [(4096, row.data_ptr(), 10)], threads=2)


def test_an_error_of_a_thread_that_helps_ends_the_reading(monkeypatch):
    limit(monkeypatch, 8)
    failed = threading.Event()

    def read(pid, batch):
        if threading.current_thread() is threading.main_thread():
            assert failed.wait(30)
            return
        failed.set()
        raise PermissionError("as Yama says")

    monkeypatch.setattr(remote_memory, "read", read)
    with pytest.raises(PermissionError):
        remote_memory.read_all(os.getpid(), rows([64])[2], threads=2)


def test_an_interrupt_leaves_no_thread_that_still_writes(monkeypatch):
    """It comes while the other thread is in the middle of a batch, and finds some of them not begun."""
    limit(monkeypatch, 8)
    reading, interrupted = threading.Event(), threading.Event()
    begun: list[object] = []

    def read(pid, batch):
        begun.append(batch)
        if threading.current_thread() is threading.main_thread():
            assert reading.wait(30)
            interrupted.set()
            raise KeyboardInterrupt
        reading.set()
        assert interrupted.wait(30)
        begun.append("done")

    monkeypatch.setattr(remote_memory, "read", read)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        remote_memory.read_all(os.getpid(), rows([640])[2], threads=2)
    assert threading.active_count() == before
    assert begun.count("done") >= 1
    assert len(begun) < 80, "the rest is left"


def test_a_single_batch_needs_no_thread(monkeypatch):
    monkeypatch.setattr(threading, "Thread", None)
    there, here, segments = rows([64, 0, 5])
    remote_memory.read_all(os.getpid(), segments, threads=4)
    assert torch.equal(there[0], here[0])
