"""Train a small GPT with DDP so that faults do not change the result, not in the last bit.

    hyperpodrun --nproc-per-node=4 --inprocess-restart train.py --inject kill:rank=2,step=40
    torchrun --nproc-per-node=4 train.py
    python train.py

The last line is a digest of the final state. It depends on the options, the number of ranks, the hardware and
the versions of Python (which brings the text) and torch; not on the launcher, nor on what failed on the way.
"""

import argparse
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmul; read when CUDA starts

import torch
import torch.distributed as dist
from data import Batches, loader
from device import init_process_group, pick_device
from digest import digest
from faults import FaultInjector, injected
from hyperpodrun import CacheResumeMMAPConfig, CheckpointManager, HPCallWrapper, HPWrapper, MMAPDataLoader
from model import GPT
from torch.nn import functional as F

manager = CheckpointManager()


class Job(NamedTuple):
    """What lives as long as the process."""

    device: torch.device
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    faults: FaultInjector


@HPWrapper(checkpoint_manager=manager)
def run_main(args: argparse.Namespace, job: Job, caller: HPCallWrapper | None = None) -> None:
    """The part that is entered again after a fault: process group and DDP are made anew, the rest lives on."""
    device, module, optimizer, scheduler, faults = job
    init_process_group(device, args.timeout)
    rank = dist.get_rank()
    torch.manual_seed(args.seed)  # one seed for all: any rank's generators can stand in for those of a lost node
    first = manager.restore()
    if rank == 0 and first:
        print(f"resumed at step {first}", flush=True)
    ddp = manager.data_parallel(module)
    faults.begin(caller, rank)
    data = batches(args, rank, first)

    for step in manager.steps(args.steps):
        faults.step = step
        inputs, targets = next(data)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(ddp(inputs.to(device)).flatten(0, 1), targets.to(device).flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        if rank == 0 and (step == 0 or (step + 1) % args.log_every == 0):
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
        faults.reach("after-update")


def batches(args: argparse.Namespace, rank: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Those from step `first` on; with --mmap-cache made ahead, by a process that outlives this one."""
    arguments = (args.seed, args.steps, rank, args.batch_size, args.block_size)
    if args.mmap_cache is None:
        return map(Batches(*arguments).__getitem__, range(first, args.steps))
    cached = MMAPDataLoader(functools.partial(loader, *arguments), CacheResumeMMAPConfig(cache_dir=args.mmap_cache))
    cached.seek(first)
    return iter(cached)


def be_deterministic() -> None:
    """The same bits in every run."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for bugs, 7 % of a step
    # Of the fused kernels of attention only flash has a backward pass that adds in a fixed order.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def parse_args() -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT with DDP.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--block-size", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, keep the weights in float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="a collective that takes longer is a fault"
    )
    parser.add_argument("--mmap-cache", metavar="DIR", help="prepare batches in memory-mapped files there")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two lines of loss")
    parser.add_argument(
        "--inject",
        type=injected,
        action="append",
        default=[],
        metavar="KIND:rank=R,step=S[,where=PLACE]",
        help="break a rank on purpose, once; may be repeated (see faults.py)",
    )
    args = parser.parse_args()
    for injection in args.inject:
        if injection.step >= args.steps:
            parser.error(f"argument --inject: step {injection.step} never begins with --steps {args.steps}.")
    return args


def main() -> None:
    """Build the model, train, print the digest."""
    args = parse_args()
    be_deterministic()
    device = pick_device()
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.width, args.heads, args.block_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    module: torch.nn.Module = torch.compile(model) if args.compile else model  # once: it outlives every restart
    faults = FaultInjector(args.inject)
    faults.attach(model, module, optimizer)
    manager.register(model=model, optimizer=optimizer, scheduler=scheduler)
    run_main(args, Job(device, module, optimizer, scheduler, faults))
    result = digest(model, optimizer)
    if dist.get_rank() == 0:
        print(f"digest {result}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
