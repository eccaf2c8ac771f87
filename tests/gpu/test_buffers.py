"""Statistics that each rank keeps for itself on its GPU, and that no other rank could give a lost one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_gpu")

BATCH_NORM = """
import os, signal, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, {gpt!r})
import torch
import torch.distributed as dist
from torch import nn
from digest import digest
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from train import be_deterministic, init_process_group, pick_device

RANK, VICTIM = int(os.environ["RANK"]), int(sys.argv[1])
be_deterministic()
device = pick_device()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
manager = CheckpointManager()
manager.register(model=model, optimizer=optimizer)


@HPWrapper(checkpoint_manager=manager)
def main(caller: HPCallWrapper):
    init_process_group(device, 60)
    manager.restore()
    ddp = manager.data_parallel(model, broadcast_buffers=False, bucket_cap_mb=0.01)
    for step in manager.steps(12):
        batch = torch.randn(16, 32, generator=torch.Generator().manual_seed(step * 10 + RANK)).to(device)
        optimizer.zero_grad()
        ddp(batch).square().mean().backward()
        if step == 6 and caller.epoch == 0 and RANK == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()


main()
line = f"rank {{RANK}} {{digest(model, optimizer)}} {{model[1].running_mean.sum().item()}}\\n"
os.write(1, line.encode())  # in one piece: the ranks share the stream
dist.barrier()
dist.destroy_process_group()
"""


def test_a_lost_rank_has_its_batch_norm_statistics_again(run, script):
    """Killed after its gradients have left: the others may have completed the step or not."""
    worker = script(BATCH_NORM.format(gpt=str(Path(__file__).parents[2] / "examples" / "gpt")))
    ends = []
    for victim in (-1, 0, 1):
        finished = run("--nproc-per-node=2", "--inprocess-restart", worker, str(victim))
        assert finished.returncode == 0, finished.output
        assert len(finished.recoveries) == (victim >= 0)
        ends.append(sorted(finished.stdout.splitlines()))
    first, second = ends[0]
    assert first.split()[3] != second.split()[3], "each rank has statistics of its own"
    assert ends[1] == ends[0]
    assert ends[2] == ends[0]
