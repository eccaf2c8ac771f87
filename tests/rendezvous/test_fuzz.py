"""Random and mutated bytes on every socket of a live agent: one line for each stranger, and the job is undisturbed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.members import Configuration, ConfigurationChange, Configurations, Member
from hyperpodrun.protocol import messages as worker_messages
from hyperpodrun.rendezvous.addresses import format_address
from hyperpodrun.rendezvous.sockets import CONTROL, STORE
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless import shard_messages

SCRIPT = """
from __future__ import annotations
import json, os, pathlib, sys, time
from hyperpodrun import HPCallWrapper, HPWrapper

directory = pathlib.Path(sys.argv[1])

@HPWrapper()
def main(caller: HPCallWrapper | None = None):
    (directory / f"epoch-{caller.epoch}.{os.environ['RANK']}.tmp").write_text(json.dumps(dict(os.environ)))
    (directory / f"epoch-{caller.epoch}.{os.environ['RANK']}.tmp").rename(
        directory / f"epoch-{caller.epoch}.{os.environ['RANK']}")
    while not (directory / "stop").exists():
        time.sleep(0.02)

main()
"""
VIEWS = Configurations(Configuration(3, 1, (Member(0, "key", "host", "127.0.0.1:1", 2),), 1), Configuration(3, 2))
CONTROL_SAMPLES = [
    msg.Join("another job", "key", "host", "127.0.0.1:1", 2),
    msg.Hold(),
    msg.Redirect("127.0.0.1:1"),
    msg.Refuse("no"),
    msg.RequestVote(9, (9, 9), pre=False),
    msg.RequestVote(9, (9, 9), pre=True),
    msg.Vote(9, pre=False, granted=True),
    msg.Lead(9, ConfigurationChange((0, 0), (9, 9), (), VIEWS.agreed.members, 1), VIEWS, msg.JobMemory((9, 9))),
    msg.Release(9, 0, "because", removed=True),
    msg.Heartbeat(1, 0, 99, 99),
    msg.Order(9, 0, 1, 0, cmd.FailEpoch(0, cmd.Cause("signal", None, "x"), 1)),
    msg.Order(9, 0, 1, 0, cmd.End(0, "over")),
    msg.Tell(9, 0, 1, 0, msg.Report((1, 1))),
    msg.Tell(9, 0, 1, 0, ev.Exited(0, 0, 1)),
]
STORE_SAMPLES = [
    shard_messages.Batch(0, 1, 0, (shard_messages.Ask(1, rq.Set(b"key", b"value")),)),
    shard_messages.Batch(0, 2, 0, (shard_messages.Ask(2, rq.Wait((b"a", b"b")), together=True),)),
    shard_messages.Batch(0, 3, 0, (shard_messages.Ask(3, rq.Barrier(b"a", 3)), shard_messages.Forget(3))),
    shard_messages.Batch(0, 1, 2, (shard_messages.Answer(1, b"reply", (b"value", None)),)),
    shard_messages.Batch(0, 2, 2, (shard_messages.Revoke(b"key", (1,)), shard_messages.Released(b"key"))),
    shard_messages.Batch(0, 0, 2, again=True),
]


def mutated(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randrange(1, 5)):
        if changed:
            changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed[: dice.randrange(len(changed) + 1)] if dice.random() < 0.3 else changed)


def strangers_speak(dice: random.Random, address: str) -> None:
    """Connections that say all that agents say to each other, whole and mutated, without being members."""
    control = [msg.encode(sample) for sample in CONTROL_SAMPLES]
    store = [shard_messages.encode(sample) for sample in STORE_SAMPLES]
    context = zmq.Context()
    try:
        for number in range(40):
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.IDENTITY, f"stranger-{number}|127.0.0.1:{1 + number}".encode())
            dealer.setsockopt(zmq.LINGER, 1000)
            dealer.setsockopt(zmq.IPV6, 1)
            dealer.connect(f"tcp://{address}")
            key = f"stranger-{number}".encode()
            for data in control:
                dealer.send_multipart([CONTROL, key, data])
            for data in store:
                dealer.send_multipart([STORE, key, data])
            channel, samples = dice.choice([(CONTROL, control), (STORE, store)])
            dealer.send_multipart([channel, key, mutated(dice, dice.choice(samples))])
            dealer.send_multipart([dice.randbytes(dice.randrange(40)) for _ in range(dice.randrange(1, 6))])
            dealer.close()
    finally:
        context.term()  # when all is sent


def garbage(dice: random.Random, connect: Callable[[], socket.socket], beginnings: list[bytes]) -> None:
    for _ in range(60):
        with connect() as sock, contextlib.suppress(OSError):  # it has closed already
            sock.sendall(mutated(dice, dice.choice(beginnings)) + dice.randbytes(dice.randrange(300)))
            sock.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                sock.recv(100)


def false_workers_speak(dice: random.Random, endpoint: str) -> None:
    """On the agent's socket for its workers, whose directory only its user can enter."""
    samples = [
        worker_messages.encode(worker_messages.Completed(0)),
        worker_messages.encode(worker_messages.Attach(1, None)),
    ]
    context = zmq.Context()
    try:
        for number in range(30):
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.IDENTITY, dice.choice([b"77.%d" % number, b"0.9%d" % number, b"x%d" % number]))
            dealer.setsockopt(zmq.LINGER, 1000)
            dealer.connect(endpoint)
            for _ in range(3):
                dealer.send(mutated(dice, dice.choice(samples)))
            dealer.send_multipart([dice.randbytes(dice.randrange(40)) for _ in range(dice.randrange(1, 4))])
            dealer.close()
    finally:
        context.term()


