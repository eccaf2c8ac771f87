"""What the user wants done between a failed epoch and the next: in the main thread, after user code is left."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Finalize(ABC):
    """Called with the HPCallWrapper. An exception makes the process unfit: it ends and is replaced."""

    @abstractmethod
    def __call__(self, caller: Any) -> None: ...


class ThreadedFinalize(Finalize):
    """Runs `function` in a thread; raises TimeoutError when it takes longer than `timeout` seconds."""

    def __init__(
        self,
        timeout: float,
        function: Callable[..., object],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.timeout = timeout
        self._function = function
        self._args = tuple(args)
        self._kwargs = dict(kwargs or {})

    def __call__(self, caller: Any) -> None:
        errors: list[BaseException] = []

        def target() -> None:
            try:
                self._function(*self._args, **self._kwargs)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=target, name="hyperpodrun-finalize", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            name = getattr(self._function, "__name__", repr(self._function))
            raise TimeoutError(f"finalize: {name} did not return within {self.timeout} s")
        if errors:
            raise errors[0]
