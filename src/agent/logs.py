"""Where a worker's output goes: `<log dir>/<run id>_<random>/attempt_<n>/<local rank>/`, torchrun's layout.

A redirected stream is the worker's own open file. A teed one is a pipe that `console.py` copies to the file and, with
a prefix, to the launcher's console. Everything else is the launcher's own stream, inherited. An attempt's directory is
never reused or wiped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .config import LaunchConfig
from .console import Console, _Stream
from .directories import make_private, temporary

STDOUT, STDERR = 1, 2


@dataclass
class Outputs:
    """The streams of one process, open until it has been started."""

    stdout: BinaryIO | int | None = None
    stderr: BinaryIO | int | None = None
    error_file: Path = Path()
    files: dict[str, str] = field(default_factory=dict)
    _to_close: list[BinaryIO | int] = field(default_factory=list)
    _streams: list[_Stream] = field(default_factory=list)

    def started(self) -> None:
        """The process holds its ends now: the launcher gives up its own."""
        for end in self._to_close:
            os.close(end) if isinstance(end, int) else end.close()
        self._to_close.clear()


class LogDirectory:
    """The directory of one launch and the files in it."""

    def __init__(self, config: LaunchConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._temporary = config.log_dir is None
        if config.log_dir is not None:
            config.log_dir.mkdir(parents=True, exist_ok=True)
        prefix = "hyperpodrun_logs_" if config.log_dir is None else f"{config.run_id}_"
        self.path = make_private(config.log_dir or temporary(), prefix)
        self.recoveries = (config.log_dir or self.path) / "recoveries.jsonl"

    def open(self, kind: str, local_rank: int) -> Outputs:
        """The outputs of a process about to start. `kind`: `attempt_<n>`, `pre_train`, `post_train`."""
        directory = self._new_directory(kind, local_rank)
        outputs = Outputs(error_file=directory / "error.json")
        teed = self._config.tee.streams(local_rank)
        redirected = self._config.redirects.streams(local_rank) | teed
        prefix = f"[{self._config.role}{local_rank}]:"
        for bit, name, target in ((STDOUT, "stdout", sys.stdout), (STDERR, "stderr", sys.stderr)):
            if not redirected & bit:
                continue
            path = directory / f"{name}.log"
            outputs.files[name] = str(path)
            file = path.open("ab", buffering=0)
            end: BinaryIO | int = file
            if teed & bit:
                read_end, end = os.pipe()
                outputs._streams.append(self._console.tee(read_end, file, target.buffer, prefix))
            outputs._to_close.append(end)
            if bit == STDOUT:
                outputs.stdout = end
            else:
                outputs.stderr = end
        return outputs

    def ended(self, outputs: Outputs) -> None:
        """The process is gone."""
        for stream in outputs._streams:
            self._console.end(stream)

    def discard(self) -> None:
        """Removes a directory that nobody asked for."""
        if self._temporary:
            import shutil

            shutil.rmtree(self.path, ignore_errors=True)

    def _new_directory(self, kind: str, local_rank: int) -> Path:
        """A rank that is respawned twice while one epoch assembles gets a directory for each process."""
        for number in range(1 << 16):
            name = str(local_rank) if number == 0 else f"{local_rank}.{number}"
            directory = self.path / kind / name
            try:
                directory.mkdir(parents=True)
            except FileExistsError:
                continue
            return directory
        raise OSError(f"no free directory for rank {local_rank} below {self.path / kind}")
