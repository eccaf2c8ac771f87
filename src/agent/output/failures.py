"""Which processes failed, how, and which of them first.

A process that the agent itself stopped has not failed, unless it had recorded an error of its own before; it is named
after those that have. The first failure is the one with the earliest time; torch's error files count whole seconds, so
all are compared in those and the order in which the agent saw them decides between equals.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...control.job.commands import Cause

NOT_AVAILABLE = "<N/A>"
_LARGEST_FILE = 16 << 20
_LATEST = 1 << 33
"""Seconds since 1970 that a calendar still has a date for."""
_NO_TRACEBACK = (
    "none recorded; with @record of torch.distributed.elastic.multiprocessing.errors on main() it is here, unless "
    "main() catches the exception and exits"
)


@dataclass
class ProcessFailure:
    """One failed process; the fields of torchelastic's class of the same name."""

    local_rank: int
    """-1 for a process of another node."""
    pid: int
    """0 for a process of another node."""
    exitcode: int
    """Negative for the signal that killed it."""
    error_file: str = NOT_AVAILABLE
    message: str | dict[str, Any] = ""
    timestamp: int = field(default_factory=lambda: int(time.time()))
    error_file_data: dict[str, Any] = field(default_factory=lambda: {"message": "<NONE>"})

    def signal_name(self) -> str:
        """`SIGKILL` for -9."""
        try:
            return signal.Signals(-self.exitcode).name if self.exitcode < 0 else NOT_AVAILABLE
        except ValueError:
            return NOT_AVAILABLE

    def timestamp_isoformat(self) -> str:
        """`2026-01-31_12:00:00`, in local time."""
        return datetime.fromtimestamp(self.timestamp).isoformat(sep="_")


class Failures:
    """The failures since all processes were started, or since an epoch began that dealt with them."""

    def __init__(self) -> None:
        self._by_rank: dict[int, ProcessFailure] = {}
        self._stopped: dict[int, ProcessFailure] = {}
        """Those that had to be ended because of the others."""
        self._stopping: int | None = None

    def forget(self) -> None:
        """They are overcome."""
        self._by_rank, self._stopped = {}, {}  # what is still being read belongs to the old ones
        self._stopping = None

    def stopping(self, signum: int) -> None:
        """From now on processes that die of this signal, or of SIGKILL, do so because the agent wants it."""
        self._stopping = signum

    def ended(self, rank: int, local_rank: int, pid: int, exit_code: int, error_file: Path) -> Callable[[], bool]:
        """A process is gone. Whether it has failed tells the function returned, which reads its error file: that may
        hang, so it is called on a thread."""
        by_rank, stopped_by_us = self._by_rank, self._stopped
        stopped = self._stopping is not None and -exit_code in (self._stopping, signal.SIGKILL)
        if stopped:
            failure = stopped_by_us[rank] = ProcessFailure(local_rank, pid, exit_code)
            failure.message = f"the launcher stopped it with {failure.signal_name()}, as the job had failed elsewhere"
        elif exit_code != 0:
            by_rank[rank] = of_exit_code(local_rank, pid, exit_code)  # in case that cannot be read

        def read() -> bool:
            if exit_code == 0 or (stopped and not error_file.is_file()):
                return False
            stopped_by_us.pop(rank, None)
            by_rank[rank] = read_failure(local_rank, pid, exit_code, error_file)
            return True

        return read

    def of_job(self, cause: Cause | None, pids: dict[int, int]) -> dict[int, ProcessFailure]:
        """By rank. The cause the job ended with is among them, also if its process did not die of it."""
        failures = dict(self._by_rank)
        if cause is not None and cause.rank is not None:
            rank = cause.rank
            elsewhere = rank not in failures and rank not in pids
            if elsewhere:
                code = 1 if cause.exit_code is None else cause.exit_code
                text = cause.traceback or f"{cause.summary}; the output and the error file are on the node where it ran"
                failures[rank] = ProcessFailure(-1, 0, code, message=text)
            elif rank not in failures:
                code = 1 if cause.exit_code is None else cause.exit_code
                failures[rank] = ProcessFailure(rank, pids[rank], code, message=cause.traceback or cause.summary)
            if elsewhere or cause.kind != "death":  # more is known than the order in which processes died here
                earliest = min(failure.timestamp for failure in failures.values())
                failures[rank].timestamp = earliest
                failures = {rank: failures.pop(rank), **failures}
        if failures:  # else the job has ended for another reason than its workers
            latest = max(failure.timestamp for failure in failures.values())
            for rank, stopped in self._stopped.items():
                stopped.timestamp = max(stopped.timestamp, latest)
                failures.setdefault(rank, stopped)
        return failures


def _read(error_file: Path) -> str:
    """The text of an error file. Raises OSError or ValueError for what cannot be one: it is the worker's to write."""
    with open(os.open(error_file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
    return data.decode(errors="replace")


def of_exit_code(local_rank: int, pid: int, exit_code: int) -> ProcessFailure:
    """What an exit code says of a dead process."""
    failure = ProcessFailure(local_rank, pid, exit_code)
    failure.message = (
        f"signal {-exit_code} ({failure.signal_name()}) ended process {pid}" if exit_code < 0 else _NO_TRACEBACK
    )
    return failure


def read_failure(local_rank: int, pid: int, exit_code: int, error_file: Path) -> ProcessFailure:
    """What is known of a dead process: from its error file, or else from its exit code."""
    import json

    failure = of_exit_code(local_rank, pid, exit_code)
    if error_file == Path():
        return failure
    try:
        data = json.loads(_read(error_file))
        message = data["message"]
        timestamp = int(data["timestamp"] if isinstance(message, str) else message["extraInfo"]["timestamp"])
        if not 0 <= timestamp < _LATEST:
            raise ValueError(f"timestamp {timestamp}")
        failure.timestamp = timestamp
    except FileNotFoundError:
        return failure
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        # The worker writes this file, and can die while it does: what it says is then not known, but its death is.
        problem = f"{type(error).__name__}: {error}"
        failure.message = f"{failure.message}; its error file {error_file} is not readable ({problem})"
        return failure
    failure.error_file = str(error_file)
    failure.error_file_data = data
    failure.message = message or failure.message
    return failure
