"""docs/dataloader.md: a data module, and a trainer that does with it what Lightning's does.

Lightning itself would be a second environment; tests/integrations/lightning trains in it.
"""

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.utils.data import DataLoader, Dataset

manager = CheckpointManager()
last = None  # there is no checkpoint yet


class Numbers(Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        return torch.full((8,), index / 256) + torch.randn(8)


class MyDataModule:
    def prepare_data(self):
        pass

    def setup(self, stage):
        self.data = Numbers()

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=4)


class Trainer:
    """One epoch, and a look at the validation data."""

    def fit(self, model, datamodule, ckpt_path):
        self.losses, self.optimizer = [], torch.optim.AdamW(model.parameters(), lr=0.01)
        HPWrapper(checkpoint_manager=manager)(self.run)(model, datamodule)

    def run(self, model, data):
        optimizer = self.optimizer
        dist.init_process_group()
        manager.register(model=model, optimizer=optimizer)
        data.load_checkpoint({"global_step": manager.restore()})
        data.setup("fit")
        batches = iter(data.train_dataloader())
        ddp = manager.data_parallel(model)
        for _ in manager.steps(14):
            loss = ddp(next(batches)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            self.losses = [model(batch).square().mean().item() for batch in data.val_dataloader()]


if __name__ == "__main__":
    trainer, model = Trainer(), faulty(torch.nn.Linear(8, 1))
    # <snippet>
    finish(losses=trainer.losses)
