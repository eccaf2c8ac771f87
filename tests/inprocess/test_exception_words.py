"""What is said of an exception, whatever its text."""

from __future__ import annotations

import pytest
from hyperpodrun.inprocess.faults import describe, format_traceback, is_consequence


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


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
