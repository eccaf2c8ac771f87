"""Which stream a rank reads. Ranks that need the same batches read one stream; others must not.

By default every rank is data-parallel: stream `dp<rank>`. Where Megatron-LM's parallel state is set up, tensor and
pipeline parallel ranks of one data-parallel rank read one stream. (Context-parallel ranks have their own, as in
HyperPod: whether they cut one batch or read different ones is the data set's business.)
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

_STREAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


def check_stream_name(name: str) -> str:
    """Raises ValueError for what cannot be a directory's name on any file system."""
    if not _STREAM.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a stream's name: up to 100 letters, digits, '_', '-' and '.', the first no sign"
        )
    return name


def data_coordinate(parallel_state: Any = None) -> str:
    """`dp<d>`, or `dp<d>-cp<c>`, of this process.

    `parallel_state` has Megatron's `get_data_parallel_rank()` and `get_context_parallel_rank()`; None: Megatron's own
    if it is initialised, else RANK, else 0.
    """
    if parallel_state is None:
        megatron = sys.modules.get("megatron.core.parallel_state")
        if megatron is not None and megatron.model_parallel_is_initialized():
            parallel_state = megatron
    if parallel_state is None:
        return f"dp{int(os.environ.get('RANK', '0'))}"
    name = f"dp{int(parallel_state.get_data_parallel_rank())}"
    context = getattr(parallel_state, "get_context_parallel_rank", None)
    rank = int(context()) if callable(context) else 0
    return f"{name}-cp{rank}" if rank else name
