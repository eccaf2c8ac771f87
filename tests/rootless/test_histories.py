"""Several clients on several nodes see what one store could have answered; the checker that says so can say no."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed")

from histories import EMPTY, OUT_OF_TIME, Operation, check
from history_runs import checked, run, torchs_own
from history_stores import MISTAKES, HistoryStores

MS = 1_000_000


def at(client: int, begin: int, end: int, kind: str, *arguments: object, result: object = None, **more) -> Operation:
    """A call on one key, in milliseconds."""
    at.calls += 1
    return Operation(client, at.calls, kind, "k", arguments, result, begin * MS, end * MS, **more)


at.calls = 0


def written(client: int, begin: int, end: int, value: bytes) -> list[Operation]:
    """A set, and a call with an answer: by then it has taken effect."""
    return [at(client, begin, end, "set", value, written=(value,)), at(client, end, end + 1, "check", result=True)]


def read(client: int, begin: int, end: int, value: bytes) -> Operation:
    return at(client, begin, end, "get", result=value, seen=(value,))


POSSIBLE = {
    "a read beside a write sees either": lambda: [
        *written(0, 0, 1, b"1"),
        *written(0, 10, 29, b"2"),
        read(1, 11, 12, b"2"),
        read(2, 9, 13, b"1"),
    ],
    "a write without an answer takes effect later": lambda: [
        at(0, 0, 1, "set", b"1", written=(b"1",)),
        at(1, 5, 6, "check", result=False),
        read(0, 9, 10, b"1"),
    ],
    "a wait that ends before anything comes": lambda: [
        at(0, 0, 1000, "wait", result=OUT_OF_TIME, limit_ns=1000 * MS),
        *written(1, 1001, 1002, b"1"),
    ],
    "two who add at once": lambda: [
        at(0, 0, 10, "add", 2, result=5),
        at(1, 0, 10, "add", 3, result=3),
    ],
}

IMPOSSIBLE = {
    "a read of what was overwritten": lambda: [
        *written(0, 0, 1, b"1"),
        *written(0, 10, 11, b"2"),
        read(1, 20, 21, b"1"),
    ],
    "a read that goes back": lambda: [
        *written(0, 0, 1, b"1"),
        at(0, 10, 90, "compare_set", b"1", b"2", result=b"2", written=(b"2",)),
        read(1, 20, 21, b"2"),
        read(2, 30, 31, b"1"),
    ],
    "an addition that was lost": lambda: [
        at(0, 0, 10, "add", 2, result=2),
        at(1, 0, 10, "add", 2, result=2),
    ],
    "two who win one compare_set": lambda: [
        at(0, 0, 10, "compare_set", b"", b"1", result=b"1", written=(b"1",)),
        at(1, 0, 10, "compare_set", b"", b"2", result=b"2", written=(b"2",)),
    ],
    "a wait that was granted for nothing": lambda: [at(0, 0, 5, "wait"), *written(1, 10, 11, b"1")],
    "a wait that nobody woke": lambda: [
        *written(1, 10, 11, b"1"),
        at(0, 0, 1000, "wait", result=OUT_OF_TIME, limit_ns=1000 * MS),
    ],
    "a wait that gave up too soon": lambda: [at(0, 0, 400, "wait", result=OUT_OF_TIME, limit_ns=1000 * MS)],
    "a check of what is there": lambda: [*written(0, 0, 1, b"1"), at(1, 5, 6, "check", result=False)],
    "a write that was seen, and is gone": lambda: [
        at(0, 0, 1, "set", b"1", written=(b"1",)),
        read(1, 5, 6, b"1"),
        at(1, 7, 8, "check", result=False),
    ],
    "an element that two have taken": lambda: [
        at(0, 0, 1, "push", b"1", written=(b"1",)),
        at(1, 5, 6, "pop", result=b"1", seen=(b"1",)),
        at(2, 5, 6, "pop", result=b"1", seen=(b"1",)),
    ],
    "elements that change their order": lambda: [
        at(0, 0, 1, "push", b"1", written=(b"1",)),
        at(0, 1, 2, "push", b"2", written=(b"2",)),
        at(1, 5, 6, "pop", result=b"2", seen=(b"2",)),
    ],
    "a queue that forgets": lambda: [
        at(0, 0, 1, "push", b"1", written=(b"1",)),
        at(0, 1, 2, "queue_len", result=1),
        at(1, 5, 6, "pop", result=EMPTY),
    ],
    "something that was deleted": lambda: [
        *written(0, 0, 1, b"1"),
        at(1, 5, 6, "delete_key", result=True),
        at(2, 8, 9, "compare_set", b"1", b"2", result=b"2", written=(b"2",)),
    ],
    "something appended twice": lambda: [
        at(0, 0, 1, "append", b"a"),
        at(0, 2, 3, "get", result=b"aa"),
    ],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_one_store_can_answer_is_accepted(name: str) -> None:
    assert not check(POSSIBLE[name]()).reason


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_store_can_answer_is_rejected(name: str) -> None:
    assert check(IMPOSSIBLE[name]()).reason


@pytest.mark.parametrize("seed", [1, 2])
def test_clients_of_four_nodes_see_one_store(seed: int) -> None:
    with HistoryStores(nodes=4) as ports:
        verdict = checked(run(ports, clients=8, operations=60, seed=seed))
    assert not verdict.reason, f"seed {seed}: {verdict}"


def test_torchs_own_server_is_accepted() -> None:
    """The control. Waits that run out of time are left out: afterwards torch 2.13 wakes clients for nothing."""
    server = torchs_own()
    verdict = checked(run([server.port], clients=8, operations=200, seed=1, patient=True))
    assert not verdict.reason, verdict


@pytest.mark.parametrize("mistake", MISTAKES)
def test_stores_that_are_broken_on_purpose_are_found_out(mistake: str) -> None:
    with HistoryStores(nodes=4, broken=mistake) as ports:
        found = [checked(run(ports, clients=8, operations=40, seed=seed, patient=True)).reason for seed in (1, 2)]
    assert any(found)
