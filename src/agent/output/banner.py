"""The failure banner: who failed, the first cause first."""

from __future__ import annotations

import socket

from ...protocol.text import printable
from .failures import NOT_AVAILABLE, ProcessFailure

_WIDTH = 60


def failure_banner(name: str, failures: dict[int, ProcessFailure], root_rank: int, root: ProcessFailure) -> str:
    """Text for people; the labels are torchrun's, so that what searches logs for them still finds them."""
    others = [(rank, failure) for rank, failure in failures.items() if rank != root_rank]
    thick, thin = "=" * _WIDTH, "-" * _WIDTH
    lines = ["", thick, f"{name} FAILED", thin, "Root Cause (first observed failure):", _describe(0, root_rank, root)]
    lines += [thin, "Failures:"]
    lines += [_describe(number, *other) for number, other in enumerate(others, 1)] or ["  none but this one"]
    return "\n".join([*lines, thick])


def _describe(number: int, rank: int, failure: ProcessFailure) -> str:
    signal_name = failure.signal_name()
    elsewhere = failure.pid == 0
    host = "another node" if elsewhere else socket.gethostname()
    place = "" if elsewhere else f" (local_rank: {failure.local_rank})"
    process = "" if elsewhere else f" (pid: {failure.pid})"
    suffix = "" if signal_name == NOT_AVAILABLE else f" ({signal_name})"
    return "\n".join(
        [
            f"[{number}]:",
            f"  time      : {failure.timestamp_isoformat()}",
            f"  host      : {host}",
            f"  rank      : {rank}{place}",
            f"  exitcode  : {failure.exitcode}{process}{suffix}",
            f"  error_file: {failure.error_file}",
            f"  traceback : {_traceback(failure)}",
        ]
    )


def _traceback(failure: ProcessFailure) -> str:
    message = failure.message
    if isinstance(message, dict):
        extra = message.get("extraInfo")
        text = extra.get("py_callstack") if isinstance(extra, dict) else None
        message = str(text or message.get("message") or NOT_AVAILABLE)
    return printable(message.rstrip("\n"), lines=True).replace("\n", "\n  ")
