"""What a worker is told is its own business, and fits into a message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
from hyperpodrun.agent.node.local import LocalNode
from hyperpodrun.agent.node.own_listeners import of_this_node
from hyperpodrun.agent.output.tracebacks import Tracebacks
from hyperpodrun.control.job import causes
from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.protocol import messages, text

LONG = "Traceback (most recent call last):\n" + "  frame\n" * 5000 + "ValueError: boom\n"


def test_a_traceback_is_whole_where_it_happened_and_short_elsewhere() -> None:
    here, elsewhere = Tracebacks(), Tracebacks()
    cause = causes.of_error(ev.Faulted(3, 0, 1, "ValueError: boom", here.keep(LONG)))
    assert len(cause.traceback) <= text.MAX_FRAMES
    for command in (cmd.FailEpoch(1, cause), cmd.End(1, "boom", causes.with_reason(cause, "for the second time"))):
        told = here.in_full(command)
        assert told.cause is not None
        assert told.cause.traceback == LONG
        assert elsewhere.in_full(command) == command
    assert here.in_full(cmd.End(0, "every worker succeeded")) == cmd.End(0, "every worker succeeded")
    assert here.keep("short") == "short"
    for number in range(1000):
        here.keep(f"{LONG}{number}")
    assert len(here._full) == 64


def test_listeners_of_other_nodes_are_not_told(monkeypatch: Any) -> None:
    entries = [SimpleNamespace(address="10.77.0.11"), SimpleNamespace(address="fe80::1%eth0")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": entries})
    own = (("10.77.0.11", 1), ("127.0.1.1", 2), ("fe80::1", 3))
    assert of_this_node((*own, ("10.77.0.12", 4))) == own
    assert of_this_node((("10.77.0.12", 4),)) == (("10.77.0.12", 4),), "rather all than none"


def test_a_message_that_is_too_large_costs_one_worker() -> None:
    """It would wait for it in vain; its death is dealt with as any other."""
    killed, lines = [], []

    def send(*_: object) -> None:
        raise messages.MessageError("Start of 2000000 bytes exceeds 1048576")

    node: Any = SimpleNamespace(
        _channel=SimpleNamespace(send=send),
        _console=SimpleNamespace(log=lambda event, **fields: lines.append((event, fields["rank"]))),
        workers=SimpleNamespace(kill=lambda worker, reason: killed.append(worker.rank)),
    )
    worker: Any = SimpleNamespace(rank=5, local_rank=1, incarnation=9)
    LocalNode._send(node, worker, messages.Finish(1))
    assert killed == [5]
    assert lines == [("message-too-large", 5)]


def test_a_long_traceback_is_shown_whole_on_its_node(run: Any, script: Any) -> None:
    functions = "\n".join(f"def function_number_{n}():\n    function_number_{n + 1}()" for n in range(40))
    body = f"""
from hyperpodrun import HPWrapper

{functions}

def function_number_40():
    raise ValueError("boom")

HPWrapper()(function_number_0)()
"""
    finished = run("--nproc-per-node=1", "--inprocess-restart", script(body))
    assert finished.returncode == 93, finished.output
    banner = finished.stderr[finished.stderr.index("Root Cause") :]
    assert "in function_number_0\n" in banner
    assert "in function_number_40\n" in banner
    assert "left out" not in banner
