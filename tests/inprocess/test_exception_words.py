"""What is said of an exception, whatever its text."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hyperpodrun.inprocess import loop
from hyperpodrun.inprocess.faults import describe, format_traceback, is_consequence, parts_of, reason_of_exit
from hyperpodrun.protocol import messages


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(7)


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__qualname__", "__module__"):
            raise RuntimeError
        return type.__getattribute__(cls, name)


class Odd(Exception, metaclass=Nameless):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError

    __cause__ = __context__ = exceptions = __traceback__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError


CUDA = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported at some other call\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(CUDA), "RuntimeError: CUDA error: device-side assert triggered"),
        (RuntimeError("\n\n  late\nmore"), "RuntimeError: late"),
        (RuntimeError("x\x1b]0;owned\x07\r\u202eend"), r"RuntimeError: x\x1b]0;owned\x07"),
        (OSError("caf\udce9"), r"OSError: caf\udce9"),
        (KeyError("name"), "KeyError: 'name'"),
        (ValueError(), "ValueError"),
        (Mute(), f"{__name__}.Mute: <its text cannot be had: ValueError>"),
        (Leaving(), f"{__name__}.Leaving: <its text cannot be had: SystemExit>"),
        (Odd("m"), f"{__name__}.Odd: m"),
        (SyntaxError("bad", ("f.py", 1, 2, "text")), "SyntaxError: bad (f.py, line 1)"),
    ],
)
def test_type_and_first_line_on_one_line_that_can_be_shown(error, said):
    assert describe(error) == said
    shown = format_traceback(error)
    assert shown.encode()
    assert "\x1b" not in shown


def step_failed() -> Exception:
    try:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    except RuntimeError:
        try:
            raise ValueError("step failed")
        except ValueError as error:
            return error


def test_an_error_raised_on_account_of_a_broken_connection_is_a_consequence_too():
    assert is_consequence(step_failed())
    assert not is_consequence(ValueError("step failed"))
    assert not is_consequence(Mute())


@pytest.mark.parametrize("reason", [ValueError("x"), Odd("x")])
def test_the_reason_of_an_exit_may_be_its_code(reason: Exception):
    try:
        sys.exit(reason)  # type: ignore[arg-type]
    except SystemExit as exit_:
        assert reason_of_exit(exit_) is reason
    assert reason_of_exit(SystemExit("text")) is None


@pytest.mark.parametrize("value", [None, 3, "ab", {"a": ValueError()}, [ValueError(), "b"]])
def test_an_attribute_called_exceptions_is_not_always_a_groups(value: object):
    error = RuntimeError()
    error.exceptions = value  # type: ignore[attr-defined]
    assert len(parts_of(error)) == isinstance(value, list)
    loop._forget_frames(error)
    loop._forget_frames(Odd())


def test_an_exception_whose_text_never_comes_is_told_without_it(monkeypatch):
    monkeypatch.setattr(loop, "_LATEST_TEXT_S", 0.05)
    told = threading.Event()
    sent: list[messages.Fault] = []

    class Endless(Exception):
        def __str__(self) -> str:
            return "late" if told.wait(60) else "never told"

    def send(message: messages.Fault) -> None:
        sent.append(message)
        told.set()

    monitor = SimpleNamespace(send=send, faulted=lambda epoch: told.is_set())
    session: Any = SimpleNamespace(epoch=3, calls=0, monitor=monitor)
    loop.ReentryLoop(session, None)._report(Endless(), 5)  # type: ignore[arg-type]
    assert len(sent) == 1
    assert "Endless, whose text takes longer than" in str(sent[0])
