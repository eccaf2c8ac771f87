"""Who waits for a job to begin says so after some seconds, then more and more seldom."""

from __future__ import annotations

import pytest
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.node import Node
from hyperpodrun.control.membership.roles import NodeConfig


@pytest.mark.parametrize("founder", [True, False])
def test_who_waits_says_for_what(founder: bool) -> None:
    job = JobConfig(world_size=1, min_nodes=3, max_nodes=3)
    seeds = ("own:1",) if founder else ("there:1",)
    node = Node(NodeConfig("own", "own", "own:1", 1, "none", job, seeds=seeds, founder=founder))
    said: list[tuple[float, dict[str, object]]] = []

    def handle(event: msg.NodeEvent, now: float) -> None:
        actions = node.handle(event, now)
        said.extend((now, a.fields) for a in actions if isinstance(a, msg.Note) and a.event == "waits")

    handle(ev.Begin(), 0.0)
    if founder:
        handle(msg.Received("other", "other:1", msg.Join("none", "other", "other", "other:1", 1)), 1.0)
    while (due := node.next_deadline()) is not None and due < 300.0:
        handle(ev.TimePassed(), due)
    assert [now for now, _ in said] == [5, 15, 35, 75, 135, 195, 255]
    expected = {"until": "others join", "nodes": "2 of 3", "asks": None}
    assert said[0][1] == {"seconds": 5, **(expected if founder else {"until": "it is answered", "asks": "there:1"})}
