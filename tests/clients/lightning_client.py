"""Lightning DDP: its torchelastic environment takes ranks and address from the launcher."""

from __future__ import annotations

import tempfile

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


lightning.seed_everything(0)
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs @ torch.randn(8, 1))
model = Regression()
with tempfile.TemporaryDirectory() as directory:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=directory,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True))
assert trainer.world_size == 2
assert model.losses[-1] < model.losses[0] / 2, model.losses
if trainer.is_global_zero:
    print(f"trained: loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}", flush=True)
