"""What each request means in each state of its epoch."""

from __future__ import annotations

import struct

import pytest
from desk import Desk
from hyperpodrun.protocol.names import epoch_prefix
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.room import Room
from hyperpodrun.rootless.wire import NOT_READY, READY, STOP_WAITING, WAIT_CANCELED, WireError, decode_blobs
from wire_client import blob


def i64(number: int) -> bytes:
    return struct.pack("<q", number)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_bare_and_prefixed_keys_meet_in_one_epoch(desk: Desk) -> None:
    early = desk.open()
    desk.advance(3)
    late = desk.open()
    assert epoch_prefix(3) == "hyperpodrun-epoch-3"
    desk.ask(late, rq.Set(b"/x", b"bare"))
    desk.ask(early, rq.Set(b"/hyperpodrun-epoch-3/y", b"prefixed"))
    assert desk.ask(early, rq.Get(b"/hyperpodrun-epoch-3/x")) == blob(b"bare")
    assert desk.ask(late, rq.Get(b"/y")) == blob(b"prefixed")
    assert desk.ask(late, rq.NumKeys()) == desk.ask(early, rq.NumKeys()) == i64(2)
    assert desk.ask(late, rq.ListKeys()) == i64(2) + blob(b"/x") + blob(b"/y")
    assert desk.ask(early, rq.ListKeys()) == i64(2) + blob(b"/hyperpodrun-epoch-3/x") + blob(b"/hyperpodrun-epoch-3/y")


def test_only_the_canonical_spelling_names_an_epoch(desk: Desk) -> None:
    session = desk.open()
    for key in (
        b"/hyperpodrun-epoch-07/x",
        b"/hyperpodrun-epoch-/x",
        b"/hyperpodrun-epoch--1/x",
        b"/hyperpodrun-epoch-7",
        b"/an/hyperpodrun-epoch-7/x",
        b"/hyperpodrun-epoch-" + b"7" * 19 + b"/",
    ):
        desk.ask(session, rq.Set(key, b"v"))
    assert desk.ask(session, rq.NumKeys()) == i64(6)


def test_an_epoch_that_has_gone_takes_nothing_and_answers_everything(desk: Desk) -> None:
    stale = desk.open()
    desk.ask(stale, rq.Set(b"/k", b"v"))
    desk.advance(1)
    fresh = desk.open()
    expected: list[tuple[rq.Request, bytes | None]] = [
        (rq.Set(b"/k", b"w"), None),
        (rq.MultiSet(((b"/k", b"w"), (b"/l", b"w"))), None),
        (rq.Append(b"/k", b"w"), None),
        (rq.QueuePush(b"/q", b"w"), None),
        (rq.CompareSet(b"/k", b"", b"w"), blob(b"")),
        (rq.CompareSet(b"/k", b"v", b"w"), blob(b"")),
        (rq.Add(b"/n", 1), i64(0)),
        (rq.DeleteKey(b"/k"), i64(0)),
        (rq.Get(b"/k"), blob(b"")),
        (rq.MultiGet((b"/k", b"/l")), blob(b"") * 2),
        (rq.Check((b"/k",)), NOT_READY),
        (rq.Wait((b"/k",)), WAIT_CANCELED),
        (rq.Barrier(b"/b", 1), WAIT_CANCELED),
        (rq.QueuePop(b"/q"), i64(0)),
        (rq.QueueLen(b"/q"), i64(0)),
        (rq.NumKeys(), i64(0)),
        (rq.ListKeys(), i64(0)),
        (rq.Ping(9), struct.pack("<I", 9)),
    ]
    for request, answer in expected:
        assert desk.ask(stale, request) == answer, request
    assert desk.keyspace.dropped_stale_writes == 9  # a MULTI_SET counts each of its keys
    assert desk.keyspace.cancelled_waits == 2
    assert list(desk.keyspace.values(1)) == []
    assert desk.ask(fresh, rq.NumKeys()) == i64(0)


