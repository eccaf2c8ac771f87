"""A loop with accelerate: shuffling, noise, accumulation, a schedule, evaluation after every epoch and within."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import Sentences, build, digest, generators, skip_copy, tell
from hyperpodrun.integrations.accelerate import epochs, recoverable
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--skip-copy", action="store_true")
parser.add_argument("--plain", action="store_true", help="as a script that knows nothing of hyperpodrun")
parser.add_argument("--fail-evaluation", type=int, default=-1, help="raise on rank 1 in this evaluation, once")
options = parser.parse_args()
torch.set_num_threads(1)
FAILED: list[int] = []


class Log:
    """What was measured; accelerate saves such an object in its checkpoints."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def state_dict(self):
        return {"entries": self.entries}

    def load_state_dict(self, state):
        self.entries = state["entries"]


def main():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(3 + accelerator.process_index)
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=80)
    set_seed(3 + accelerator.process_index)
    loader = DataLoader(Sentences(70), batch_size=2, shuffle=True, num_workers=options.workers)
    validation = DataLoader(Sentences(16), batch_size=4, num_workers=options.workers)
    log = Log()
    accelerator.register_for_checkpointing(log)
    model, optimizer, loader, validation, scheduler = accelerator.prepare(
        model, optimizer, loader, validation, scheduler
    )

    def evaluate(where: str, number: int) -> None:
        model.eval()
        with torch.no_grad():
            losses = torch.stack([model(**batch).loss for batch in validation])
        log.entries.append({where: number, "loss": accelerator.gather(losses).mean().item()})
        if where == "epoch" and number == options.fail_evaluation and accelerator.process_index == 1 and not FAILED:
            FAILED.append(1)
            raise RuntimeError("injected in an evaluation")

    for epoch in range(options.epochs) if options.plain else epochs(loader, options.epochs):
        model.train()
        for index, batch in enumerate(loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            log.entries.append({"train": accelerator.reduce(loss.detach(), "mean").item()})
            if accelerator.sync_gradients and len(log.entries) % 5 == 0:
                evaluate("step", index)
                model.train()
        evaluate("epoch", epoch)
        accelerator.save_state(os.environ["OUTCOME"] + f"/checkpoint-{epoch}")
    return {
        "history": log.entries,
        "steps": sum("train" in entry for entry in log.entries),
        "weights": digest(accelerator.unwrap_model(model).state_dict()),
        "optimizer": digest(optimizer.state_dict(), scheduler.state_dict()),
        "generators": generators(),
        "checkpoints": sorted(path.name for path in Path(os.environ["OUTCOME"]).glob("checkpoint-*")),
    }


if options.skip_copy:
    skip_copy()
tell(**(main if options.plain else recoverable(main))())
