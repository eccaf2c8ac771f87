"""Where a worker's output goes: `<log dir>/<run id>_<random>/attempt_<n>/<local rank>/`, torchrun's layout.

A redirected stream is the worker's own open file. A teed one is a pipe that `console.py` copies to the file and, with
a prefix, to the launcher's console and, where filters ask for it, to one file of the attempt. Everything else is the
launcher's own stream, inherited. What the console is not to show goes to its file or nowhere. An attempt's directory
is never reused or wiped. `--log-dir /dev/null` means no files at all.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, BinaryIO

from ..config import LaunchConfig
from ..directories import make_private, temporary
from ..processes import CannotStart
from .console import Console, Filtered, _Stream
from .printer import standard_stream

if TYPE_CHECKING:
    from .logs_specs import Destinations, LogsSpecs

STDOUT, STDERR = 1, 2


@dataclass
class Outputs:
    """The streams of one process, open until it has been started."""

    stdout: BinaryIO | int | None = None
    stderr: BinaryIO | int | None = None
    error_file: Path = Path()
    error_path: str = ""
    """What the process is told: its error file, or nothing."""
    files: dict[str, str] = field(default_factory=dict)
    _to_close: list[BinaryIO | int] = field(default_factory=list)
    _streams: list[_Stream] = field(default_factory=list)

    def started(self) -> None:
        """The process holds its ends now: the launcher gives up its own."""
        for end in self._to_close:
            os.close(end) if isinstance(end, int) else end.close()
        self._to_close.clear()


def _append_to(path: str) -> BinaryIO:
    return open(path, "ab", buffering=0)


@dataclass
class _Where:
    """Where the streams of one process go: a file, `/dev/null`, or nothing for the console."""

    error_file: str
    paths: dict[str, str] = field(default_factory=dict)
    teed: set[str] = field(default_factory=set)
    """Those that are shown on the console as well."""
    filtered: dict[str, str] = field(default_factory=dict)


class LogDirectory:
    """The directory of one launch and the files in it."""

    def __init__(self, config: LaunchConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._nowhere = config.log_dir == Path(os.devnull)
        base = None if self._nowhere else config.log_dir
        self._temporary = base is None
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
        prefix = "hyperpodrun_logs_" if base is None else f"{config.run_id.replace('/', '_')}_"
        self.path = make_private(base or temporary(), prefix)
        self.recoveries = (base or self.path) / "recoveries.jsonl"
        self._specs: LogsSpecs | None = None
        if config.logs_specs is not None:
            from .logs_specs import LogsSpecs

            self._specs = LogsSpecs(config)

    def open(self, kind: str, local_rank: int, rank: int | None = None) -> Outputs:
        """The outputs of a process about to start. `kind`: `attempt_<n>`, `pre_train`, `post_train`.

        Raises CannotStart when there is no room for them, or the user's class does not say where they go.
        """
        try:
            return self._open(kind, local_rank, local_rank if rank is None else rank)
        except CannotStart:
            raise
        except OSError as error:
            raise CannotStart(f"logs of {kind}, local rank {local_rank}: {error}") from error

    def _open(self, kind: str, local_rank: int, rank: int) -> Outputs:
        where = self._where(kind, local_rank)
        outputs = Outputs(error_file=Path(where.error_file))
        outputs.error_path = "" if self._nowhere else where.error_file
        for bit, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
            path = where.paths[name]
            if not path:
                continue
            end: BinaryIO | int
            if path == os.devnull:
                end = os.open(os.devnull, os.O_WRONLY)
            else:
                outputs.files[name] = path
                end = file = _append_to(path)
                if name in where.teed:
                    read_end, end = os.pipe()
                    filtered = self._filtered(where.filtered[name], name)
                    prefix = self._prefix(local_rank, rank)
                    outputs._streams.append(self._console.tee(read_end, file, standard_stream(name), prefix, filtered))
            outputs._to_close.append(end)
            if bit == STDOUT:
                outputs.stdout = end
            else:
                outputs.stderr = end
        return outputs

    def _where(self, kind: str, local_rank: int) -> _Where:
        """Where the streams of a process go."""
        if self._specs is not None and kind.startswith("attempt_"):
            return self._as_specified(self._specs.attempt(int(kind.removeprefix("attempt_"))), local_rank)
        directory = self._new_directory(kind, local_rank)
        teed = 0 if self._nowhere else self._config.tee.streams(local_rank)
        redirected = 0 if self._nowhere else self._config.redirects.streams(local_rank) | teed
        shown = self._config.shows(local_rank)
        where = _Where(str(directory / "error.json"))
        for bit, name in ((STDOUT, "stdout"), (STDERR, "stderr")):
            hidden = os.devnull if not shown and not self._nowhere else ""
            where.paths[name] = str(directory / f"{name}.log") if redirected & bit else hidden
            if teed & bit and shown:
                where.teed.add(name)
            where.filtered[name] = str(directory.parent / f"filtered_{name}.log")
        return where

    @staticmethod
    def _as_specified(wanted: Destinations, local_rank: int) -> _Where:
        where = _Where(wanted.error_files.get(local_rank, ""))
        where.paths = {"stdout": wanted.stdouts.get(local_rank, ""), "stderr": wanted.stderrs.get(local_rank, "")}
        where.teed = {
            name
            for name, teed in (("stdout", wanted.tee_stdouts), ("stderr", wanted.tee_stderrs))
            if local_rank in teed
        }
        where.filtered = {"stdout": wanted.filtered_stdout, "stderr": wanted.filtered_stderr}
        for path in (where.error_file, *where.paths.values()):
            if path:  # that its directory is there is the class's business, but no reason to fail
                Path(path).parent.mkdir(parents=True, exist_ok=True)
        return where

    def _prefix(self, local_rank: int, rank: int) -> str:
        """What teed lines begin with."""
        if self._config.line_prefix is None:
            return f"[{self._config.role}{local_rank}]:"
        names = {
            "role_name": self._config.role,
            "rank": rank,
            "local_rank": local_rank,
            "hostname": socket.gethostname(),
        }
        return Template(self._config.line_prefix).safe_substitute(names)

    def _filtered(self, path: str, name: str) -> Filtered | None:
        """The file of the attempt for teed lines that contain one of the launch's texts."""
        texts = self._config.stdout_filters if name == "stdout" else self._config.stderr_filters
        if not texts:
            return None
        return Filtered(Path(path), tuple(text.encode() for text in texts))

    def ended(self, outputs: Outputs) -> None:
        """The process is gone."""
        for stream in outputs._streams:
            self._console.end(stream)

    def close(self) -> None:
        """No process will be started any more."""
        if self._specs is not None:
            self._specs.close()

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
