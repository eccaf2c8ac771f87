"""Real processes on three nodes and a spare: whatever is lost, the job ends where the undisturbed run ends.

The survivors keep their processes, and the lost ranks come back on the spare, or where they were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import TRAIN, Job

GPT = str(Path(__file__).parents[2] / "examples" / "gpt" / "train.py")
SMALL = ["--layers=2", "--width=64", "--batch-size=2", "--block-size=32", "--log-every=1"]
SCRIPT = [GPT, "--steps=40", *SMALL]
LONG = [GPT, "--steps=250", *SMALL]
"""For a node that is to come back before it is over: many seconds, as TCP waits longer and longer to try again."""
SHARDS = str(Path(__file__).parent / "workers" / "shards.py")
OPTIONS = ("--nnodes=3", "--inprocess-restart", "--rdzv-conf=heartbeat_interval=0.5,heartbeat_limit=2,join_timeout=60")
STANDBYS = os.environ.get("HYPERPODRUN_STANDBY") != "0"
"""This run of the tests is with them."""
DIGESTS: dict[str, str] = {}
SPARE = 3


def undisturbed(cluster: Callable[..., Job], script: list[str]) -> str:
    """The digest of six ranks without a fault: on one node, where it is the same."""
    if script[1] not in DIGESTS:
        job = cluster(1, "--inprocess-restart")
        job.start(0, script=script, options=("--standalone", "--nproc-per-node=6"))
        assert job.wait(0) == [0], job.everything()
        DIGESTS[script[1]] = job.digest()
    return DIGESTS[script[1]]


def kill_worker(job: Job) -> set[int]:
    job.kill_worker(1, 1)
    return set()


def kill_agent(job: Job) -> set[int]:
    job.kill_agent(1)
    return {1}


def cut_silently(job: Job) -> set[int]:
    job.namespaces.cut(2)
    return {2}


def kill_the_leaders_node(job: Job) -> set[int]:
    job.namespaces.kill_everything(0)
    return {0}


def kill_the_leader_in_a_recovery(job: Job) -> set[int]:
    job.kill_worker(2, 0)
    time.sleep(0.03)  # into the middle of what follows; wherever this strikes, the outcome must be the same
    job.namespaces.kill_everything(0)
    return {0}


def begin(cluster: Callable[..., Job], script: list[str], environment: dict[str, str] | None = None) -> Job:
    """Three nodes that train, and a spare that holds a warm standby."""
    job = cluster(4, *OPTIONS)
    job.start(0, 1, 2, script=script, environment=environment)
    job.wait_for("leads term=1 nodes=3", node=0)
    job.start(SPARE, script=script, environment={"LOGLEVEL": "DEBUG", **(environment or {})})
    job.wait_for("node-joins", node=0)
    if STANDBYS:
        job.wait_for("standby-ready", node=SPARE)
    job.wait_for(r"^step 5 ", node=0)
    return job


def trains_again(job: Job, nodes: set[int]) -> float:
    """When the last of these nodes has completed a step in a new epoch, as told by `time.monotonic`."""
    return max(job.wait_for("^hyperpodrun: recovery epoch=", node=node) for node in nodes)


def check_survivors(job: Job, nodes: set[int], *, respawned: bool) -> None:
    """Their processes are those from before."""
    for node in nodes:
        rows = job.recoveries(node)
        assert rows, job.everything()
        for row in rows:
            replaced = set(map(str, row["respawned"]))
            kept = {rank: pid for rank, pid in row["pids_before"].items() if rank not in replaced}
            assert kept.items() <= row["pids_after"].items(), row
            assert not replaced or respawned, row


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "strike", [kill_worker, kill_agent, cut_silently, kill_the_leaders_node, kill_the_leader_in_a_recovery]
)
def test_the_job_goes_on(
    cluster: Callable[..., Job], strike: Callable[[Job], set[int]], recovery_times: Callable[..., None]
) -> None:
    expected = undisturbed(cluster, SCRIPT)
    job = begin(cluster, SCRIPT)
    struck = time.monotonic()
    lost = strike(job)
    survivors = {0, 1, 2} - lost
    again = trains_again(job, survivors)
    alive = survivors | {SPARE}
    assert job.wait(*alive) == [0] * len(alive), job.everything()
    assert job.digest() == expected, job.everything()
    check_survivors(job, survivors, respawned=strike in (kill_worker, kill_the_leader_in_a_recovery))
    if STANDBYS:
        took_over = "forked" in job.text(SPARE)
        assert took_over == bool(lost), job.everything()
        assert "cold-start" not in job.text(SPARE)
    recovery_times(job, strike.__name__, again - struck, survivors)


@pytest.mark.timeout(150)
def test_without_rootless_the_job_outlives_the_node_whose_store_it_was(cluster: Callable[..., Job]) -> None:
    expected = undisturbed(cluster, SCRIPT)
    job = begin(cluster, SCRIPT, {"HPCT_USE_ROOTLESS": "0"})
    survivors = {1, 2}
    assert kill_the_leaders_node(job) == {0}
    trains_again(job, survivors)
    assert job.wait(*survivors, SPARE) == [0] * 3, job.everything()
    assert job.digest() == expected, job.everything()
    check_survivors(job, survivors, respawned=False)


@pytest.mark.timeout(150)
def test_a_node_that_was_cut_off_stops_says_why_and_comes_back(
    cluster: Callable[..., Job], recovery_times: Callable[..., None]
) -> None:
    """Cut and healed: the spare has its place by then, and it becomes the spare."""
    expected = undisturbed(cluster, LONG)
    job = begin(cluster, LONG)
    struck = time.monotonic()
    job.namespaces.cut(1)
    again = trains_again(job, {0, 2})
    job.wait_for("minority found=.1 of 4 nodes, 3 are needed", node=1)
    job.wait_for("workers-stopped", node=1)
    job.namespaces.heal(1)
    assert job.wait(0, 1, 2, SPARE) == [0] * 4, job.everything()
    assert job.digest() == expected
    check_survivors(job, {0, 2}, respawned=False)
    recovery_times(job, "cut_and_healed", again - struck, {0, 2})


@pytest.mark.timeout(150)
def test_the_world_shrinks_and_grows_and_keeps_every_log(cluster: Callable[..., Job]) -> None:
    """--nnodes 2:3 without a spare."""
    conf = "--rdzv-conf=join_timeout=2,last_call_timeout=1"
    job = cluster(3, "--nnodes=2:3", "--inprocess-restart", "--redirects=1", conf)
    script = [TRAIN, "100000"]
    job.start(0, 1, 2, script=script)
    log = job.logs(0)
    job.wait_for("leads term=1 nodes=3", node=0)

    def lines() -> str:
        return "".join(path.read_text() for path in sorted(log.glob("none_*/attempt_*/0/stdout.log")))

    def wait_for_log(what: str, limit: float = 60.0) -> None:
        deadline = time.monotonic() + limit
        while what not in lines():
            assert time.monotonic() < deadline, f"{what!r}\n{lines()}\n{job.everything()}"
            time.sleep(0.01)

    wait_for_log("\nstep 5\n")
    job.namespaces.kill_everything(2)
    wait_for_log("epoch 1: step")
    job.start(2, script=script)
    wait_for_log("epoch 2: step")
    worlds = [sorted({row["scope"] for row in job.recoveries(node)}) for node in (0, 1)]
    assert all(world == ["in-process"] for world in worlds), job.everything()
    job.wait_for("recovery epoch=1->2 .*joined a world of 2", node=0)
    before, pids = job.recoveries(0)[0]["pids_before"], job.recoveries(0)[0]["pids_after"]
    assert before == pids
    assert "step 1\n" in lines()
    assert list(job.logs(2).glob("none_*/attempt_0/0/stdout.log"))
    assert len(list(job.logs(2).glob("none_*"))) == 2


@pytest.mark.timeout(150)
def test_shards_of_a_lost_node_come_back_from_their_snapshots_on_another(cluster: Callable[..., Job]) -> None:
    """Nobody else held them: all ranks go back to the newest snapshot, and the result is the undisturbed run's."""
    script = [SHARDS, "40", "4"]
    expected = undisturbed(cluster, script)
    job = cluster(4, *OPTIONS)
    job.start(0, 1, 2, script=script)
    job.wait_for("leads term=1 nodes=3", node=0)
    job.start(SPARE, script=script)
    job.wait_for("node-joins", node=0)
    job.wait_for(r"^step 15$", node=0)
    job.namespaces.kill_everything(1)
    assert job.wait(0, 2, SPARE) == [0] * 3, job.everything()
    assert job.digest() == expected, job.everything()
    (row,) = job.recoveries(0)
    assert row["state"] == "snapshot"
    assert 0 < row["lost_steps"] <= 8, row