def test_a_write_to_an_epoch_that_has_not_begun_is_there_when_it_does(desk: Desk) -> None:
    early, other = desk.open(), desk.open()
    desk.ask(early, rq.Set(b"/hyperpodrun-epoch-2/k", b"v"))
    assert desk.ask(other, rq.Wait((b"/hyperpodrun-epoch-2/k", b"/hyperpodrun-epoch-2/later"))) is None
    desk.advance(2)
    assert desk.heard(other) is None
    late = desk.open()
    assert desk.ask(late, rq.Get(b"/k")) == blob(b"v")
    desk.ask(late, rq.Set(b"/later", b"v"))
    assert desk.heard(other) == STOP_WAITING


def test_a_cancelled_epoch_answers_but_lets_nobody_block(desk: Desk) -> None:
    waits, arrives, sets = desk.open(), desk.open(), desk.open()
    assert desk.ask(waits, rq.Wait((b"/a", b"/b"))) is None
    assert desk.ask(arrives, rq.Barrier(b"/bar", 2)) is None
    assert desk.cancel(0) == 2
    assert desk.heard(waits) == desk.heard(arrives) == WAIT_CANCELED
    desk.ask(sets, rq.Set(b"/a", b"v"))
    assert desk.ask(waits, rq.Wait((b"/a",))) == STOP_WAITING
    assert desk.ask(waits, rq.Get(b"/a")) == blob(b"v")
    assert desk.ask(waits, rq.Wait((b"/a", b"/b"))) == WAIT_CANCELED
    for _ in range(2):  # who was cancelled has not arrived: trying again does not complete the barrier
        assert desk.ask(arrives, rq.Barrier(b"/bar", 2)) == WAIT_CANCELED
    assert desk.ask(arrives, rq.Barrier(b"/alone", 1)) == STOP_WAITING
    assert desk.cancel(0) == 0
    desk.advance(1)
    assert desk.ask(waits, rq.Wait((b"/hyperpodrun-epoch-1/a",))) is None  # the next epoch blocks as ever


def test_a_fault_reported_before_its_epoch_began_still_counts(desk: Desk) -> None:
    session = desk.open()
    desk.cancel(1)
    desk.advance(1)
    assert desk.ask(session, rq.Wait((b"/hyperpodrun-epoch-1/a",))) == WAIT_CANCELED
    assert desk.cancel(0) == 0


def test_epochs_never_go_back(desk: Desk) -> None:
    desk.advance(5)
    desk.advance(5)
    with pytest.raises(ValueError, match="epoch 4 is older than the current epoch 5"):
        desk.advance(4)


def test_advance_cancels_the_waits_of_older_epochs_only(desk: Desk) -> None:
    old, new, both = desk.open(), desk.open(), desk.open()
    desk.ask(old, rq.Wait((b"/a",)))
    desk.ask(new, rq.Wait((b"/hyperpodrun-epoch-1/a",)))
    desk.ask(both, rq.Wait((b"/hyperpodrun-epoch-1/a", b"/b")))
    desk.advance(1)
    assert desk.heard(old) == desk.heard(both) == WAIT_CANCELED
    assert desk.heard(new) is None
    desk.ask(both, rq.Set(b"/hyperpodrun-epoch-1/a", b"v"))
    assert desk.heard(new) == STOP_WAITING
    assert desk.heard(both) is None
    desk.ask(both, rq.Wait((b"/hyperpodrun-epoch-1/x", b"/hyperpodrun-epoch-2/x")))
    desk.advance(3)  # both of them gone at once: one answer
    assert desk.heard(both) == WAIT_CANCELED


def test_what_a_wait_granted_can_be_read_although_its_epoch_has_gone(desk: Desk) -> None:
    reader, writer = desk.open(), desk.open()
    desk.ask(writer, rq.MultiSet(((b"/a", b"1"), (b"/b", b"2"))))
    assert desk.ask(reader, rq.Wait((b"/a",))) == STOP_WAITING
    desk.advance(1)
    assert desk.ask(reader, rq.Get(b"/a")) == blob(b"1")
    assert desk.ask(reader, rq.Get(b"/b")) == blob(b"")
    assert desk.ask(reader, rq.Wait((b"/a",))) == WAIT_CANCELED
    assert desk.ask(reader, rq.Get(b"/a")) == blob(b"")

    blocked = desk.open()
    assert desk.ask(blocked, rq.Wait((b"/c", b"/d"))) is None
    desk.ask(writer, rq.MultiSet(((b"/hyperpodrun-epoch-1/c", b"3"), (b"/hyperpodrun-epoch-1/d", b"4"))))
    assert desk.heard(blocked) == STOP_WAITING
    desk.advance(2)
    desk.advance(3)
    assert desk.ask(blocked, rq.MultiGet((b"/c", b"/d"))) == blob(b"3") + blob(b"4")


