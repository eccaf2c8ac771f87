"""Random numbers that depend on which batch is made, and on nothing else.

torch's DataLoader seeds each worker once, so what an augmentation draws depends on which worker made which batches
before. Here the generators of torch, `random` and numpy are seeded anew for every batch, from the stream's seed and the
batch's place, whoever makes it and however often: a batch made again after a fault is the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
import xxhash

ORDER = -1
"""In place of a batch's index: the seed of the order of an epoch, and of what an iterable source draws."""
FACTORY = -(1 << 32)
"""The seed of what the user's factory draws."""


def derive(seed: int, epoch: int, index: int) -> int:
    """63 bits."""
    return int(xxhash.xxh3_64_intdigest(b"%d/%d/%d" % (seed, epoch, index))) >> 1


def set_seed(seed: int) -> None:
    """Seeds the CPU generators of this process."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn and seeded inside, the process's own random numbers go on as if it had not been."""
    state, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy.random")
    numpy_state = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy is not None and numpy_state is not None:
            numpy.set_state(numpy_state)
