"""docs/frameworks.md: an ordinary script with its three lines."""

import os

import lightning
import torch
from hyperpodrun.testing import result
from torch.utils.data import DataLoader, TensorDataset

# <snippet>


class MyModule(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, index):
        return self(batch[0]).square().mean()

    def on_train_end(self):
        result([parameter.detach().clone() for parameter in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class MyData(lightning.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(256.0).reshape(64, 4)), batch_size=4, shuffle=True, num_workers=1)


settings = {
    "accelerator": "cpu",
    "devices": int(os.environ["LOCAL_WORLD_SIZE"]),
    "max_epochs": 3,
    "logger": False,
    "enable_progress_bar": False,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    main()
