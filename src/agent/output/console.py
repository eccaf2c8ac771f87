"""The launcher's own output: log lines and the teed streams of workers.

Owns: the pipes of teed workers and the thread that copies them to their files. What is shown goes through a
`Printer`: a terminal that does not drain stops neither the agent's event loop nor a worker for long.
Called by: `logs.py` to tee a stream, everybody to log.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

from ...protocol.text import printable
from .printer import Printer, Target, standard_stream

_CHUNK = 1 << 16
_LARGEST_PIPE = 1 << 20
_FILE_LIMIT_S = 5.0
"""A file that takes nothing for so long is not waited for at the end."""


class Filtered:
    """A file for the teed lines that contain one of `texts`; several workers append to it."""

    def __init__(self, path: Path, texts: tuple[bytes, ...]) -> None:
        self._file = path.open("ab", buffering=0)
        self._texts = texts

    def write(self, lines: list[bytes], prefix: bytes) -> None:
        """Raises OSError."""
        chosen = [prefix + line + b"\n" for line in lines if any(text in line for text in self._texts)]
        if chosen:
            _write_file(self._file, b"".join(chosen))

    @property
    def name(self) -> str:
        return str(self._file.name)

    def close(self) -> None:
        self._file.close()


class _Stream:
    """A worker's pipe on its way to its file and to the console."""

    def __init__(self, fd: int, file: BinaryIO, target: Target, prefix: bytes, filtered: Filtered | None) -> None:
        self.filtered = filtered
        self.fd = fd
        self.file: BinaryIO | None = file
        self.target = target
        self.prefix = prefix
        self.partial = b""
        self.hidden = 0
        """Lines that a stuck console has not been given."""
        self.finished = False


class Console:
    """Writes lines to the launcher's stdout and stderr, and copies the output of workers."""

    def __init__(self, printer: Printer | None = None) -> None:
        self._printer = printer or Printer()
        self._ended: deque[_Stream] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._closing = False
        self._writing_since: float | None = None
        """When the thread began to write to the file it is at."""
        self._thread: threading.Thread | None = None

    def log(self, event: str, **fields: object) -> None:
        """One line on stderr: `hyperpodrun: event field=value ...`."""
        words = [event, *(f"{name}={_quote(value)}" for name, value in fields.items() if value is not None)]
        self.write(f"hyperpodrun: {' '.join(words)}\n")

    def debug(self, event: str, **fields: object) -> None:
        """The same, if LOGLEVEL asks for it."""
        if os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
            self.log(event, **fields)

    def write(self, text: str) -> None:
        """Text for stderr, as it is."""
        self._printer.put(standard_stream("stderr"), text.encode(errors="backslashreplace"))

    def tee(self, fd: int, file: BinaryIO, target: Target, prefix: str, filtered: Filtered | None = None) -> _Stream:
        """Copies what arrives on `fd` to `file` as it is, and line by line with `prefix` to `target` and `filtered`."""
        os.set_blocking(fd, False)
        stream = _Stream(fd, file, target, prefix.encode(), filtered)
        self._selector.register(fd, selectors.EVENT_READ, stream)
        self._wake()
        return stream

    def end(self, stream: _Stream) -> None:
        """The worker is gone: all it wrote is in the pipe now. What else holds the pipe open is not waited for."""
        self._ended.append(stream)
        self._wake()

    def close(self, timeout: float = 30.0) -> None:
        """Writes out everything. `timeout` bounds a console that does not take it."""
        if self._thread is not None:
            self._closing = True
            self._wake()
            deadline = time.monotonic() + timeout
            while self._thread.is_alive() and time.monotonic() < deadline and not self._file_hangs():
                self._thread.join(0.1)
        self._printer.close(timeout)
        if self._thread is None or not self._thread.is_alive():
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _file_hangs(self) -> bool:
        since = self._writing_since
        return since is not None and time.monotonic() > since + _FILE_LIMIT_S

    def _wake(self) -> None:
        if self._thread is None:  # started late: a launch without --tee needs no thread
            self._thread = threading.Thread(target=self._run, name="hyperpodrun-tee", daemon=True)
            self._thread.start()
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, _CHUNK)
                else:
                    self._copy(key.data)
            while self._ended:
                stream = self._ended.popleft()
                for _ in range(_LARGEST_PIPE // _CHUNK):  # whoever else writes into it can do so for ever
                    if not self._copy(stream):
                        break
                self._finish(stream)
            if self._closing and not self._ended:
                return

    def _copy(self, stream: _Stream) -> bool:
        """Copies one chunk; False when there is none at the moment or ever again."""
        if stream.finished:
            return False
        try:
            data = os.read(stream.fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._finish(stream)
            return False
        if stream.file is not None:
            try:
                self._writing_since = time.monotonic()
                _write_file(stream.file, data)
            except OSError as error:  # a full disk: the worker must not wait for a reader that has gone
                self._lost(stream.file, error)
                stream.file = None
            finally:
                self._writing_since = None
        lines = (stream.partial + data).split(b"\n")
        stream.partial = lines.pop()
        if len(stream.partial) > _CHUNK:  # a progress bar without newlines must not grow for ever
            lines.append(stream.partial)
            stream.partial = b""
        self._show(stream, lines)
        return True

    def _finish(self, stream: _Stream) -> None:
        if stream.finished:
            return
        if stream.partial:
            self._show(stream, [stream.partial])
        self._tell_hidden(stream)
        self._selector.unregister(stream.fd)
        os.close(stream.fd)
        if stream.file is not None:
            stream.file.close()
        if stream.filtered is not None:
            stream.filtered.close()
        stream.finished = True

    def _show(self, stream: _Stream, lines: list[bytes]) -> None:
        if not lines:
            return
        if self._printer.has_room():
            self._tell_hidden(stream)
            self._printer.put(stream.target, b"".join(stream.prefix + line + b"\n" for line in lines))
        else:
            stream.hidden += len(lines)
        if stream.filtered is not None:
            try:
                stream.filtered.write(lines, stream.prefix)
            except OSError as error:
                self._lost(stream.filtered, error)
                stream.filtered = None

    def _tell_hidden(self, stream: _Stream) -> None:
        if stream.hidden:
            where = "" if stream.file is None else f"; they are in {stream.file.name}"
            text = f"hyperpodrun: {stream.hidden} lines are not shown, as the console did not take them{where}\n"
            self._printer.put(stream.target, stream.prefix + text.encode())
            stream.hidden = 0

    def _lost(self, file: BinaryIO | Filtered, error: OSError) -> None:
        """What is written from now on is on the console only."""
        self.log("log-file-lost", path=file.name, reason=error.strerror)
        with contextlib.suppress(OSError):
            file.close()


def _write_file(file: BinaryIO, data: bytes) -> None:
    """All of it: an unbuffered file takes what there is room for, and only then fails. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _quote(value: object) -> str:
    text = str(value)
    if text.isprintable() and text and not any(character in ' "=' for character in text):
        return text
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
