"""Directories of the launch's own: made with mode 0700 and a name nobody can guess.

What `tempfile` is for; but that imports `random` and with it OpenSSL, 30 ms before the first worker starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import keeper

_OWNER = ".owner"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LONGEST_FOR_SOCKETS = 60
"""A socket's path has at most 107 bytes; this much of it may be the temporary directory's."""


@dataclass(frozen=True)
class Owned:
    """A directory that lives no longer than its job. `proof`: a descriptor of the file in it that is locked so long."""

    path: Path
    proof: int | None

    def remove(self) -> None:
        keeper.remove_tree(str(self.path))
        if self.proof is not None:
            os.close(self.proof)


def make_owned(parent: Path, prefix: str, token: str) -> Owned:
    """A private directory of the job `token`; whoever holds `proof` open keeps it from `remove_orphaned`.

    Raises OSError if it cannot be made, or nothing be written in it.
    """
    path = make_private(parent, prefix)
    draft = path / f"{_OWNER}.new"
    try:
        proof = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(proof, f"{_boot()}\n{token}\n".encode())
    except OSError:
        keeper.remove_tree(str(path))
        raise
    try:
        fcntl.flock(proof, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: nobody can tell later that it is orphaned
        os.close(proof)
        return Owned(path, None)
    draft.rename(path / _OWNER)  # locked before anybody can look for it
    return Owned(path, proof)


def remove_orphaned(parents: Iterator[Path], prefixes: tuple[str, ...]) -> list[Path]:
    """Removes directories of `make_owned` whose job was killed with all that would have removed them; which these were.

    Only this user's, only those made since this machine has started, and only if nobody holds their proof any more.
    """
    removed = []
    for parent in dict.fromkeys(parents):
        try:
            names = os.listdir(parent)
        except OSError:
            continue
        for name in names:
            if name.startswith(prefixes) and _remove_if_orphaned(parent / name):
                removed.append(parent / name)
    return removed


def _remove_if_orphaned(path: Path) -> bool:
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        proof = os.open(path / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        boot, _, token = os.read(proof, 200).decode("ascii", "replace").strip().partition("\n")
        if not boot or boot != _boot():
            return False
        fcntl.flock(proof, fcntl.LOCK_EX | fcntl.LOCK_NB)
        keeper.remove_caches(str(path), token)
        keeper.remove_tree(str(path))
        return True
    except OSError:  # it is in use
        return False
    finally:
        os.close(proof)


def _boot() -> str:
    """Which run of which machine this is: a lock says nothing about another machine that shares the directory."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def make_private(parent: Path, prefix: str) -> Path:
    """A new directory `<parent>/<prefix><random>`, readable by this user only. Raises OSError if it cannot be made."""
    while True:
        path = parent / f"{prefix}{os.urandom(6).hex()}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path


def temporary() -> Path:
    """Where temporary files go: the first of `tempfile`'s places in which a file can be written. Raises OSError."""
    return _first_usable(_places())


def in_memory() -> Path:
    """Where files are kept in memory: /dev/shm where there is one, or where temporary files go."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK | os.X_OK) else temporary()


def temporary_for_sockets() -> Path:
    """The same as `temporary`, of places whose names are short enough for the paths of sockets."""
    return _first_usable([place for place in _places() if _holds_sockets(place)])


def _places() -> list[Path]:
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    places = [os.path.abspath(name) for name in named if name] + ["/tmp", "/var/tmp", "/usr/tmp"]
    with contextlib.suppress(OSError):  # it was removed
        places.append(os.getcwd())
    return [Path(place) for place in dict.fromkeys(places)]


def _holds_sockets(place: Path) -> bool:
    try:
        name = str(place).encode()  # ZeroMQ wants UTF-8
    except UnicodeEncodeError:
        return False
    return len(name) <= _LONGEST_FOR_SOCKETS


def _first_usable(places: list[Path]) -> Path:
    """A file is written, as `tempfile` does it: permissions do not tell of a full disk, or of a server's own mind."""
    for place in places:
        probe = place / f"hyperpodrun-probe-{os.urandom(6).hex()}"
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            os.write(fd, b"probe")
            return place
        except OSError:
            continue
        finally:
            os.close(fd)
            os.unlink(probe)
    raise OSError(f"temporary files can be written nowhere: {', '.join(map(str, places))} (TMPDIR)")
