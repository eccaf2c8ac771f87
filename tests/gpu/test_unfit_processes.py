"""What no restart in process can mend, and what must not be used after one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_gpu")

HEAD = """
import os, sys, time
sys.path.insert(0, {gpt!r})
import torch
import torch.distributed as dist
from hyperpodrun import CudaHealthCheck, HPCallWrapper, HPWrapper
from train import init_process_group, pick_device

device = pick_device()
RANK = int(os.environ["RANK"])

def step(caller):
    dist.all_reduce(torch.ones(1, device=device))
    torch.cuda.synchronize()
    caller.step_completed()
"""


def job(run, script, body: str, *options: str):
    gpt = str(Path(__file__).parents[2] / "examples" / "gpt")
    return run("--nproc-per-node=2", "--inprocess-restart", *options, script(HEAD.format(gpt=gpt) + body))


def test_a_kernel_that_never_ends_costs_its_process_and_no_other(run, script):
    finished = job(run, script, """
@HPWrapper(health_check=CudaHealthCheck(timeout=2))
def main(caller: HPCallWrapper):
    init_process_group(device, 60)
    step(caller)
    if caller.epoch == 0 and RANK == 1:
        torch.cuda._sleep(10**14)
        raise RuntimeError("boom")
    step(caller)
main()
""")  # fmt: skip
    assert finished.returncode == 0, finished.output
    (row,) = finished.recoveries
    assert row["respawned"] == [1], finished.output
    assert "did not finish its work within 2 s" in finished.stderr


def test_an_illegal_address_costs_its_process_and_the_agent_hears_of_it_from_the_driver(run, script):
    finished = job(run, script, """
import triton
import triton.language as tl

@triton.jit
def stray(row):
    tl.store(row + (1 << 42), 1.0)

@HPWrapper()
def main(caller: HPCallWrapper):
    init_process_group(device, 60)
    step(caller)
    if caller.epoch == 0 and RANK == 1:
        stray[(1,)](torch.zeros(1, device=device))
        torch.cuda.synchronize()
    for _ in range(3):
        step(caller)
    time.sleep(2.5)  # the driver's news takes up to a second or two
main()
""")  # fmt: skip
    assert finished.returncode == 0, finished.output
    (row,) = finished.recoveries
    assert row["respawned"] == [1], finished.output
    assert "is in error" in finished.stderr
    assert "hyperpodrun: gpu-error gpu=0 xid=" in finished.stderr, finished.output


def test_a_graph_with_collectives_of_a_dead_epoch_is_refused_and_others_are_not(run, script):
    finished = job(run, script, """
from hyperpodrun.inprocess.aborts.cuda_graphs import StaleGraphError

x = torch.zeros(4, device=device)
plain = torch.cuda.CUDAGraph()
graphs = {}

def capture(graph, work):
    work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()

@HPWrapper()
def main(caller: HPCallWrapper):
    init_process_group(device, 60)
    step(caller)
    if caller.epoch == 0:
        capture(plain, lambda: x.add_(1))
        graphs["all_reduce"] = torch.cuda.CUDAGraph()
        capture(graphs["all_reduce"], lambda: dist.all_reduce(x))
        graphs["all_reduce"].replay()
        torch.cuda.synchronize()
        step(caller)
        if RANK == 1:
            raise RuntimeError("boom")
        step(caller)
    plain.replay()
    try:
        graphs["all_reduce"].replay()
    except StaleGraphError as error:
        print(f"refused: {error}", flush=True)
    graphs["all_reduce"] = torch.cuda.CUDAGraph()
    capture(graphs["all_reduce"], lambda: dist.all_reduce(x))
    graphs["all_reduce"].replay()
    torch.cuda.synchronize()
    step(caller)
main()
""")  # fmt: skip
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("refused: this CUDA graph was captured in epoch 0") == 2, finished.output
    assert [row["respawned"] for row in finished.recoveries] == [[]]
