"""The life of a standby source: import, say so, fork on request."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import socket
import sys
from collections.abc import Iterator

import msgspec

from ..protocol import standby as protocol
from ..protocol.messages import MessageError
from . import unseen, worker

_CORE = ("torch", "torch.distributed")
_LATER = ("torch.optim", "torch.nn.parallel", "torch.utils.data", "torch._dynamo")
"""Constructing any optimizer or DDP imports torch._dynamo: it takes as long as torch itself."""
_OWN = ("hyperpodrun.inprocess.wrapper",)
_OWN_LATER = ("hyperpodrun.checkpointless.manager", "hyperpodrun.dataloader.loader")
_COMPILER = ("torch._inductor.compile_fx",)
"""The first torch.compile imports it: one second, and four where Triton is installed."""
_QUIET_S = 5.0
"""So long after the last fork the source imports what workers do not need, or what only a respawned one finds done: a
start is not slowed down by that, neither by waiting nor by sharing the processors."""


class CannotServe(Exception):
    """This process cannot be a source; the sentence says why."""


def serve(preload_own: bool) -> None:
    """Runs the source. Returns in the forked workers only; the source itself ends when its agent does."""
    options = _take_options()
    own = preload_own and options.inprocess
    names: set[str] = set()
    _serve(options, names, own=own)
    unseen.hide(names, [__name__.partition(".")[0]] if own else [])


def _serve(options: protocol.SourceOptions, names: set[str], *, own: bool) -> None:
    """`names`: of environment variables; those that are read while importing are added."""
    control = socket.socket(fileno=options.control)
    control.set_inheritable(False)
    source = _Source(control, options.agent)
    modules = (*_LATER, *(_OWN if own else ()), *options.preload)
    try:
        _import_torch(names)
        if options.needs == protocol.CORE:
            control.send(protocol.encode(protocol.Ready()))
            if source.fork_until_quiet(protocol.CORE):
                return
            control.send(protocol.encode(protocol.Ready(busy=True)))
        if source.fork_all(protocol.CORE, wait_s=0) or _import_in_turns(modules, names, source):
            return
        control.send(protocol.encode(protocol.Ready()))
        if own or options.compiler:
            if source.fork_until_quiet(protocol.EVERYTHING):
                return
            control.send(protocol.encode(protocol.Ready(busy=True)))
            _import_all(_OWN_LATER if own else (), names)
            if options.compiler and not _import_compiler(control, names):
                os._exit(1)
            control.send(protocol.encode(protocol.Ready()))
        while not source.fork_all(protocol.EVERYTHING, wait_s=None):
            pass
    except CannotServe as error:
        with contextlib.suppress(OSError):  # the agent is gone
            control.send(protocol.encode(protocol.Refused(str(error)[:1000])))
        os._exit(1)
    except (EOFError, ConnectionError):  # the agent is gone, or does not want this source any more
        os._exit(0)


def _take_options() -> protocol.SourceOptions:
    """From here on the environment is that of a worker, as far as all workers share it."""
    options = msgspec.json.decode(os.environ.pop(protocol.OPTIONS), type=protocol.SourceOptions)
    os.environ.pop(protocol.ROOM)
    if options.python_path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = options.python_path
    # Moves the C library's environment to the heap, before anybody points into the area that workers overwrite.
    worker.set_environment([(os.fsencode(name), os.fsencode(value)) for name, value in os.environ.items()])
    return options


def _import_torch(names: set[str]) -> None:
    """Without looking for garbage meanwhile, or afterwards: that takes a sixth of the time, and finds two megabytes."""
    gc.disable()
    try:
        for name in _CORE:
            _import(name, names)
    finally:
        gc.enable()
    gc.freeze()
    _check(_CORE)


def _import_in_turns(modules: tuple[str, ...], names: set[str], source: _Source) -> bool:
    """Imports, and between two modules forks who needs none of them. True in a worker."""
    for name in modules:
        _import(name, names)
        if source.is_asked(protocol.CORE):
            _check(modules)
            if source.fork_all(protocol.CORE, wait_s=0):
                return True
    _tidy()
    _check(modules)
    return False


def _import_all(modules: tuple[str, ...], names: set[str]) -> None:
    """Raises CannotServe when a module cannot be imported, or leaves behind what does not survive a fork."""
    for name in modules:
        _import(name, names)
    _tidy()
    _check(modules)


def _import(name: str, names: set[str]) -> None:
    try:
        with unseen.noting_reads(names):
            importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module does at import
        raise CannotServe(f"import {name}: {type(error).__name__}: {error}") from None


def _tidy() -> None:
    """The collector of a worker must not touch, and so copy, the pages they share."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _check(modules: tuple[str, ...]) -> None:
    """Before a fork: raises CannotServe if there is, after these imports, what does not survive one."""
    # Libraries that know of fork (OpenBLAS) stop their threads before one. A thread that is there afterwards is lost.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise CannotServe(f"{threads - 1} thread(s) run after importing {', '.join(modules)}")
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
                raise CannotServe(f"{target} was opened while importing {', '.join(modules)}")