def wait_for(path: Path) -> dict[str, str]:
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is not there"
        time.sleep(0.02)
    return json.loads(path.read_text())


def free_address() -> tuple[str, int]:
    """On the IPv6 loopback, where there is one: agents are found and meet there like anywhere."""
    for family, host in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]
    raise AssertionError("no loopback")


def unix(path: str, kind: int) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.connect(path)
        return sock

    return connect


def test_a_live_job_is_undisturbed(start: Any, script: Callable[[str], Path], tmp_path: Path) -> None:
    dice = random.Random(5)
    room = tmp_path / "room"
    room.mkdir()
    host, port = free_address()
    address = format_address(host, port)
    options = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={address}", "--inprocess-restart", "--insecure"]
    launches = [start(*options, script(SCRIPT), room) for _ in range(2)]
    environments = [wait_for(room / f"epoch-0.{rank}") for rank in range(2)]

    strangers_speak(dice, address)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(54, b"\0")
    garbage(dice, lambda: socket.create_connection((host, port)), [greeting, b"GET / HTTP/1.1\r\n"])
    for environment in environments:
        store = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
        validate = b"\x00" + struct.pack("<I", 0x3C85F7CE)
        wait = b"\x05" + struct.pack("<QQ", 1, 3) + b"key"
        garbage(dice, lambda store=store: socket.create_connection(store), [validate, validate + wait])
        false_workers_speak(dice, environment["HYPERPODRUN_AGENT"])
        garbage(dice, unix(environment["HYPERPODRUN_AGENT"].removeprefix("ipc://"), socket.SOCK_STREAM), [greeting])
        garbage(dice, unix(environment["HYPERPODRUN_DATA"], socket.SOCK_SEQPACKET), [b"\x81\xa4type\xa5Hello"])

    (room / "stop").touch()
    for launch in launches:
        finished = launch.wait(40)
        assert finished.returncode == 0, finished.output
        assert finished.recoveries == []
        assert "Traceback" not in finished.stderr, finished.output
        lines = finished.stderr.splitlines()
        said = [line.partition("reason=")[0] for line in lines if "bad-message" in line]
        assert len(said) == len(set(said)), "one line for each stranger"
    assert not list(room.glob("epoch-1.*")), "no epoch has failed"
