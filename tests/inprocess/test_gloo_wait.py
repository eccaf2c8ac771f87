"""A wait for a message that will not come is told from one whose end is only late, and from waits outside gloo."""

from __future__ import annotations

import json

SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from hyperpodrun.inprocess.gloo import GlooWait

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
told, joins = {}, Path(sys.argv[1]) / "joins"


def look():
    wait, began = GlooWait(), time.monotonic()
    while not wait.is_endless():
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    told["endless"] = time.monotonic() - began
    joins.touch()


if dist.get_rank() == 0:
    outside = GlooWait()
    for _ in range(50):
        threading.Event().wait(0.01)  # a futex with a deadline, and nothing of gloo's is awaited
    told["outside"] = outside.is_endless()
    looks = threading.Thread(target=look)
    looks.start()
    dist.all_reduce(torch.ones(1))
    looks.join()
    print(json.dumps(told), flush=True)
else:
    while not joins.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
"""


def test_an_endless_wait_is_found_and_no_other(run, script, tmp_path):
    finished = run("--nproc-per-node=2", script(SCRIPT), tmp_path)
    assert finished.returncode == 0, finished.output
    told = json.loads(finished.stdout)
    assert told["outside"] is False
    assert told["endless"] >= 0.2  # gloo's loop has looked for news 25 times, every 10 ms
