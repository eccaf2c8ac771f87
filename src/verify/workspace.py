"""Each run's own place: a fresh copy of the working directory, and its own HOME, TMPDIR, log and trace directories.

What one run leaves behind (a checkpoint that the next one would go on from, a cache) must not reach another.
"""

from __future__ import annotations

import os
import shutil
import site
from dataclasses import dataclass
from pathlib import Path

from ..launcher.errors import UsageError

PREFIX = "hyperpodrun-verify-"
"""How the directory of one verification is called, and those that are kept."""
_LARGEST = 2 << 30
"""What is copied for every run; more than that is hardly a script."""


@dataclass(frozen=True)
class Workspace:
    """The place of one run."""

    root: Path

    @property
    def directory(self) -> Path:
        return self.root / "work"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    @property
    def output(self) -> Path:
        """What the launcher says."""
        return self.root / "launcher.log"

    def environment(self) -> dict[str, str]:
        """What the run's launcher gets instead of this process's."""
        changed = {"HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp")}
        user_base = site.getuserbase()  # packages that are installed for this user lie in the real home
        return {"PYTHONUSERBASE": user_base, **os.environ, **changed}


def make(root: Path, source: Path, shared: tuple[Path, ...]) -> Workspace:
    """Copies `source`. What is in `shared` is linked to instead."""
    workspace = Workspace(root)
    for directory in ("home", "tmp", "logs", "trace"):
        (root / directory).mkdir(parents=True)
    _copy(source, workspace.directory, source, shared)
    return workspace


def measure(source: Path, shared: tuple[Path, ...]) -> tuple[int, int]:
    """Files and bytes that a copy takes. Raises UsageError where that is too much."""
    files = size = 0
    for path, directories, names in os.walk(source):
        directories[:] = [name for name in directories if not _is_left_out(Path(path, name), shared)]
        for name in names:
            files += 1
            size += Path(path, name).lstat().st_size
            if size > _LARGEST:
                raise UsageError(
                    f"verify copies the working directory for every run, and {source} holds more than "
                    f"{_LARGEST >> 30} GiB: start it beside the script, or name what the script only reads with --share"
                )
    return files, size


def _copy(source: Path, target: Path, top: Path, shared: tuple[Path, ...]) -> None:
    target.mkdir()
    for entry in os.scandir(source):
        path, copied = Path(entry.path), target / entry.name
        if path in shared:
            copied.symlink_to(path)
        elif entry.is_symlink():
            _copy_link(path, copied, top)
        elif entry.is_dir():
            if not _is_left_out(path, shared):
                _copy(path, copied, top, shared)
        elif entry.is_file():
            shutil.copy2(path, copied)


def _copy_link(path: Path, copied: Path, top: Path) -> None:
    """A link into the directory leads into the copy; one that leads out of it still leads where it did."""
    target = Path(os.readlink(path))
    inside = not target.is_absolute() and Path(os.path.normpath(path.parent / target)).is_relative_to(top)
    copied.symlink_to(target if inside else path.parent / target)


def _is_left_out(path: Path, shared: tuple[Path, ...]) -> bool:
    """Directories of tools (`.git`, `.venv`), what is only read, and the copies, where TMPDIR is in what is copied."""
    return path.name.startswith((".", PREFIX)) or path.name == "__pycache__" or path in shared