@pytest.mark.parametrize("blocks_first", [True, False])
def test_a_cancel_and_the_clients_deadline_may_cross(desk: Desk, blocks_first: bool) -> None:
    session = desk.open()
    if blocks_first:
        assert desk.ask(session, rq.Wait((b"/a",))) is None
        desk.cancel(0)
        assert desk.heard(session) == WAIT_CANCELED
    else:
        desk.cancel(0)
        assert desk.ask(session, rq.Wait((b"/a",))) == WAIT_CANCELED
    # Its deadline passed before the cancel came: it took the cancel for the answer to this.
    assert desk.ask(session, rq.CancelWait()) is None
    assert desk.ask(session, rq.CancelWait()) == WAIT_CANCELED


def test_a_client_whose_deadline_passes_is_told_so_and_forgotten(desk: Desk) -> None:
    session, other = desk.open(), desk.open()
    desk.ask(session, rq.Wait((b"/a",)))
    assert desk.ask(session, rq.CancelWait()) == WAIT_CANCELED
    desk.ask(other, rq.Set(b"/a", b"v"))
    assert desk.heard(session) is None
    # The key came in the moment of the deadline: the client expects both answers.
    desk.ask(session, rq.Wait((b"/b",)))
    desk.ask(other, rq.Set(b"/b", b"v"))
    assert desk.heard(session) == STOP_WAITING
    assert desk.ask(session, rq.CancelWait()) == WAIT_CANCELED


def test_a_wait_given_up_without_a_word_gets_no_answer_later(desk: Desk) -> None:
    session, other = desk.open(), desk.open()
    desk.ask(session, rq.Wait((b"/a",)))
    assert desk.ask(session, rq.NumKeys()) == i64(0)
    desk.ask(other, rq.Set(b"/a", b"v"))
    assert desk.heard(session) is None


def test_a_connection_that_is_gone_waits_for_nothing(desk: Desk) -> None:
    session, other = desk.open(), desk.open()
    desk.ask(session, rq.Wait((b"/a",)))
    desk.keyspace.close(session)
    desk.ask(other, rq.Set(b"/a", b"v"))
    assert desk.heard(session) is None
    assert desk.cancel(0) == 0


def test_a_push_frees_one_waiter_in_the_order_they_came(desk: Desk) -> None:
    first, second, pusher = desk.open(), desk.open(), desk.open()
    desk.ask(first, rq.Wait((b"/q",)))
    desk.ask(second, rq.Wait((b"/q",)))
    desk.ask(pusher, rq.QueuePush(b"/q", b"1"))
    assert (desk.heard(first), desk.heard(second)) == (STOP_WAITING, None)
    assert desk.ask(first, rq.QueuePop(b"/q")) == i64(1) + blob(b"1")
    desk.ask(pusher, rq.QueuePush(b"/q", b"2"))
    assert desk.heard(second) == STOP_WAITING
    assert desk.ask(pusher, rq.QueueLen(b"/q")) == i64(1)


def test_a_wait_for_keys_and_a_queue_needs_both(desk: Desk) -> None:
    session, other = desk.open(), desk.open()
    assert desk.ask(session, rq.Wait((b"/k", b"/q", b"/k"))) is None
    desk.ask(other, rq.QueuePush(b"/q", b"1"))
    assert desk.heard(session) is None
    desk.ask(other, rq.Set(b"/k", b"1"))
    assert desk.heard(session) == STOP_WAITING
    assert desk.ask(session, rq.Check((b"/k", b"/q"))) == READY


def test_the_last_to_arrive_frees_the_barrier(desk: Desk) -> None:
    sessions = [desk.open() for _ in range(4)]
    for session in sessions[:3]:
        assert desk.ask(session, rq.Barrier(b"/b", 4)) is None
    assert desk.ask(sessions[3], rq.Barrier(b"/b", 4)) == STOP_WAITING
    assert [desk.heard(session) for session in sessions[:3]] == [STOP_WAITING] * 3


