"""Where a worker's output goes: `<log dir>/<run id>_<random>/attempt_<n>/<local rank>/`, torchrun's layout.

A redirected stream is the worker's own open file. A teed one is a pipe that `console.py` copies to the file and, with
a prefix, to the launcher's console and, where filters ask for it, to one file of the attempt. Everything else is the
launcher's own stream, inherited. What the console is not to show goes to its file or nowhere. An attempt's directory
is never reused or wiped. `--log-dir /dev/null` means no files at all.

Files are made, opened and closed on a thread (`disk.py`): a directory that hangs must not stop the agent. A process
whose files are not there in time is started without them, so that its output goes to the console.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, BinaryIO

from ..config import LaunchConfig
from ..directories import make_private, temporary
from ..processes import CannotStart
from .console import Console, Filtered, _Stream
from .disk import Disk, DiskHangs, Task
from .printer import standard_stream

if TYPE_CHECKING:
    import asyncio

    from .logs_specs import Destinations, LogsSpecs

STDOUT, STDERR = 1, 2
_START_LIMIT_S = 10.0
_OPEN_LIMIT_S = 5.0
_SETTLE_LIMIT_S = 0.2
_END_LIMIT_S = 2.0
"""So long the files of a process, and at the end of a launch all of them, are waited for."""


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
    _to_tee: list[_Tee] = field(default_factory=list)
    _streams: list[_Stream] = field(default_factory=list)
    _disk: Disk | None = None

    def started(self) -> None:
        """The process holds its ends now: the launcher gives up its own. A file that is closed is flushed, which can
        hang."""
        ends, self._to_close = self._to_close, []
        for end in ends:
            if isinstance(end, int):
                os.close(end)
            elif self._disk is not None:
                self._disk.begin(end.close)

    def discard(self) -> None:
        """No process is started with them."""
        self.started()
        for tee in self._to_tee:
            os.close(tee.fd)
            if self._disk is not None:
                self._disk.begin(tee.file.close)


@dataclass
class _Tee:
    """A pipe that the console is to copy to a file."""

    fd: int
    file: BinaryIO
    name: str
    prefix: str
    filtered: Filtered | None


@dataclass
class _Opening:
    """Files that a process about to start waits for."""

    what: str
    then: Callable[[Outputs], None]
    task: Task[Outputs] | None = None
    timer: asyncio.TimerHandle | None = None


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
        self.disk = Disk()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._openings: list[_Opening] = []
        try:
            self.path = self.disk.call(lambda: self._make(base), _START_LIMIT_S)
        except DiskHangs as error:
            raise DiskHangs(f"the log directory {base or temporary()}: {error}") from None
        self.recoveries = (base or self.path) / "recoveries.jsonl"
        self._specs: LogsSpecs | None = None
        self._limit_s = _OPEN_LIMIT_S
        if config.logs_specs is not None:
            from .logs_specs import LONGEST_ANSWER_S, LogsSpecs

            self._specs = LogsSpecs(config)
            self._limit_s += LONGEST_ANSWER_S

    def _make(self, base: Path | None) -> Path:
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
        prefix = "hyperpodrun_logs_" if base is None else f"{self._config.run_id.replace('/', '_')}_"
        return make_private(base or temporary(), prefix)

    # ---- files of processes --------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop runs now, and must not wait for files any more."""
        self._loop = loop

    def open(self, kind: str, local_rank: int, rank: int | None, then: Callable[[Outputs], None]) -> None:
        """Gives `then` the outputs of a process about to start: at once, or on the loop when they are there. `kind`:
        `attempt_<n>`, `pre_train`, `post_train`.

        Raises CannotStart when there is no room for them, or the user's class does not say where they go.
        """
        opening = _Opening(f"logs of {kind}, local rank {local_rank}", then)

        def files() -> Outputs:
            return self._open(kind, local_rank, local_rank if rank is None else rank)

        if self._loop is None:
            try:
                outputs = self.disk.call(files, self._limit_s)
            except DiskHangs:
                self._go_without(opening)
            except OSError as error:
                raise self._cannot_start(opening, error) from error
            else:
                then(self._begin_to_tee(outputs))
            return
        if self.disk.hangs:
            self._go_without(opening)
            return
        loop = self._loop
        self._openings.append(opening)
        opening.timer = loop.call_later(self._limit_s, self._go_without, opening)

        def opened(task: Task[Outputs]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._opened, opening)

        opening.task = self.disk.begin(files, opened)

    def settle(self) -> None:
        """Whoever still waits for files is started now, if need be without them: it is to be signalled."""
        for opening in list(self._openings):
            if opening.task is not None and not self.disk.hangs and opening.task.over.wait(_SETTLE_LIMIT_S):
                self._opened(opening)
            else:
                self._go_without(opening)

    def _opened(self, opening: _Opening) -> None:
        task = opening.task
        assert task is not None
        if not self._forget(opening):  # too late: it runs without them
            if task.result is not None:
                task.result.discard()
            return
        if isinstance(task.error, OSError):
            raise self._cannot_start(opening, task.error) from task.error
        if task.error is not None:
            raise task.error
        assert task.result is not None
        opening.then(self._begin_to_tee(task.result))

    def _go_without(self, opening: _Opening) -> None:
        self._forget(opening)
        if opening.task is not None:
            self.disk.give_up(opening.task)  # type: ignore[arg-type]
        self._console.log("log-directory-hangs", path=self.path, without=opening.what, action="output to the console")
        opening.then(Outputs())

    def _forget(self, opening: _Opening) -> bool:
        """Whether it was still waited for."""
        if opening.timer is not None:
            opening.timer.cancel()
        known = opening in self._openings
        if known:
            self._openings.remove(opening)
        return known

    @staticmethod
    def _cannot_start(opening: _Opening, error: OSError) -> CannotStart:
        return error if isinstance(error, CannotStart) else CannotStart(f"{opening.what}: {error}")

    def _begin_to_tee(self, outputs: Outputs) -> Outputs:
        for tee in outputs._to_tee:
            stream = self._console.tee(tee.fd, tee.file, standard_stream(tee.name), tee.prefix, tee.filtered)
            outputs._streams.append(stream)
        return outputs

    def _open(self, kind: str, local_rank: int, rank: int) -> Outputs:
        where = self._where(kind, local_rank)
        outputs = Outputs(error_file=Path(where.error_file), _disk=self.disk)
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
                    outputs._to_tee.append(_Tee(read_end, file, name, prefix, filtered))
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

    def written(self) -> None:
        """Waits, not for long, until what was to be read or written has been."""
        with contextlib.suppress(DiskHangs):
            self.disk.call(lambda: None, _END_LIMIT_S)

    def discard(self) -> None:
        """Removes a directory that nobody asked for, unless there were recoveries."""
        if self._temporary:
            with contextlib.suppress(DiskHangs):
                self.disk.call(self._discard, _END_LIMIT_S)

    def _discard(self) -> None:
        import shutil

        if not self.recoveries.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def discard_if_empty(self) -> bool:
        """Removes the directory if there is no file in it; whether it did."""
        with contextlib.suppress(DiskHangs):
            return self.disk.call(self._discard_if_empty, _END_LIMIT_S)
        return False

    def _discard_if_empty(self) -> bool:
        if any(files for _, _, files in os.walk(self.path)):
            return False
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)
        return True

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
