"""torchelastic's file timers: a worker that is late is killed, and nothing else is, whatever is written to the pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hyperpodrun.agent.node.file_timers import FileTimers, pipe_for
from hyperpodrun.agent.output.console import Console
from hyperpodrun.protocol.names import JOB_TOKEN

TOKEN = "0123456789abcdef"


class Node:
    """The pipe of a node, its watcher, and processes that carry the job's mark or not."""

    def __init__(self, directory: Path) -> None:
        pipe = pipe_for(directory, {"TORCHELASTIC_ENABLE_FILE_TIMER": "1"})
        assert pipe is not None
        self.pipe = pipe
        self.console = Console()
        self.ranks: dict[int, int] = {}
        self.timers = FileTimers(pipe, TOKEN, self.console, self.ranks.get)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def process(self, *, marked: bool = True) -> subprocess.Popen[bytes]:
        environment = {**os.environ, JOB_TOKEN: TOKEN if marked else "another job's"}
        process = subprocess.Popen(["sleep", "3600"], env=environment)
        self.processes.append(process)
        deadline = time.monotonic() + 10
        while JOB_TOKEN.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
            assert time.monotonic() < deadline  # the kernel shows it a moment after exec has begun
            time.sleep(0.001)
        return process

    def say(self, *lines: bytes | str) -> None:
        with open(self.pipe, "wb") as pipe:
            pipe.write(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for process in self.processes:
            process.kill()
            process.wait()
        self.timers.close()
        self.console.close()


def line(process: subprocess.Popen[bytes], scope: str, after: float, signum: int = signal.SIGKILL) -> str:
    expires = -1 if after < 0 else time.time() + after
    row = {"version": 1, "pid": process.pid, "scope_id": scope, "expiration_time": expires, "signal": int(signum)}
    return json.dumps(row) + "\n"


@pytest.fixture
def node(tmp_path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


def test_who_is_late_is_killed_and_who_is_done_is_not(node, capfd):
    late, done = node.process(), node.process()
    node.ranks[late.pid] = 7
    node.say(line(done, "a", 0.2), line(late, "a", 0.4), line(late, "b", 3600))
    node.say(line(done, "a", -1))
    assert late.wait(10) == -signal.SIGKILL
    assert done.poll() is None
    node.close()
    assert f"timer-expired rank=7 pid={late.pid} scope=a signal=SIGKILL" in capfd.readouterr().err


def test_the_signal_is_the_clients_and_none_is_none(node, capfd):
    process, told = node.process(), node.process()
    node.say(line(told, "only told of", 0, 0), line(process, "z", 0, signal.SIGTERM))
    assert process.wait(10) == -signal.SIGTERM
    assert told.poll() is None
    node.close()
    assert "signal=none" in capfd.readouterr().err


BAD: dict[str, Callable[[Node], bytes | str]] = {
    "a process of another job": lambda node: line(node.process(marked=False), "a", 0),
    "a process that is none": lambda node: line(node.process(), "a", 0).replace('"pid": ', '"pid": 9999'),
    "pid 0": lambda node: '{"pid": 0, "scope_id": "a", "expiration_time": 1.0, "signal": 9}\n',
    "init": lambda node: '{"pid": 1, "scope_id": "a", "expiration_time": 1.0, "signal": 9}\n',
    "a signal that is none": lambda node: line(node.process(), "a", 0).replace('"signal": 9', '"signal": 999999999999'),
    "another signal that is none": lambda node: line(node.process(), "a", 0).replace('"signal": 9', '"signal": 99'),
    "no JSON": lambda node: b"\xff\xfe\0 what\n",
    "another type": lambda node: '{"pid": "1", "scope_id": 3, "expiration_time": null, "signal": 9}\n',
    "a line without an end": lambda node: b"x" * 300_000 + b"\n",
    "an empty line": lambda node: b"\n",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_is_no_timer_of_this_job_kills_nobody_and_is_told_once(node, capfd, bad):
    node.say(bad(node), bad(node))
    late = node.process()
    node.say(line(late, "a", 3600.0), line(late, "b", 0))
    assert late.wait(10) == -signal.SIGKILL, "it is still watched"
    assert [process.poll() for process in node.processes if process is not late] == [None] * (len(node.processes) - 1)
    node.close()
    assert capfd.readouterr().err.count("timer-refused") == 1


def test_a_file_of_the_users_is_not_replaced(tmp_path):
    file = tmp_path / "precious"
    file.write_text("data")
    with pytest.raises(OSError, match="no named pipe"):
        pipe_for(tmp_path, {"TORCHELASTIC_ENABLE_FILE_TIMER": "1", "TORCHELASTIC_TIMER_FILE": str(file)})
    assert pipe_for(tmp_path, {"TORCHELASTIC_ENABLE_FILE_TIMER": "0", "TORCHELASTIC_TIMER_FILE": str(file)}) is None
    assert file.read_text() == "data"


def test_a_worker_that_is_late_by_torchs_own_timer_is_killed_and_started_anew(run, script):
    body = """
import os, time
import torch.distributed.elastic.timer as timer
timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
with timer.expires(after=3600):
    pass
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    with timer.expires(after=0.3, scope="step 3"):
        time.sleep(60)
print("done", flush=True)
"""
    finished = run("--max-restarts=1", script(body), TORCHELASTIC_ENABLE_FILE_TIMER="1")
    assert (finished.returncode, finished.stdout) == (0, "done\n"), finished.output
    assert 'scope="step 3" signal=SIGKILL' in finished.stderr
