"""Ranks of real gloo groups on one node, forked from a process that has imported torch: `ranks.py SOCKET NODE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from meeting import come

_LIMIT = timedelta(seconds=60)


def _serve(path: str, rank: int) -> None:
    desk = come(path, "rank", rank)
    stores: dict[str, Any] = {}
    while True:
        try:
            message = desk.recv()
        except EOFError:
            return
        try:
            match message:
                case ("connect", kind, host, port):
                    stores[kind] = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_LIMIT)
                    desk.send(None)
                case ("bootstrap", kind, prefix, world_size, begin, address):
                    while time.monotonic() < begin:  # all at once
                        time.sleep(0.0005)
                    began = time.monotonic()
                    if address is not None:
                        stores[kind] = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=_LIMIT)
                    _bootstrap(dist.PrefixStore(prefix, stores[kind]), rank, world_size)
                    desk.send((began, time.monotonic()))
                case ("groups", kind, prefix, world_size, count):
                    desk.send(_many_groups(stores[kind], count, rank, world_size, prefix))
                case ("destroy",):
                    dist.destroy_process_group()
                    desk.send(None)
                case ("end",):
                    desk.send(None)
                    return
        except Exception as error:
            desk.send(RuntimeError(f"{type(error).__name__}: {str(error)[:500]}"))


def _bootstrap(store: Any, rank: int, world_size: int) -> None:
    dist.distributed_c10d._world.group_count = 0  # a process that is new has made none
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_LIMIT)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == world_size


def _many_groups(store: Any, count: int, rank: int, world_size: int, prefix: str) -> tuple[float, float]:
    """So many groups of pairs, quarters and halves, beside the one of all."""
    _bootstrap(dist.PrefixStore(prefix, store), rank, world_size)
    began = time.monotonic()
    for number in range(count):
        size = max(2, world_size >> (1 + number % 3))
        first = number * size % world_size
        members = sorted((first + offset) % world_size for offset in range(size))
        group = dist.new_group(members, timeout=_LIMIT)
        if rank in members:
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert total.item() == size
    return began, time.monotonic()


def main() -> None:
    path, node = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    desk = come(path, "node", node)
    while True:
        try:
            _, ranks = desk.recv()
        except EOFError:
            return
        for rank in ranks:
            if not os.fork():
                desk.close()
                _serve(path, rank)
                os._exit(0)
        desk.send(None)


if __name__ == "__main__":
    main()
