"""What comes from outside costs whoever it is from: a worker's error file, a worker's word, another agent's message."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hyperpodrun.agent.node.cluster import ClusterHead
from hyperpodrun.agent.node.sole import SoleHead
from hyperpodrun.agent.node.timer import Timer
from hyperpodrun.agent.output.banner import failure_banner
from hyperpodrun.agent.output.error_files import publish
from hyperpodrun.agent.output.failures import Failures, read_failure
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.commands import Cause
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.launcher.errors import ChildFailedError


def _message(**extra: Any) -> bytes:
    return json.dumps({"message": {"message": "boom", "extraInfo": extra}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'"text"',
        b'{"message": 7}',
        b'{"message": "boom"}',
        b'{"message": "boom", "timestamp": Infinity}',
        b'{"message": "boom", "timestamp": NaN}',
        b'{"message": "boom", "timestamp": -1e30}',
        b'{"message": "boom", "timestamp": ' + b"9" * 5000 + b"}",
        _message(timestamp="1e400"),
        _message(timestamp=None),
        _message(timestamp=10**40),
        _message(timestamp=1, py_callstack={"no": "text"}),
        b" " * (17 << 20),
        None,
        "directory",
        "pipe",
    ],
    ids=lambda content: repr(content)[:40],
)
def test_no_error_file_of_a_worker_hurts(tmp_path, content):
    path = tmp_path / "error.json"
    if content == "directory":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    failure = read_failure(1, 4242, 3, path)
    assert failure.exitcode == 3
    assert "4242" in failure_banner("script", {1: failure}, 1, failure)


class _Node:
    """What a head asks of its node when it cannot take an event."""

    def __init__(self) -> None:
        self.blamed: list[object] = []

    def blame(self, event: object, error: Exception) -> bool:
        self.blamed.append(event)
        return not isinstance(event, ev.TimePassed)


def _broken(*_: object) -> list[Any]:
    raise KeyError("what cannot be")


def test_a_word_that_the_decisions_cannot_take_costs_its_worker():
    head = SoleHead.__new__(SoleHead)
    head._job, head._node = SimpleNamespace(handle=_broken), _Node()
    head._timer = Timer(lambda: None, lambda: None)
    word = ev.Completed(1, 0, 7)
    head.handle(word)
    assert head._node.blamed == [word]
    with pytest.raises(KeyError):  # nobody has said this: it is our own error
        head.handle(ev.TimePassed())


def test_a_message_that_the_decisions_cannot_take_costs_its_agent():
    refused = []
    head = ClusterHead.__new__(ClusterHead)
    head._node, head._local = SimpleNamespace(handle=_broken), _Node()
    head._transport = SimpleNamespace(refuse_agent=lambda *who: refused.append(who))
    head._busy, head._waiting = False, []
    head._timer = Timer(lambda: None, lambda: None)
    head.handle(msg.Received("key", "127.0.0.1:1", "a message"))
    assert [who[:2] for who in refused] == [("key", "127.0.0.1:1")]
    assert head._local.blamed == []
    with pytest.raises(KeyError):
        head.handle(ev.TimePassed())


def test_a_process_that_failed_on_another_node_is_the_root_cause_and_is_said_to_be_there():
    """What died of it here was seen first here, but the job knows its cause."""
    failures = Failures()
    failures.stopping(15)
    failures.ended(0, 0, 4711, 1, Path())()
    ended = Cause("death", 1, "exited with code 1", exit_code=1)
    by_rank = failures.of_job(ended, {0: 4711})
    error = ChildFailedError("train.py", by_rank)
    assert error.get_first_failure()[0] == 1
    root, others = str(error).split("Failures:")
    assert "host      : another node" in root
    assert "rank      : 1\n" in root
    assert "pid" not in root
    assert "exited with code 1; the output and the error file are on the node where it ran" in root
    assert "rank      : 0 (local_rank: 0)" in others
    assert "(pid: 4711)" in others


def test_an_error_file_of_many_levels_is_published_or_refused(tmp_path):
    source, target = tmp_path / "error.json", tmp_path / "launcher.json"
    for depth in range(100, 1000, 50):
        source.write_text(
            f'{{"message": {{"message": {"[" * depth}{"]" * depth}, "extraInfo": {{"timestamp": "1"}}}}}}'
        )
        with contextlib.suppress(OSError):
            publish(read_failure(0, 1, 3, source), target)
    assert '"errorCode": 3' in target.read_text()
