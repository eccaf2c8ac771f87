"""Random histories of torch's TCPStore clients on several nodes: what they ask, and what they were answered.

Run as a script it makes long ones and checks them: `scripts/check-store --help`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of every wait that runs out of time a warning
os.environ.setdefault("RES_OPTIONS", "attempts:0")  # see rank_process.py

import torch.distributed as dist
from histories import EMPTY, OUT_OF_TIME, Operation, Verdict, check
from history_stores import HistoryStores

OPERATIONS_OF_A_ROUND = 5
"""After so many of each client all go on to other keys: a key's history is short, and many want it at once."""
WAIT_MS = (700, 1000)
"""So much longer than an answer takes here that who runs out of time was not answered because nothing was there."""
CERTAIN_MS = (20_000, 20_000)
REGISTERS, COUNTERS, QUEUES = ("a", "b", "c"), ("n",), ("q",)
_ALL = "barrier"
OPERATIONS_BETWEEN_BARRIERS = 50


class Client:
    """One client, on a thread of its own."""

    def __init__(
        self, number: int, port: int, operations: int, clients: int, seed: int, *, patient: bool = False
    ) -> None:
        self.number = number
        self.history: list[Operation] = []
        self.error: BaseException | None = None
        self._store: Any = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        self._operations, self._clients, self._patient = operations, clients, patient
        self._dice = random.Random(f"{seed} {number}")
        self._calls = 0
        self._written = 0

    def run(self) -> None:
        try:
            for call in range(self._operations):
                if call % OPERATIONS_BETWEEN_BARRIERS == 0 and hasattr(self._store, "barrier"):
                    self._barrier(call)
                turn = call // OPERATIONS_OF_A_ROUND
                if call % OPERATIONS_OF_A_ROUND == 0:
                    self._certain(turn)
                self._any(turn)
        except BaseException as error:
            self.error = error

    def _barrier(self, call: int) -> None:
        """Nobody leaves before all have arrived, which `check_barriers` sees."""
        begin = time.monotonic_ns()
        self._store.barrier(f"all-{call}", self._clients, timedelta(seconds=20))
        self._note(_ALL, f"all-{call}", (), True, begin)

    def _certain(self, turn: int) -> None:
        """A key of its own, which is certain to come: who waits for it gets it."""
        value, begin = self._new(), time.monotonic_ns()
        key = f"{turn}-own-{self.number}"
        self._store.set(key, value)
        self._note("set", key, (value,), None, begin, written=(value,))

    def _await_certain(self, turn: int) -> None:
        keys = [f"{turn}-own-{other}" for other in self._dice.sample(range(self._clients), 2)]
        kind = self._dice.choice(("get", "wait", "multi_get"))
        if kind == "multi_get":
            self._blocking("get", keys, lambda: self._store.multi_get(keys), CERTAIN_MS)
        else:
            action = (lambda: self._store.get(keys[0])) if kind == "get" else None
            self._blocking(kind, keys[:1], action, CERTAIN_MS)

    def _any(self, turn: int) -> None:
        kind = self._dice.choices(("register", "counter", "queue", "many", "certain"), (6, 2, 3, 2, 2))[0]
        if kind == "certain":
            self._await_certain(turn)
            return
        name = f"{turn}-{{}}"
        if kind == "register":
            self._register(name.format(self._dice.choice(REGISTERS)))
        elif kind == "counter":
            self._counter(name.format(self._dice.choice(COUNTERS)))
        elif kind == "queue":
            self._queue(name.format(self._dice.choice(QUEUES)))
        else:
            self._many([name.format(register) for register in self._dice.sample(REGISTERS, 2)])

    def _register(self, key: str) -> None:
        store, value, begin = self._store, self._new(), time.monotonic_ns()
        kinds = ("set", "get", "compare_set", "check", "delete_key", "append", "wait")
        kind = self._dice.choices(kinds, (6, 6, 8, 6, 1, 2, 2))[0]
        if kind == "set":
            store.set(key, value)
            self._note(kind, key, (value,), None, begin, written=(value,))
        elif kind == "append":
            store.append(key, value.decode())
            self._note(kind, key, (value,), None, begin)
        elif kind == "compare_set":
            wanted = self._known(key)
            result = store.compare_set(key, wanted.decode(), value.decode())
            self._note(kind, key, (wanted, value), result, begin, written=(value,), seen=(result,))
        elif kind == "check":
            self._note(kind, key, (), store.check([key]), begin)
        elif kind == "delete_key":
            self._note(kind, key, (), store.delete_key(key), begin)
        else:
            self._blocking(kind, [key], (lambda: store.get(key)) if kind == "get" else None)

    def _counter(self, key: str) -> None:
        begin = time.monotonic_ns()
        if self._dice.random() < 0.7:
            delta = self._dice.randint(-3, 9)
            self._note("add", key, (delta,), self._store.add(key, delta), begin)
        else:
            self._blocking("get", [key], lambda: self._store.get(key))

    def _queue(self, key: str) -> None:
        store, begin = self._store, time.monotonic_ns()
        kind = self._dice.choices(("push", "pop", "pop_wait", "queue_len", "check"), (8, 3, 2, 2, 2))[0]
        if kind == "push":
            value = self._new()
            store.queue_push(key, value.decode())
            self._note(kind, key, (value,), None, begin, written=(value,))
        elif kind == "queue_len":
            self._note(kind, key, (), store.queue_len(key), begin)
        elif kind == "check":
            self._note(kind, key, (), store.check([key]), begin)
        elif kind == "pop":
            self._note(kind, key, (), self._pop(key, block=False), begin)
        else:
            self._blocking(kind, [key], lambda: self._pop(key, block=True))

    def _pop(self, key: str, *, block: bool) -> Any:
        try:
            return self._store.queue_pop(key, block)
        except dist.QueueEmptyError:
            return EMPTY

    def _many(self, keys: list[str]) -> None:
        begin = time.monotonic_ns()
        if self._dice.random() < 0.5:
            values = [self._new() for _ in keys]
            self._store.multi_set(keys, [value.decode() for value in values])
            for key, value in zip(keys, values, strict=True):
                self._note("set", key, (value,), None, begin, written=(value,), same=key != keys[0])
        else:
            self._blocking("get", keys, lambda: self._store.multi_get(keys))

    def _blocking(self, kind: str, keys: list[str], action: Any, limits_ms: tuple[int, int] = WAIT_MS) -> None:
        """A call that waits for keys, for so long."""
        if self._patient and limits_ms == WAIT_MS:
            return
        limit_ms = self._dice.randint(*limits_ms)
        limit = timedelta(milliseconds=limit_ms)
        self._store.set_timeout(limit)
        begin = time.monotonic_ns()
        try:
            found = self._store.wait(keys, limit) if action is None else action()
        except dist.DistStoreError as error:
            if "timeout" not in str(error) and "timed out" not in str(error):
                raise
            found = OUT_OF_TIME
        if found == OUT_OF_TIME and len(keys) > 1:  # which of them was not there is not said
            self._calls += 1
            return
        results = found if len(keys) > 1 else [found]
        for key, result in zip(keys, results, strict=True):
            seen = (result,) if isinstance(result, bytes) else ()
            self._note(kind, key, (), result, begin, limit_ns=limit_ms * 1_000_000, seen=seen, same=key != keys[0])

    def _new(self) -> bytes:
        self._written += 1
        return b"<%d.%d>" % (self.number, self._written)

    def _known(self, key: str) -> bytes:
        """What the key held when this client saw it last, or nothing."""
        for operation in reversed(self.history[-12:]):
            if operation.key == key:
                return next(iter((*operation.seen, *operation.written)), b"")
        return b""

    def _note(
        self,
        kind: str,
        key: str,
        arguments: tuple[Any, ...],
        result: Any,
        begin: int,
        *,
        limit_ns: int = 0,
        written: tuple[bytes, ...] = (),
        seen: tuple[bytes, ...] = (),
        same: bool = False,
    ) -> None:
        self._calls += not same
        end = time.monotonic_ns()
        seen = tuple(value for value in seen if value and value not in written)
        self.history.append(
            Operation(self.number, self._calls, kind, key, arguments, result, begin, end, limit_ns, written, seen)
        )


