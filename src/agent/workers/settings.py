"""Does a script change what libraries read when they are imported? Found in its text, never by running it.

In a worker that is forked from a process that has imported torch, such a change comes too late; and what a script has
run cannot be run again in another process. So a script whose text changes the environment is started cold, unless the
name is known to be read later. What is not understood counts as a change: a wrong answer costs the import's time.
Changes that the text does not show are noticed in the worker (`standby/unseen.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

OF_THE_JOB = ("GROUP_", "LOCAL_", "MASTER_", "NODE_RANK", "RANK", "ROLE_", "WORLD_SIZE")
READ_LATER = (
    *OF_THE_JOB,
    "ACCELERATE_", "AWS_", "CLEARML_", "COMET_", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "DATASETS_", "DS_",
    "GLOO_", "HF_", "HUGGING", "HYDRA_", "MLFLOW_", "NCCL_", "NEPTUNE_", "PYTHONHASHSEED",
    "PYTORCH_NVML_BASED_CUDA_CHECK", "RAY_", "S3_", "SLURM_", "TF_", "TOKENIZERS_", "TORCH_NCCL_",
    "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
"""Beginnings of the names that nothing reads while torch is imported."""
_SURELY_READ = ("ATEN_", "GOMP_", "KINETO_", "MKL_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH", "TRITON_")
_IN_PACKAGES = re.compile(
    r"environ(?:\[|\.setdefault\()\s*['\"](?P<name>(?:{})\w*)['\"](?:\]\s*=[^=]|\s*,)".format("|".join(_SURELY_READ))
)
_WORTH_PARSING = re.compile(
    r"environ|putenv|unsetenv|setenv|dotenv|sched_setaffinity|cpu_affinity|setdlopenflags|RTLD_GLOBAL|sys\.modules|"
    r"meta_path|path_hooks|install_import_hook|setLoggerClass"
)
_READING = frozenset({"copy", "get", "items", "keys", "values", "__contains__", "__getitem__"})
_HARMLESS_CALLS = frozenset({
    "bool", "copy", "deepcopy", "dict", "iter", "len", "list", "print", "repr", "set", "sorted", "str", "tuple",
})  # fmt: skip
_BY_NAME = ("attrgetter", "getattr", "setattr")
_OTHERS = {
    "sched_setaffinity": "the processors it may use",
    "cpu_affinity": "the processors it may use",
    "setdlopenflags": "how libraries are loaded",
    "RTLD_GLOBAL": "how libraries are loaded",
    "meta_path": "how modules are imported",
    "path_hooks": "how modules are imported",
    "install_import_hook": "how modules are imported",
    "setLoggerClass": "the class of loggers",
}
_LISTS = ("meta_path", "path_hooks")
_UNKNOWN = "the environment"
_LONGEST = 200_000
"""A longer one, which would take long to be understood, counts as a change."""


def change_in(text: str, harmless: tuple[str, ...]) -> str | None:
    """`line N changes NAME` for the first change that may matter. `harmless`: beginnings of names that do not."""
    if _WORTH_PARSING.search(text) is None:
        return None
    if len(text) > _LONGEST:
        return f"a file of {len(text)} characters perhaps changes {_UNKNOWN}"
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # it will not run either
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    changes = [
        (node.lineno, what)
        for node in ast.walk(tree)
        if isinstance(node, ast.expr | ast.ImportFrom | ast.Import)
        for what in _changes(node, parents)
        if not what.startswith(harmless)
    ]
    return "line {} changes {}".format(*min(changes)) if changes else None


def change_in_package(text: str) -> str | None:
    """The same for a file of others: only what is plainly written, and surely read."""
    match = _IN_PACKAGES.search(text)
    if match is None or match["name"].startswith(READ_LATER):
        return None
    return f"line {text.count(chr(10), 0, match.start()) + 1} changes {match['name']}"


def _changes(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[str]:
    """Names that may be changed where `node` stands; `_UNKNOWN` for any."""
    name = _last_name(node)
    if name in ("environ", "environb"):
        yield from _of_environ(node, parents)
    elif name in ("putenv", "unsetenv", "setenv"):
        call = parents.get(node)
        yield _key(call.args[0]) if isinstance(call, ast.Call) and call.func is node and call.args else _UNKNOWN
    elif name in _OTHERS:
        parent = parents.get(node)
        if name in _LISTS and _is_only_read(node, parent):
            return
        if name != "cpu_affinity" or (isinstance(parent, ast.Call) and parent.args):
            yield _OTHERS[name]
    elif name == "modules" and isinstance(node, ast.Attribute) and _last_name(node.value) == "sys":
        if _is_changed(node, parents.get(node)):
            yield "sys.modules"
    elif isinstance(node, ast.Constant) and node.value == "sys.modules":
        yield "sys.modules"
    elif isinstance(node, ast.Constant) and node.value in ("environ", "environb"):
        call = parents.get(node)
        if isinstance(call, ast.Subscript) or (isinstance(call, ast.Call) and _last_name(call.func) in _BY_NAME):
            yield _UNKNOWN
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            if "dotenv" in f"{getattr(node, 'module', '')}.{alias.name}":
                yield f"{_UNKNOWN} (dotenv)"
            elif alias.name in ("environ", "environb", "putenv", "unsetenv") and alias.asname is not None:
                yield _UNKNOWN


def _last_name(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _key(node: ast.AST) -> str:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else value.decode(errors="replace") if isinstance(value, bytes) else _UNKNOWN


def _is_changed(node: ast.AST, parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.Subscript):
        return parent.value is node and not isinstance(parent.ctx, ast.Load)
    return isinstance(parent, ast.Attribute) and parent.attr in ("clear", "pop", "setdefault", "update")


def _is_only_read(node: ast.AST, parent: ast.AST | None) -> bool:
    match parent:
        case ast.comprehension(iter=read) | ast.For(iter=read):
            return read is node
        case ast.Subscript(value=read, ctx=ast.Load()):
            return read is node
        case ast.Call(func=func):
            return func is not node and _last_name(func) in _HARMLESS_CALLS
    return isinstance(parent, ast.Compare | ast.FormattedValue)


def _of_environ(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[str]:
    parent = parents.get(node)
    match parent:
        case ast.Subscript(value=value) if value is node:
            if not isinstance(parent.ctx, ast.Load):
                yield _key(parent.slice)
        case ast.Attribute():
            yield from _of_method(parent, parents.get(parent))
        case ast.AugAssign(target=target) if target is node:
            yield from _keys_of(parent.value)
        case ast.Compare(ops=ops) if all(isinstance(op, ast.In | ast.NotIn) for op in ops):
            return
        case ast.Call(func=func) if func is not node and _last_name(func) in _HARMLESS_CALLS:
            return
        case ast.keyword(arg="env") | ast.FormattedValue() | ast.Dict() | ast.comprehension() | ast.For() | ast.Expr():
            return
        case _:
            yield _UNKNOWN


def _of_method(method: ast.Attribute, call: ast.AST | None) -> Iterator[str]:
    if method.attr in _READING:
        return
    if not isinstance(call, ast.Call) or call.func is not method:
        yield _UNKNOWN
    elif method.attr in ("setdefault", "pop", "__setitem__", "__delitem__") and call.args:
        yield _key(call.args[0])
    elif method.attr == "update":
        for argument in call.args:
            yield from _keys_of(argument)
        for keyword in call.keywords:
            if keyword.arg is None:
                yield from _keys_of(keyword.value)
            else:
                yield keyword.arg
    else:
        yield _UNKNOWN


def _keys_of(mapping: ast.AST) -> Iterator[str]:
    if isinstance(mapping, ast.Dict):
        for key in mapping.keys:
            yield _UNKNOWN if key is None else _key(key)
    elif isinstance(mapping, ast.Call) and _last_name(mapping.func) == "dict" and not mapping.args:
        for keyword in mapping.keywords:
            yield keyword.arg or _UNKNOWN
    else:
        yield _UNKNOWN
