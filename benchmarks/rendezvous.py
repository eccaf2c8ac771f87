"""Agents on several nodes: until all workers train together, and from SIGKILL of an agent until all train again.

Nodes are network namespaces on this machine, one worker each; torchrun (c10d) does the same beside it. The agent that
is killed is not the one at the endpoint, whose loss torchrun does not survive; it is started again at once on its
node, as a scheduler would, in both. *Start*: from the start of the first agent until the last rank has completed its
first all-reduce with all others; *recovery*: the same from the SIGKILL. The *first line* of the last worker, which is
in the rows too, is no measure: a worker of hyperpodrun is forked from a process that has imported torch, and torchrun's
imports it after that line.

Where the time goes is told by milestones, each when the last rank has reached it: its *process* is there, it runs its
first *line*, *imports* are done, the *function* is entered (here: with all others), there is a *group*, and the
*all-reduce*. Ranks that have lived on are at the later ones only.

    python benchmarks/rendezvous.py [--quick] [--agents 2,4,8] [--runs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
from namespaces import Namespaces, why_not

WORKER = harness.BENCHMARKS / "rendezvous_worker.py"
MILESTONES = ("process", "line", "imports", "function", "group", "all-reduce")
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Measured:
    """One run. Milestones in seconds since its beginning, and since the fault."""

    start: dict[str, float]
    recovery: dict[str, float]


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

    def firsts_after(self, at_ns: int) -> dict[str, tuple[int, Path]]:
        """By rank, when its first all-reduce since then was completed, and the file that tells the rest."""
        found: dict[str, tuple[int, Path]] = {}
        for path in self.room.glob("first.*"):
            _, rank, moment = path.name.split(".")
            if int(moment) > at_ns and (rank not in found or int(moment) < found[rank][0]):
                found[rank] = int(moment), path
        return found

    def milestones(self, since_ns: int) -> dict[str, float]:
        """When the last rank had reached each; one that nobody has reached since then was reached at once."""
        times = [json.loads(path.read_text()) for _, path in self.firsts_after(since_ns).values()]
        return {name: max(0, *(each[name] - since_ns for each in times)) / 1e9 for name in MILESTONES}


def measure(launcher: str, agents: int) -> Measured:
    """Raises RunFailed."""
    namespaces = Namespaces(agents)
    try:
        with tempfile.TemporaryDirectory() as directory:
            return _measure(Cluster(launcher, namespaces, Path(directory)), agents)
    finally:
        namespaces.close()


def _measure(cluster: Cluster, agents: int) -> Measured:
    began = time.monotonic_ns()
    for node in range(agents):
        cluster.start(node)
    cluster.wait_for("the first all-reduce", lambda: len(cluster.firsts_after(began)) == agents)
    time.sleep(0.5)  # it trains: nothing of the start is under way any more
    killed = time.monotonic_ns()
    cluster.kill(agents - 1)
    cluster.start(agents - 1)
    cluster.wait_for("an all-reduce after the fault", lambda: len(cluster.firsts_after(killed)) == agents)
    measured = Measured(cluster.milestones(began), cluster.milestones(killed))
    cluster.stop()
    return measured


def _told(milestones: dict[str, float]) -> str:
    return ", ".join(f"{name} {milestones[name]:.2f}" for name in MILESTONES)


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
    results: dict[tuple[int, str], list[Measured]] = {
        (agents, launcher): [] for agents in counts for launcher in arguments.launchers.split(",")
    }
    failed = dict.fromkeys(results, 0)
    for number in harness.rounds(1 if arguments.quick else arguments.runs):
        for (agents, launcher), found in results.items():
            name = f"{launcher}, {agents} agents, run {number + 1}"
            try:
                found.append(measure(launcher, agents))
                harness.progress(f"{name}, start: {_told(found[-1].start)}")
                harness.progress(f"{name}, recovery: {_told(found[-1].recovery)}")
            except harness.RunFailed as error:
                failed[agents, launcher] += 1
                harness.progress(f"{name}: {error}")
    rows: list[dict[str, object]] = []
    lines: list[list[str]] = []
    where: list[list[str]] = []
    for (agents, launcher), found in results.items():
        row: dict[str, object] = {"benchmark": "rendezvous", "launcher": launcher, "agents": agents}
        line = [str(agents), launcher]
        for what in ("start", "recovery"):
            runs: list[dict[str, float]] = [getattr(measured, what) for measured in found]
            reached = {name: harness.median([run[name] for run in runs]) for name in MILESTONES}
            row[f"{what}_s"], row[f"{what}_milestones_s"] = reached["all-reduce"], reached
            line.append(harness.spread([run["all-reduce"] for run in runs]))
            where.append(
                [str(agents), launcher, what, *(f"{reached[name]:.2f}" if runs else "-" for name in MILESTONES)]
            )
            if what == "start":
                row["first_line_s"] = reached["line"]
        rows.append({**row, "failed": failed[agents, launcher]})
        lines.append([*line, str(failed[agents, launcher])])
    print(harness.table(["agents", "launcher", "start, s", "recovery, s", "failed"], lines))
    print("\nwhen the last rank had come to, s")
    print(harness.table(["agents", "launcher", "", *MILESTONES], where))
    harness.write_rows(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
