"""Where batch files lie, and who may remove them.

    <cache_dir>/                      0700
      job-<token>/                    0700, one per job and node; its host holds a lock on `lock` while it lives
        lock
        train-dp0/                    0700, one per stream; its producer's alone to write
          stream.json                 what is in here, and how it was made
          3-1041.safetensors          0600: epoch 3, batch 1041
          .tmp-...                    being written; nobody reads it

A file appears under its name whole or not at all (rename). Directories of jobs whose lock nobody holds are of dead jobs
and are removed by the next host that uses the cache directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from ..errors import CacheCorruptError, ProducerError
from . import format
from .encryption import Sealer

_JOB = re.compile(r"job-([0-9a-f]{8,64})")
_BATCH = re.compile(r"(\d+)-(\d+)\.safetensors")
_TEMPORARY = ".tmp-"
_MANIFEST = "stream.json"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream's directory holds. Batches are used again only when all but `mark` is what is wanted now."""

    version: int
    digest: str
    """Of the recipe."""
    contents: list[str]
    """Of the objects in it, of everyone who reads the stream."""
    seed: int
    key_check: str
    """Tells keys apart without telling the key; empty when batches are not encrypted."""
    mark: str
    """Random; every file carries it."""


def batch_name(position: Position) -> str:
    return f"{position[0]}-{position[1]}.safetensors"


def private_directory(path: Path) -> Path:
    """Makes it with mode 0700, if it is not there. Raises ProducerError for a link and another user's directory."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise ProducerError(f"the cache directory {path} cannot be made: {error.strerror}") from None
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ProducerError(f"{path} is not a directory of this user: choose another cache_dir")
    return path


# ---- the directory of a job: the host's ------------------------------------------------------------------------


class JobDirectory:
    """The caches of one job on this node, below one cache directory. Its lock is held as long as this object lives."""

    def __init__(self, cache_dir: Path, token: str) -> None:
        self.path = private_directory(cache_dir) / f"job-{token}"
        self._lock = self._hold()

    def _hold(self) -> int:
        while True:
            private_directory(self.path)
            os.chmod(self.path, 0o700)
            try:
                lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:  # somebody took the new directory for that of a dead job
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise ProducerError(f"another host of producers holds {self.path}") from None
            if (self.path / "lock").exists():
                return lock
            os.close(lock)

    def remove(self) -> None:
        """The job is over."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_dead_jobs(cache_dir: Path) -> list[str]:
    """Removes what jobs have left whose host is gone; gives the names. A job that lives keeps all it has."""
    removed: list[str] = []
    for entry in os.scandir(cache_dir):
        if not _JOB.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        with contextlib.suppress(OSError):  # another user's, or just removed by somebody else
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                removed.append(entry.name)
            finally:
                os.close(lock)
    return removed


# ---- the directory of a stream: the producer's -----------------------------------------------------------------


class StreamDirectory:
    """Batch files of one stream. The producer makes and removes, fetchers publish, readers read."""

    def __init__(self, path: Path, mark: str, sealer: Sealer | None) -> None:
        self.path = path
        self.mark = mark
        self.sealer = sealer

    def label(self, position: Position) -> format.Label:
        return format.Label(self.mark, *position)

    def publish(self, position: Position, batch: Any, state: Any = None) -> None:
        """Writes a batch and gives it its name. Raises BatchTypeError, OSError (no space, ...)."""
        temporary = self.path / f"{_TEMPORARY}{os.getpid()}-{position[0]}-{position[1]}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            format.write(fd, self.label(position), batch, state, self.sealer)
            os.rename(temporary, self.path / batch_name(position))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)

    def load(self, position: Position) -> format.Loaded:
        """Raises FileNotFoundError, or CacheCorruptError with the file's name."""
        path = f"{self.path}/{batch_name(position)}"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return format.read(fd, self.label(position), self.sealer)
        except CacheCorruptError as error:
            raise CacheCorruptError(f"{path} is corrupt: {error}") from None
        finally:
            os.close(fd)

    def size(self, position: Position) -> int:
        """Bytes of a batch's file. Raises FileNotFoundError."""
        return os.stat(self.path / batch_name(position)).st_size

    def remove(self, position: Position) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / batch_name(position))

    def present(self) -> set[Position]:
        """The batches that lie here."""
        names = [entry.name for entry in os.scandir(self.path) if entry.is_file(follow_symlinks=False)]
        return {(int(match[1]), int(match[2])) for name in names if (match := _BATCH.fullmatch(name))}

    def remove_unfinished(self) -> None:
        """What fetchers that are gone had begun to write."""
        for entry in os.scandir(self.path):
            if entry.name.startswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)


def open_stream(job: Path, opened: protocol.Open, key: bytes) -> tuple[StreamDirectory, Manifest]:
    """The stream's directory, and what it says of itself. What lies there is kept if it is what is wanted.

    A stream keeps its first seed: readers that come later may have none of their own, or another.
    """
    import hashlib

    from .encryption import sealer

    path = private_directory(job / opened.stream)
    check = hashlib.sha256(b"hyperpodrun " + key).hexdigest()[:16] if key else ""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        old = msgspec.json.decode((path / _MANIFEST).read_bytes(), type=Manifest)
        same = (old.version, old.digest, old.key_check) == (format.VERSION, opened.digest, check)
        if same and opened.content in old.contents and not (opened.insist and old.seed != opened.seed):
            directory = StreamDirectory(path, old.mark, sealer(key))
            directory.remove_unfinished()
            return directory, old
    for entry in list(os.scandir(path)):
        os.unlink(entry.path)
    manifest = Manifest(format.VERSION, opened.digest, [opened.content], opened.seed, check, secrets.token_hex(8))
    _write_manifest(path, manifest)
    return StreamDirectory(path, manifest.mark, sealer(key)), manifest


def admit(path: Path, manifest: Manifest, content: str) -> Manifest:
    """The stream is read by somebody whose objects hold something else, too."""
    manifest = msgspec.structs.replace(manifest, contents=[*manifest.contents, content])
    _write_manifest(path, manifest)
    return manifest


def forget(path: Path) -> None:
    """The next producer makes the stream anew."""
    (path / _MANIFEST).unlink(missing_ok=True)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    temporary = path / f"{_TEMPORARY}manifest"
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as output:
        output.write(msgspec.json.encode(manifest))
    os.rename(temporary, path / _MANIFEST)
