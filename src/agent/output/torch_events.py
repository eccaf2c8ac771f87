"""torchelastic's events for `--event-log-handler console`: one JSON object a line on stderr, with torchrun's fields.

What else goes on is in hyperpodrun's own log lines and recoveries.jsonl; these are for programs made for torchrun.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config import LaunchConfig
from .console import Console

if TYPE_CHECKING:
    from ...control.job.commands import End


class TorchEvents:
    """Says nothing unless the launch asks for it."""

    def __init__(self, config: LaunchConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._began = time.monotonic()
        self._on = config.event_log == "console"
        self._group = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
        """This node's place and the attempt, by the names that workers know."""
        self._places: dict[int, dict[str, object]] = {}
        """Of the processes that run, by pid."""

    def started(self, pid: int, local_rank: int, environment: Mapping[str, str]) -> None:
        """`environment`: that of the worker, which says the rest."""
        if not self._on:
            return
        self._group = {name: environment[name] for name in self._group}
        self._places[pid] = {
            "global_rank": int(environment["RANK"]),
            "local_rank": [local_rank],
            "role_rank": [int(environment["ROLE_RANK"])],
            "role_world_size": [int(environment["ROLE_WORLD_SIZE"])],
        }
        self._worker("START", pid, None)

    def ended(self, pid: int, exit_code: int, *, failed: bool) -> None:
        """`failed`: of its own accord; else the agent has stopped it."""
        if not self._on:
            return
        self._worker("SUCCEEDED" if exit_code == 0 else "FAILED" if failed else "TERMINATED", pid, exit_code)
        del self._places[pid]

    def concluded(self, end: End) -> None:
        """The agent's own event; torchrun's says SUCCEEDED also when the job failed, which this one does not."""
        if self._on:
            self._record("SUCCEEDED" if end.exit_code == 0 else "FAILED", "AGENT", None, None, {}, end.reason)

    def _worker(self, state: str, pid: int, exit_code: int | None) -> None:
        details = {**self._places[pid], "exit_code": [exit_code], "worker_pid": [pid]}
        rank = details.pop("global_rank")
        self._record(state, "WORKER", rank, str(pid), details, None)

    def _record(
        self,
        state: str,
        source: str,
        rank: object,
        worker: str | None,
        details: dict[str, object],
        error: str | None,
    ) -> None:
        import json
        import socket

        metadata = {
            "run_id": self._config.run_id,
            "global_rank": rank,
            "group_rank": int(self._group["GROUP_RANK"]),
            "worker_id": worker,
            "role": self._config.role,
            "hostname": socket.gethostname(),
            "state": state,
            "total_run_time": int(time.monotonic() - self._began),
            "rdzv_backend": self._config.rendezvous.backend,
            "raw_error": None if state == "SUCCEEDED" else error,
            "metadata": json.dumps(
                {
                    "group_world_size": int(self._group["GROUP_WORLD_SIZE"]),
                    "entry_point": self._config.script,
                    **details,
                }
            ),
            "agent_restarts": int(self._group["TORCHELASTIC_RESTART_COUNT"]),
            "duration_ms": None,
        }
        event = {
            "name": f"torchelastic.worker.status.{state}",
            "source": source,
            "timestamp": int(time.time() * 1000),
            "metadata": metadata,
        }
        self._console.write(json.dumps(event) + "\n")
