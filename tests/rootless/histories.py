"""Is what some clients of a store have seen possible, if there is one store that does one thing at a time?

Owns the model of a key, as torch's TCPStore serves it, and the search for an order (Wing and Gong, with the states that
were found to lead nowhere remembered). Pure: `history_runs.py` makes the histories.

A history is linearizable if it is for each key, so each is looked at alone: a request for several keys is one operation
on each, with the same beginning and end. What differs from a textbook's history:
- SET, APPEND, MULTI_SET and QUEUE_PUSH have no answer. Such a call has taken effect by the time at which a later call
  of its client was answered, as a connection is served in order, or anybody has seen the value of a later one.
- The operations of one client on one key keep their order, although their intervals then overlap.
- `get` waits and then reads, so it is two operations: the key was there, and then it had this value.
- A wait that ran out of time says that the key was absent at some moment near its deadline: before it by no more than
  an answer takes, and before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

_State = TypeVar("_State", bound=Hashable)
NO_ANSWER = {"set", "append", "push"}
OUT_OF_TIME = "out of time"
EMPTY = "empty"
"""What `pop` finds in a queue without elements."""


@dataclass(frozen=True)
class State:
    """One key: its value, None where it has none, and the elements of its queue."""

    value: bytes | None = None
    queue: tuple[bytes, ...] = ()

    @property
    def present(self) -> bool:
        return self.value is not None or bool(self.queue)


@dataclass(eq=False)
class Operation:
    """One call on one key. Times of `time.monotonic_ns`, of the same clock for all clients."""

    client: int
    number: int
    """Of the call, in its client's order."""
    kind: str
    key: str
    arguments: tuple[Any, ...] = ()
    result: Any = None
    call: int = 0
    end: int = 0
    limit_ns: int = 0
    """Of a call that may run out of time."""
    written: tuple[bytes, ...] = ()
    """Values that no other call writes."""
    seen: tuple[bytes, ...] = ()
    effect: int = field(default=0, repr=False)
    """By then it has taken effect."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a history; nothing if `reason` is empty."""

    reason: str = ""
    key: str = ""
    operations: tuple[Operation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.reason} (key {self.key})"] if self.reason else ["no difference"]
        first = min((operation.call for operation in self.operations), default=0)
        for operation in sorted(self.operations, key=lambda one: one.call):
            call, end = (operation.call - first) / 1e6, (operation.end - first) / 1e6
            said = f"{operation.kind}{operation.arguments} -> {operation.result!r}"
            lines.append(f"  {call:10.3f} .. {end:10.3f} ms  client {operation.client}  {said}")
        return "\n".join(lines)


LATE_NS = 500_000_000
"""An answer may take so long: what it says was so before."""


def check(history: Iterable[Operation], slack_ns: int = 20_000_000) -> Verdict:
    """The first key whose history no store can have, or nothing. `slack_ns`: by so much a deadline may come early."""
    operations = list(history)
    late = _early(operations, slack_ns)
    if late.reason:
        return late
    _find_effects(operations)
    by_key: dict[str, list[Operation]] = {}
    for operation in operations:
        by_key.setdefault(operation.key, []).extend(_halves(operation))
    for key, mine in by_key.items():
        if not linearizable(mine):
            return Verdict("no order of these gives what was seen", key, tuple(mine))
    return Verdict()


def _early(operations: Sequence[Operation], slack_ns: int) -> Verdict:
    for operation in operations:
        early = operation.result == OUT_OF_TIME and operation.end - operation.call < operation.limit_ns - slack_ns
        if early:
            return Verdict("it ran out of time before its time", operation.key, (operation,))
    return Verdict()


def _find_effects(operations: Sequence[Operation]) -> None:
    """When each call has taken effect at the latest."""
    seen_at: dict[bytes, int] = {}
    for operation in operations:
        for value in operation.seen:
            seen_at[value] = min(operation.end, seen_at.get(value, operation.end))
    by_client: dict[int, list[Operation]] = {}
    for operation in operations:
        by_client.setdefault(operation.client, []).append(operation)
    for mine in by_client.values():
        mine.sort(key=lambda one: one.number)
        latest, number = 1 << 63, None
        before: list[Operation] = []
        for operation in reversed(mine):
            if operation.number != number:  # calls of one number are one request
                latest = min([latest, *(_own_latest(one, seen_at) for one in before)])
                before, number = [], operation.number
            before.append(operation)
            operation.effect = min(latest, _own_latest(operation, seen_at))


