"""The node's GPUs, as NVML sees them: errors when they are reported, and the state of their memory at the start.

A thread waits for NVML's events; what they mean is judged by `control/job/gpu_errors.py`. Owns nothing of the workers:
whom an error concerns goes to the job as an event. Never imports torch, and nothing at all on a node without a GPU.
Called by: `agent.py`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...control.job import events as ev
from ...control.job.gpu_errors import Verdict, judge, judge_rows
from ..output.console import Console

if TYPE_CHECKING:
    import asyncio

    from ..workers.workers import Worker

_DRIVER = Path("/dev/nvidiactl")
_WAIT_MS = 1000
"""NVML's wait cannot be ended from outside: so long a closed watch still waits."""


class GpuWatch:
    """One per agent; does nothing where there is no GPU, or a driver that reports no errors."""

    def __init__(
        self,
        console: Console,
        workers: Iterable[Worker],
        on_event: Callable[[ev.Event], None],
        on_leave: Callable[[str], None],
    ) -> None:
        """`on_leave` is told why this node cannot go on."""
        self._console = console
        self._workers = workers
        self._on_event = on_event
        self._on_leave = on_leave
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to watch; errors are dealt with on `loop`."""
        if _DRIVER.exists():
            self._loop = loop
            threading.Thread(target=self._run, name="gpu-watch", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    # ---- on the loop -----------------------------------------------------------------------------------------------

    def on_error(self, gpu: int, xid: int, pids: frozenset[int]) -> None:
        """A GPU has reported an error. `pids`: the processes on it, as far as NVML knows this machine's numbers."""
        if self._closed.is_set():
            return
        verdict, meaning = judge(xid)
        reason = f"GPU {gpu} reported Xid {xid} ({meaning})"
        self._console.log("gpu-error", gpu=gpu, xid=xid, meaning=meaning, action=verdict.value)
        if verdict is Verdict.LEAVE:
            self._on_leave(f"{reason}: this node cannot train before the GPU is reset or replaced")
        elif verdict is Verdict.REPLACE:
            for worker in concerned(list(self._workers), gpu, pids, _visible()):
                self._on_event(ev.Condemned(worker.rank, worker.incarnation, reason))

    # ---- on the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._console.log("gpu-watch-off", reason=str(error))
            return
        try:
            self._watch(pynvml)
        except pynvml.NVMLError as error:  # virtual GPUs report nothing
            self._console.log("gpu-watch-off", reason=str(error))
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _watch(self, nvml: Any) -> None:
        handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())}
        for index, handle in handles.items():
            self._tell_memory(nvml, index, handle)
        events = nvml.nvmlEventSetCreate()
        try:
            for handle in handles.values():
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            while not self._closed.is_set():
                with contextlib.suppress(nvml.NVMLError_Timeout):
                    self._report(nvml, nvml.nvmlEventSetWait_v2(events, _WAIT_MS))
        finally:
            nvml.nvmlEventSetFree(events)

    def _report(self, nvml: Any, event: Any) -> None:
        gpu = int(nvml.nvmlDeviceGetIndex(event.device))
        pids: frozenset[int] = frozenset()
        with contextlib.suppress(nvml.NVMLError):  # a GPU that has fallen off the bus answers nothing
            pids = frozenset(int(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(event.device))
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            self._loop.call_soon_threadsafe(self.on_error, gpu, int(event.eventData), pids)

    def _tell_memory(self, nvml: Any, index: int, handle: Any) -> None:
        """What people should know before hours of training: errors so far, and rows that wait for a reset."""
        with contextlib.suppress(nvml.NVMLError):  # GPUs without ECC
            uncorrected = nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
            if uncorrected:
                self._console.log("gpu-memory", gpu=index, uncorrected_errors=uncorrected)
        with contextlib.suppress(nvml.NVMLError):  # GPUs before Ampere remap no rows
            _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
            advice = judge_rows(pending=bool(pending), failed=bool(failed))
            if advice is not None:
                self._console.log("gpu-memory", gpu=index, rows=advice)


def concerned(workers: list[Worker], gpu: int, pids: frozenset[int], visible: list[int]) -> list[Worker]:
    """The workers on a GPU: those whose processes NVML names; in a container, where it has other numbers for them,
    those whose local rank means this GPU of the `visible` ones."""
    named = [worker for worker in workers if worker.child is not None and worker.child.pid in pids]
    if named or not visible:
        return named
    return [worker for worker in workers if visible[worker.local_rank % len(visible)] == gpu]


def _visible() -> list[int]:
    """The GPUs' numbers in the order in which workers count them; empty where CUDA_VISIBLE_DEVICES has other names."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        return [int(name) for name in names] if all(name.isdigit() for name in names) else []
    return sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
