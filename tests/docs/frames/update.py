"""docs/checkpointless.md: an average of the weights belongs to the update."""

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.optim.swa_utils import AveragedModel

manager = CheckpointManager()
model = faulty(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
average = AveragedModel(model)
manager.register(model=model, optimizer=optimizer, average=average)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    manager.restore()
    ddp = manager.data_parallel(model)
    for _ in manager.steps(14):
        loss = ddp(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        # <snippet>


run_main()
finish()
