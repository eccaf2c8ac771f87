"""Train a small classifier with Lightning, its batches prepared by a process that outlives the workers.

    hyperpodrun --nproc-per-node=2 --max-restarts=1 train.py --kill rank=1,step=12
    python train.py

The data module is any LightningDataModule; MMAPDataModule(data_module=...) around it is the only change. A checkpoint
is written every five steps; after a restart training goes on from the last one, and its first batch lies ready. The
last line is a digest of the weights: with and without --kill it is the same.
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import lightning
import torch
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataModule, PassthroughMMAPConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset


class Spirals(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points of three spirals, moved a little at random each time they are drawn."""

    def __len__(self) -> int:
        return 960

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        label, turn = index % 3, torch.tensor(index / 160)
        angle = turn + 2.1 * label
        point = turn / 6 * torch.stack((angle.cos(), angle.sin()))
        return point + 0.01 * torch.randn(2), torch.tensor(label)


class SpiralsModule(lightning.LightningDataModule):
    """An ordinary data module: it knows nothing of caches."""

    def setup(self, stage: str) -> None:
        self.data = Spirals()

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(self.data, batch_size=16, shuffle=True, num_workers=1)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(self.data, batch_size=32)


class Classifier(lightning.LightningModule):
    """Two layers."""

    def __init__(self, kill: tuple[int, int] | None) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        self.kill = kill

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if (self.global_rank, self.global_step) == self.kill and os.environ.get(
            "TORCHELASTIC_RESTART_COUNT", "0"
        ) == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        accuracy = (self.layers(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def rank_and_step(text: str) -> tuple[int, int]:
    """`rank=R,step=S`"""
    values = dict(part.split("=") for part in text.split(","))
    return int(values["rank"]), int(values["step"])


def main() -> None:
    """Train, print the digest."""
    parser = argparse.ArgumentParser(description="Train a small classifier with Lightning.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path("lightning_checkpoints"), help="for checkpoints")
    parser.add_argument("--cache-dir", default="/dev/shm/pdl_cache")
    parser.add_argument("--no-cache", action="store_true", help="load in the training process")
    parser.add_argument("--kill", type=rank_and_step, metavar="rank=R,step=S", help="a rank that is lost, once")
    args = parser.parse_args()
    lightning.seed_everything(0)
    torch.set_num_threads(1)
    config = PassthroughMMAPConfig() if args.no_cache else CacheResumeMMAPConfig(cache_dir=args.cache_dir)
    model = Classifier(args.kill)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), strategy="ddp", max_epochs=args.epochs,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=args.directory,
        callbacks=[ModelCheckpoint(args.directory, save_last=True, every_n_train_steps=5)],
    )  # fmt: skip
    last = args.directory / "last.ckpt"
    trainer.fit(
        model,
        datamodule=MMAPDataModule(data_module=SpiralsModule(), mmap_config=config),
        ckpt_path=last if last.exists() else None,
    )
    if trainer.is_global_zero:
        weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
        print(f"digest {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
