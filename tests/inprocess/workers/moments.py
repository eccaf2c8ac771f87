"""Run under hyperpodrun by test_moments.py: one wrapped function for each moment in which a fault can come.

In each, the first attempt fails on one rank while the other is somewhere in particular; the second attempt must
succeed in the same processes. A line `<name> rank=R pid=P attempts=N <what the function returned>` says so.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper

LONG = 3600.0
RANK = int(os.environ["RANK"])
moments = []
attempts: dict[str, int] = {}
"""Epochs that each moment took."""
entered: dict[str, int] = {}


class Boom(Exception):
    pass


def moment(function):
    """The function is called as function(caller, attempt), attempt counted from 0."""

    @HPWrapper()
    def body(caller: HPCallWrapper = None):
        # Counted in epochs: a rank that is told of the fault before it gets here is not entered in that epoch.
        attempt = caller.epoch - sum(attempts.values())
        entered[function.__name__] = attempt + 1
        value = function(caller, attempt)
        if dist.is_initialized():
            dist.destroy_process_group()
        return value

    moments.append((function.__name__, body))
    return function


def work(caller):
    """A step: the group comes up and sums."""
    dist.init_process_group("gloo")
    ones = torch.ones(1000)
    dist.all_reduce(ones)
    assert ones[0].item() == dist.get_world_size()
    caller.step_completed()


@moment
def nothing_fails(caller, attempt):
    work(caller)
    return "fine"


@moment
def peer_waits_in_init_process_group(caller, attempt):
    if attempt == 0 and RANK == 0:
        time.sleep(0.2)  # so that the other one is in it
        raise Boom
    work(caller)


@moment
def peer_waits_for_a_store_key(caller, attempt):
    work(caller)
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.2)
            raise Boom
        dist.distributed_c10d._get_default_store().get("never set")


@moment
def peer_waits_in_all_reduce(caller, attempt):
    work(caller)
    if attempt == 0:
        if RANK == 1:
            raise Boom
        dist.all_reduce(torch.ones(10_000_000))


@moment
def peer_waits_in_recv(caller, attempt):
    work(caller)
    if attempt == 0:
        if RANK == 1:
            time.sleep(0.1)
            raise Boom
        dist.recv(torch.ones(10), src=1)


@moment
def peer_waits_in_a_subgroup(caller, attempt):
    work(caller)
    group = dist.new_group([0, 1])
    if attempt == 0:
        if RANK == 0:
            raise Boom
        dist.barrier(group)


@moment
def peer_waits_in_new_group(caller, attempt):
    work(caller)
    if attempt == 0 and RANK == 0:
        time.sleep(0.1)
        raise Boom
    dist.barrier(dist.new_group([0, 1]))


@moment
def peer_computes_in_python(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.1)
            raise Boom
        while True:
            sum(range(1000))
    work(caller)


@moment
def peer_sleeps(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            raise Boom
        time.sleep(LONG)
    work(caller)


@moment
def peer_waits_for_a_queue_a_lock_and_an_event(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            raise Boom
        waits = [queue.Queue().get, threading.Event().wait]
        for wait in waits:
            try:
                wait(timeout=LONG)
            finally:
                continue_elsewhere = threading.Lock()
                continue_elsewhere.acquire()
    work(caller)


@moment
def peer_swallows_everything(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.1)
            raise Boom
        while True:
            try:  # noqa: SIM105
                time.sleep(0.001)
            except BaseException:  # what the gate must be able to live with
                pass
    work(caller)


class SleepsWhenFreed:
    def __del__(self):
        time.sleep(0.5)


@moment
def interrupt_lands_in_a_finalizer(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.1)
            raise Boom
        thing = SleepsWhenFreed()
        del thing  # the interrupt is raised in __del__, from which no exception comes out
        time.sleep(LONG)
    work(caller)


@moment
def peer_cleans_up_and_raises_something_else(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            raise Boom
        try:
            time.sleep(LONG)
        finally:
            time.sleep(0.05)
            raise ValueError("from the clean-up")
    work(caller)


finished_sections: list[int] = []


@moment
def peer_is_in_a_critical_section(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.05)
            raise Boom
        with caller.atomic():
            time.sleep(0.3)
            finished_sections.append(1)
        time.sleep(LONG)
    work(caller)
    return f"finished={len(finished_sections)}"


@moment
def fault_inside_a_critical_section(caller, attempt):
    if attempt == 0:
        with caller.atomic():
            if RANK == 1:
                raise Boom
            time.sleep(0.05)
        time.sleep(LONG)
    work(caller)


@moment
def peer_hangs_in_a_critical_section(caller, attempt):
    work(caller)
    if attempt == 0:
        if RANK == 1:
            raise Boom
        with caller.atomic():
            dist.barrier()


@moment
def peer_has_returned_already(caller, attempt):
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.2)
            raise Boom
        return "too early"
    work(caller)
    return "in time"


@moment
def second_fault_at_once_in_the_next_epoch(caller, attempt):
    if attempt == 0 and RANK == 0:
        raise Boom
    if attempt == 1 and RANK == 1:
        raise Boom
    work(caller)


@moment
def every_rank_raises(caller, attempt):
    work(caller)
    if attempt == 0:
        raise Boom


@moment
def un_waited_work_is_under_way(caller, attempt):
    work(caller)
    if attempt == 0:
        if RANK == 1:
            raise Boom
        handles = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(4)]
        assert handles
        time.sleep(LONG)


class SlowData(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.5)
        return torch.ones(1)


@moment
def data_loader_workers_are_busy(caller, attempt):
    loader = torch.utils.data.DataLoader(SlowData(), num_workers=2, batch_size=8)
    if attempt == 0:
        if RANK == 0:
            time.sleep(0.5)
            raise Boom
        for batch in loader:
            assert batch is not None
    work(caller)


heard: list[int] = []


@moment
def user_signal_handlers_work(caller, attempt):
    signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    signal.signal(signal.SIGALRM, lambda signum, frame: heard.append(signum))
    signal.raise_signal(signal.SIGUSR1)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while len(heard) < 2 * (attempt + 1):
        time.sleep(0.005)
    if attempt == 0:
        if RANK == 0:
            raise Boom
        time.sleep(LONG)
    work(caller)
    return f"heard={len(heard)}"


@moment
def environment_is_that_of_the_epoch(caller, attempt):
    assert os.environ["JOB_RESTART_COUNT"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == str(caller.epoch)
    assert (caller.rank, caller.world_size) == (RANK, 2)
    if attempt == 0:
        raise Boom
    work(caller)


def close_and_boom():
    """The other rank sees a broken connection some moments before it is told of the fault."""
    dist.destroy_process_group()
    time.sleep(0.3)
    raise Boom


@moment
def error_is_logged_and_the_process_exits(caller, attempt):
    try:
        if attempt == 0 and RANK == 0:
            raise Boom
        work(caller)
    except Exception:
        sys.exit(1)


@moment
def broken_connection_is_logged_and_the_process_exits_with_a_text(caller, attempt):
    dist.init_process_group("gloo")
    try:
        if attempt == 0 and RANK == 0:
            close_and_boom()
        dist.all_reduce(torch.ones(1))
    except Exception:
        sys.exit("this rank gives up")


@moment
def broken_connection_ends_in_good_order(caller, attempt):
    dist.init_process_group("gloo")
    try:
        if attempt == 0 and RANK == 0:
            close_and_boom()
        dist.all_reduce(torch.ones(1))
    except Exception:
        sys.exit()


@moment
def broken_connection_is_noted_and_the_process_exits_later(caller, attempt):
    dist.init_process_group("gloo")
    fine = True
    if attempt == 0 and RANK == 0:
        close_and_boom()
    try:
        dist.all_reduce(torch.ones(1))
    except Exception:
        fine = False
    if not fine:
        sys.exit(3)


@moment
def process_exits_in_a_finally(caller, attempt):
    try:
        if attempt == 0 and RANK == 0:
            raise Boom
        work(caller)
    finally:
        if attempt == 0:
            sys.exit(4)


@moment
def error_becomes_one_of_another_kind(caller, attempt):
    class Stop(BaseException):
        pass

    try:
        if attempt == 0 and RANK == 0:
            raise Boom
        work(caller)
    except Exception as error:
        raise Stop from error


@moment
def text_cannot_be_encoded(caller, attempt):
    if attempt == 0:
        raise Boom(os.fsdecode(b"caf\xe9") + "\x1b[2J\u202e" * 100_000)
    work(caller)


@moment
def text_cannot_be_had(caller, attempt):
    class Mute(Exception):
        ends_job = property(lambda self: 1 // 0)

        def __str__(self):
            raise Boom

    if attempt == 0:
        raise Mute
    work(caller)


@moment
def leaving_by_sys_exit_0_is_a_return(caller, attempt):
    if attempt == 0 and RANK == 1:
        raise Boom
    work(caller)
    dist.destroy_process_group()
    sys.exit(0)


def main() -> None:
    for name, body in moments:
        value = None
        with contextlib.suppress(SystemExit):
            value = body()
        attempts[name] = entered[name]
        # One write: both ranks share the pipe.
        sys.stdout.write(f"{name} rank={RANK} pid={os.getpid()} attempts={attempts[name]} {value}\n")
    print(f"threads={sorted(t.name for t in threading.enumerate())}", file=sys.stderr)


if __name__ == "__main__":
    main()
