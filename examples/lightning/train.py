"""Train a small classifier with Lightning, and lose processes on the way.

    hyperpodrun --nproc-per-node=2 --inprocess-restart train.py --inject kill:rank=1,step=12,where=backward
    python train.py

The lines marked 1 to 3 are all that recovery takes. Batches are shuffled and made by a worker process, a checkpoint is
saved after every validation, metrics go to a CSV file; all of it is after a fault what it is without. The last line is
a digest of the weights: with and without --inject it is the same. With --mmap-cache batches are prepared by a process
that outlives the workers (docs/dataloader.md); --strategy fsdp2 shards the model.
"""

import argparse
import hashlib
import os

import lightning
import torch
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataModule, testing
from hyperpodrun.integrations import lightning as checkpointless  # 1
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset


class Spirals(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points of three spirals, moved a little at random each time they are drawn."""

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        label, turn = index % 3, torch.tensor(index / 160)
        angle = turn + 2.1 * label
        point = turn / 6 * torch.stack((angle.cos(), angle.sin()))
        return point + 0.01 * torch.randn(2), torch.tensor(label)


class SpiralsModule(lightning.LightningDataModule):
    """An ordinary data module: it knows nothing of faults, nor of caches."""

    def setup(self, stage: str) -> None:
        self.data = Spirals()

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(self.data, batch_size=16, shuffle=True, num_workers=1)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(self.data, batch_size=32)


class Classifier(lightning.LightningModule):
    """Two layers."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded:  # two shards, each on every second rank: who is lost has a replica
            shape = (int(os.environ["WORLD_SIZE"]) // 2, 2)
            mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            fully_shard(self.layers, mesh=mesh)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layers(points)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        accuracy = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


@checkpointless.recoverable  # 2
def main(args: argparse.Namespace) -> None:
    """Train, print the digest."""
    lightning.seed_everything(0)
    torch.set_num_threads(1)
    if args.strategy == "ddp":
        strategy = checkpointless.CheckpointlessDDPStrategy()  # 3
    else:
        strategy = checkpointless.CheckpointlessModelParallelStrategy(int(os.environ["WORLD_SIZE"]), 1)
    trainer = lightning.Trainer(
        strategy=strategy, accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")), max_epochs=args.epochs, val_check_interval=0.5,
        log_every_n_steps=1, logger=CSVLogger(args.directory), enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(monitor="accuracy", mode="max", save_top_k=2, save_last=True)],
    )  # fmt: skip
    data = SpiralsModule()
    if args.mmap_cache:
        data = MMAPDataModule(data_module=data, mmap_config=CacheResumeMMAPConfig(cache_dir=args.mmap_cache))
    trainer.fit(model := Classifier(sharded=args.strategy == "fsdp2"), datamodule=data)
    weights = b"".join(getattr(p, "full_tensor", p.detach)().detach().numpy().tobytes() for p in model.parameters())
    if trainer.is_global_zero:
        print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
        print(f"digest {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)
    testing.result([weights, trainer.callback_metrics["accuracy"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small classifier with Lightning.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--directory", default="lightning_run", help="for metrics and checkpoints")
    parser.add_argument("--mmap-cache", metavar="DIR", help="batches are prepared by a process of their own")
    parser.add_argument("--inject", help="faults, KIND:rank=R,step=S[,where=PLACE], separated by ;")
    args = parser.parse_args()
    if args.inject:
        os.environ |= {"HYPERPODRUN_TESTING": "1", "HYPERPODRUN_INJECT": args.inject}
    main(args)
