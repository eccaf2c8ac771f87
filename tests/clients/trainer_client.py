"""transformers.Trainer: a tiny GPT-2 with random weights learns a repeating sequence."""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


class Sequence(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=2))
with tempfile.TemporaryDirectory() as directory:
    arguments = TrainingArguments(
        output_dir=directory, use_cpu=True, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=5, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert arguments.world_size == 2
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequence())
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert float(losses[-1]) < float(losses[0]) / 2, losses
if trainer.is_world_process_zero():
    print(f"trained: loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}", flush=True)
torch.distributed.destroy_process_group()
