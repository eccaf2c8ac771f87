"""One process of `dataloader.py`: makes a loader of some kind for some workload, and reads from it.

    dataloader_worker.py KIND WORKLOAD first STEP      time from the loader's construction to batch STEP
    dataloader_worker.py KIND WORKLOAD steady BATCHES  throughput, CPU and memory after a warm-up
    dataloader_worker.py KIND WORKLOAD leave STEP      read batch STEP, then wait to be killed
    dataloader_worker.py mmap WORKLOAD cold STEP DIRECTORY RANK [share]
                         rank 0 has batch STEP, rank 1 is on another node, where nothing is: the time until it has it

KIND is torch (DataLoader with persistent workers, which skips forward), stateful (torchdata) or mmap (ours). The last
line of output is JSON.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

WORKERS = 2
PREFETCH = 10
MARK = "HYPERPODRUN_BENCHMARK"
WARM_UP = 3 * PREFETCH


class Text(Dataset[Any]):
    """Tokenised text: a sample is 2,049 tokens from a file of 16-bit tokens, as inputs and targets."""

    batch_size, length = 8, 8 * 120_000

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(0, 50_000, (1 << 22,), generator=generator, dtype=torch.int32).to(torch.uint16)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * 1021 % (len(self._tokens) - 2049)
        tokens = self._tokens[begin : begin + 2049].to(torch.int64)
        return tokens[:-1], tokens[1:]


class Images(Dataset[Any]):
    """Decoded images: 256 x 256 bytes, cropped to 224, flipped at random, normalised to float32."""

    batch_size, length = 32, 32 * 120_000

    def __init__(self) -> None:
        self._images = torch.randint(0, 256, (16, 3, 256, 256), generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left, flip = torch.randint(0, 32, (3,)).tolist()
        image = self._images[index % 16, :, top : top + 224, left : left + 224].to(torch.float32)
        image = image.sub_(127.5).div_(64.0)
        return (image.flip(-1) if flip % 2 else image), index % 1000


class Tiny(Dataset[Any]):
    """A table: eight numbers and a label."""

    batch_size, length = 16, 16 * 120_000

    def __init__(self) -> None:
        self._rows = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._rows[index % 1024], index


WORKLOADS: dict[str, type[Any]] = {"text": Text, "images": Images, "tiny": Tiny}


def make(workload: str, kind: str = "torch") -> Any:
    """The loader that all kinds have in common."""
    dataset = WORKLOADS[workload]()
    options: dict[str, Any] = {
        "batch_size": dataset.batch_size,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(7),
        "num_workers": WORKERS,
        "prefetch_factor": PREFETCH // WORKERS,
        "persistent_workers": True,
    }
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(dataset, **options)
    return DataLoader(dataset, **options)


def construct(kind: str, workload: str, **options: Any) -> Any:
    if kind != "mmap":
        return make(workload, kind)
    from hyperpodrun import CacheResumeMMAPConfig, MMAPDataLoader

    config = CacheResumeMMAPConfig(cache_dir=os.environ["BENCHMARK_CACHE"], prefetch_length=PREFETCH, **options)
    # With a seed of ours, what is drawn is the same, too.
    return MMAPDataLoader(functools.partial(make, workload), config, data_rank=0, seed=7)


def digest(batch: Any) -> str:
    """Of what came out: every kind must give the same."""
    value = hashlib.sha256()
    for part in batch:
        value.update(part.numpy().tobytes())
    return value.hexdigest()[:16]


def first(kind: str, workload: str, step: int, state: Path | None) -> dict[str, Any]:
    """Seconds from construction to batch `step`."""
    if kind == "mmap":
        import hyperpodrun.dataloader.loader  # noqa: F401  # imports are not what is measured
    if kind == "stateful":
        import torchdata.stateful_dataloader  # noqa: F401
    saved = torch.load(state) if state is not None else None
    began = time.perf_counter()
    loader = construct(kind, workload)
    if kind == "mmap":
        loader.seek(step)
    elif saved is not None:
        loader.load_state_dict(saved)
    iterator = iter(loader)
    if kind == "torch":
        for _ in range(step):
            next(iterator)
    batch = next(iterator)
    return {"first_batch_s": time.perf_counter() - began, "digest": digest(batch)}


def save_state(workload: str, step: int, path: Path) -> dict[str, Any]:
    """What a checkpoint of a StatefulDataLoader at a step holds."""
    loader = make(workload, "stateful")
    iterator = iter(loader)
    for _ in range(step):
        next(iterator)
    torch.save(loader.state_dict(), path)
    return {}


def family() -> list[int]:
    """All processes of this measurement: those with its mark."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if mark in environment.split(b"\0"):
                found.append(int(name))
    return found


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def steady(kind: str, workload: str, batches: int) -> dict[str, Any]:
    """Throughput with a reader that does nothing else; CPU and memory of all processes together."""
    from harness import pss_mb

    iterator = iter(construct(kind, workload))
    for _ in range(WARM_UP):
        next(iterator)
    pids = family()
    cpu, began = cpu_seconds(pids), time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - began
    cpu = cpu_seconds(pids) - cpu
    memory = sum(pss_mb(pid) for pid in pids)
    return {"batches_per_s": batches / seconds, "cpu_s": cpu / batches * 1000, "memory_mb": memory}


def cold(workload: str, step: int, directory: Path, rank: int, share: bool) -> dict[str, Any]:
    """Seconds from construction to batch `step`, on a node that replaces another one; `share`: others may give it."""
    import hyperpodrun.dataloader.loader  # noqa: F401  # imports are not what is measured
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    if rank == 0:
        loader = construct("mmap", workload)
        loader.seek(max(0, step - 1))
        next(iter(loader))
        loader.close()
    dist.barrier()
    began = time.perf_counter()
    loader = construct("mmap", workload, model_parallel_group=dist.group.WORLD if share else None)
    loader.seek(step)
    batch = next(iter(loader))
    row = {"first_batch_s": time.perf_counter() - began, "digest": digest(batch)}
    dist.barrier()  # the one that gives lives until the other one has taken
    dist.destroy_process_group()
    return row


def stay() -> None:
    """A member of the job that reads nothing: while it lives, so does the job."""
    from hyperpodrun.dataloader.preparing import standalone

    line = standalone.connect(60)
    print("ready", flush=True)
    signal.pause()
    line.close()


def leave(kind: str, workload: str, step: int) -> None:
    """Reads a batch, says so, and is killed."""
    loader = construct(kind, workload)
    loader.seek(step)
    iterator = iter(loader)
    next(iterator)
    print("ready", flush=True)
    signal.pause()


def main() -> None:
    kind, workload, what, number = sys.argv[1:5]
    path = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    if what == "leave":
        leave(kind, workload, int(number))
        return
    if what == "stay":
        stay()
        return
    if what == "first":
        row = first(kind, workload, int(number), path)
    elif what == "cold":
        assert path is not None
        row = cold(workload, int(number), path, int(sys.argv[6]), share=sys.argv[7:] == ["share"])
    elif what == "save":
        assert path is not None
        row = save_state(workload, int(number), path)
    else:
        row = steady(kind, workload, int(number))
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
