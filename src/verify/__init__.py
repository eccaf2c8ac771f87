"""`hyperpodrun verify`: does this script, on this machine, really end the same with faults as without?

- `command`: its options, and the order of things.
- `workspace`: each run's own copy of the working directory, home and temporary directory.
- `launch`: one run, and what is left of it.
- `records`: what the ranks of a run wrote and printed.
- `compare`: where two runs first differ.
- `plan`: which faults, seeded.
- `report`: what a person reads.

It runs beside the jobs, as their launcher's parent, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence


def entry_point(arguments: Sequence[str]) -> int:
    """The subcommand; its exit code. Raises UsageError with one sentence."""
    from .command import main

    return main(arguments)
