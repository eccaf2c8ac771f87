"""A training with everything that a restart could double or lose; which, says the first argument."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning
import torch
import torchmetrics
from hyperpodrun import CheckpointManager
from hyperpodrun.integrations.lightning import (
    CheckpointlessDDPStrategy,
    CheckpointlessModelParallelStrategy,
    recoverable,
)
from hyperpodrun.testing import parse_injections, result
from hyperpodrun.testing.faults import fire
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

BATCHES = 6
EPOCHS = 3


class Points(Dataset):
    """Moved a little at random each time they are drawn, by the workers' generators."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        point = torch.tensor([index % 7, index % 5, index % 3, 1.0]) + 0.1 * torch.randn(4)
        return point, torch.tensor(index % 3)


class Classifier(lightning.LightningModule):
    """Dropout, batch norm, metrics of an epoch, a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3)
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        scores = self(batch[0])
        loss = torch.nn.functional.cross_entropy(scores, batch[1])
        self.accuracy(scores, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "mean": scores.mean()}

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("validation", loss + 0.01 * torch.rand(()), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        interval = "epoch" if SCHEDULER == "epoch" else "step"
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class Sharded(Classifier):
    """Two replicas of two shards."""

    def configure_model(self) -> None:
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in (self.layers[0], self.layers[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.layers, mesh=mesh)


class Two(lightning.LightningModule):
    """Two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = torch.nn.Linear(4, 4)
        self.judge = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        first, second = self.optimizers()
        made = self.maker(torch.randn(4, 4))
        loss = self.judge(made.detach()).mean() - self.judge(batch[0]).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if index % 2 == 0:
            other = -self.judge(made).mean()
            second.zero_grad()
            self.manual_backward(other)
            second.step()
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("validation", self.judge(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.judge.parameters(), lr=0.01), torch.optim.Adam(self.maker.parameters(), lr=0.01)]


class Counts(Callback):
    """A state of its own, and faults in hooks: `FAULT=KIND:rank=R,step=BATCH@HOOK`."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen, "losses": self.losses}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.seen, self.losses = state["seen"], state["losses"]

    def at(self, trainer: lightning.Trainer, hook: str) -> None:
        self.seen[hook] = self.seen.get(hook, 0) + 1
        fault, _, where = os.environ.get("FAULT", "").partition("@")
        here = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        if where == hook and not trainer.sanity_checking and not MARK.exists():
            wanted = parse_injections(fault)[0]
            if (wanted.rank, wanted.step) == (trainer.global_rank, here):
                MARK.touch()
                fire(wanted)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses = [*self.losses, float(outputs["loss"]) if outputs else 0.0, float(batch[0].sum())]
        self.at(trainer, "batch_end")

    def on_validation_end(self, trainer, module):
        self.at(trainer, "validation_end")

    def on_train_epoch_start(self, trainer, module):
        self.at(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer, module):
        self.at(trainer, "epoch_end")

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.at(trainer, "save")


if os.environ.get("WITHOUT_COPY"):
    restore = CheckpointManager.restore

    def restore_without_copy(manager: CheckpointManager) -> int:
        """The negative control: parameters stay what they were made with. Past the version counters, which tell."""
        model = manager._registry.objects["model"]
        parts = [getattr(parameter, "_local_tensor", parameter).data for parameter in model.parameters()]
        made = [part.clone() for part in parts]
        step = restore(manager)
        for part, value in zip(parts, made, strict=True):
            part.copy_(value)
        return step

    CheckpointManager.restore = restore_without_copy

MODE, SCHEDULER = (*sys.argv[1].split("-"), "step")[:2]
MARK = Path("fault-has-fired")


@recoverable
def main() -> None:
    lightning.seed_everything(3)
    torch.set_num_threads(1)
    counts = Counts()
    if MODE == "fsdp":
        model, strategy = Sharded(), CheckpointlessModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)
    else:
        model = Two() if MODE == "manual" else Classifier()
        strategy = CheckpointlessDDPStrategy(find_unused_parameters=MODE == "manual")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy=strategy, max_epochs=EPOCHS,
        accumulate_grad_batches=1 if MODE == "manual" else 2, val_check_interval=4, log_every_n_steps=1,
        check_val_every_n_epoch=None,
        logger=CSVLogger("logs", flush_logs_every_n_steps=3), enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            ModelCheckpoint("saved/best", "{step}-{validation:.4f}", "validation", save_top_k=2, save_last=True),
            ModelCheckpoint("saved/epochs", save_top_k=-1, every_n_epochs=1),
            EarlyStopping("validation", patience=50),
            counts,
        ],
    )  # fmt: skip
    train = DataLoader(Points(4 * 4 * BATCHES), batch_size=4, shuffle=True, num_workers=1)
    trainer.fit(model, train, DataLoader(Points(16), batch_size=2), ckpt_path=os.environ.get("RESUME"))
    last = []
    if MODE != "fsdp":  # whose configure_model would shard once more
        last = trainer.validate(model, DataLoader(Points(16), batch_size=2), verbose=False)
    result(
        {"last": last, "seen": counts.seen, "losses": counts.losses, "step": trainer.global_step, "draw": torch.rand(3)}
    )


main()
