"""Real agents on several nodes, which are network namespaces: started, struck, and asked what became of the job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from namespaces import Namespaces  # noqa: E402

TRAIN = str(Path(__file__).parent / "workers" / "train.py")


class Job:
    """One job on namespaces: `start(node)` begins an agent there."""

    def __init__(self, namespaces: Namespaces, directory: Path) -> None:
        self.namespaces = namespaces
        self.directory = directory
        self.options: list[str] = []
        self.agents: dict[int, subprocess.Popen[str]] = {}
        self.secret = directory / "secret"
        self.secret.write_text("a secret of this test, long enough\n")

    def start(
        self,
        *nodes: int,
        script: list[str],
        secret: Path | None = None,
        options: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        given = {"OMP_NUM_THREADS": "1", **(environment or {})}
        for node in nodes:
            command = [
                sys.executable, "-m", "hyperpodrun", "--rdzv-endpoint", self.namespaces.address(0),
                "--nproc-per-node=2", "--log-dir", str(self.logs(node)),
                "--job-secret-file", str(secret or self.secret),
                *self.options, *options, *script,
            ]  # fmt: skip
            self.agents[node] = self.namespaces.start(node, command, self.output(node), given)

    def logs(self, node: int) -> Path:
        return self.directory / f"logs-{node}"

    def output(self, node: int) -> Path:
        return self.directory / f"output-{node}.txt"

    def text(self, node: int) -> str:
        return self.output(node).read_text() if self.output(node).exists() else ""

    def everything(self) -> str:
        return "\n".join(f"--- node {node}\n{self.text(node)}" for node in self.agents)

    def wait_for(self, what: str, node: int | None = None, limit: float = 60.0) -> float:
        """Until a line matches somewhere, or on this node; when it was seen."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            nodes = self.agents if node is None else (node,)
            if any(re.search(what, self.text(number), re.MULTILINE) for number in nodes):
                return time.monotonic()
            time.sleep(0.01)
        raise AssertionError(f"{what!r} was not seen within {limit} s\n{self.everything()}")

    def wait(self, *nodes: int, limit: float = 60.0) -> list[int]:
        """The exit codes of these agents."""
        deadline = time.monotonic() + limit
        codes = []
        for node in nodes:
            try:
                codes.append(self.agents[node].wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"node {node} has not ended within {limit} s\n{self.everything()}") from None
        return codes

    def digest(self) -> str:
        found = set(re.findall(r"^digest (\w+)$", self.everything(), re.MULTILINE))
        assert len(found) == 1, self.everything()
        return found.pop()

    def recoveries(self, node: int) -> list[dict]:
        path = self.logs(node) / "recoveries.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def worker(self, node: int, local_rank: int) -> int:
        """The pid of a worker."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespaces.name(node)], capture_output=True, text=True, check=True
        )
        for pid in map(int, found.stdout.split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            marked = any(entry.startswith(b"HYPERPODRUN_WORKER=%d." % local_rank) for entry in environment)
            if marked and b"LOCAL_RANK=%d" % local_rank in environment:
                return pid
        raise AssertionError(f"there is no local rank {local_rank} on node {node}\n{self.everything()}")

    def kill_agent(self, node: int) -> None:
        os.kill(self.agents[node].pid, signal.SIGKILL)

    def kill_worker(self, node: int, local_rank: int) -> None:
        os.kill(self.worker(node, local_rank), signal.SIGKILL)
