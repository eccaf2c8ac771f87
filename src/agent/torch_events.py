"""torchelastic's events for `--event-log-handler console`: one JSON object a line on stderr, with torchrun's fields.

What else goes on is in hyperpodrun's own log lines and recoveries.jsonl; these are for programs made for torchrun.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .config import LaunchConfig
from .console import Console

if TYPE_CHECKING:
    from ..control.commands import End


class TorchEvents:
    """Says nothing unless the launch asks for it."""

    def __init__(self, config: LaunchConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._began = time.monotonic()
        self._restarts = 0
        self._on = config.event_log == "console"

    def started(self, rank: int, pid: int, attempt: int) -> None:
        self._restarts = attempt
        self._worker("START", rank, pid, None)

    def ended(self, rank: int, pid: int, exit_code: int, *, failed: bool) -> None:
        """`failed`: of its own accord; else the agent has stopped it."""
        state = "SUCCEEDED" if exit_code == 0 else "FAILED" if failed else "TERMINATED"
        self._worker(state, rank, pid, exit_code)

    def concluded(self, end: End) -> None:
        """The agent's own event; torchrun's says SUCCEEDED also when the job failed, which this one does not."""
        if self._on:
            self._record("SUCCEEDED" if end.exit_code == 0 else "FAILED", "AGENT", None, None, {}, end.reason)

    def _worker(self, state: str, rank: int, pid: int, exit_code: int | None) -> None:
        if not self._on:
            return
        details = {
            "local_rank": [rank],
            "role_rank": [rank],
            "role_world_size": [self._config.nproc_per_node],
            "exit_code": [exit_code],
            "worker_pid": [pid],
        }
        self._record(state, "WORKER", rank, str(pid), details, None)

    def _record(
        self,
        state: str,
        source: str,
        rank: int | None,
        worker: str | None,
        details: dict[str, object],
        error: str | None,
    ) -> None:
        import json
        import socket

        metadata = {
            "run_id": self._config.run_id,
            "global_rank": rank,
            "group_rank": 0,
            "worker_id": worker,
            "role": self._config.role,
            "hostname": socket.gethostname(),
            "state": state,
            "total_run_time": int(time.monotonic() - self._began),
            "rdzv_backend": self._config.rendezvous.backend,
            "raw_error": None if state == "SUCCEEDED" else error,
            "metadata": json.dumps({"group_world_size": 1, "entry_point": self._config.script, **details}),
            "agent_restarts": self._restarts,
            "duration_ms": None,
        }
        event = {
            "name": f"torchelastic.worker.status.{state}",
            "source": source,
            "timestamp": int(time.time() * 1000),
            "metadata": metadata,
        }
        self._console.write(json.dumps(event) + "\n")
