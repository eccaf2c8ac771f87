"""Train a small GPT with DDP so that faults do not change the result, not in the last bit.

    hyperpodrun --nproc-per-node=4 --inprocess-restart train.py --inject kill:rank=2,step=40
    torchrun --nproc-per-node=4 train.py
    python train.py

The last line is a digest of the final state. It depends on the options, the number of ranks, the hardware and
the versions of Python (which brings the text) and torch; not on the launcher, nor on what failed on the way.
"""

import argparse
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matmul; read when CUDA starts
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # see wrap(); read when torch is imported

import torch
import torch.distributed as dist
from data import batch
from faults import FaultInjector, Injection
from hyperpodrun import HPCallWrapper, HPWrapper
from state import TrainState
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


@HPWrapper()
def run_main(
    args: argparse.Namespace, state: TrainState, faults: FaultInjector, caller: HPCallWrapper | None = None
) -> None:
    """The part that is entered again after a fault: process group and DDP are made anew, `state` lives on."""
    assert caller is not None, "HPWrapper passes it"
    init_process_group(state.device)
    rank, first_step = dist.get_rank(), 0
    if caller.plan is not None:
        with caller.restoring():
            first_step = state.restore(caller.plan)
        if rank == 0:
            print(f"epoch {caller.epoch}: resumed at step {first_step}", flush=True)
    ddp = wrap(state.model)
    faults.begin(caller.epoch, rank)

    for step in range(first_step, args.steps):
        faults.step = step
        inputs, targets = batch(args.seed, step, rank, args.batch_size, args.block_size)
        state.optimizer.zero_grad(set_to_none=True)  # an interrupted backward leaves gradients behind
        logits = ddp(inputs.to(state.device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(state.device).flatten())
        loss.backward()
        state.remember_rng(step + 1)
        state.optimizer.step()
        if rank == 0 and (step == 0 or (step + 1) % args.log_every == 0):
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
        faults.reach("between")


def init_process_group(device: torch.device) -> None:
    """Join the job; plain `python` is a job of one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def wrap(model: torch.nn.Module) -> DistributedDataParallel:
    """DDP that adds the ranks' gradients in the same order in every epoch.

    After its first backward DDP rearranges its buckets, and an element's place in its bucket decides in which
    order its gradients are added: a DDP made anew in the middle of a run would round differently. With
    find_unused_parameters=True it never does so; TORCH_CPP_LOG_LEVEL hides its warning that none is unused.
    All ranks hold the same weights by now: rank 0, perhaps a new process, need not send its own (init_sync).
    """
    return DistributedDataParallel(model, bucket_cap_mb=1, find_unused_parameters=True, init_sync=False)


def pick_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a sum split over threads rounds differently
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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
    parser.add_argument("--log-every", type=int, default=10, help="steps between two lines of loss")
    parser.add_argument(
        "--inject",
        type=Injection.parse,
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
    """Build the state once, train, print the digest."""
    args = parse_args()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for bugs, 7 % of a step
    state = TrainState(args, pick_device())
    faults = FaultInjector(args.inject)
    faults.attach(state.model, state.optimizer)
    run_main(args, state, faults)
    if os.environ.get("RANK", "0") == "0":
        print(f"digest {state.digest()}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
