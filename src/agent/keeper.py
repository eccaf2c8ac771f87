"""The keeper: a tiny process that outlives the agent by a moment, to leave no process of the job behind.

Run as a file by `processes.Keeper`, with nothing imported but the standard library's core: it must start in a few
milliseconds and be able to do its work on a machine that is out of everything.
It waits for the agent's end of a pipe to close. However the agent ended, every process that carries the job's mark in
its environment is then killed, again and again until none is left.
"""

import os
import signal
import sys
import time

ROUNDS_S = 5.0
"""How long the keeper goes on killing: a process in uninterruptible sleep must not keep it for ever."""


def marked_processes(mark: bytes) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            pass  # gone meanwhile, or not ours to look at
    return found


def kill_all(mark: bytes) -> None:
    deadline = time.monotonic() + ROUNDS_S
    pause = 0.001
    while time.monotonic() < deadline:
        found = marked_processes(mark)
        if not found:
            return
        for pid in found:
            try:  # noqa: SIM105  # not one import more than needed
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # gone meanwhile
        time.sleep(pause)  # the kernel needs a moment to take them away; a new one may have been forked
        pause = min(0.1, pause * 2)


def remove_caches(directory: str, token: str) -> None:
    """What the host of data producers has said is to go with the job: directories named after it, and no others."""
    try:
        with open(os.path.join(directory, "caches")) as file:
            caches = file.read().splitlines()
    except OSError:
        return  # there are none
    for cache in caches:
        if os.path.basename(cache) != f"job-{token}":
            continue
        for parent, directories, files in os.walk(cache, topdown=False):
            for name in (*files, *directories):
                path = os.path.join(parent, name)
                try:  # noqa: SIM105
                    os.rmdir(path) if name in directories and not os.path.islink(path) else os.unlink(path)
                except OSError:
                    pass  # the next job that uses the cache directory will see to it
        try:  # noqa: SIM105
            os.rmdir(cache)
        except OSError:
            pass  # likewise


def remove(directory: str) -> None:
    """A directory of the agent's, for sockets or state, if the agent could not do it."""
    try:
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
    except OSError:
        pass  # it could


def main() -> None:
    # A scheduler that signals every process of a step means the workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    mark = os.environb[b"KEEPER_TOKEN"]
    while os.read(int(sys.argv[1]), 1):
        pass
    kill_all(mark)
    for directory in sys.argv[2:]:
        remove_caches(directory, mark.decode().partition("=")[2])
        remove(directory)


if __name__ == "__main__":
    main()
