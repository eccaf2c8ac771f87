"""transformers.Trainer with all that must survive a fault: shuffling, noise, accumulation, a schedule, evaluation."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from common import Sentences, build, digest, generators, skip_copy, tell
from hyperpodrun.integrations.hf import recoverable
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--drawn-order", action="store_true", help="from a generator, and not from a seed per epoch")
parser.add_argument("--lora", action="store_true")
parser.add_argument("--skip-copy", action="store_true")
parser.add_argument("--plain", action="store_true", help="as a script that knows nothing of hyperpodrun")
parser.add_argument("--fail-evaluation", type=int, default=-1, help="raise on rank 1 in this evaluation, once")
options = parser.parse_args()
torch.set_num_threads(1)
TOLD: list[str] = []
FAILED: list[int] = []


class Counting(TrainerCallback):
    """Has a state of its own, and sees what is called."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_, **__):
        self.steps += 1

    def on_evaluate(self, args, state, *_, **__):
        last = options.fail_evaluation
        if state.global_step == last and args.process_index == 1 and not FAILED:
            FAILED.append(1)
            raise RuntimeError("injected in an evaluation")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def main():
    arguments = TrainingArguments(
        output_dir=os.environ["OUTCOME"] + "/checkpoints", use_cpu=True, seed=7, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=options.epochs,
        max_steps=options.max_steps, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=3, logging_steps=2,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", dataloader_num_workers=options.workers,
        include_num_input_tokens_seen=True, accelerator_config={"use_seedable_sampler": not options.drawn_order},
    )  # fmt: skip
    torch.manual_seed(1)
    model = build()
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1))
    counting = Counting()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Sentences(70), eval_dataset=Sentences(16),
        callbacks=[counting, EarlyStoppingCallback(early_stopping_patience=50)],
    )  # fmt: skip
    trained = trainer.train()
    history = [
        {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]
    return {
        "history": history,
        "steps": trainer.state.global_step,
        "loss": trained.training_loss,
        "weights": digest(trainer.model.state_dict()),
        "optimizer": digest(trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()),
        "generators": generators(),
        "counted": counting.steps,
        "best": trainer.state.best_global_step,
        "checkpoints": sorted(path.name for path in Path(arguments.output_dir).glob("checkpoint-*")),
    }


if options.skip_copy:
    skip_copy()
tell(**(main if options.plain else recoverable(main))())