def _import_compiler(control: socket.socket, names: set[str]) -> bool:
    """Whether this process can still serve."""
    try:
        with _driver_left_alone():
            _import_all(_COMPILER, names)
    except CannotServe as error:
        control.send(protocol.encode(protocol.Spoiled(str(error)[:1000])))
        return False
    return True


@contextlib.contextmanager
def _driver_left_alone() -> Iterator[None]:
    """torch before 2.13 asks whether there is a GPU as it imports the compiler. The answer would come from CUDA's
    driver, which no fork survives; here it comes from whether the driver has made its device."""
    import torch

    device = "/dev/kfd" if torch.version.hip else "/dev/nvidiactl"
    there = torch.cuda._is_compiled() and os.path.exists(device)
    asks = torch.cuda.is_available
    torch.cuda.is_available = lambda: there
    try:
        yield
    finally:
        torch.cuda.is_available = asks


class _Source:
    """Takes requests and forks."""

    def __init__(self, control: socket.socket, agent: int) -> None:
        self._control = control
        self._agent = agent
        self._waiting: list[tuple[protocol.Fork, list[int]]] = []
        self._forked = 0

    def fork_until_quiet(self, imported: int) -> bool:
        """Forks the first workers, and more until for a while none has been asked for. True in a worker."""
        forked = -1
        while forked != self._forked:
            forked = self._forked
            if self.fork_all(imported, wait_s=_QUIET_S if forked else None):
                return True
        return False

    def is_asked(self, imported: int) -> bool:
        """Whether a worker is asked for that needs no more than this."""
        while select.select([self._control], [], [], 0)[0]:
            self._waiting.append(self._receive())
        return any(request[0].needs <= imported for request in self._waiting)

    def fork_all(self, imported: int, *, wait_s: float | None) -> bool:
        """Forks the workers that are asked for, now or within `wait_s`, and need no more than what is imported. True in
        a worker."""
        while select.select([self._control], [], [], 0 if self._waiting else wait_s)[0]:
            self._waiting.append(self._receive())
        for request in [request for request in self._waiting if request[0].needs <= imported]:
            self._waiting.remove(request)
            if self._fork(request[1]):
                return True
        return False

    def _receive(self) -> tuple[protocol.Fork, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._control, protocol.MAX_PACKET_BYTES, 4)
        if not data:
            raise EOFError
        try:
            request = protocol.decode_to_source(data)
        except MessageError as error:
            raise CannotServe(f"bad request: {error}") from None
        if len(fds) != 4:
            raise CannotServe(f"a request with {len(fds)} descriptors: is the limit of open files too low?")
        return request, fds

    def _fork(self, fds: list[int]) -> bool:
        """True in the worker. It is the child of a process that ends at once, and so becomes the agent's."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        with worker.about_to_fork():
            try:
                intermediate = os.fork()
            except OSError as error:
                raise CannotServe(f"fork: {error}") from None
            if intermediate == 0:
                try:
                    child = os.fork()
                except OSError:
                    os._exit(1)  # the line's end tells the agent
                if child:
                    os._exit(0)
                worker.begin(self._agent, *fds)
                return True
        os.waitpid(intermediate, 0)
        self._forked += 1
        for fd in fds:
            os.close(fd)
        return False
