"""A wait for a message that does not come is found by what gloo's threads do meanwhile."""

from __future__ import annotations

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from hyperpodrun.inprocess.gloo import GlooWait

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
