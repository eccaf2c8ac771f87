"""What a person reads: what is run, one row per run as soon as it is over, the verdict, and what to do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from .compare import Difference
from .launch import Ended

EQUAL, DIFFERENT, NON_DETERMINISTIC, NOT_COMPARED = 0, 1, 3, 4
"""Exit codes. 2 is a wrong command line."""

_ROW = "{:<14} {:<46} {:>7}  {}"


class Report:
    """Printed line by line; rows appear when their runs are over."""

    def __init__(self, command: Sequence[str], *, seed: int, faults: int, files: int, size: int) -> None:
        self.command = shlex.join(command)
        self.say(f"hyperpodrun verify: {self.command}")
        self.say(
            f"2 runs undisturbed, then {faults} with a fault each (seed {seed}), all with --inprocess-restart; every "
            f"run in its own copy of the working directory ({files} files, {size / 1e6:.1f} MB), with its own HOME, "
            "TMPDIR and logs"
        )
        self.say("")
        self.say(_ROW.format("run", "fault", "seconds", "result").rstrip())

    def say(self, text: str) -> None:
        print(text)
        sys.stdout.flush()

    def row(self, name: str, ended: Ended, result: str) -> None:
        self.say(_ROW.format(name, ended.faults or "-", f"{ended.seconds:.1f}", result))

    def verdict(self, sentence: str, *advice: str) -> None:
        self.say("")
        self.say(sentence)
        for line in advice:
            self.say(f"  {line}")

    def unregistered(self, sentences: Sequence[str]) -> None:
        """What changed in a step and nobody registered."""
        if not sentences:
            return
        self.say("")
        self.say("Found on the way; wrong only if a later step depends on it:")
        for sentence in sentences:
            self.say(f"  {sentence}")

    def repeat(self, faults: str) -> str:
        """How to have a run again, and look at what it leaves."""
        return f"hyperpodrun verify --keep --inject '{faults}' {self.command}"


def result_of(ended: Ended, difference: Difference | None) -> tuple[str, int]:
    """A row's last column, and what it means for the exit code."""
    if not ended.finished:
        return (f"refused: {ended.sentence}" if ended.refused else f"failed: {ended.sentence}"), NOT_COMPARED
    if difference is not None:
        return f"DIFFERENT: {difference}", DIFFERENT
    if ended.faults and not ended.fired:
        return "the fault never fired", NOT_COMPARED
    recovered = f", recovered in {sum(ended.recoveries):.2f} s" if ended.recoveries else ""
    return f"equal{recovered}", EQUAL
