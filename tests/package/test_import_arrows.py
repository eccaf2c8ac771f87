"""Who imports whom in src/, read off its text: no circles, and between folders downwards only (CONTRIBUTING.md).

Every import counts, also one inside a function and one for types only: each of them is something that a reader of the
one file must know of the other.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"

ARROWS = {
    "launcher": {"agent"},
    "agent": {"control", "rendezvous", "rootless"},
    "control": {"protocol"},
    "rendezvous": {"protocol"},
    "rootless": {"protocol"},
    "inprocess": {"protocol"},
    "checkpointless": {"protocol"},
    "dataloader": {"protocol"},
    "standby": {"protocol"},
    "protocol": set(),
    "simulation": {"control"},
    "testing": set(),
    "verify": {"launcher", "testing"},
    "integrations": {"inprocess", "checkpointless", "dataloader"},
}
"""Those of CONTRIBUTING.md, and that of the simulation. Along several arrows is downwards, too: agent to protocol."""


def name_of(path: Path) -> str:
    """`agent.config` of src/agent/config.py; the package itself has an empty name."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in SRC.rglob("*.py")}


def imported(statement: ast.stmt, importer: str) -> set[str]:
    """The files of this package that it names; `importer` is what relative names are relative to."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
        return {name.partition(".")[2] for name in names if name.partition(".")[0] == "hyperpodrun"}
    if not isinstance(statement, ast.ImportFrom):
        return set()
    base = (statement.module or "").split(".") if statement.module else []
    if statement.level:
        package = importer.split(".") if importer else []
        if FILES[importer].name != "__init__.py":
            package.pop()
        base = package[: len(package) - statement.level + 1] + base
    elif base[0] != "hyperpodrun":
        return set()
    else:
        base = base[1:]
    found = {".".join([*base, alias.name]) for alias in statement.names}
    return {name if name in FILES else ".".join(base) for name in found}


def at_import(tree: ast.Module) -> set[ast.stmt]:
    """The statements that run when the file is imported."""
    found: set[ast.stmt] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            found.add(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def edges() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Who imports whom: when it is imported, and ever."""
    first: dict[str, set[str]] = defaultdict(set)
    ever: dict[str, set[str]] = defaultdict(set)
    for name, path in FILES.items():
        tree = ast.parse(path.read_text())
        early = at_import(tree)
        for statement in ast.walk(tree):
            if isinstance(statement, ast.stmt):
                found = imported(statement, name) - {name}
                ever[name] |= found
                if statement in early:
                    first[name] |= found
    return first, ever


AT_IMPORT, EVER = edges()


def circle(graph: dict[str, set[str]]) -> str:
    """One circle in it, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


BY_NAME = {("checkpointless", "testing"), ("launcher", "testing"), ("launcher", "verify")}
"""Imported inside a function only, where somebody asks for it."""


def folder(name: str) -> str:
    return name.partition(".")[0]


def below(upper: str) -> set[str]:
    """All that its files may import, beside each other."""
    return ARROWS[upper].union(*(below(lower) for lower in ARROWS[upper]))


def test_imports_are_read_off_the_text_as_python_reads_them():
    assert "agent.config" in AT_IMPORT["launcher.rendezvous"]
    assert "launcher.command" in EVER["launcher"] - AT_IMPORT["launcher"]
    assert "checkpointless.manager" in EVER[""] - AT_IMPORT[""], "for types only"
    assert "control.job.commands" in AT_IMPORT["control.job.job"], "from . import commands"
    unknown = {(name, other) for name, others in EVER.items() for other in others if other not in FILES}
    assert not unknown


def test_no_circle_of_imports():
    assert not circle(EVER)


ROLES = {f"control.membership.{role}" for role in ("joining", "founding", "follower", "candidate", "leader")}


def test_only_the_node_knows_the_roles():
    """A role returns what it becomes as a value (`becoming.py`)."""
    inside = {name for name in FILES if name.startswith("control.")}
    assert {name for name in inside if EVER[name] & ROLES} == {"control.membership.node"}


def test_nothing_of_the_decisions_is_imported_inside_a_function():
    late = {name: EVER[name] - AT_IMPORT[name] for name in FILES if folder(name) in ("control", "simulation")}
    assert not {name: found for name, found in late.items() if found}


def test_folders_import_downwards_only():
    assert {folder(name) for name in FILES} - {"", "__main__"} == set(ARROWS), "a folder without arrows"
    wrong = [
        f"{name} imports {other}"
        for name in FILES
        for other in EVER[name]
        if folder(name) in ARROWS and folder(other) not in {folder(name), *below(folder(name))}
        if (folder(name), folder(other)) not in BY_NAME or other in AT_IMPORT[name]
    ]
    assert not wrong


def test_contributing_shows_these_arrows():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    chain = re.search(r"`(launcher -> [^`]*)`, and ((?:`\w+`,? (?:and )?)+)each `-> (\w+)`", text)
    assert chain, "CONTRIBUTING.md says in one sentence who may import whom"
    levels = [set(re.findall(r"\w+", level)) for level in chain[1].split("->")]
    shown = {upper: after for level, after in pairwise(levels) for upper in level}
    shown |= {upper: {chain[3]} for upper in re.findall(r"\w+", chain[2]) if upper != "and"}
    assert shown == {
        upper: arrows
        for upper, arrows in ARROWS.items()
        if upper not in ("protocol", "simulation", "testing", "verify", "integrations")
    }
