"""Is this process fit to go on? Asked after every fault, before it joins the next epoch."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from typing import Any

from .aborts.nccl import overdue_aborts


class HealthCheckError(RuntimeError):
    """This process is not fit: it ends, and the agent puts a new one in its place."""


class HealthCheck(ABC):
    """Called with the HPCallWrapper between an epoch and the next. Raises HealthCheckError when it is unfit."""

    @abstractmethod
    def __call__(self, caller: Any) -> None: ...


class CudaHealthCheck(HealthCheck):
    """The GPU answers: `torch.cuda.synchronize()` returns within `timeout` seconds and without an error.

    Passes where CUDA is not in use. A kernel that hangs, and an error that sticks to the context (an illegal address,
    a device-side assert), make the process unfit: no restart in process can mend them. So does an NCCL communicator
    that should have been aborted by now and is not.

    It is also the moment from which on nothing of the failed epoch runs on the device: the kernels of aborted
    collectives end some milliseconds after the abort has begun.
    """

    def __init__(self, timeout: float = 30.0) -> None:
        if timeout <= 0:
            raise ValueError(f"CudaHealthCheck: timeout must be positive, not {timeout}")
        self.timeout = timeout

    def __call__(self, caller: Any) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        overdue = overdue_aborts()
        if overdue:
            raise HealthCheckError(f"the NCCL abort of epoch {overdue[0]} has not returned")
        device = torch.cuda.current_device()
        errors: list[BaseException] = []

        def synchronize() -> None:
            try:
                torch.cuda.synchronize(device)
            except BaseException as error:
                errors.append(error)

        # On a thread of its own: nothing can end a synchronize() that waits for a kernel that never ends.
        thread = threading.Thread(target=synchronize, name="hyperpodrun-cuda-check", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise HealthCheckError(f"CUDA device {device} did not finish its work within {self.timeout:g} s")
        if errors:
            raise HealthCheckError(f"CUDA device {device} is in error: {_first_line(errors[0])}") from errors[0]


def _first_line(error: BaseException) -> str:
    """CUDA's errors are followed by a page of advice on debugging."""
    return str(error).partition("\n")[0]
