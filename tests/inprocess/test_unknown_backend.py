"""A backend of torch.distributed that is not known: said once, and a process that hangs in it is replaced."""

from __future__ import annotations

import pytest
from hyperpodrun.inprocess.aborts.nccl import is_nccl

SCRIPT = """
import ctypes, os, time
import torch, torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper
from hyperpodrun.inprocess.aborts import unknown
from hyperpodrun.inprocess import monitor

monitor.PATIENCE_S = 1.0
RANK = int(os.environ["RANK"])


class Odd(dist.ProcessGroup):
    \"\"\"Its barrier is a wait that no signal and no exception ends.\"\"\"

    def barrier(self, options=None):
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        for _ in range(2):
            libc.pthread_mutex_lock(mutex)


dist.Backend.register_backend("odd", lambda store, rank, size, timeout: Odd(rank, size), devices=["cpu"])


@HPWrapper()
def main(caller: HPCallWrapper = None):
    dist.init_process_group("odd")
    caller.step_completed()
    if caller.epoch == 0:
        if RANK == 0:
            time.sleep(0.5)
            raise ValueError("bad batch")
        dist.distributed_c10d._get_default_group().barrier()


main()
print("done", RANK, flush=True)
"""


def test_it_is_said_once_and_who_hangs_in_it_is_replaced(run, script):
    finished = run("--nproc-per-node=2", "--inprocess-restart", script(SCRIPT), timeout=60)
    assert finished.returncode == 0, finished.output
    assert sorted(finished.stdout.splitlines()) == ["done 0", "done 1"]
    assert finished.stderr.count("backend-unknown rank=0 name=odd") == 1, finished.output
    assert "backend-stuck rank=1 epoch=0 name=odd" in finished.stderr
    (row,) = finished.recoveries
    assert row["respawned"] == [1]


@pytest.mark.parametrize(("name", "known"), [("nccl", True), ("nccl2", True), ("gloo", False), ("xccl", False)])
def test_a_successor_of_nccl_is_nccl(name, known):
    assert is_nccl(name) is known
