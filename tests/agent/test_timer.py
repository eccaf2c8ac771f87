"""The timer of who decides: one deadline at a time, the one that is there after whatever has happened last."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from hyperpodrun.agent.node.cluster import ClusterHead
from hyperpodrun.agent.node.timer import Timer
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.membership import messages as msg


class Loop:
    """Keeps what is to be called."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Any]] = []

    def call_at(self, when: float, callback: Any) -> Any:
        call = (when, callback)
        self.calls.append(call)
        return SimpleNamespace(cancel=lambda: self.calls.remove(call))


def test_only_the_newest_deadline_is_kept_and_none_after_the_end() -> None:
    loop, due = Loop(), [5.0]
    timer = Timer(lambda: due[0], lambda: None)
    timer.set()
    assert loop.calls == [], "there is no loop yet"
    timer.start(cast(asyncio.AbstractEventLoop, loop))
    due[0] = 3.0
    timer.set()
    assert [when for when, _ in loop.calls] == [3.0]
    timer.stop()
    timer.set()
    assert loop.calls == []


def test_what_another_agent_says_goes_to_the_head_and_moves_its_deadline() -> None:
    loop, told, due = Loop(), list[object](), [5.0]

    def handle(event: object, now: float) -> list[msg.Action]:
        told.append(event)
        due[0] -= 1
        return []

    head = ClusterHead.__new__(ClusterHead)
    head._node = SimpleNamespace(handle=handle, next_deadline=lambda: due[0])  # type: ignore[assignment]
    head._busy, head._waiting, head._transport = False, [], cast(Any, object())
    head._timer = Timer(head._next_deadline, lambda: head.handle(ev.TimePassed()))
    head._timer.start(cast(asyncio.AbstractEventLoop, loop))
    head._on_message("key", "there:1", b"", msg.encode(msg.Hold()))
    assert told == [msg.Received("key", "there:1", msg.Hold())]
    ((when, on_due),) = loop.calls
    assert when == 4.0
    on_due()
    assert told[1:] == [ev.TimePassed()]
    assert [when for when, _ in loop.calls if when == 3.0], "what it brings about counts"
