"""docs/verify.md: what a rank computes in the end, declared."""

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish

manager = CheckpointManager()
model = faulty(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
manager.register(model=model, optimizer=optimizer)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    manager.restore()
    ddp = manager.data_parallel(model)
    for _ in manager.steps(12):
        loss = ddp(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


accuracy = run_main()
# <snippet>
finish(accuracy=accuracy)
