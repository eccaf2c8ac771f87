"""A process that has imported torch and runs the tests' snippets: one rank, used again and again.

`RankProcess` is the tests' side; run as a script, this file is the rank's side. A snippet is the body of a
function with the names of `scope` below, and everything that earlier snippets made global, to use; what it
returns, or `raised` and the exception's name and text, comes back.

RES_OPTIONS: each torch client looks its peer up in the DNS, which now and then takes 5 s; here it need not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from typing import Any


class RankProcess:
    """The tests' handle on a rank."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "RES_OPTIONS": "attempts:0", **environment},
        )

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(timeout=20)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def start(self, snippet: str, **given: Any) -> None:
        """Begin a snippet, with these names set; `result` ends it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([textwrap.dedent(snippet), given]) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """What the snippet returned; fails after 30 s."""
        assert self._process.stdout is not None
        timer = threading.Timer(30, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        assert line, "the rank died, or did not finish in 30 s"
        return json.loads(line)

    def run(self, snippet: str, **given: Any) -> Any:
        """A snippet from begin to end."""
        self.start(snippet, **given)
        return self.result()


def _main() -> None:
    import datetime
    import time

    import torch
    import torch.distributed as dist

    def connect(port: int, timeout: float = 20.0, world_size: int | None = None) -> dist.TCPStore:
        return dist.TCPStore(
            "127.0.0.1", port, world_size, is_master=False, timeout=datetime.timedelta(seconds=timeout)
        )

    def seconds(number: float) -> datetime.timedelta:
        return datetime.timedelta(seconds=number)

    scope: dict[str, Any] = {
        "torch": torch,
        "dist": dist,
        "connect": connect,
        "seconds": seconds,
        "PrefixStore": dist.PrefixStore,
        "os": os,
        "time": time,
        "threading": threading,
    }
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        snippet, given = json.loads(line)
        scope.update(given)
        exec("def snippet():\n" + textwrap.indent(snippet.strip("\n"), "    "), scope)
        try:
            outcome = scope["snippet"]()
        except Exception as error:
            outcome = {"raised": type(error).__name__, "text": str(error)}
        print(json.dumps(outcome, default=lambda value: value.decode("latin-1")), file=out, flush=True)


if __name__ == "__main__":
    _main()
