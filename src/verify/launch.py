"""One run: a launcher in a process of its own, to its end, and what it left."""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..testing.settings import INJECT, TESTING, TRACE
from . import workspace
from .records import RankRecord, errors_of, read_records, recoveries_of

_PR_SET_PDEATHSIG = 1
_REASON = re.compile(r'^hyperpodrun: failed .*\breason="((?:[^"\\]|\\.)*)"', re.MULTILINE)
_SENTENCE = re.compile(r"^hyperpodrun: (?!recovery |TESTING)(.*)$", re.MULTILINE)
_REFUSED = re.compile(r"(?:Error|Exception): ((?:register\(|CheckpointManager|[^\n;,]*cannot be carried)[^\n;]*)")
_STOP_S = 40.0
"""The launcher's own way of stopping takes 30 s at most."""
_LAUNCHER = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"  # the script's directory is not the launcher's
    f"from {__package__.partition('.')[0]}.launcher import entry_point; entry_point()"
)


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    faults: str
    seconds: float
    exit_code: int
    records: dict[int, RankRecord] = field(default_factory=dict)
    recoveries: tuple[float, ...] = ()
    """How long each took, in seconds."""
    sentence: str = ""
    """How it ended, if not well."""
    refused: bool = False
    """It ended because an object cannot be carried; the sentence says which."""

    @property
    def finished(self) -> bool:
        return self.exit_code == 0

    @property
    def fired(self) -> int:
        return sum(len(record.fired) for record in self.records.values())


class Runner:
    """Starts runs of one command, one after the other. The command is the launcher's, with `--` before the script."""

    def __init__(self, command: Sequence[str], root: Path, source: Path, shared: tuple[Path, ...], keep: bool) -> None:
        self._command, self._root, self._source, self._shared, self._keep = command, root, source, shared, keep
        self._count = 0

    def run(self, faults: str = "", limit: float | None = None) -> Ended:
        """A run with these faults; one that has not ended after `limit` seconds is stopped."""
        place = workspace.make(self._root / str(self._count), self._source, self._shared)
        self._count += 1
        environment = {**place.environment(), TESTING: "1", INJECT: faults, TRACE: str(place.trace)}
        command = self._with("--inprocess-restart", f"--log-dir={place.logs}", "--redirects=3", "--tee=0")
        began = time.monotonic()
        try:
            with place.output.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-c", _LAUNCHER, *command],
                    cwd=place.directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
                code = _wait(process, limit)
            seconds = time.monotonic() - began
            records, recoveries = read_records(place.trace, place.logs), tuple(recoveries_of(place.logs))
            sentence, refused = _ending(code, limit, place)
            return Ended(faults, seconds, 1 if code is None else code, records, recoveries, sentence, refused)
        finally:
            if not self._keep:
                shutil.rmtree(place.root, ignore_errors=True)

    def _with(self, *options: str) -> list[str]:
        """The command with these options, which count more than what it says itself."""
        command = list(self._command)
        end = command.index("--")
        return [*command[:end], *options, *command[end:]]


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """Its exit code; None when it had to be stopped. Whatever ends the waiting ends the process."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ending(code: int | None, limit: float | None, place: workspace.Workspace) -> tuple[str, bool]:
    """How a job ended, in a sentence, and whether it was refused."""
    if code == 0:
        return "", False
    said = place.output.read_text(errors="replace")
    refused = _REFUSED.findall(said) or _REFUSED.findall(errors_of(place.logs))
    if refused:
        return refused[0].rstrip('"'), True
    if code is None:
        return f"had not ended after {limit:.0f} s and was stopped", False
    reasons = _REASON.findall(said) or _SENTENCE.findall(said)
    return reasons[-1] if reasons else f"exit code {code}", False


def _end_with_parent() -> None:
    """In the child: no launcher outlives this process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
