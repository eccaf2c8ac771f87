"""`@HPWrapper(...)`: makes a function one that survives faults without its process ending.

Under `hyperpodrun --inprocess-restart` the function is entered on every rank together and re-entered after a fault on
any rank, in the same processes. Anywhere else it runs once, as if it were not wrapped.
The names of the arguments are HyperPod's, so that its scripts run unchanged; every default works.
"""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from .aborts.abort import Abort
from .aborts.groups import default_abort
from .call import HPCallWrapper
from .connection import AgentConnection, HPAgentK8sAPIFactory
from .finalize import Finalize
from .health import CudaHealthCheck, HealthCheck
from .loop import _UNBOUNDED_ABORT_S, Hooks, ReentryLoop
from .monitor import AbortPolicy
from .session import current_session, has_session

P = ParamSpec("P")
R = TypeVar("R")

_warned = False


class HPWrapper:
    """Decorator for the re-executable code block (RCB), the function that is entered anew after a fault.

    Args:
        health_check: asked after every fault whether this process may go on; an error replaces the process. Default
            `CudaHealthCheck()`, which costs nothing where CUDA is not in use.
        hp_api_factory: makes the connection to the agent.
        abort_timeout: seconds in which the communicators must be broken and user code left; a process that takes
            longer is replaced. None: only the launcher's --inprocess-timeout counts.
        abort: breaks what the main thread can be stuck in; default NCCL, gloo and DataLoader workers.
        finalize: called after user code is left and the communicators are gone.
        checkpoint_manager: its `on_restart(caller)`, if it has one, is called before `finalize`.
        enabled: False returns the function unchanged.
        trace_file_path: a file to which one JSON line with the times of every restart of this process is appended.
        async_raise_before_abort: interrupt the main thread before the communicators are broken, too, so that it begins
            nothing new on them; False: only afterwards.
        early_abort_communicator: do not wait for a critical section before breaking communicators.
        check_memory_status: log this process's memory after every restart.
    """

    def __init__(
        self,
        *unnamed: object,
        health_check: HealthCheck | None = None,
        hp_api_factory: Callable[[], AgentConnection | None] | None = None,
        abort_timeout: float | None = None,
        abort: Abort | None = None,
        finalize: Finalize | None = None,
        checkpoint_manager: Any = None,
        enabled: bool = True,
        trace_file_path: str | None = None,
        async_raise_before_abort: bool = True,
        early_abort_communicator: bool = False,
        check_memory_status: bool = False,
    ) -> None:
        if unnamed:
            raise TypeError("HPWrapper takes its arguments by name; without any the decorator is written @HPWrapper()")
        if abort_timeout is not None and abort_timeout <= 0:
            raise ValueError(f"HPWrapper: abort_timeout must be positive or None, not {abort_timeout}")
        self._enabled = enabled
        self._factory = hp_api_factory or HPAgentK8sAPIFactory()
        self._abort_timeout = abort_timeout
        self._hooks = Hooks(
            policy=AbortPolicy(
                abort=abort or default_abort(),
                timeout=_UNBOUNDED_ABORT_S if abort_timeout is None else float(abort_timeout),
                raise_first=async_raise_before_abort,
                wait_for_section=not early_abort_communicator,
            ),
            finalize=finalize,
            health_check=health_check or CudaHealthCheck(),
            checkpoint_manager=checkpoint_manager,
            trace_file_path=trace_file_path,
            check_memory_status=check_memory_status,
        )

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if not self._enabled:
            return function
        _refuse_what_runs_later(function)
        parameter = _caller_parameter(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            def run(caller: HPCallWrapper) -> R:
                positional, named = _inject(function, parameter, caller, args, kwargs)
                return function(*positional, **named)

            connection = None if has_session() else self._factory()
            if connection is None and not has_session():
                _warn_once()
                return run(HPCallWrapper())
            session = current_session(connection, self._abort_timeout)
            if session.inside:  # a wrapped function that calls another: the outer one is the block to re-enter
                return run(HPCallWrapper(session, session.epoch))
            noted = getattr(self._hooks.checkpoint_manager, "wraps", None)
            if noted is not None:
                noted(function, args, kwargs)
            value: R = ReentryLoop(session, self._hooks).run(run)
            return value

        return wrapped


def _caller_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter annotated with HPCallWrapper, Optional or not, or else one called `caller` that has neither an
    annotation nor a default other than None; None when there is none."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that cannot be resolved (a name only imported for type checking), or no function
        hints = dict(getattr(function, "__annotations__", {}))
    found = _annotated(hints)
    if found is not None:
        return found
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return None
    found = _annotated({name: parameter.annotation for name, parameter in parameters.items()})  # of a partial, a class
    if found is not None:
        return found
    caller = parameters.get("caller")
    if caller is None or caller.kind not in (caller.POSITIONAL_OR_KEYWORD, caller.KEYWORD_ONLY):
        return None
    bare = caller.annotation is caller.empty and caller.default in (None, caller.empty)
    return "caller" if bare else None


def _annotated(hints: dict[str, Any]) -> str | None:
    for name, hint in hints.items():
        if name == "return":
            continue
        if hint is HPCallWrapper or HPCallWrapper in typing.get_args(hint):
            return name
        if isinstance(hint, str) and "HPCallWrapper" in hint:
            return name
    return None


def _refuse_what_runs_later(function: Callable[..., Any]) -> None:
    """A call of such a function returns before its first line has run, and no fault would be seen."""
    kinds = {
        "a coroutine function": inspect.iscoroutinefunction,
        "a generator function": inspect.isgeneratorfunction,
        "an asynchronous generator function": inspect.isasyncgenfunction,
    }
    for kind, holds in kinds.items():
        if holds(function):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"HPWrapper: {name} is {kind}, whose lines run after the wrapper has been left: wrap an ordinary "
                "function that runs it to its end"
            )


def _inject(
    function: Callable[..., Any],
    parameter: str | None,
    caller: HPCallWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if parameter is None:
        return args, kwargs
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    if bound.arguments.get(parameter) is not None:
        return args, kwargs
    bound.arguments[parameter] = caller  # also in place of a None that was given by position
    return bound.args, bound.kwargs


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "HPWrapper: not started by `hyperpodrun --inprocess-restart`, so the function runs once and a fault ends "
            "the process",
            stacklevel=4,
        )
