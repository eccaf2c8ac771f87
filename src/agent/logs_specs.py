"""`--logs-specs NAME`: a class of the user's decides where the workers' output goes.

Such a class is torch's (`torch.distributed.elastic.multiprocessing.LogsSpecs`, entry point group
`torchrun.logs_specs`), and the agent never imports torch: it lives in a process of its own (`logs_specs_child.py`),
which is asked once for every attempt and answers in JSON. That process ends with the agent, whose end of its pipe it
reads.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from .config import LaunchConfig

_ANSWER_LIMIT_S = 120.0
"""It imports torch before its first answer; on a cold file system that takes a while."""


class LogsSpecsError(OSError):
    """The class could not be loaded, or its answer is of no use; the sentence says why."""


class Destinations:
    """Where the class wants the streams of one attempt. Paths by local rank; an empty one is the console."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def path(self, stream: str, local_rank: int) -> str:
        return str(self._answer[f"{stream}s"].get(str(local_rank), ""))

    def teed(self, stream: str, local_rank: int) -> bool:
        return str(local_rank) in self._answer[f"tee_{stream}s"]

    def error_file(self, local_rank: int) -> str:
        return str(self._answer["error_files"].get(str(local_rank), ""))

    def filtered(self, stream: str) -> str:
        return str(self._answer[f"filtered_{stream}"])


class LogsSpecs:
    """The process in which the class lives. Started with the launch, asked once for every attempt."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self._attempts: dict[int, Destinations] = {}
        ranks = range(config.nproc_per_node)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("logs_specs_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._ask(
            {
                "name": config.logs_specs,
                "log_dir": None if config.log_dir is None else str(config.log_dir),
                "redirects": {rank: config.redirects.streams(rank) for rank in ranks},
                "tee": {rank: config.tee.streams(rank) for rank in ranks},
                "local_ranks_filter": None if config.console_ranks is None else sorted(config.console_ranks),
            }
        )

    def attempt(self, number: int) -> Destinations:
        """Where the output of this attempt goes. Raises LogsSpecsError."""
        if number not in self._attempts:
            environment = {
                "TORCHELASTIC_RUN_ID": self._config.run_id,
                "TORCHELASTIC_RESTART_COUNT": str(number),
                "TORCHELASTIC_MAX_RESTARTS": str(self._config.max_restarts),
                "ROLE_NAME": self._config.role,
                "LOCAL_WORLD_SIZE": str(self._config.nproc_per_node),
            }
            ranks = range(self._config.nproc_per_node)
            envs = {rank: {**environment, "LOCAL_RANK": str(rank)} for rank in ranks}
            self._attempts[number] = Destinations(self._ask({"envs": envs}))
        return self._attempts[number]

    def close(self) -> None:
        """The launch is over."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LogsSpecsError(f"--logs-specs {self._config.logs_specs}: its process has ended") from None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        line = self._process.stdout.readline() if poll.poll(_ANSWER_LIMIT_S * 1000) else b""
        answer = json.loads(line) if line else {"error": "its process has ended, or does not answer"}
        if "error" in answer:
            raise LogsSpecsError(f"--logs-specs {self._config.logs_specs}: {answer['error']}")
        return dict(answer)
