"""Train a tiny GPT-2 with transformers.Trainer, so that faults do not change the result, not in the last bit.

    hyperpodrun --nproc-per-node=4 --inprocess-restart train.py
    env HYPERPODRUN_TESTING=1 "HYPERPODRUN_INJECT=kill:rank=2,step=7,where=backward" hyperpodrun ... train.py
    hyperpodrun verify --nproc-per-node=4 train.py

It needs `pip install 'hyperpodrun[hf]'`, and nothing else: the model is made on the spot, and so is the data, in JSON
lines, the same compressed, or Arrow. Two lines make it recoverable: the import, and `@recoverable`. The last line of
output is a digest of the weights; with and without a fault it is the same.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch
from datasets import Dataset, load_dataset, load_from_disk
from hyperpodrun.integrations.hf import recoverable  # 1
from hyperpodrun.testing import result
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
LENGTH = 24


def write(path: Path, count: int) -> None:
    """Sentences in a file of that kind, in one move: other ranks find all of it or nothing."""
    if path.exists():
        return
    draw = random.Random(count)
    words = ["the", "lost", "rank", "comes", "back", "from", "a", "peer", "and", "goes", "on"]
    rows = [{"text": " ".join(draw.choices(words, k=6)) + "."} for _ in range(count)]
    part = path.with_name(f"{path.name}.{os.getpid()}")
    if path.suffix == ".arrow":
        Dataset.from_list(rows).save_to_disk(part)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        part.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    try:
        part.rename(path)
    except OSError:  # another rank was first, and a folder does not replace another
        shutil.rmtree(part)


def read(path: Path) -> Dataset:
    """Its sentences as numbers, cut and filled up to one length."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        letters = [LETTERS.index(letter) for letter in row["text"][:LENGTH]]
        return {"input_ids": letters + [0] * (LENGTH - len(letters))}

    rows = load_from_disk(path) if path.suffix == ".arrow" else load_dataset("json", data_files=str(path))["train"]
    return rows.map(encode, remove_columns=["text"], keep_in_memory=True)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch in which some letters are replaced at random, anew in every epoch."""
    labels = torch.tensor([row["input_ids"] for row in rows])
    noise = torch.rand(labels.shape) < 0.05
    return {"input_ids": torch.where(noise, torch.randint_like(labels, len(LETTERS)), labels), "labels": labels}


@recoverable  # 2
def main(options: argparse.Namespace) -> None:
    arguments = TrainingArguments(
        output_dir=options.output,
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        dataloader_num_workers=1,
        report_to=[],
        disable_tqdm=True,
    )
    set_seed(1)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    paths = [Path(options.output) / f"{name}.{options.format}" for name in ("train", "test")]
    for path, count in zip(paths, (320, 32), strict=True):
        write(path, count)
    shape = GPT2Config(vocab_size=len(LETTERS), n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    trainer = Trainer(
        model=GPT2LMHeadModel(shape),
        args=arguments,
        train_dataset=read(paths[0]),
        eval_dataset=read(paths[1]),
        data_collator=collate,
    )
    trainer.train()
    losses = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]]
    weights = b"".join(value.cpu().numpy().tobytes() for value in trainer.model.state_dict().values())
    result(losses, "losses")
    if trainer.is_world_process_zero():
        print(f"digest {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a tiny GPT-2 with transformers.Trainer.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--format", choices=["jsonl", "jsonl.gz", "arrow"], default="jsonl", help="of the data")
    parser.add_argument("--output", default="out/hf")
    main(parser.parse_args())
