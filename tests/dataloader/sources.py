"""Loaders that the tests' producers make. Imported there by name, so this is a module of its own."""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset


class Numbers(Dataset[Any]):
    """Sample i is (i, three random numbers)."""

    def __init__(self, length: int, slow_s: float = 0.0) -> None:
        self.length = length
        self.slow_s = slow_s

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        time.sleep(self.slow_s)
        return index, torch.rand(3)


class Counting(Numbers):
    """Writes down which samples were made."""

    def __init__(self, length: int, log: str) -> None:
        super().__init__(length)
        self.log = log

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        with open(self.log, "a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


class Broken(Numbers):
    """Cannot give one of its samples: `how` says what happens instead. Mended once the file `mended` exists."""

    def __init__(self, length: int, bad: int, how: str, mended: str = "") -> None:
        super().__init__(length)
        self.bad, self.how, self.mended = bad, how, mended

    def __getitem__(self, index: int) -> Any:
        if index == self.bad and not (self.mended and Path(self.mended).exists()):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "own":
                raise OwnError(f"sample {index} is broken")
            if self.how == "type":
                return object(), torch.zeros(3)
            if self.how == "key":
                return {}[index]
            raise ValueError(f"sample {index} is broken")
        return super().__getitem__(index)


class OwnError(Exception):
    pass


def plain(samples: Any) -> Any:
    return samples


def numbers(length: int = 100, batch_size: int = 4, workers: int = 2, slow_s: float = 0.0, **options: Any) -> Any:
    return DataLoader(Numbers(length, slow_s), batch_size=batch_size, num_workers=workers, **options)


def shuffled(length: int = 100, batch_size: int = 4, workers: int = 2, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        Numbers(length), batch_size=batch_size, shuffle=True, generator=generator, num_workers=workers, drop_last=True
    )


def shuffled_by_default() -> Any:
    return DataLoader(Numbers(40), batch_size=4, shuffle=True)


def distributed(rank: int, world_size: int) -> Any:
    sampler: Any = DistributedSampler(Numbers(64), num_replicas=world_size, rank=rank, seed=3)
    return DataLoader(Numbers(64), batch_size=4, sampler=sampler)


def counting(log: str, length: int = 4000) -> Any:
    return DataLoader(Counting(length, log), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))


def broken(bad: int, how: str, mended: str = "", workers: int = 1) -> Any:
    dataset = Broken(40, bad, how, mended)
    return DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=plain if how == "type" else None)


def without_batches() -> Any:
    return DataLoader(Numbers(6), batch_size=None, sampler=range(3, 6))


class Tuples:
    """A batch sampler of its own kind, whose indices are no numbers."""

    def __iter__(self) -> Any:
        return iter([[("a", 1), ("b", 2)], [("c", 3)]])

    def __len__(self) -> int:
        return 2


class ByKey(Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        assert isinstance(key, tuple)
        return f"{key[0]}{key[1]}"


def by_key() -> Any:
    return DataLoader(ByKey(), batch_sampler=Tuples())


class SeekableSampler:
    """Gets to a batch by arithmetic."""

    def __init__(self, batches: int) -> None:
        self.batches, self.first = batches, 0
        self.sought: list[int] = []

    def seek(self, batch: int) -> None:
        self.first = batch

    def __iter__(self) -> Any:
        return iter(
            [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(self.first, min(self.batches, self.first + 50))]
        )

    def __len__(self) -> int:
        return self.batches


def seekable() -> Any:
    return DataLoader(Numbers(1 << 40), batch_sampler=SeekableSampler(1 << 38))


class Stream(IterableDataset[Any]):
    """An iterable data set without any state."""

    def __init__(self, length: int, fails_at: int = -1) -> None:
        self.length, self.fails_at = length, fails_at
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for i in range(self.length):
            if i == self.fails_at:
                raise ValueError(f"record {i} is broken")
            yield i + 1000 * self.epoch, torch.rand(2)


def stream(length: int = 30, fails_at: int = -1) -> Any:
    return DataLoader(Stream(length, fails_at), batch_size=3)


class StatefulStream(Stream):
    """The same, with a state; writes down what it makes."""

    def __init__(self, length: int, log: str) -> None:
        super().__init__(length)
        self.log = log
        self.next = 0

    def __iter__(self) -> Any:
        for i in range(self.next, self.length):
            self.next = i + 1
            with open(self.log, "a") as file:
                file.write(f"{i}\n")
            yield i + 1000 * self.epoch, torch.rand(2)
        self.next = 0

    def state_dict(self) -> Any:
        return {"next": self.next}

    def load_state_dict(self, state: Any) -> None:
        self.next = state["next"]


def stateful_stream(log: str) -> Any:
    return DataLoader(StatefulStream(60, log), batch_size=3)


def stateful_loader(workers: int = 0) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Numbers(60), batch_size=4, shuffle=True, num_workers=workers)


def stateful_both(log: str = "/dev/null", workers: int = 0) -> Any:
    """A StatefulDataLoader over an iterable dataset with state."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(StatefulStream(60, log), batch_size=3, num_workers=workers)


Pair = collections.namedtuple("Pair", "left right")


def of_everything() -> Any:
    """A list is a loader too, if it is not of loaders."""
    return iter_of([{"pair": Pair(1, torch.ones(2)), "text": ["a", None], "deep": {"x": (1.5, True, b"z")}}])


def iter_of(batches: list[Any]) -> Any:
    class Loader:
        def __iter__(self) -> Any:
            return iter(batches)

    return Loader()


def large(megabytes: int = 1, length: int = 20) -> Any:
    return DataLoader(Large(megabytes, length), batch_size=1)


class Large(Numbers):
    def __init__(self, megabytes: int, length: int) -> None:
        super().__init__(length)
        self.megabytes = megabytes

    def __getitem__(self, index: int) -> Any:
        return torch.full((self.megabytes << 18,), float(index))


def failing() -> Any:
    raise FileNotFoundError("there is no such corpus")


def leaving() -> Any:
    sys.exit("the corpus is not licensed")


def wide(samples: int = 50_000) -> Any:
    """More indices per batch than go into a packet."""
    return DataLoader(Indices(samples * 3), batch_sampler=BatchSampler(range(samples * 3), samples, False))


class Indices(Numbers):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [sum(indices), len(indices)]
