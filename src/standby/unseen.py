"""What a worker's script changes before it imports torch, in a process that has imported it long ago.

Most such scripts are recognised by their text and started cold (`agent/workers/settings.py`). For the others torch and
numpy are hidden from `sys.modules` until the script imports them. If by then something is different that they have
read when they were imported, a new process would compute something else than this one: the import fails, and says why.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_HIDDEN = ("torch", "numpy")
_READ_BY_C = (
    "ATEN_", "BLIS_", "GOMP_", "GOTO_", "KINETO_", "KMP_", "MKL_", "NPY_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH",
)  # fmt: skip
"""Beginnings of the names that C libraries read, which nobody sees."""
_READ_LATER = ("KINETO_USE_DAEMON", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHELASTIC_", "TORCH_NCCL_")
_OF_THE_SYSTEM = frozenset({
    "CI", "CXX", "HOME", "LANG", "LNAME", "LOGNAME", "PATH", "PWD", "SHELL", "TEMP", "TERM", "TMP", "TMPDIR", "USER",
    "USERNAME",
})  # fmt: skip
"""Read, but for paths and names only."""
_REMEDY = "start with --start-method=spawn, or make the setting where hyperpodrun is started"


@contextmanager
def noting_reads(names: set[str]) -> Iterator[None]:
    """Adds the names of environment variables that Python code reads meanwhile."""
    kind: Any = type(os.environ)
    read = kind.__getitem__

    def noted(self: Any, name: str) -> Any:
        if sys._getframe(1).f_code.co_name != "__iter__":  # somebody who looks through all of them
            names.add(name)
        return read(self, name)

    kind.__getitem__ = noted
    try:
        yield
    finally:
        kind.__getitem__ = read


def hide(names: set[str], more: Sequence[str]) -> None:
    """In a worker, before its script. `names`: what was read while importing; `more`: packages that bring torch."""
    for top in (*_HIDDEN, *more):
        if top in sys.modules:
            sys.meta_path.insert(0, _Hidden(top, _taken(top)))
    _Hidden.before = dict(os.environ)
    _Hidden.before_in_c = _environment_in_c()
    _Hidden.names = frozenset(names - _OF_THE_SYSTEM)
    _Hidden.processors = os.sched_getaffinity(0)


def _environment_in_c() -> dict[str, str]:
    """What C libraries read: `os.putenv` and `setenv` change only that."""
    start = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found: dict[str, str] = {}
    entry = 0
    while start and (text := start[entry]) is not None:
        name, _, value = os.fsdecode(text).partition("=")
        found.setdefault(name, value)
        entry += 1
    return found


def _taken(top: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == top or name.startswith(f"{top}.")]
    return {name: sys.modules.pop(name) for name in names if not name.startswith(__package__)}


class _Hidden:
    """One package: finder and loader of what is in memory already."""

    before: dict[str, str]
    before_in_c: dict[str, str]
    names: frozenset[str]
    processors: set[int]

    def __init__(self, top: str, modules: dict[str, ModuleType]) -> None:
        self._top = top
        self._modules = modules
        self._spec = modules[top].__spec__

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Looking for it is not importing it."""
        if name != self._top:
            return None
        module = self._modules[name]
        spec = importlib.machinery.ModuleSpec(name, self, origin=module.__file__)  # type: ignore[arg-type]
        spec.has_location = True
        spec.submodule_search_locations = list(module.__path__)
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        changed = self._changed()
        if changed:
            raise RuntimeError(
                f"hyperpodrun: {changed} before `import {self._top}`, and this process, forked from a standby, has "
                f"imported it before that: {_REMEDY}"
            )
        others = [finder for finder in sys.meta_path if isinstance(finder, _Hidden)]
        for finder in [self] if self._top == "numpy" else others:
            sys.meta_path.remove(finder)
            sys.modules.update(finder._modules)
        return self._modules[self._top]

    def exec_module(self, module: ModuleType) -> None:
        """That was long ago."""
        module.__spec__ = self._spec

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a loader."""
        return getattr(self._modules[self._top].__loader__, name)

    def _changed(self) -> str:
        after = dict(os.environ)
        for before, now in ((self.before, after), (self.before_in_c, _environment_in_c())):
            for name in sorted({*before, *now}):
                is_read = name in self.names or name.startswith(_READ_BY_C)
                if is_read and not name.startswith(_READ_LATER) and before.get(name) != now.get(name):
                    return f"{name} was changed"
        if "OMP_NUM_THREADS" not in after and os.sched_getaffinity(0) != self.processors:
            return "the set of processors it may use was changed"
        return self._elsewhere()

    def _elsewhere(self) -> str:
        """Another copy of it, where the script now looks first."""
        spec = importlib.machinery.PathFinder.find_spec(self._top)
        origin = self._modules[self._top].__file__
        if spec is None or spec.origin is None or origin is None:
            return ""
        same = os.path.realpath(spec.origin) == os.path.realpath(origin)
        return "" if same else f"sys.path came to lead to {spec.origin}"