def test_counters_are_decimal_and_wrap(desk: Desk) -> None:
    session = desk.open()
    top = (1 << 63) - 1
    assert desk.ask(session, rq.Add(b"/n", top)) == i64(top)
    assert desk.ask(session, rq.Add(b"/n", 2)) == i64(-top)
    desk.ask(session, rq.Set(b"/n", b" 12abc"))
    assert desk.ask(session, rq.Add(b"/n", -2)) == i64(10)
    desk.ask(session, rq.Set(b"/n", b"abc"))
    for request in (rq.Add(b"/n", 1), rq.Barrier(b"/n", 1)):
        with pytest.raises(WireError, match="holds a value that is not a number"):
            desk.ask(session, request)


def test_the_last_write_of_an_epoch_has_a_time(desk: Desk) -> None:
    session = desk.open()
    assert desk.keyspace.last_write_ns(0) is None
    desk.ask(session, rq.Set(b"/a", b""))
    written = desk.now_ns
    desk.ask(session, rq.Get(b"/a"))
    assert desk.keyspace.last_write_ns(0) == written
    desk.advance(1)
    assert desk.keyspace.last_write_ns(0) is desk.keyspace.last_write_ns(1) is None


def test_a_read_of_many_keys_is_answered_from_memory_until_one_of_them_changes():
    """All ranks read the same keys; who reads them after any change sees it."""
    keyspace = Keyspace(0, Room(1 << 30))
    session = keyspace.open()
    keys = tuple(b"hyperpodrun-epoch-0/%d" % number for number in range(20))

    def read() -> list[bytes]:
        ((_, reply),) = keyspace.apply(session, rq.MultiGet(keys), 0)
        return decode_blobs(b"".join(reply))

    for key in keys:
        keyspace.apply(session, rq.Set(key, b"1"), 0)
    assert read() == read() == [b"1"] * 20
    for request, value in (
        (rq.Set(keys[3], b"2"), b"2"),
        (rq.Append(keys[3], b"0"), b"20"),
        (rq.Append(keys[3], b"0"), b"200"),
        (rq.Add(keys[3], 5), b"205"),
        (rq.CompareSet(keys[3], b"205", b"7"), b"7"),
        (rq.DeleteKey(keys[3]), b""),
        (rq.MultiSet(((keys[3], b"8"),)), b"8"),
    ):
        keyspace.apply(session, request, 0)
        assert read() == [*[b"1"] * 3, value, *[b"1"] * 16]
        assert read()[3] == value
    keyspace.advance(1)  # it had not been promised to this client
    assert read() == [b""] * 20


def test_the_keys_of_a_long_request_are_of_the_epoch_that_each_client_means():
    """The same bytes are other keys for a client of another epoch."""
    keyspace = Keyspace(0, Room(1 << 30))
    old = keyspace.open()
    keys = tuple(b"key %d" % number for number in range(20))
    keyspace.apply(old, rq.MultiSet(tuple((key, b"old") for key in keys)), 0)
    assert keyspace.places(old, keys).epoch == 0
    keyspace.advance(1)
    new = keyspace.open()
    assert keyspace.places(new, keys).epoch == 1
    assert keyspace.places(old, keys).epoch == 0
    named = tuple(b"hyperpodrun-epoch-1/" + key for key in keys)
    for _ in range(2):  # read key by key, then known
        assert keyspace.places(old, named).keys == tuple(b"" + key for key in keys)
        assert old.named == 1
        old.named = None


def test_what_is_remembered_of_requests_is_small() -> None:
    keyspace = Keyspace(0, Room(1 << 30))
    session = keyspace.open()
    large = tuple(b"%d" % number + b"x" * (64 << 10) for number in range(17))
    keyspace.apply(session, rq.MultiGet(large), 0)
    assert not keyspace._placed
    assert not keyspace._epochs.peek(0)._answers
    small = large[:8]
    keyspace.apply(session, rq.MultiGet(small), 0)
    assert list(keyspace._placed) == [(0, small)]
    assert list(keyspace._epochs.peek(0)._answers) == [small]
