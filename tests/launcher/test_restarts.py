"""Process-level restarts: torchrun's workers can read the store keys of the attempt before; ours never do."""

from __future__ import annotations

import pytest

RESTARTS = 12

BODY = """
import os, random, sys, time
import torch.distributed as dist
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
time.sleep(random.Random(f"{attempt}.{rank}").uniform(0, 0.5))
dist.init_process_group("gloo")
everybody = [None] * dist.get_world_size()
dist.all_gather_object(everybody, attempt)
assert everybody == [attempt] * dist.get_world_size(), everybody
mine = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
assert mine.add(f"seen-{rank}", 1) == 1, "a key of an earlier attempt"
print(f"attempt {attempt} is in order", flush=True)
if attempt < RESTARTS:
    os._exit(1) if rank == attempt % 2 else time.sleep(3600)
""".replace("RESTARTS", str(RESTARTS))


@pytest.mark.timeout(400)
def test_twelve_restarts_with_ranks_that_come_at_random_times(run, script):
    finished = run("--nproc-per-node=2", f"--max-restarts={RESTARTS}", "--redirects=1", script(BODY), timeout=380)
    assert finished.returncode == 0, finished.output
    files = finished.log_dir.glob("*/attempt_*/*/stdout.log")
    in_order = sorted(int(file.read_text().split()[1]) for file in files if file.read_text())
    assert set(in_order) == set(range(RESTARTS + 1)), "every attempt came as far as its first collective"
