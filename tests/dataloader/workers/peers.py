"""Run by test_peers.py, once for each rank: ranks of two nodes that read one stream, of which one is cold.

Arguments: a directory, the rank, the source, whether files are encrypted. Each rank has a host of producers of its own,
as on two nodes. The producer of rank 1 opens nothing before the file `gate` exists.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import sources
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataLoader

FIRST = 5
CARRIED = 4


def gated(directory: str, source: str) -> Any:
    deadline = time.monotonic() + 60
    while os.environ["RANK"] == "1" and not (Path(directory) / "gate").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return getattr(sources, source)()


def plain(batch: Any) -> Any:
    return [part.tolist() for part in batch]


def main() -> None:
    directory, rank, source, sealed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "sealed"
    os.environ.update(RANK=str(rank), MASTER_ADDR=str(directory), MASTER_PORT=str(rank))  # "two nodes"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    factory = functools.partial(gated, str(directory), source)
    config = CacheResumeMMAPConfig(
        cache_dir=str(directory / f"cache-{rank}"), prefetch_length=CARRIED, enable_batch_encryption=sealed
    )
    if rank == 0:
        loader = MMAPDataLoader(factory, config, data_rank="shared", seed=3)
        loader.seek(FIRST - 1)
        batches = iter(loader)
        next(batches)
        ready = Path(loader._opened().directory)
        deadline = time.monotonic() + 60
        while len(list(ready.glob("*.safetensors"))) < CARRIED + 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        loader.close()
    dist.barrier()
    group = CacheResumeMMAPConfig(**{**config.__dict__, "model_parallel_group": dist.group.WORLD})
    loader = MMAPDataLoader(factory, group, data_rank="shared", seed=3)
    loader.seek(FIRST)
    batches = iter(loader)
    read = [plain(next(batches)) for _ in range(CARRIED)]
    opened_early = loader._connection is not None and loader._connection.opened is not None
    (directory / "gate").touch()
    read += [plain(batch) for batch in batches]
    state = loader.state_dict()
    print(json.dumps({"read": read, "opened_early": opened_early, "epoch": state["epoch"]}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
