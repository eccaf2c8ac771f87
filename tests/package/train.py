"""An ordinary script of eight lines more, as the README shows it. Each rank writes a digest of what it ends with.

train.py DIRECTORY [KILL_STEP]      rank 1 is killed in the middle of that step's backward pass, once
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import hyperpodrun
import torch
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper

DIRECTORY, KILL_STEP = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
RANK = int(os.environ["RANK"])

torch.manual_seed(0)
torch.set_num_threads(1)
manager = CheckpointManager()
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters())
manager.register(model=model, optimizer=optimizer)


@HPWrapper(checkpoint_manager=manager)
def run_main(caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    torch.distributed.init_process_group("gloo")
    manager.restore()
    ddp = manager.data_parallel(model)
    for step in manager.steps(12):
        loss = ddp(torch.randn(8, 16)).square().mean()
        optimizer.zero_grad()
        if (caller.epoch, RANK, step) == (0, 1, KILL_STEP):
            model[0].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        loss.backward()
        optimizer.step()


run_main()
moments = [tensor for _, tensor in sorted(optimizer.state_dict()["state"][0].items())]  # a peer names them in its order
state = [torch.get_rng_state(), *model.state_dict().values(), *moments]
ended = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state))
(DIRECTORY / f"rank-{RANK}").write_text(f"{ended.hexdigest()} {hyperpodrun.__file__}")
