"""Does a script import torch? Found by reading its text, never by importing anything.

Follows imports from file to file as far as a small budget goes: first the modules beside the script, then installed
packages, never the standard library. Nothing here decides whether a script works, only whether it waits for torch to be
imported once for all ranks, so a wrong answer costs time and nothing else. Files that are read anyway are also searched
for what must not happen in a forked worker (`settings.py`).
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..reading import read_regular
from .settings import READ_LATER, change_in, change_in_package

BRINGS_TORCH = frozenset({
    "accelerate", "apex", "datasets", "deepspeed", "diffusers", "fairscale", "fairseq", "hyperpodrun", "lightning",
    "megatron", "monai", "nemo", "peft", "pytorch_lightning", "sentence_transformers", "timm", "torch", "torchao",
    "torchaudio", "torchdata", "torchtext", "torchtitan", "torchtune", "torchvision", "transformer_engine",
    "transformers", "trl",
})  # fmt: skip
_BUDGET_FILES = 100
_OWN_BUDGET_S = 0.05
"""For the script's own files; of processor time: on a busy machine the answer must be the same."""
_INSTALLED_BUDGET_S = 0.01
"""For installed packages: a script without torch starts so much later, and its own imports take many times as long."""
_LARGEST = 1 << 20
_IMPORT = re.compile(
    r"^[ \t]*(?:import[ \t]+(?P<names>[\w., \t]+)|"
    r"from[ \t]+(?P<origin>\.*[\w.]*)[ \t]+import[ \t]+\(?(?P<items>[\w., \t]*))",
    re.MULTILINE,
)
_IMPORTS_BY_NAME = re.compile(r"(?:import_module|__import__|run_module)\(\s*['\"](?P<name>\w[\w.]*)['\"]")
_RUNS = re.compile(r"['\"](?P<file>[\w./-]+\.py)['\"]")
"""Perhaps to be executed: only what it changes counts then."""
_USES_DYNAMO = re.compile(r"\boptim|DistributedDataParallel|\bDDP\b|FSDP|FullySharded|fully_shard|torch\.compile")
_COMPILES = re.compile(r"\btorch\.compile\b")


class Imports(enum.Enum):
    """What was found."""

    NOTHING = "no torch"
    UNKNOWN = "not found, but not everything was read"
    TORCH = "torch"
    ALL = "torch, and what brings torch._dynamo with it"
    COMPILER = "all that, and torch.compile"


@dataclass(frozen=True)
class PythonCommand:
    """`python -u script ...` or `python -u -m module ...`."""

    target: str
    module: bool

    @staticmethod
    def parse(command: tuple[str, ...]) -> PythonCommand | None:
        """None: something else than this interpreter, or with other flags than the launcher's."""
        if command[:2] != (sys.executable, "-u") or len(command) < 3:
            return None
        if command[2] != "-m":
            return PythonCommand(command[2], module=False)
        return PythonCommand(command[3], module=True) if len(command) > 3 else None


def torch_is_installed() -> bool:
    """In the interpreter of the agent, which is that of the workers."""
    return importlib.util.find_spec("torch") is not None  # a name without a dot: nothing is imported


def scan(command: PythonCommand) -> Imports:
    """What the script will import, as far as its text tells."""
    return examine(command, READ_LATER)[0]


def examine(command: PythonCommand, harmless: tuple[str, ...]) -> tuple[Imports, str | None]:
    """The same, and where it changes what libraries read at import, if it does (`settings.py`)."""
    directory = os.getcwd() if command.module else os.path.dirname(os.path.realpath(command.target))
    search = [directory, *sys.path]
    if command.module:
        start = [*_files(command.target, search), *_files(f"{command.target}.__main__", search)]
    elif os.path.isdir(command.target):
        start = [Path(command.target) / "__main__.py"]
    else:
        start = [Path(command.target)]
    found = _Scan(search, harmless)
    return found.run(start), found.change


def source_of(module: str) -> str | None:
    """The file that `python -m module` runs, if it can be found."""
    search = [os.getcwd(), *sys.path]
    for name in (f"{module}.__main__", module):
        files = _files(name, search)
        if len(files) >= name.count(".") + 1 and files[-1].stem in (name.rpartition(".")[2], "__init__"):
            return str(files[-1])
    return None