def run(ports: Sequence[int], clients: int, operations: int, seed: int, *, patient: bool = False) -> list[Operation]:
    """So many operations of each client, on the nodes in turn. Who is patient lets no wait run out of time."""
    made = [
        Client(number, ports[number % len(ports)], operations, clients, seed, patient=patient)
        for number in range(clients)
    ]
    threads = [threading.Thread(target=client.run, daemon=True) for client in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    errors = [client.error for client in made if client.error is not None]
    if errors:  # the others may have waited for the one that failed
        raise min(errors, key=lambda error: "barrier" in str(error))
    for client, thread in zip(made, threads, strict=True):
        if thread.is_alive():
            raise AssertionError(f"client {client.number} is stuck after {len(client.history)} operations")
    return [operation for client in made for operation in client.history]


def checked(history: Sequence[Operation]) -> Verdict:
    """Of everything that was asked."""
    arrivals = [operation for operation in history if operation.kind == _ALL]
    for operation in arrivals:
        others = [other for other in arrivals if other.key == operation.key]
        if operation.end < max(other.call for other in others):
            return Verdict("it left a barrier before all had arrived", operation.key, tuple(others))
    return check(operation for operation in history if operation.kind != _ALL)


def torchs_own() -> Any:
    """A server of torch's, for comparison."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/check-store")
    parser.add_argument("--operations", type=int, default=10_000, help="of all clients together [10000]")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--delay-ms", type=float, default=0.5, help="of a message between nodes, at most")
    parser.add_argument(
        "--torch-times-out",
        action="store_true",
        help="waits run out of time at torch's server, too, which then wakes clients that wait for something else",
    )
    options = parser.parse_args()
    each = -(-options.operations // options.clients)
    with HistoryStores(options.nodes, delay_ms=options.delay_ms) as ports:
        ours = run(ports, options.clients, each, options.seed)
    server = torchs_own()
    theirs = run([server.port], options.clients, each, options.seed, patient=not options.torch_times_out)
    failed = False
    for name, history in (("hyperpodrun", ours), ("torch", theirs)):
        verdict = checked(history)
        failed |= bool(verdict.reason)
        print(f"{name}: {len(history)} operations of {options.clients} clients, seed {options.seed}: {verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
