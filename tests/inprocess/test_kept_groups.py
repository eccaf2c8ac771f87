"""A process group is destroyed by Python, without the interpreter's lock, and never by a DDP module, with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch.distributed as dist
from hyperpodrun.inprocess.aborts.kept_groups import KeptGroups


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "_pg_map", dict(dist.distributed_c10d._pg_map))
    kept = KeptGroups()
    kept.install()
    yield kept
    if dist.is_initialized():
        dist.destroy_process_group()


def begin() -> weakref.ref:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return weakref.ref(dist.group.WORLD)


def test_a_destroyed_group_is_held_until_it_is_taken(kept):
    group = begin()
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    assert group() is not None
    taken = kept.take_destroyed()
    assert len(taken) == 1
    assert kept.take_destroyed() == []
    taken.clear()
    gc.collect()
    assert group() is None


def test_a_group_in_use_is_not_taken(kept):
    group = begin()
    assert kept.take_destroyed() == []
    assert group() is dist.group.WORLD


def test_groups_that_come_and_go_do_not_gather(kept):
    begin()
    seen = []
    for _ in range(5):
        sub = dist.new_group([0])
        seen.append(weakref.ref(sub))
        dist.destroy_process_group(sub)
        del sub
    gc.collect()
    assert sum(group() is not None for group in seen) == 1
    assert [group for group in kept.take_destroyed() if group is not None] == [seen[-1]()]
