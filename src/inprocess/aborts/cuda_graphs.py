"""CUDA graphs that hold collectives of an epoch that is over: to replay one would wait for ever, so it is an error.

A captured collective is a kernel of one communicator, and every epoch has new ones. Whether a graph holds any is seen
by the groups' sequence numbers, which every collective advances, captured ones too. (Single sends and receives do not
advance them.) Graphs without collectives, those of `torch.compile(mode="reduce-overhead")` among them, live on.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from . import nccl


class StaleGraphError(RuntimeError):
    """A CUDA graph was replayed whose communicators are gone; it has to be captured again."""


class GraphWatch:
    """Notices captures and replays. One per process; does nothing where torch has no CUDA."""

    def __init__(self) -> None:
        self.epoch = 0
        self._captured: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Graphs with collectives, and the epoch of their capture."""
        self._before: dict[int, dict[str, int]] = {}

    def install(self) -> None:
        """Wraps the methods of `torch.cuda.CUDAGraph`."""
        torch = sys.modules.get("torch")
        if torch is None or torch.version.cuda is None:
            return
        graph_type = torch.cuda.CUDAGraph
        begin, end, replay = graph_type.capture_begin, graph_type.capture_end, graph_type.replay

        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            begin(graph, *args, **kwargs)
            self.begins(graph)

        def capture_end(graph: Any) -> None:
            end(graph)
            self.ends(graph)

        def checked_replay(graph: Any) -> None:
            self.check(graph)
            replay(graph)

        graph_type.capture_begin = capture_begin
        graph_type.capture_end = capture_end
        graph_type.replay = checked_replay

    def begins(self, graph: Any) -> None:
        """The capture of `graph` has begun."""
        self._before[id(graph)] = _sequence_numbers()

    def ends(self, graph: Any) -> None:
        """It is over."""
        if self._before.pop(id(graph), None) != _sequence_numbers():
            self._captured[graph] = self.epoch
        else:
            self._captured.pop(graph, None)

    def check(self, graph: Any) -> None:
        """Raises StaleGraphError for a graph that must not be replayed."""
        epoch = self._captured.get(graph, self.epoch)
        if epoch != self.epoch:
            raise StaleGraphError(
                f"this CUDA graph was captured in epoch {epoch} with collectives in it, and their communicators are "
                f"gone: in epoch {self.epoch} it has to be captured again, inside the function under HPWrapper"
            )


def _sequence_numbers() -> dict[str, int]:
    """How many collectives every NCCL group has begun."""
    return nccl.collectives()
