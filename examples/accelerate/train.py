"""Train a small classifier with a loop of accelerate, so that faults do not change the result, not in the last bit.

    hyperpodrun --nproc-per-node=4 --inprocess-restart train.py
    env HYPERPODRUN_TESTING=1 "HYPERPODRUN_INJECT=kill:rank=2,step=7,where=backward" hyperpodrun ... train.py
    hyperpodrun verify --nproc-per-node=4 train.py

It needs `pip install 'hyperpodrun[hf]'`, and nothing else: the data is written on the spot, in JSON lines, the same
compressed, or Arrow. Three lines make it recoverable: the import, `@recoverable`, and `epochs(loader, n)` in place of
`range(n)`. The last line of output is a digest of the weights; with and without a fault it is the same.
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
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset, load_from_disk
from hyperpodrun.integrations.accelerate import epochs, recoverable  # 1
from hyperpodrun.testing import result
from torch.utils.data import DataLoader


def write(path: Path, count: int) -> None:
    """Points in a file of that kind, in one move: other ranks find all of it or nothing."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(count)
    points = [(draw.uniform(-1, 1), draw.uniform(-1, 1)) for _ in range(count)]
    rows = [{"point": [x, y], "label": int(x * y > 0)} for x, y in points]
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
    rows = load_from_disk(path) if path.suffix == ".arrow" else load_dataset("json", data_files=str(path))["train"]
    return rows.with_format("torch")


@recoverable  # 2
def main(options: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    set_seed(1)
    paths = [Path(options.output) / f"{name}.{options.format}" for name in ("train", "test")]
    for path, count in zip(paths, (320, 64), strict=True):
        write(path, count)
    loader = DataLoader(read(paths[0]), batch_size=8, shuffle=True, num_workers=1)
    tests = DataLoader(read(paths[1]), batch_size=8)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=400)
    set_seed(1, device_specific=True)  # dropout differs between ranks
    model, optimizer, loader, tests, scheduler = accelerator.prepare(model, optimizer, loader, tests, scheduler)

    for epoch in epochs(loader, options.epochs):  # 3
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(batch["point"]), batch["label"])
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            right = [model(batch["point"]).argmax(1) == batch["label"] for batch in tests]
        accuracy = accelerator.gather(torch.cat(right)).float().mean().item()
        accelerator.print(f"epoch {epoch} accuracy {accuracy:.3f}", flush=True)
        result(accuracy, f"accuracy {epoch}")

    weights = b"".join(value.cpu().numpy().tobytes() for value in accelerator.unwrap_model(model).state_dict().values())
    accelerator.print(f"digest {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small classifier with accelerate.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--format", choices=["jsonl", "jsonl.gz", "arrow"], default="jsonl", help="of the data")
    parser.add_argument("--output", default="out/accelerate")
    main(parser.parse_args())
