"""Where `multiprocessing` keeps its sockets: in the job's own directory, which goes with the job.

Otherwise each process that is killed, as DataLoader workers are at every fault, leaves a folder `pymp-*` among the
user's temporary files. Called by: a forked worker (`standby/`) and a process under HPWrapper (`inprocess/`).
"""

from __future__ import annotations

import os
import sys
from typing import Any

from .names import DATA_ENDPOINT


def keep_sockets_with_the_job() -> None:
    """For this process and those it starts with `multiprocessing`. Nothing happens outside of a job."""
    endpoint = os.environ.get(DATA_ENDPOINT)
    process: Any = sys.modules.get("multiprocessing.process")
    config = None if process is None else getattr(process.current_process(), "_config", None)
    if not endpoint or not isinstance(config, dict) or config.get("tempdir"):
        return
    directory = os.path.join(os.path.dirname(endpoint), f"pymp-{os.getpid()}")
    try:
        os.mkdir(directory, 0o700)
    except OSError:  # then as without us
        return
    config["tempdir"] = directory
