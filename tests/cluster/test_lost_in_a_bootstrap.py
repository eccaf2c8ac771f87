"""An agent that is lost at any moment of a bootstrap: its node's work goes on in a clean new epoch, every time."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import Job

BOOTSTRAPS = str(Path(__file__).parent / "workers" / "bootstraps.py")
MOMENTS = 20
MOMENTS_OF_A_JOB = 5
"""One node is lost at each, and started again as a spare for the next."""
OPTIONS = ("--nnodes=3", "--inprocess-restart", "--rdzv-conf=heartbeat_interval=0.5,heartbeat_limit=2,join_timeout=60")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(MOMENTS // MOMENTS_OF_A_JOB))
def test_the_next_epoch_is_clean(cluster: Callable[..., Job], seed: int) -> None:
    """Whichever node it is, the first and the one that leads included; who comes back is the next one's spare."""
    dice = random.Random(seed)
    job = cluster(4, *OPTIONS)
    script = [BOOTSTRAPS, str(MOMENTS_OF_A_JOB)]
    job.start(0, 1, 2, 3, script=script)
    job.wait_for("node-joins .*node=3|spare", limit=90)
    at_work = {0, 1, 2, 3}
    for epoch in range(MOMENTS_OF_A_JOB):
        job.wait_for(rf"^(\[.*\]:)?epoch {epoch} begins$", limit=90)
        time.sleep(dice.random() ** 2)  # more often in the first milliseconds, when groups come up
        working = [node for node in sorted(at_work) if f"epoch {epoch} begins" in job.text(node)]
        victim = dice.choice(working)
        job.namespaces.kill_everything(victim)
        job.agents[victim].wait()
        job.start(victim, script=script)
    job.wait_for(rf"^(\[.*\]:)?epoch {MOMENTS_OF_A_JOB} is clean$", limit=90)
    assert job.wait(*at_work, limit=90) == [0] * 4, job.everything()
    clean = re.findall(rf"epoch {MOMENTS_OF_A_JOB} is clean", job.everything())
    assert len(clean) == 6, job.everything()
