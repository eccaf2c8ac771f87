"""What an agent was started to run decides whether it is of this job."""

from __future__ import annotations

import pytest
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.identity import Identity, why_another_job
from hyperpodrun.control.membership.node import Node
from hyperpodrun.control.membership.roles import NodeConfig
from msgspec.structs import replace

OURS = Identity(script="a.py", text="1", arguments="2", options=(("--nnodes", "2:2"), ("--nproc-per-node", "2")))
OTHERS = {
    "another text": replace(OURS, script="b.py", text="3"),
    "other arguments": replace(OURS, arguments="4"),
    "another world": replace(OURS, options=(("--nnodes", "1:2"), ("--nproc-per-node", "2"))),
    "other nodes": replace(OURS, options=(("--nnodes", "2:2"), ("--nproc-per-node", "gpu"))),
    "an option less": replace(OURS, options=(("--nnodes", "2:2"),)),
    "an option more": replace(OURS, options=(*OURS.options, ("--inprocess-restart", "1"))),
}


def join(key: str, identity: Identity, role: str = "default") -> msg.Received:
    address = f"{key}:1"
    return msg.Received(key, address, msg.Join("none", key, key, address, 1, role=role, identity=identity))


def answers(node: Node, event: msg.NodeEvent) -> list[object]:
    return [action.message for action in node.handle(event, 0.0) if isinstance(action, msg.Send)]


def founder(identity: Identity = OURS) -> Node:
    job = JobConfig(world_size=1, min_nodes=2, max_nodes=2)
    node = Node(NodeConfig("own", "own", "own:1", 1, "none", job, founder=True, identity=identity))
    node.handle(ev.Begin(), 0.0)
    return node


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_job_is_refused_before_and_after_the_job_has_begun(other: Identity) -> None:
    node = founder()
    for _ in range(2):
        (refusal,) = answers(node, join("stranger", other))
        assert isinstance(refusal, msg.Refuse)
        assert "an endpoint of its own" in refusal.reason
        assert "may_differ" in refusal.reason
        answers(node, join("friend", OURS))
    assert type(node.role).__name__ == "Leader"
    assert [member.key for member in node.context.configurations.proposed.members] == ["own", "friend"]


def test_the_same_script_elsewhere_is_the_same_job() -> None:
    assert why_another_job(OURS, replace(OURS, script="/elsewhere/a.py"), same_role=True) == ""


def test_roles_have_scripts_of_their_own_but_one_world() -> None:
    assert why_another_job(OURS, OTHERS["another text"], same_role=False) == ""
    assert why_another_job(OURS, OTHERS["other nodes"], same_role=False) == ""
    assert "--nnodes=1:2" in why_another_job(OURS, OTHERS["another world"], same_role=False)


def test_who_means_it_says_so_on_both_sides_and_it_is_told() -> None:
    ours, theirs = (replace(identity, may_differ=True) for identity in (OURS, OTHERS["another text"]))
    assert why_another_job(OURS, theirs, same_role=True)
    actions = founder(ours).handle(join("friend", theirs), 0.0)
    notes = [action for action in actions if isinstance(action, msg.Note)]
    assert notes[0].event == "node-differs"
    assert "b.py" in str(notes[0].fields["how"])


def test_a_strangers_words_cannot_hurt() -> None:
    said = why_another_job(OURS, Identity(script="\x1b[2J" + "x" * 5000, text="no"), same_role=True)
    assert said.isprintable()
    assert len(said) < 700
