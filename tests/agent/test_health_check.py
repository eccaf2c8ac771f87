"""TORCHELASTIC_HEALTH_CHECK_PORT: probes are answered by the agent, and cannot hurt it."""

from __future__ import annotations

import http.client
import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest

WAITS = "import pathlib, time\npathlib.Path('up').touch()\nwhile not pathlib.Path('go').exists(): time.sleep(0.01)"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def wait_for_file(path: str) -> None:
    deadline = time.monotonic() + 30
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def ask(port: int, method: str = "GET", path: str = "/healthz", host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_probes_are_answered_while_the_job_runs_and_strangers_change_nothing(start, script, free_port):
    port = free_port()
    launch = start(script(WAITS), TORCHELASTIC_HEALTH_CHECK_PORT=str(port))
    wait_for_file("up")
    deadline = time.monotonic() + 30
    while True:
        try:
            assert ask(port) == (200, b"ok\n")
            break
        except ConnectionRefusedError:  # the worker is up before the agent's loop
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert ask(port, "HEAD") == (200, b"")
    assert ask(port, "GET", "/healthz?verbose")[0] == 200
    assert [ask(port, "GET", "/secret")[0], ask(port, "POST")[0]] == [404, 405]
    if socket.has_dualstack_ipv6():
        assert ask(port, host="::1")[0] == 200

    for nonsense in (b"\0\xff" * 10_000, b"GET\r\n\r\n", b"\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            try:
                stranger.sendall(nonsense)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
            except ConnectionError:
                pass  # it has been refused
    held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(100)]
    assert ask(port)[0] == 200, "who says nothing does not keep others out"
    for stranger in held:
        stranger.close()

    before = resource.prlimit(launch.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(launch.pid, resource.RLIMIT_NOFILE, (3, before[1]))  # none is left
    starved = socket.create_connection(("127.0.0.1", port), timeout=10)
    starved.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
    time.sleep(0.3)  # in which an agent that it ends would end
    resource.prlimit(launch.pid, resource.RLIMIT_NOFILE, before)
    assert starved.recv(4096).startswith(b"HTTP/1.1 200 OK")
    starved.close()

    Path("go").touch()
    finished = launch.wait(30)
    assert (finished.returncode, finished.stderr) == (0, ""), finished.output


@pytest.mark.parametrize("port", ["taken", "0", "0x50", "99999"])
def test_a_port_that_cannot_be_had_costs_a_line(run, script, port):
    with socket.create_server(("", 0)) as taken:
        wanted = str(taken.getsockname()[1]) if port == "taken" else port
        finished = run("--no-python", "true", TORCHELASTIC_HEALTH_CHECK_PORT=wanted)
    assert finished.returncode == 0, finished.output
    assert finished.stderr.startswith(f"hyperpodrun: no-health-check port={wanted} reason=")


def test_a_job_that_is_stopped_slowly_is_still_alive(start, script, free_port):
    port = free_port()
    body = f"import signal\nsignal.signal(signal.SIGTERM, lambda *_: open('asked', 'w'))\n{WAITS}"
    launch = start(script(body), TORCHELASTIC_HEALTH_CHECK_PORT=str(port))
    wait_for_file("up")
    os.kill(launch.pid, signal.SIGTERM)
    wait_for_file("asked")
    assert ask(port)[0] == 200
    Path("go").touch()
    assert launch.wait(30).returncode == 143
