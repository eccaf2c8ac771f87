"""Whatever happens, each client gets exactly the answers it reads: its stream never loses step."""

from __future__ import annotations

from desk import Desk
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.namespace import Session
from hyperpodrun.rootless.wire import STOP_WAITING, WAIT_CANCELED
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = st.sampled_from([b"/a", b"/b", *(b"/hyperpodrun-epoch-" + name for name in (b"0/a", b"1/a", b"1/b", b"2/a"))])
ROWS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
BLOCKING = (rq.Wait, rq.Barrier)
SILENT = (rq.Set, rq.Append, rq.QueuePush)
STEPS = st.one_of(
    st.tuples(st.just("advance"), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 2)),
    st.tuples(st.just("deadline"), st.integers(0, 2)),
    st.tuples(
        st.integers(0, 2),
        st.one_of(
            st.builds(rq.Wait, ROWS),
            st.builds(rq.Barrier, NAMES, st.integers(1, 3)),
            st.builds(rq.Set, NAMES, st.just(b"1")),
            st.builds(rq.Add, NAMES, st.just(1)),
            st.builds(rq.Get, NAMES),
            st.builds(rq.DeleteKey, NAMES),
            st.builds(rq.QueuePush, NAMES, st.just(b"1")),
            st.builds(rq.QueuePop, NAMES),
            st.builds(rq.CompareSet, NAMES, st.just(b""), st.just(b"1")),
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_every_client_stays_in_step_whatever_happens(steps: list[tuple[object, object]]) -> None:
    """Clients that behave as torch's: one request at a time, CANCEL_WAIT only while a wait has no answer."""
    desk = Desk()
    clients = [desk.open() for _ in range(3)]
    waiting: set[Session] = set()
    for who, what in steps:
        if who == "advance":
            assert isinstance(what, int)
            desk.advance(max(what, desk.keyspace.epoch))
        elif who == "cancel":
            assert isinstance(what, int)
            desk.cancel(what)
        elif who == "deadline":
            assert isinstance(what, int)
            session = clients[what]
            if session in waiting:  # the answer, if there is one by now, is still on its way to the client
                answers = [desk.heard(session), desk.ask(session, rq.CancelWait())]
                assert answers in (
                    [None, WAIT_CANCELED],
                    [STOP_WAITING, WAIT_CANCELED],
                    [WAIT_CANCELED, None],
                )
                waiting.discard(session)
        else:
            assert isinstance(who, int)
            session = clients[who]
            if session in waiting:
                answer = desk.heard(session)
                if answer is None:
                    continue  # a torch client is stuck here
                assert answer in (STOP_WAITING, WAIT_CANCELED)
                waiting.discard(session)
            assert isinstance(what, BLOCKING + SILENT + (rq.Add, rq.Get, rq.DeleteKey, rq.QueuePop, rq.CompareSet))
            answer = desk.ask(session, what)
            if isinstance(what, BLOCKING) and answer is None:
                waiting.add(session)
            else:
                assert (answer is None) == isinstance(what, SILENT)
    for epoch in range(3):
        desk.cancel(epoch)
    for session in waiting:
        assert desk.heard(session) is not None
        assert session.waiter is None
    assert all(not answers for answers in desk.inbox.values())
