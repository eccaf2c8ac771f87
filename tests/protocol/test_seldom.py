"""Lines that strangers cause: one a minute of each kind, with how many were left out, and no memory without bound."""

from __future__ import annotations

from hyperpodrun.protocol.seldom import _KINDS, Seldom


def test_one_line_a_minute_of_each_kind_says_how_many_were_left_out() -> None:
    seldom = Seldom(60)
    assert [seldom.due("refused", now) for now in (0, 1, 59.9)] == [0, None, None]
    assert seldom.due("malformed", 2) == 0
    assert seldom.due("refused", 60) == 2
    assert [seldom.due("refused", now) for now in (61, 120)] == [None, 1]


def test_kinds_that_somebody_invents_are_forgotten_again() -> None:
    seldom = Seldom(60)
    for number in range(3 * _KINDS):
        assert seldom.due(str(number), number) == 0
    assert len(seldom._kinds) == _KINDS
