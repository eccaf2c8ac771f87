"""One rank leaves the wrapped function in good order and the others are still in it."""

from __future__ import annotations

import pytest

SCRIPT = """
import os, queue, sys, threading, time
import torch, torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper

HOW, RANK = sys.argv[1], int(os.environ["RANK"])
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
manager = CheckpointManager()
manager.register(model=model, optimizer=optimizer)


@HPWrapper(checkpoint_manager=manager)
def main(caller: HPCallWrapper = None):
    dist.init_process_group("gloo")
    manager.restore()
    ddp = manager.data_parallel(model)
    for step in manager.steps(8):
        if RANK == 1 and step == 5 and HOW == "exit":
            sys.exit(0)
        if RANK == 1 and step == 5 and HOW == "once" and caller.epoch == 0:
            return
        optimizer.zero_grad()
        ddp(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    print(f"trained rank={RANK} step={step}", flush=True)


@HPWrapper()
def uneven(caller: HPCallWrapper = None):
    dist.init_process_group("gloo")
    for batch in range(3 + RANK):
        dist.send(torch.ones(1), 1 - RANK) if RANK else dist.recv(torch.ones(1), 1 - RANK)
        dist.all_reduce(torch.ones(1))
        caller.step_completed()


@HPWrapper()
def alone(caller: HPCallWrapper = None):
    dist.init_process_group("gloo")
    two = dist.new_group([0, 1])
    if RANK == 0:  # evaluates, saves, and waits for things that are not torch's
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            sum(range(1000))
        time.sleep(1.5)
        try:
            queue.Queue().get(timeout=1.5)
        except queue.Empty:
            pass
    if RANK < 2:  # one of these waits, but for a rank that comes
        dist.barrier(two)
    print(f"alone rank={RANK}", flush=True)


@HPWrapper()
def afterwards(caller: HPCallWrapper = None):
    dist.barrier()
    time.sleep(RANK)


if HOW == "alone":
    alone()
    dist.barrier()
    afterwards()
    dist.destroy_process_group()
elif HOW == "uneven":
    uneven()
else:
    main()
"""


@pytest.fixture(scope="module")
def finished(start_any_time, tmp_path_factory):
    """All at once: they mostly wait."""
    path = tmp_path_factory.mktemp("leaving") / "worker.py"
    path.write_text(SCRIPT)
    launches = {
        how: start_any_time(f"--nproc-per-node={3 if how == 'alone' else 2}", "--inprocess-restart", path, how)
        for how in ("exit", "once", "uneven", "alone")
    }
    return {how: launch.wait() for how, launch in launches.items()}


def test_a_rank_that_leaves_its_loop_early_ends_the_job_in_seconds(finished):
    ended = finished["exit"]
    assert ended.returncode == 1, ended.output
    assert [row["rank"] for row in ended.recoveries] == [1], ended.output
    assert "it left manager.steps(8) at step 5) while rank 0 waits for it" in ended.stderr


def test_a_rank_that_leaves_its_loop_once_is_a_fault_like_another(finished):
    ended = finished["once"]
    assert ended.returncode == 0, ended.output
    assert sorted(ended.stdout.splitlines()) == ["trained rank=0 step=7", "trained rank=1 step=7"]
    assert len(ended.recoveries) == 1


def test_uneven_batches_without_a_checkpoint_manager_end_the_job(finished):
    ended = finished["uneven"]
    assert ended.returncode == 1, ended.output
    assert "rank 0 returned from the wrapped function while rank 1 waits for it" in ended.stderr


def test_a_rank_that_works_on_alone_is_left_alone(finished):
    ended = finished["alone"]
    assert ended.returncode == 0, ended.output
    assert not ended.recoveries
    assert ended.stdout.count("alone") == 3


STOPPED = """
import os, signal, sys, time
from hyperpodrun import HPCallWrapper, HPWrapper

RANK = int(os.environ["RANK"])


def stop(signum, frame):
    sys.exit(RANK)


@HPWrapper()
def main(caller: HPCallWrapper = None):
    signal.signal(signal.SIGTERM, stop)
    try:
        raise ValueError
    except ValueError:  # so that the exit seems to have a reason
        os.write(1, b"in\\n")  # at once: both ranks write to one pipe
        time.sleep(3600)


try:
    main()
finally:
    os.write(1, f"ended rank={RANK}\\n".encode())
"""


def test_scripts_that_exit_when_they_are_stopped_are_let_go(start, script):
    """With exit code 0 they would wait for each other, with another one for an epoch that does not come."""
    launch = start("--nproc-per-node=2", "--inprocess-restart", "--shutdown-timeout=60", script(STOPPED))
    assert launch.process.stdout is not None
    for _ in range(2):
        assert launch.process.stdout.readline() == "in\n"
    launch.process.terminate()
    finished = launch.wait(40)
    assert finished.returncode == 143, finished.output
    assert sorted(finished.stdout.splitlines()) == ["ended rank=0", "ended rank=1"]
