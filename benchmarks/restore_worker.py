"""Loses a rank again and again, and times how its state comes back; then the same bytes by gloo, and through disk."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import hyperpodrun
import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
from device import init_process_group, pick_device

LAYER_BYTES = 4 << 20


class Journal:
    """One JSON line for every fact, with the package that it is about."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **fields: object) -> None:
        code = str(Path(hyperpodrun.__file__).parent)
        with self._path.open("a") as file:
            file.write(json.dumps({"rank": dist.get_rank(), "code": code, **fields}) + "\n")


def make(nbytes: int, device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer: half of the bytes are parameters, half are momentum."""
    count = max(1, nbytes // 2 // LAYER_BYTES)
    size = nbytes // 2 // count // 4
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size, device=device)) for _ in range(count)])
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def give_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Optimizer state, as a step would leave it; a new process has none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 2.0)


def memory_kb(name: str) -> int:
    """A line of /proc/self/status: VmRSS now, VmHWM the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(name)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def train(args: argparse.Namespace, journal: Journal, manager: CheckpointManager, caller: HPCallWrapper) -> None:
    init_process_group(args.device, timeout=60)
    rank = dist.get_rank()
    lost = dist.get_world_size() - 1
    model, optimizer = args.objects
    if caller.epoch == 0:
        give_momentum(optimizer)
    manager.register(model=model, optimizer=optimizer)
    dist.barrier()
    resident = memory_kb("VmRSS")
    forget_peak()
    begin = time.perf_counter()
    manager.restore()
    finish(args.device)
    seconds = time.perf_counter() - begin
    if caller.epoch:
        took_part = caller.plan is not None and (caller.plan.sent_by(rank) or caller.plan.source_of(rank))
        received = caller.plan is not None and caller.plan.source_of(rank) is not None
        # A new process's momentum is made during the restore: it is part of the state, not extra.
        own = args.bytes // 2 // 1024 if received else 0
        if took_part:
            extra = max(0, memory_kb("VmHWM") - resident - own) / 1024
            journal.write(path="peer", seconds=seconds, extra_mb=extra, received=received)
    first = True
    for _ in manager.steps(args.runs + 1):
        if not first and caller.epoch < args.runs and rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        with manager.update():
            first = False  # nothing is trained here; but a job that makes no progress is ended
    if args.broadcast:
        broadcast(args, journal)
    else:
        compare(args, journal, lost)


def finish(device: torch.device) -> None:
    """What has been queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def broadcast(args: argparse.Namespace, journal: Journal) -> None:
    """The same bytes by a broadcast of the group's own, and by one send, which NCCL gives fewer channels."""
    row = torch.zeros(args.bytes, dtype=torch.uint8, device=args.device)
    operation = dist.irecv if dist.get_rank() else dist.isend

    def send() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(operation, row, 1 - dist.get_rank())]):
            work.wait()

    for path, move in (("broadcast", lambda: dist.broadcast(row, 0)), ("send", send)):
        for run in range(args.runs + 1):  # the first one warms up
            dist.barrier()
            finish(args.device)
            begin = time.perf_counter()
            move()
            finish(args.device)
            if run and dist.get_rank():
                journal.write(path=path, seconds=time.perf_counter() - begin)


def compare(args: argparse.Namespace, journal: Journal, lost: int) -> None:
    """The same bytes by one gloo send, and through a file that stays in the page cache."""
    rank = dist.get_rank()
    if rank not in (0, lost):
        return
    row = torch.zeros(args.bytes, dtype=torch.uint8)
    word = torch.zeros(1)
    for run in range(args.runs + 1):  # the first one warms up
        dist.send(word, lost) if rank == 0 else dist.recv(word, 0)
        begin = time.perf_counter()
        dist.send(row, lost) if rank == 0 else dist.recv(row, 0)
        seconds = time.perf_counter() - begin
        dist.send(word, 0) if rank == lost else dist.recv(word, lost)
        if run and rank == lost:
            journal.write(path="gloo", seconds=seconds)
    if rank == 0:
        state = {f"layer {i}": part for i, part in enumerate(row.view(torch.float32).split(LAYER_BYTES // 4))}
        path = args.directory / "state.pt"
        for _ in range(args.runs):
            begin = time.perf_counter()
            torch.save(state, path)
            torch.load(path, weights_only=True)
            journal.write(path="disk", seconds=time.perf_counter() - begin)
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--broadcast", action="store_true", help="beside broadcast and send, not gloo and disk")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: this rank's GPU, and NCCL")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.device = pick_device() if args.device == "cuda" else torch.device("cpu")
    args.objects = make(args.bytes, args.device)
    manager = CheckpointManager(enable_checksum=args.checksum)

    @HPWrapper(checkpoint_manager=manager)
    def run_main(caller: HPCallWrapper) -> None:
        train(args, Journal(args.directory / "facts.jsonl"), manager, caller)

    run_main()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
