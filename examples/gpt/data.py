"""The training text: the help topics that every CPython carries. Nothing is downloaded."""

import functools
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader, Dataset


@functools.cache
def corpus() -> torch.Tensor:
    """The whole text as one row of bytes, about 0.5 MB."""
    text = "".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batch(seed: int, step: int, rank: int, size: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step on one rank.

    They depend on the arguments alone: there is no reading position to lose. The generator is private to the
    call, so that drawing data leaves the dropout's random numbers as they are.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
    text = corpus()
    starts = torch.randint(len(text) - block_size, (size, 1), generator=generator)
    window = text[starts + torch.arange(block_size + 1)].long()
    return window[:, :-1], window[:, 1:]


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item k is the batch of step k."""

    def __init__(self, seed: int, steps: int, rank: int, size: int, block_size: int) -> None:
        self._seed, self._steps, self._of_every_step = seed, steps, (rank, size, block_size)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch(self._seed, step, *self._of_every_step)


def loader(*args: int) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """A DataLoader of `Batches(*args)`."""
    return DataLoader(Batches(*args), batch_size=None)
