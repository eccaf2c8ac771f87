"""The conversation between a controller and a follower: once, in order, whatever the network does with it."""

from __future__ import annotations

from hyperpodrun.control.membership.link import Link


def link() -> Link[str, str]:
    return Link()


def test_messages_are_dealt_with_once_and_in_order() -> None:
    end = link()
    assert end.receive(2, "b") == []
    assert end.receive(2, "b") == []
    assert end.receive(1, "a") == ["a", "b"]
    assert end.receive(1, "a") == []
    assert end.received == 2


def test_what_is_missing_is_taken_however_much_came_before_it() -> None:
    end = link()
    for serial in range(2, 10_000):
        assert end.receive(serial, str(serial)) == []
    ready = end.receive(1, "1")
    assert ready == [str(serial) for serial in range(1, len(ready) + 1)]
    assert len(ready) > 1000
    again = [message for serial in range(2, 10_000) for message in end.receive(serial, str(serial))]
    assert [*ready, *again] == [str(serial) for serial in range(1, 10_000)], "what was too early comes again"


def test_only_what_was_not_confirmed_is_sent_again_and_not_at_once() -> None:
    end = link()
    for at, message in enumerate("abc"):
        end.send(message, float(at))
    end.confirm(1)
    assert end.overdue(1.4) == []
    assert end.overdue(1.6) == [(2, "b")]
    assert end.overdue(1.7) == []
    assert end.overdue(3.0) == [(2, "b"), (3, "c")]
    end.confirm(3)
    assert end.all_confirmed


def test_a_question_for_what_is_missing_is_not_repeated_before_it_can_have_been_answered() -> None:
    end = link()
    assert not end.must_ask(0, 1.0)
    assert end.must_ask(1, 1.0)
    assert not end.must_ask(2, 1.4)
    assert end.must_ask(2, 1.5)
    end.receive(1, "a")
    end.receive(2, "b")
    assert not end.must_ask(2, 9.0)
