"""The worker library's own log lines: on stderr, in the launcher's format, with the rank."""

from __future__ import annotations

import os
import sys

from ..protocol.text import printable


def log(event: str, **fields: object) -> None:
    """One line: `hyperpodrun: event rank=R field=value ...`. Off with HPWRAPPER_LOG_LEVEL=off."""
    if _level() != "off":
        _write(event, fields)


def debug(event: str, **fields: object) -> None:
    """The same, with HPWRAPPER_LOG_LEVEL=debug only."""
    if _level() == "debug":
        _write(event, fields)


def _level() -> str:
    return os.environ.get("HPWRAPPER_LOG_LEVEL", "info").lower()


def _write(event: str, fields: dict[str, object]) -> None:
    words = printable(
        " ".join(f"{name}={value!r}" if " " in str(value) else f"{name}={value}" for name, value in fields.items())
    )
    sys.stderr.write(f"hyperpodrun: {event} rank={os.environ.get('RANK', '?')} {words}\n")
    sys.stderr.flush()
