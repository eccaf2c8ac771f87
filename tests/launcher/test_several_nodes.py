"""Several agents on one machine, on its loopback address, as with torchrun."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["torch.distributed.run", "hyperpodrun"])
def test_roles_that_differ_between_nodes_count_their_own_ranks(tmp_path, free_port, script, module):
    names = ("WORLD_SIZE", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE")
    worker = script(
        f"import os, sys\nopen(f'told.{{os.getpid()}}', 'w').write(' '.join(os.environ[name] for name in {names!r}))"
    )
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=roles"]
    nodes = [
        subprocess.Popen([sys.executable, "-m", module, *options, f"--role={role}", f"--nproc-per-node={n}", worker])
        for role, n in (("trainer", 2), ("reader", 1))
    ]
    try:
        assert [node.wait(90) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    told = sorted(path.read_text() for path in tmp_path.glob("told.*"))
    assert told == ["3 2 1 reader 0 1", "3 2 2 trainer 0 2", "3 2 2 trainer 1 2"]


def test_a_spare_succeeds_with_the_job_and_another_job_at_its_endpoint_is_refused(tmp_path, free_port, script):
    worker = script(
        "import os, pathlib, time\npathlib.Path(f'up.{os.getpid()}').touch()\n"
        "while not pathlib.Path('go').exists():\n    time.sleep(0.01)\n"
    )
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=1"]
    other = script("print('never')", name="other.py")
    nodes = []

    def start(worker=worker, *more) -> None:
        with open(tmp_path / f"node.{len(nodes)}", "wb") as log:
            nodes.append(subprocess.Popen([sys.executable, "-m", "hyperpodrun", *options, *more, worker], stderr=log))

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, logs()
            time.sleep(0.01)

    def logs() -> str:
        return "".join(path.read_text() for path in sorted(tmp_path.glob("node.*")))

    try:
        start()
        start()
        wait_for(lambda: len(list(tmp_path.glob("up.*"))) == 2)
        start()
        wait_for(lambda: "node-joins node=2" in logs())
        start(other)
        start(worker, "--max-restarts=2")
        assert [node.wait(60) for node in nodes[3:]] == [1, 1], logs()
        assert "it runs " in logs(), logs()
        assert "other.py, and the job here " in logs()
        assert "it has --max-restarts=2, and the job here 1 (another job needs an endpoint of its own" in logs()
        (tmp_path / "go").touch()
        assert [node.wait(60) for node in nodes[:3]] == [0, 0, 0], logs()
        assert 'spare end="the job has succeeded, and nothing of it ran here"' in logs()
    finally:
        for node in nodes:
            node.kill()
    assert len(list(tmp_path.glob("up.*"))) == 2, "the spare has started a worker"


_MISTAKES = """
import os, pathlib, socket, struct, time

def blob(data):
    return struct.pack("<Q", len(data)) + data

def ask(request, answer):
    with socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), timeout=20) as store:
        store.sendall(b"\\0" + struct.pack("<I", 0x3C85F7CE))
        try:
            store.sendall(request)
            store.sendall(b"\\x0d" + struct.pack("<I", 7))
            got = store.recv(answer)
        except ConnectionError:
            got = b""
        return got

def wait_for(key):
    ask(b"\\6" + struct.pack("<Q", 1) + blob(key), 1)

if os.environ["RANK"] == "1":
    for number in range(8):
        key = b"k%d" % number  # a key of the other node is among them
        ask(b"\\1" + blob(key) + blob(b"text"), 4)
        assert ask(b"\\4" + blob(key) + struct.pack("<q", 1), 4) == b"", "add on text"
        assert ask(b"\\1" + blob(key) + blob(b"x" * (33 << 20)), 4) == b"", "a large value"
    ask(b"\\1" + blob(b"made") + blob(b"1"), 4)
wait_for(b"made")
pathlib.Path("done." + os.environ["RANK"]).touch()
"""


def test_a_scripts_mistakes_with_the_store_cost_no_node(tmp_path, free_port, script, both_succeed):
    worker = script(_MISTAKES)
    options = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=mistakes", "--start-method=spawn"]
    errors = both_succeed(options, worker)
    assert sorted(path.name for path in tmp_path.glob("done.*")) == ["done.0", "done.1"]
    assert not any("node-lost" in text or "bad-message" in text for text in errors)
