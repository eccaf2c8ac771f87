"""How a process breaks."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time

from .grammar import Injection


def fire(injection: Injection) -> None:
    """Breaks this process, at once. Returns never; `raise` raises RuntimeError."""
    what = f"rank {injection.rank}, step {injection.step}, {injection.where}"
    print(f"injecting {injection.kind}: {what}", file=sys.stderr, flush=True)
    if injection.kind == "raise":
        raise RuntimeError(f"injected fault: {what}")
    if injection.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if injection.kind == "segv":
        faulthandler.disable()
        ctypes.string_at(0)
    while injection.kind == "hang":  # and the others wait in their next collective
        time.sleep(1)
    if injection.kind == "assert":  # on a GPU a kernel's assertion: the process can use CUDA no more
        import torch

        table = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
        table[torch.tensor([injection.rank + 9], device=table.device)].sum().item()
    os._exit(3)
