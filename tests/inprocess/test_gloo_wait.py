"""Waits in gloo that only a peer could end, and never will."""

from __future__ import annotations

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from hyperpodrun.inprocess.aborts.gloo import GlooWait

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
joins = Path(sys.argv[1]) / "joins"


def look():
    wait, began = GlooWait(), time.monotonic()
    while not wait.is_endless():
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    joins.touch()


if dist.get_rank() == 0:
    looks = threading.Thread(target=look)
    looks.start()
    dist.all_reduce(torch.ones(1))
    looks.join()
    print("found", flush=True)
else:
    while not joins.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
"""


def test_an_endless_wait_is_found(run, script, tmp_path):
    """What the other rank does once it has been found shows that it was one of gloo's."""
    finished = run("--nproc-per-node=2", script(SCRIPT), tmp_path)
    assert finished.returncode == 0, finished.output
    assert finished.stdout == "found\n"


NEVER_CONNECTS = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper
from hyperpodrun.inprocess.aborts.gloo import _FUTEX

RANK = int(os.environ["RANK"])
waiter = Path(sys.argv[1]) / "waiter"


class Absent(dist.Store):
    \"\"\"Publishes an address that is higher than any, so that the other rank waits to be called; then fails.\"\"\"

    def __init__(self, store):
        super().__init__()
        self.store = store

    def has_extended_api(self):
        return True

    def set(self, key, value):
        self.store.set(key, bytes(value).replace(bytes([127, 0, 0, 1]), bytes([127, 255, 255, 254])))

    def multi_set(self, keys, values):
        for key, value in zip(keys, values):
            self.set(key, value)

    def get(self, key):
        self.fail()

    def multi_get(self, keys):
        self.fail()

    def wait(self, keys, timeout=None):
        self.fail()

    def fail(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if waiter.exists():
                number, *arguments = Path(f"/proc/{waiter.read_text()}/syscall").read_text().split()
                if number == _FUTEX and int(arguments[3], 16):  # with a deadline: gloo's wait
                    raise RuntimeError("boom")
            time.sleep(0.01)
        os._exit(3)


@HPWrapper()
def main(caller: HPCallWrapper):
    if caller.epoch == 0 and RANK == 1:
        store, rank, world_size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=Absent(dist.PrefixStore("default_pg", store)), rank=1, world_size=2)
    elif caller.epoch == 0:
        waiter.with_suffix(".new").write_text(str(os.getpid()))
        waiter.with_suffix(".new").rename(waiter)
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    caller.step_completed()
    print("together", flush=True)


main()
"""


def test_a_rank_that_waits_for_another_to_connect_is_released(run, script, tmp_path):
    finished = run("--nproc-per-node=2", "--inprocess-restart", script(NEVER_CONNECTS), tmp_path)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("together") == 2, finished.output
    (row,) = finished.recoveries
    assert row["respawned"] == [], finished.output
    assert row["pids_before"] == row["pids_after"]
    assert "gloo-stuck" not in finished.stderr


BUSY = """
import sys, threading, time
import torch
import torch.distributed as dist
from hyperpodrun.inprocess.aborts.gloo import GlooWait

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    lost = dist.all_reduce(torch.ones(1), async_op=True)  # a thread of gloo's waits for the other rank
    found = []
    wait = GlooWait()

    def look():
        for _ in range(100):
            found.append(wait.is_endless())
            time.sleep(0.01)

    looks = threading.Thread(target=look)
    looks.start()
    while looks.is_alive():  # the main thread has something else to do
        sum(range(1000))
    assert not any(found), found
    print("on its way", flush=True)
    go = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
    lost.wait()
else:
    dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
    dist.all_reduce(torch.ones(1))
"""


def test_a_main_thread_that_computes_does_not_wait_whatever_gloos_threads_do(run, script, free_port):
    finished = run("--nproc-per-node=2", script(BUSY), str(free_port()))
    assert finished.returncode == 0, finished.output
    assert finished.stdout == "on its way\n"
