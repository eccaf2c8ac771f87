"""The keeper: a tiny process that outlives the agent by a moment, to leave no process of the job behind.

Run as a file by `processes.Keeper`, with nothing imported but the standard library's core: it must start in a few
milliseconds and be able to do its work on a machine that is out of everything. The agent uses its functions.
It waits for the agent's end of a pipe to close. However the agent ended, every process that carries the job's mark in
its environment is then killed, again and again until none is left.
"""

import os
import signal
import sys
import time

ROUNDS_S = 5.0
"""How long the keeper goes on killing: a process in uninterruptible sleep must not keep it for ever."""
CLEANING_S = 2.0
"""How long who cleans up after others has for that, once they are gone."""


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


def cleans_up(pid: int) -> bool:
    """Whether the only task of a process is to remove what others leave behind, as soon as they are gone: the resource
    tracker of Python, also joblib's, and the manager of torch's shared memory. Killed, they remove nothing."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read()
    except OSError:
        return False
    return b"resource_tracker import main" in line or line.split(b"\0")[0].endswith(b"torch_shm_manager")


def socket_folders(pids: list[int]) -> set[str]:
    """Folders of `multiprocessing` (`pymp-*`) in which these processes have sockets. Each would remove its own at its
    end; killed, it does not."""
    sockets = {}
    if not pids:
        return set()
    try:
        with open("/proc/net/unix", "rb") as file:
            for line in file:
                fields = line.split(None, 7)
                if len(fields) == 8 and b"/pymp-" in fields[7]:
                    sockets[b"socket:[" + fields[6] + b"]"] = os.path.dirname(os.fsdecode(fields[7].rstrip(b"\n")))
    except OSError:
        return set()
    found = set()
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                folder = sockets.get(os.readlink(f"/proc/{pid}/fd/{name}".encode()))
                if folder is not None and os.path.basename(folder).startswith("pymp-"):
                    found.add(folder)
        except OSError:
            pass  # gone meanwhile, or not ours to look at
    return found


def kill_all(mark: bytes) -> None:
    folders: set[str] = set()
    _kill_all(mark, folders)
    for folder in folders:
        remove_tree(folder)


def _kill_all(mark: bytes, folders: set[str]) -> None:
    begun = time.monotonic()
    alone_since = None
    pause = 0.001
    while time.monotonic() < begun + ROUNDS_S:
        marked = marked_processes(mark)
        found = [pid for pid in marked if not cleans_up(pid)]
        if not found:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() > alone_since + CLEANING_S:
                found = marked
        if not marked:
            return
        folders |= socket_folders(found)
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
        if os.path.basename(cache) == f"job-{token}":
            remove_tree(cache)


def remove_tree(directory: str) -> None:
    for parent, directories, files in os.walk(directory, topdown=False):
        for name in (*files, *directories):
            path = os.path.join(parent, name)
            try:  # noqa: SIM105
                os.rmdir(path) if name in directories and not os.path.islink(path) else os.unlink(path)
            except OSError:
                pass  # another has done it, or will: the next job on this machine
    try:  # noqa: SIM105
        os.rmdir(directory)
    except OSError:
        pass  # likewise


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
        remove_tree(directory)


if __name__ == "__main__":
    main()
