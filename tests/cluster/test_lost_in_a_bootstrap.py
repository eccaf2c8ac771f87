"""An agent that is lost at any moment of a bootstrap: its node's work goes on in a clean new epoch, every time."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import Job

BOOTSTRAPS = str(Path(__file__).parent / "workers" / "bootstraps.py")
MOMENTS = int(os.environ.get("HYPERPODRUN_MOMENTS", "5"))
"""HYPERPODRUN_MOMENTS=20 tries more of them."""
MOMENTS_OF_A_JOB = 5
OPTIONS = ("--nnodes=3", "--inprocess-restart", "--rdzv-conf=heartbeat_interval=0.5,heartbeat_limit=2,join_timeout=90")
NODES = [0, 1, 2, 3]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(MOMENTS // MOMENTS_OF_A_JOB))
def test_the_next_epoch_is_clean(cluster: Callable[..., Job], seed: int) -> None:
    """Whichever node it is, the first and the one that leads included; who comes back is the next one's spare."""
    dice = random.Random(seed)
    job = cluster(len(NODES), *OPTIONS)
    script = [BOOTSTRAPS, str(MOMENTS_OF_A_JOB)]

    def start(*nodes: int) -> None:
        joined = {node: job.text(node).count("joined at=") for node in nodes}
        job.start(*nodes, script=script)
        for node, count in joined.items():
            if node != nodes[0] or len(nodes) == 1:  # the first of all has founded the job
                job.wait_for("(?s)" + ".*joined at=" * (count + 1), node=node, limit=90)

    start(0, 1, 2)
    start(3)
    for epoch in range(MOMENTS_OF_A_JOB):
        job.wait_for(f"epoch {epoch} begins", limit=90)
        time.sleep(dice.random() / 2)  # into any moment of the groups that come up all the time
        victim = dice.choice([node for node in NODES if f"epoch {epoch} begins" in job.text(node)])
        job.namespaces.kill_everything(victim)
        job.agents[victim].wait()
        start(victim)
    clean = f"epoch {MOMENTS_OF_A_JOB} is clean, step {MOMENTS_OF_A_JOB + 1}"
    job.wait_for(clean, limit=90)
    assert job.wait(*NODES, limit=90) == [0] * len(NODES), job.everything()
    assert len(re.findall(clean, job.everything())) == 6, job.everything()
