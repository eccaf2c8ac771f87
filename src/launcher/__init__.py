"""The `hyperpodrun` command. It never imports torch."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Runs one launch from command-line arguments (default: those of this process); returns its exit code."""
    from .command import run

    return run(args)


def entry_point() -> None:
    """The console script."""
    import gc
    import sys

    exit_code = main()
    gc.freeze()  # the interpreter need not look for garbage in a process that is about to end: 30 ms
    sys.exit(exit_code)