def _own_latest(operation: Operation, seen_at: dict[bytes, int]) -> int:
    times = [seen_at[value] for value in operation.written if value in seen_at]
    return min(times, default=1 << 63) if operation.kind in NO_ANSWER else min([operation.end, *times])


def _halves(operation: Operation) -> list[Operation]:
    """A call in the steps that a client of torch takes."""
    steps = [operation.kind]
    if operation.kind in ("get", "wait", "pop_wait") and operation.result == OUT_OF_TIME:
        steps = ["absent"]
    elif operation.kind == "get":
        steps = ["present", "read"]
    elif operation.kind == "wait":
        steps = ["present"]
    elif operation.kind == "pop_wait":
        steps = ["present", "pop"] if operation.result == EMPTY else ["pop"]
    call = operation.call
    if steps == ["absent"]:
        call = max(operation.call, operation.call + operation.limit_ns - LATE_NS)
    return [
        Operation(
            operation.client, operation.number * 2 + step, kind, operation.key, operation.arguments, operation.result,
            call, operation.end, effect=operation.effect,
        )
        for step, kind in enumerate(steps)
    ]  # fmt: skip


def linearizable(operations: Sequence[Operation]) -> bool:
    """Whether one key can have answered so."""
    mine = sorted(operations, key=lambda one: (one.call, one.client, one.number))
    before = [0] * len(mine)
    """By index: the same client's call just before it, as a bit."""
    by_client: dict[int, list[int]] = {}
    for index, operation in enumerate(mine):
        by_client.setdefault(operation.client, []).append(index)
    for indices in by_client.values():
        indices.sort(key=lambda index: mine[index].number)
        for earlier, later in pairwise(indices):
            before[later] = 1 << earlier
    spans = [(one.call, one.effect) for one in mine]
    return has_an_order(spans, State(), lambda state, index: step(state, mine[index]), before)


def has_an_order(
    spans: Sequence[tuple[float, float]],
    first: _State,
    after: Callable[[_State, int], _State | None],
    before: Sequence[int] = (),
) -> bool:
    """Whether some order explains every result (Wing and Gong; what was found to lead nowhere is remembered).

    `spans`: when each call began, in that order, and by when it has taken effect. `after(state, index)`: the state
    after a call; None if it cannot have given its result then. `before`: by call, those that come before it, as bits.
    """
    everything = (1 << len(spans)) - 1
    tried: set[tuple[int, _State]] = set()
    stack: list[tuple[int, _State]] = [(0, first)]
    while stack:
        done, state = stack.pop()
        if done == everything:
            return True
        if (done, state) in tried:
            continue
        tried.add((done, state))
        horizon = min(effect for index, (_, effect) in enumerate(spans) if not done >> index & 1)
        for index, (call, _) in enumerate(spans):
            if call > horizon:
                break
            if done >> index & 1 or (before and before[index] & ~done):
                continue
            then = after(state, index)
            if then is not None:
                stack.append((done | 1 << index, then))
    return False


def step(state: State, operation: Operation) -> State | None:
    """The state after an operation that gave its result; None if it cannot have given that."""
    value, queue, result = state.value, state.queue, operation.result
    after, expected = state, result
    match operation.kind, operation.arguments:
        case "set", (new,):
            after = State(new, queue)
        case "append", (more,):
            after = State((value or b"") + more, queue)
        case "add", (delta,):
            expected = int(value or b"0") + delta
            after = State(b"%d" % expected, queue)
        case "compare_set", (wanted, new):
            if value is None and wanted:
                expected = wanted
            elif value is None or value == wanted:
                expected, after = new, State(new, queue)
            else:
                expected = value
        case "delete_key", ():
            expected, after = value is not None, State(None, queue)
        case "check", ():
            expected = state.present
        case "present", ():
            return state if state.present else None
        case "absent", ():
            return None if state.present else state
        case "read", ():
            expected = value or b""
        case "push", (new,):
            after = State(value, (*queue, new))
        case "pop", ():
            expected = queue[0] if queue else EMPTY
            after = State(value, queue[1:])
        case "queue_len", ():
            expected = len(queue)
        case other:
            raise AssertionError(f"no such operation {other}")
    return after if expected == result else None
