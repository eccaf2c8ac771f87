"""What the trainings of these tests share: tiny models, data that draws random numbers, and an outcome per rank."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

WORDS = 32


class Sentences(torch.utils.data.Dataset):
    """Tokens of which a few are replaced at random, each time they are read."""

    def __init__(self, count: int, *, noisy: bool = True) -> None:
        self.count, self.noisy = count, noisy

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) * (index % 5 + 1) + index) % WORDS
        if self.noisy:
            tokens[torch.randint(8, ())] = random.randrange(WORDS)
            tokens[int(np.random.randint(8))] = 1
        return {"input_ids": tokens, "labels": tokens}


def build(*, dropout: float = 0.1) -> GPT2LMHeadModel:
    shape = {"vocab_size": WORDS, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**shape, **drops, bos_token_id=0, eos_token_id=0))


def digest(*states: Any) -> str:
    """Of everything in there, bit for bit."""
    sums = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sums.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                sums.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sums.update(repr(value).encode())

    add(states)
    return sums.hexdigest()[:16]


def generators() -> str:
    return digest(torch.get_rng_state(), list(random.getstate()), np.random.get_state()[1].tolist())


def tell(**outcome: Any) -> None:
    """This rank's outcome, for the test."""
    directory = Path(os.environ["OUTCOME"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(outcome, indent=1))


def skip_copy() -> None:
    """The negative control: what a lost rank receives does not get into its tensors."""
    from hyperpodrun.checkpointless.transfer import restore

    take = restore.Restorer._take

    def take_nothing(self: Any, transfer: Any, step: int) -> Any:
        before = {name: value.detach().clone() for name, value in self._registry.state.named_tensors().items()}
        small = take(self, transfer, step)
        with torch.no_grad():
            for name, value in self._registry.state.named_tensors().items():
                value.copy_(before[name]) if name in before else value.zero_()
        return small

    restore.Restorer._take = take_nothing