class _Scan:
    def __init__(self, search: list[str], harmless: tuple[str, ...]) -> None:
        self.change: str | None = None
        self._search = search
        self._harmless = harmless
        self._found = Imports.NOTHING
        self._seen: set[Path] = set()
        self._names: set[str] = set()

    def run(self, start: list[Path]) -> Imports:
        began = time.thread_time()
        own, installed = list(start), list[Path]()
        while (own or installed) and self.change is None:
            if not own and self._found in (Imports.ALL, Imports.COMPILER):
                self._look_at_packages(installed, began)
                break
            path, budget = (own.pop(0), _OWN_BUDGET_S) if own else (installed.pop(0), _INSTALLED_BUDGET_S)
            if path in self._seen:
                continue
            if len(self._seen) >= _BUDGET_FILES or time.thread_time() - began > budget:
                return Imports.UNKNOWN if self._found is Imports.NOTHING else self._found
            self._seen.add(path)
            for file in self._read(path):
                (own if self._is_own(file) else installed).append(file)
        return self._found

    def _at_least(self, found: Imports) -> None:
        order = list(Imports)
        self._found = max(self._found, found, key=order.index)

    def _is_own(self, file: Path) -> bool:
        """Not a package that was installed."""
        return not {"site-packages", "dist-packages"} & set(file.parts)

    def _read(self, path: Path) -> list[Path]:
        """The files of the modules that this one imports, or runs, and that are worth reading."""
        content = read_regular(path, _LARGEST)
        if content is None:
            return []
        text = content.decode(errors="replace")
        self._note_change(path, text)
        files: list[Path] = []
        for name in self._imported(text, path):
            top = name.partition(".")[0]
            if top == "torch":
                uses = _USES_DYNAMO.search(text) is not None
                self._at_least(Imports.COMPILER if _COMPILES.search(text) else Imports.ALL if uses else Imports.TORCH)
            elif top == "hyperpodrun":
                self._at_least(Imports.TORCH)
            elif top in BRINGS_TORCH:
                self._at_least(Imports.ALL)
            elif top not in sys.stdlib_module_names and name not in self._names:
                self._names.add(name)
                files += _files(name, self._search)
        if self._is_own(path):
            for match in _RUNS.finditer(text):
                files += [file for file in (path.parent / match["file"], Path(match["file"])) if file.is_file()]
        return files

    def _note_change(self, path: Path, text: str) -> None:
        found = change_in(text, self._harmless) if self._is_own(path) else change_in_package(text)
        if found is not None and self.change is None:
            self.change = f"{path}, {found}"

    def _look_at_packages(self, files: list[Path], began: float) -> None:
        """What the script's own files import directly: some packages set what others read."""
        for path in files:
            if time.thread_time() - began > _OWN_BUDGET_S or self.change is not None:
                return
            content = read_regular(path, _LARGEST)
            if content is not None:
                self._note_change(path, content.decode(errors="replace"))

    def _imported(self, text: str, path: Path) -> Iterator[str]:
        for match in _IMPORTS_BY_NAME.finditer(text):
            yield match["name"]
        for match in _IMPORT.finditer(text):
            if match["names"] is not None:
                for name in match["names"].split(","):
                    if name.strip():
                        yield name.split()[0]
                continue
            origin = match["origin"]
            if origin.startswith("."):
                continue_from = path.parent
                for _ in range(len(origin) - len(origin.lstrip(".")) - 1):
                    continue_from = continue_from.parent
                origin = self._dotted(continue_from, origin.lstrip("."))
                if origin is None:
                    continue
            yield origin
            for item in match["items"].split(","):
                if item.strip():
                    yield f"{origin}.{item.split()[0]}"

    def _dotted(self, directory: Path, name: str) -> str | None:
        """The full name of a relatively imported module, from the directory that it is in."""
        for entry in self._search:
            try:
                parts = directory.relative_to(entry).parts
            except ValueError:
                continue
            if parts:
                return ".".join([*parts, *([name] if name else [])])
        return None


def _files(name: str, search: list[str]) -> list[Path]:
    """The source files that an import of `name` runs."""
    files: list[Path] = []
    path = search
    for depth, part in enumerate(name.split(".")):
        try:
            # By its last name only: for a dotted one a namespace package asks for its parent, which is not imported.
            spec = importlib.machinery.PathFinder.find_spec(part, path)
            if spec is None and depth == 0:
                spec = importlib.util.find_spec(part)  # editable installations have finders of their own
            if spec is None:
                return files
            if spec.origin and spec.origin.endswith(".py"):
                files.append(Path(spec.origin))
            path = list(spec.submodule_search_locations or ())
        except Exception:  # finders are other people's code; what cannot be found here is not followed
            return files
        if not path:
            return files
    return files
