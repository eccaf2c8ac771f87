"""What a fault is called, and which of several is due in which epoch."""

from __future__ import annotations

import pytest
from hyperpodrun.testing import KINDS, PLACES, Injection, numbered, parse_injections
from hyperpodrun.testing.settings import wanted_faults


def test_every_kind_at_every_place_is_read_as_it_is_written():
    for kind in KINDS:
        for where in PLACES:
            injection = Injection(kind, 3, 20, where)
            assert Injection.parse(str(injection)) == injection


def test_the_forward_pass_is_where_a_fault_fires_that_names_no_place():
    assert Injection.parse("kill:rank=1,step=20") == Injection("kill", 1, 20, "forward")


def test_the_names_of_the_examples_option_mean_the_same():
    assert Injection.parse("exit:rank=0,step=2,where=optimizer").where == "in-update"
    assert Injection.parse("exit:rank=0,step=2,where=between").where == "after-update"


@pytest.mark.parametrize("text", ["", "kill", "kill:step=1,rank=0", "kill:rank=-1,step=0", "kil:rank=0,step=0"])
def test_anything_else_is_refused_with_what_would_be_right(text):
    with pytest.raises(ValueError, match="is not KIND:rank=R,step=S") as refused:
        Injection.parse(text)
    assert "\n" not in str(refused.value)


def test_several_are_separated_by_semicolons():
    assert parse_injections("kill:rank=1,step=20; raise:rank=0,step=3 ;") == [
        Injection("kill", 1, 20),
        Injection("raise", 0, 3),
    ]


def test_ranks_at_the_same_point_of_a_step_are_one_event_and_a_rank_named_twice_makes_two():
    injections = parse_injections(
        "raise:rank=0,step=5,where=after-update;kill:rank=1,step=5,where=in-update;kill:rank=1,step=5,where=in-update;"
        "raise:rank=0,step=5,where=backward;raise:rank=1,step=2"
    )
    assert [(event, str(injection)) for event, injection in numbered(injections)] == [
        (0, "raise:rank=1,step=2,where=forward"),
        (1, "raise:rank=0,step=5,where=backward"),
        (2, "raise:rank=0,step=5,where=after-update"),
        (2, "kill:rank=1,step=5,where=in-update"),
        (3, "kill:rank=1,step=5,where=in-update"),
    ]


def test_faults_are_refused_where_nobody_says_that_this_is_a_test(monkeypatch):
    monkeypatch.setenv("HYPERPODRUN_INJECT", "kill:rank=0,step=1")
    monkeypatch.delenv("HYPERPODRUN_TESTING", raising=False)
    with pytest.raises(ValueError, match="HYPERPODRUN_TESTING=1 is not"):
        wanted_faults()
    monkeypatch.setenv("HYPERPODRUN_TESTING", "1")
    assert wanted_faults() == [Injection("kill", 0, 1)]
    monkeypatch.setenv("HYPERPODRUN_INJECT", " ")
    assert wanted_faults() == []
