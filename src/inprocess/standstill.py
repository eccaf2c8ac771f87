"""Does the main thread wait in torch.distributed for something that does not come?

Asked only once other ranks have returned from the wrapped function. gloo and the store have no callback for it, so it
is looked at: the main thread has stood at one place without running for a second, and either it is in a call of
torch.distributed or one of gloo's threads waits for a peer. A rank that computes, saves, or waits for anything else
(a queue, a data loader, a process, a disk) is not meant. What NCCL has queued waits on the device: there the groups'
numbers tell, when this rank has begun a collective that a rank which has returned never will, and the device is busy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from types import CodeType

from .aborts import nccl
from .aborts.gloo import progress, waits_for_a_peer

_STILL_FOR_S = 1.0
LOOK_EVERY_S = 0.25
_CALLS = ("wait", "recv", "send")
"""Methods of works and groups that user code calls itself, with no function of torch.distributed in between."""
_WAITING_FILES = ("torch/distributed/distributed_c10d.py", "torch/distributed/rendezvous.py")
"""Where torch waits for peers and for the store. Others of its files wait for disks (torch.distributed.checkpoint)."""
_STANDARD_LIBRARY = os.path.dirname(os.__file__)


class Standstill:
    """One question, asked every now and then on the monitor thread. `collectives`: see `protocol.messages.Returned`."""

    def __init__(self, collectives: Mapping[str, int]) -> None:
        self._collectives = collectives
        self._seen: object = None
        self._since = 0.0

    def waits(self) -> bool:
        """Whether nothing has moved for a second, and it is torch.distributed that is waited for."""
        now = time.monotonic()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return False
        place = (id(frame), frame.f_lasti)
        code = frame.f_code
        behind = nccl.ahead_of(self._collectives)
        # A thread that waits for the device spins or sleeps in turns; one that waits for a peer does not run at all.
        seen = (place, behind, None if behind else (_main_thread_runs(), progress()))
        if seen != self._seen:
            self._seen, self._since = seen, now
            return False
        if now - self._since < _STILL_FOR_S:
            return False
        del frame
        if behind and nccl.device_is_busy():
            return True
        within = code.co_filename.endswith(_WAITING_FILES)
        return within or waits_for_a_peer(main_thread=_may_wait_for_a_work(code))


def _may_wait_for_a_work(code: CodeType) -> bool:
    """Whether this is code of the user's that calls what a work has, and not a wait of Python's own."""
    if code.co_filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in code.co_filename:
        return False
    return any(name in _CALLS for name in code.co_names)


def _main_thread_runs() -> tuple[str, ...]:
    """What moves when the main thread runs: its time on a processor, and how often it has gone to sleep."""
    found: list[str] = []
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/stat") as file:
        found += file.read().rpartition(")")[2].split()[11:13]  # utime and stime
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/status") as file:
        found += [line for line in file if line.startswith("voluntary")]
    return tuple(found)
