"""Trains, and when a fault comes says what it has found: have gradients come, weights changed, the scheduler moved?"""

import sys

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from hyperpodrun.testing import result

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
called = torch.compile(model, backend="eager", fullgraph=True) if "--compile" in sys.argv else model
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
manager = CheckpointManager()
manager.register(model=model, optimizer=optimizer, scheduler=scheduler)


@HPWrapper(checkpoint_manager=manager)
def main(caller: HPCallWrapper = None) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    manager.restore()
    ddp = manager.data_parallel(called)
    for step in manager.steps(10):
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        try:
            loss = ddp(torch.full((2, 4), step + caller.rank, dtype=torch.float32)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
        except RuntimeError as error:
            if "injected" in str(error):
                gradients = model[0].weight.grad is not None
                changed = not torch.equal(before, model[0].weight)
                moved = scheduler.last_epoch > step
                what = str(error).rpartition(" ")[2]
                sys.stdout.write(f"{what} {gradients=} {changed=} {moved=}\n")
                sys.stdout.flush()
            raise


main()
digest = result([parameter.detach() for parameter in model.parameters()])
sys.stdout.write(f"end {dist.get_rank()} {[float(value.sum()) for value in digest]}\n")
