"""The environment variables that have a job broken or traced. Launcher and worker read them; neither needs torch."""

from __future__ import annotations

import os
from pathlib import Path

from .grammar import Injection, parse_injections

TESTING = "HYPERPODRUN_TESTING"
"""1: this job may be broken on purpose."""
INJECT = "HYPERPODRUN_INJECT"
"""The faults, as `grammar` has them."""
TRACE = "HYPERPODRUN_TRACE"
"""A directory: each rank writes there what its state was after each step."""


def wanted_faults() -> list[Injection]:
    """What HYPERPODRUN_INJECT asks for. Raises ValueError, with one sentence, where it must not or cannot."""
    text = os.environ.get(INJECT, "")
    if not text.strip():
        return []
    if os.environ.get(TESTING) != "1":
        raise ValueError(f"{INJECT} is set, which breaks jobs on purpose, and {TESTING}=1 is not: unset it or set both")
    try:
        return parse_injections(text)
    except ValueError as error:
        raise ValueError(f"{INJECT}: {error}") from None


def announcement(faults: list[Injection]) -> str:
    """What is said, loudly, where faults are active."""
    return f"TESTING: this job is broken on purpose ({INJECT}): {'; '.join(map(str, faults))}"


def trace_directory() -> Path | None:
    path = os.environ.get(TRACE)
    return Path(path) if path else None
