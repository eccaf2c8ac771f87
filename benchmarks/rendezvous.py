"""Agents on several nodes: until all workers are there, and from SIGKILL of an agent until all train again.

Nodes are network namespaces on this machine, one worker each; torchrun (c10d) does the same beside it. The agent that
is killed is not the one at the endpoint, whose loss torchrun does not survive; it is started again at once on its
node, as a scheduler would, in both. *First line*: from the start of the first agent until the last worker runs its
first statement. *Recovery*: from the SIGKILL until the last rank has completed an all-reduce with all others.

    python benchmarks/rendezvous.py [--quick] [--agents 2,4,8] [--runs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
from namespaces import Namespaces, why_not

WORKER = harness.BENCHMARKS / "rendezvous_worker.py"
_DEADLINE_S = 60.0


class Cluster:
    """One launcher's job on all nodes."""

    def __init__(self, launcher: str, namespaces: Namespaces, room: Path) -> None:
        self._launcher = launcher
        self._namespaces = namespaces
        self.room = room
        self._agents: dict[int, subprocess.Popen[str]] = {}
        self._secret = room / "secret"
        self._secret.write_text("a secret for this benchmark")

    def start(self, node: int) -> None:
        count, address = self._namespaces.count, self._namespaces.address
        if self._launcher == "torchrun":
            options = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", f"--rdzv-endpoint={address(0)}:29400"]
            options += ["--max-restarts=5", "--rdzv-id=benchmark", f"--local-addr={address(node)}"]
            # It would compare the address with what the host's name stands for, which no namespace has.
            options += [f"--rdzv-conf=is_host={int(node == 0)}"]
        else:
            options = ["-m", "hyperpodrun", f"--rdzv-endpoint={address(0)}", "--inprocess-restart"]
            options += [f"--job-secret-file={self._secret}", "--min-nodes=1"]  # two have no majority without one
        options += [f"--nnodes={count}", "--nproc-per-node=1", str(WORKER), str(self.room)]
        environment = {**harness.WORKER_ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}
        output = self.room / f"output-{node}.txt"
        self._agents[node] = self._namespaces.start(node, [sys.executable, *options], output, environment)

    def kill(self, node: int) -> None:
        os.kill(self._agents[node].pid, signal.SIGKILL)
        self._agents[node].wait()

    def stop(self) -> None:
        (self.room / "stop").touch()
        for node, agent in self._agents.items():
            try:
                code = agent.wait(_DEADLINE_S)
            except subprocess.TimeoutExpired:
                raise harness.RunFailed(f"the agent of node {node} does not end") from None
            if code != 0:
                raise harness.RunFailed(f"the agent of node {node} ended with exit code {code}")

    def wait_for(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while not done():
            if time.monotonic() > deadline:
                said = "".join(path.read_text()[-800:] for path in sorted(self.room.glob("output-*.txt")))
                raise harness.RunFailed(f"{what} not within {_DEADLINE_S:.0f} s\n{said}")
            time.sleep(0.002)

    def firsts_after(self, at_ns: int) -> dict[str, int]:
        """By rank, when its first all-reduce since then was completed."""
        found: dict[str, int] = {}
        for path in self.room.glob("first.*"):
            _, rank, moment = path.name.split(".")
            if int(moment) > at_ns:
                found[rank] = min(int(moment), found.get(rank, int(moment)))
        return found


def measure(launcher: str, agents: int) -> tuple[float, float]:
    """(first line, recovery) of one run, in seconds. Raises RunFailed."""
    namespaces = Namespaces(agents)
    try:
        with tempfile.TemporaryDirectory() as directory:
            return _measure(Cluster(launcher, namespaces, Path(directory)), agents)
    finally:
        namespaces.close()


def _measure(cluster: Cluster, agents: int) -> tuple[float, float]:
    began = time.monotonic_ns()
    for node in range(agents):
        cluster.start(node)
    cluster.wait_for("all workers", lambda: len(list(cluster.room.glob("line.*"))) >= agents)
    lines = max(int(path.read_text() or "0") for path in cluster.room.glob("line.*"))
    cluster.wait_for("the first all-reduce", lambda: len(cluster.firsts_after(began)) == agents)
    time.sleep(0.5)  # it trains: the standby is warm, nothing of the start is under way any more
    killed = time.monotonic_ns()
    cluster.kill(agents - 1)
    cluster.start(agents - 1)
    cluster.wait_for("an all-reduce after the fault", lambda: len(cluster.firsts_after(killed)) == agents)
    recovered = max(cluster.firsts_after(killed).values())
    cluster.stop()
    return (lines - began) / 1e9, (recovered - killed) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="2,4,8", help="how many, with commas between")
    harness.add_runs_option(parser)
    parser.add_argument("--launchers", default=",".join(harness.LAUNCHERS))
    parser.add_argument("--quick", action="store_true", help="two agents, one run")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        harness.write_rows(arguments.json, [])
        return 0
    counts = [2] if arguments.quick else [int(text) for text in arguments.agents.split(",")]
    print(harness.describe_machine())
    results: dict[tuple[int, str], list[tuple[float, float]]] = {
        (agents, launcher): [] for agents in counts for launcher in arguments.launchers.split(",")
    }
    failed = dict.fromkeys(results, 0)
    for number in harness.rounds(1 if arguments.quick else arguments.runs):
        for (agents, launcher), found in results.items():
            name = f"{launcher}, {agents} agents, run {number + 1}"
            try:
                found.append(measure(launcher, agents))
                harness.progress(f"{name}: first line {found[-1][0]:.2f} s, recovery {found[-1][1]:.2f} s")
            except harness.RunFailed as error:
                failed[agents, launcher] += 1
                harness.progress(f"{name}: {error}")
    rows: list[dict[str, object]] = []
    lines: list[list[str]] = []
    for (agents, launcher), found in results.items():
        first, recovery = ([result[i] for result in found] for i in range(2))
        rows.append(
            {
                "benchmark": "rendezvous",
                "launcher": launcher,
                "agents": agents,
                "first_line_s": harness.median(first),
                "recovery_s": harness.median(recovery),
                "failed": failed[agents, launcher],
            }
        )
        failures = str(failed[agents, launcher])
        lines.append([str(agents), launcher, harness.spread(first), harness.spread(recovery), failures])
    print(harness.table(["agents", "launcher", "first line, s", "recovery, s", "failed"], lines))
    harness.write_rows(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
