"""What `hyperpodrun NAME ...` does beside launching. A launch pays one look at its first argument."""

from __future__ import annotations

import os
from collections.abc import Sequence

SUBCOMMANDS = {"verify": "runs a script with and without faults, and compares what it trained"}
"""By name: packages beside this one that have an `entry_point(arguments)`, which gives an exit code."""


def subcommand(arguments: Sequence[str]) -> str | None:
    """The one that is asked for. A file of that name is a script, and so is what follows `--`."""
    name = arguments[0] if arguments else ""
    if name not in SUBCOMMANDS or any(map(os.path.isfile, (name, os.path.join(name, "__main__.py")))):
        return None
    return name


def run_subcommand(name: str, arguments: Sequence[str]) -> int:
    """Its exit code. Raises UsageError with one sentence."""
    import importlib

    package = importlib.import_module(f"{__name__.partition('.')[0]}.{name}")
    return int(package.entry_point(arguments))
