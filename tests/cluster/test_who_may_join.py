"""Strangers, pairs and founders: who is let into a job on several nodes, and who may go on alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_jobs import TRAIN, Job

WAITS = """
import os, pathlib, time
print(f"rank {{os.environ['RANK']}} is here", flush=True)
while not pathlib.Path({stop!r}).exists():
    time.sleep(0.02)
"""
QUICK = "--rdzv-conf=heartbeat_interval=0.5,heartbeat_limit=2,join_timeout={join},last_call_timeout=1"


def waiting_script(directory: Path) -> list[str]:
    """Workers that wait for a file."""
    path = directory / "waits.py"
    path.write_text(WAITS.format(stop=str(directory / "stop")))
    return [str(path)]


@pytest.mark.timeout(90)
def test_strangers_are_refused_and_the_job_is_undisturbed(cluster: Callable[..., Job], tmp_path: Path) -> None:
    job = cluster(4, "--nnodes=2", QUICK.format(join=4))
    script = waiting_script(tmp_path)
    job.start(0, 1, script=script)
    job.wait_for("rank 3 is here")
    wrong = tmp_path / "wrong"
    wrong.write_text("not the secret of this job")
    job.start(2, script=script, secret=wrong)
    job.start(3, script=script, options=("--rdzv-id=another",))
    assert job.wait(2, 3) == [1, 1], job.everything()
    assert "no agreement on a key: is the job's secret the same there?" in job.text(2)
    assert "no agreement on a key" in job.text(3), "the keys of another job are other keys"
    assert job.text(0).count("peer-refused") == 1, job.text(0)
    (tmp_path / "stop").touch()
    assert job.wait(0, 1) == [0, 0], job.everything()


@pytest.mark.timeout(90)
def test_nodes_whose_hosts_file_leads_their_own_name_to_loopback_find_each_other(
    cluster: Callable[..., Job], tmp_path: Path
) -> None:
    job = cluster(2)
    script = waiting_script(tmp_path)
    (tmp_path / "stop").touch()
    addresses = [job.namespaces.address(node) for node in (0, 1)]
    for node, name in enumerate(("nodea", "nodeb")):
        hosts = tmp_path / f"hosts-{node}"
        hosts.write_text(f"127.0.1.1 {name}\n{addresses[1 - node]} {('nodeb', 'nodea')[node]}\n")
        launch = f"{sys.executable} -m hyperpodrun --nnodes=2 --rdzv-endpoint=nodea --job-secret-file={job.secret}"
        begin = f"hostname {name}; mount --bind {hosts} /etc/hosts; exec {launch} {script[0]}"
        command = ["unshare", "--mount", "--uts", "sh", "-c", begin]
        job.agents[node] = job.namespaces.start(node, command, job.output(node), {})
    assert job.wait(0, 1) == [0, 0], job.everything()
    assert "rank 1 is here" in job.everything()


@pytest.mark.timeout(60)
def test_without_a_secret_nothing_is_started(cluster: Callable[..., Job], tmp_path: Path) -> None:
    job = cluster(1, "--nnodes=2")
    job.start(0, script=waiting_script(tmp_path), options=("--job-secret-file=",))
    assert job.wait(0) == [2]
    assert "needs a secret, the same on each" in job.text(0)
    assert "--insecure" in job.text(0)


@pytest.mark.timeout(90)
def test_one_of_a_pair_does_not_go_on_alone(cluster: Callable[..., Job], tmp_path: Path) -> None:
    job = cluster(2, "--nnodes=1:2", "--max-restarts=2", QUICK.format(join=3))
    job.start(0, 1, script=waiting_script(tmp_path))
    job.wait_for("rank 3 is here")
    job.kill_agent(1)
    job.wait_for("minority reason=.no majority: 1 of 2 nodes, 2 are needed .--min-nodes 1 would let one go on", node=0)
    assert job.wait(0) == [1], job.everything()
    assert "no majority of the 2 nodes was there for 3 s" in job.text(0)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("lost", [0, 1], ids=["the leader is lost", "the follower is lost"])
def test_one_of_a_pair_goes_on_alone_where_it_may(cluster: Callable[..., Job], lost: int) -> None:
    job = cluster(2, "--nnodes=1:2", "--min-nodes=1", "--inprocess-restart", QUICK.format(join=2))
    job.start(0, 1, script=[TRAIN, "80"])
    job.wait_for("^step 5$")
    job.namespaces.kill_everything(lost)
    assert job.wait(1 - lost) == [0], job.everything()
    assert job.recoveries(1 - lost)[0]["scope"] == "in-process", job.everything()
    assert "digest" in job.everything()
