"""What an interrupted attempt has started and nobody has ended does not keep a process whose script is over."""

from __future__ import annotations

SCRIPT = """
import atexit, multiprocessing, os, queue, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from hyperpodrun import HPCallWrapper, HPWrapper
from hyperpodrun.inprocess import leftovers

leftovers.LEFTOVER_TIMEOUT_S = 0.5
RANK, CODE = int(os.environ["RANK"]), int(sys.argv[1])
both = threading.Lock()


def stubborn():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()


def start_something():
    if RANK == 0:
        writer = threading.Thread(target=queue.Queue().get, name="writer")
        writer.start()
        atexit.register(writer.join)
        both.acquire()
        threading.Thread(target=both.acquire, name="deadlocked").start()
    elif RANK == 1:
        ThreadPoolExecutor(2, "pool").submit(threading.Event().wait)
    elif RANK == 2:
        child = multiprocessing.Process(target=threading.Event().wait, name="child")
        child.start()
        atexit.register(child.join)
        multiprocessing.Process(target=stubborn, name="daemon", daemon=True).start()
        multiprocessing.Queue().put(bytes(1 << 20))
    else:
        ProcessPoolExecutor(1).submit(time.sleep, 3600)


def last_words():
    time.sleep(1.5)
    print("written", flush=True)


@HPWrapper()
def main(caller: HPCallWrapper = None):
    if caller.epoch == 0:
        start_something()
        time.sleep(0.3)
        raise ValueError("bad batch")
    if RANK == 0:
        threading.Thread(target=last_words).start()


main()
sys.exit(CODE)
"""


def test_whatever_is_left_the_launch_ends(start, script):
    """With the exit code of the script; and what the last attempt has started is waited for."""
    path = script(SCRIPT)
    good = start("--nproc-per-node=4", "--inprocess-restart", path, "0")
    bad = start("--nproc-per-node=1", "--inprocess-restart", path, "7")
    finished = good.wait(60)
    assert finished.returncode == 0, finished.output
    assert finished.stdout == "written\n"
    for name in ("thread writer", "thread deadlocked", "thread pool_0", "thread QueueFeederThread", "child child"):
        assert name in finished.stderr, finished.output
    assert "in last_words" not in finished.stderr
    finished = bad.wait(60)
    assert finished.returncode == 1, finished.output
    assert "exited with code 7" in finished.stderr
