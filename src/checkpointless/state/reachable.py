"""What a function can reach: by name, the objects that hold state, a few levels deep. Nothing is called on the way.

Breadth first, so that an object is known by its shortest path, and limited in depth and number: O(objects), once per
look. Modules, optimizers and generators are ends; torch's, other libraries' objects are not looked into.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .versions import kind_of

_DEEPEST = 3
"""Attribute, item or closure: a variable is at 0."""
_MOST = 5000
_MOST_ITEMS = 200
_FOREIGN = frozenset({
    "torch", "numpy", "accelerate", "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "builtins",
    __name__.partition(".")[0], *sys.stdlib_module_names,
})  # fmt: skip
"""Packages whose objects are their own affair."""
_TRANSPARENT = (types.SimpleNamespace,)


@dataclass(frozen=True)
class Reached:
    """An object that holds state, and how it is called."""

    path: str
    kind: str
    _target: Any

    @property
    def target(self) -> Any:
        """None when it is gone."""
        return self._target() if isinstance(self._target, weakref.ref) else self._target

    def weak(self) -> Reached:
        try:
            return Reached(self.path, self.kind, weakref.ref(self._target))
        except TypeError:  # a generator of torch's: small
            return self


def reach_from(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: types.FrameType | None
) -> Iterator[Reached]:
    """What `function(*args, **kwargs)` can reach; `frame`: where it has got to by now."""
    todo = deque((name, value, 0) for name, value in _roots(function, args, kwargs, frame))
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        path, value, depth = todo.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = kind_of(value)
        if kind is not None:
            yield Reached(path, kind, value)
        elif depth < _DEEPEST:
            todo.extend((name, item, depth + 1) for name, item in _inside(path, value))


def _roots(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: types.FrameType | None
) -> Iterator[tuple[str, Any]]:
    inner = inspect.unwrap(function)
    try:
        yield from inspect.signature(inner).bind_partial(*args, **kwargs).arguments.items()
    except (TypeError, ValueError):
        yield from kwargs.items()
    yield from _of_function("", inner)
    code = getattr(inner, "__code__", None)
    frames = []
    while frame is not None and frame.f_code is not code:
        if not _is_foreign(frame.f_globals.get("__name__")):
            frames.append(frame)
        frame = frame.f_back
    if frame is None:
        return  # called from somewhere else
    for one in (frame, *reversed(frames)):
        yield from _locals(one)
        yield from _globals_of(one.f_code, one.f_globals)


def _locals(frame: types.FrameType) -> Iterator[tuple[str, Any]]:
    found = frame.f_locals
    copied = list(found.items())
    if isinstance(found, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.getrefcount(found) <= 3:
        found.clear()  # before Python 3.13 the frame keeps this copy, and with it all that is local now
    return iter(copied)


def _of_function(path: str, function: Any) -> Iterator[tuple[str, Any]]:
    """Its closure, the globals it names, and what it is bound to."""
    prefix = f"{path}." if path else ""
    if isinstance(function, functools.partial):
        yield from ((f"{prefix}{name}", value) for name, value in function.keywords.items())
        yield from ((f"{path or 'partial'}.args[{number}]", value) for number, value in enumerate(function.args))
        yield from _of_function(path, function.func)
        return
    if inspect.ismethod(function):
        yield "self", function.__self__
        function = function.__func__
    if not inspect.isfunction(function):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from _globals_of(function.__code__, function.__globals__)


def _globals_of(code: types.CodeType, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, names[name]) for name in code.co_names if name in names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant, names)


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        items = list(dict.items(value))[:_MOST_ITEMS]
        yield from ((f"{path}[{key!r}]", item) for key, item in items if isinstance(key, str | int))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", None)
        for number, item in enumerate(value[:_MOST_ITEMS]):
            yield f"{path}.{names[number]}" if names else f"{path}[{number}]", item
    elif isinstance(value, functools.partial) or inspect.isfunction(value) or inspect.ismethod(value):
        if not _is_foreign(getattr(value, "__module__", None)):
            yield from _of_function(path, value)
    elif _is_plain(value):
        yield from ((f"{path}.{name}", item) for name, item in list(vars(value).items())[:_MOST_ITEMS])


def _is_plain(value: Any) -> bool:
    """Somebody's own object, not a library's."""
    if isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, _TRANSPARENT) or not _is_foreign(type(value).__module__)


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN
