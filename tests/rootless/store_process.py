"""A StoreServer in a process of its own, driven by the tests.

Some calls of torch's TCPStore client (`list_keys`, `queue_len`) hold the GIL while they wait for the answer,
so a server in a thread beside such a client would never get to answer. `StoreProcess` is the tests' side; run
as a script, this file is the server's side: a line of JSON on standard input is one call, a line on standard
output its result.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class StoreProcess:
    """The tests' handle on a store."""

    def __init__(self, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port: int = self._result()

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()
        assert self._process.returncode == 0, "the store process died or did not close cleanly"

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of the server, or of `_Served`, in the server's loop."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._result()

    def _result(self) -> Any:
        assert self._process.stdout is not None
        outcome = json.loads(self._process.stdout.readline())
        if "error" in outcome:
            raise RuntimeError(outcome["error"])
        return outcome["result"]

    def until(self, name: str, wanted: Callable[[Any], bool], *arguments: Any) -> Any:
        """Call until the result is as wanted; fails after 20 s."""
        deadline = time.monotonic() + 20
        while not wanted(result := self.call(name, *arguments)):
            assert time.monotonic() < deadline, f"{name} is still {result}"
            time.sleep(0.001)
        return result

    def until_blocked(self, count: int) -> None:
        """Wait until this many clients block."""
        self.until("blocked", lambda blocked: blocked == count)


async def _serve(options: dict[str, Any]) -> None:
    import dataclasses

    from hyperpodrun.rootless.server import StoreServer
    from hyperpodrun.rootless.wire import Limits

    lines: list[str] = []
    limits = Limits(**options.pop("limits", {}))
    server = StoreServer(limits=limits, log=lines.append, **options)

    extra: dict[str, Callable[..., Any]] = {
        "blocked": lambda: sum(session.waiter is not None for session in server._hub.connections),
        "open": lambda: len(server._hub.connections),
        "lines": lambda: lines,
        "counters": lambda: dataclasses.asdict(server.counters),
        "loaded": lambda name: name in sys.modules,
        "values": lambda epoch: [value.hex() for value in server._keyspace.values(epoch)],
    }

    def answer(outcome: dict[str, Any]) -> None:
        print(json.dumps(outcome), flush=True)

    answer({"result": await server.start()})
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        name, *arguments = json.loads(line)
        try:
            answer({"result": (extra.get(name) or getattr(server, name))(*arguments)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    await server.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
