"""`--rdzv-*`, `--standalone` and `--master-*`: which torchrun rendezvous they would mean, and where ours listens."""

from __future__ import annotations

import os
from typing import Any

import click

from ..agent.config import Rendezvous
from .endpoint import parse_endpoint

_BACKENDS = ("c10d", "static", "hyperpod")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_C10D_PORT = 29400
_STATIC_PORT = 29500


def meeting_point(options: dict[str, Any]) -> tuple[Rendezvous, str]:
    """The rendezvous and the name of the job. Raises click.UsageError."""
    backend, endpoint = options["rdzv_backend"], options["rdzv_endpoint"]
    address, port = options["master_addr"], options["master_port"]
    one_node_by_default = backend == "static" and not endpoint and port is None and options["nnodes"][1] == 1
    run_id = options["rdzv_id"]
    scheduled_id = ""
    if options["nnodes"][1] > 1 and not endpoint and address is None:
        endpoint, scheduled_id = discovered()
    if options["standalone"] or one_node_by_default:
        # torchrun gives the job a name of its own here; one that was asked for is better.
        return Rendezvous(settings=options["rdzv_conf"]), _random_id() if run_id is None else run_id
    if backend in ("etcd", "etcd-v2"):
        raise click.UsageError(f"--rdzv-backend {backend}: hyperpodrun needs no etcd; use c10d with the same endpoint")
    if backend not in _BACKENDS:
        raise click.UsageError(f"--rdzv-backend {backend}: there are c10d, static and hyperpod")
    if backend == "static" and not endpoint:
        endpoint = f"{'127.0.0.1' if address is None else address}:{_STATIC_PORT if port is None else port}"
    if options["nnodes"][1] > 1:
        settings = _with_node_rank(options, backend)
        return Rendezvous(backend, endpoint, settings), run_id or scheduled_id or "none"
    host, listen_on = parse_endpoint(endpoint, {"c10d": _C10D_PORT, "static": None, "hyperpod": 0}[backend])
    given = options["rdzv_endpoint"] or address is not None
    return (
        Rendezvous(
            backend=backend,
            endpoint=endpoint,
            settings=_with_node_rank(options, backend),
            host=host if given and host in _LOOPBACK else "localhost",
            port=listen_on,
        ),
        "none" if run_id is None else run_id,
    )


def discovered() -> tuple[str, str]:
    """The endpoint that the scheduler tells of, where none was named, and its name for the job. Or nothing."""
    from .discovery import scheduler

    found = scheduler(os.environ)
    return ("", "") if found is None else (",".join(found.hosts), found.run_id)


def _with_node_rank(options: dict[str, Any], backend: str) -> dict[str, str]:
    if backend != "static":
        return dict(options["rdzv_conf"])
    if not 0 <= options["node_rank"] < options["nnodes"][1]:
        raise click.UsageError(f"--node-rank {options['node_rank']}: there are nodes 0 to {options['nnodes'][1] - 1}")
    return {**options["rdzv_conf"], "rank": str(options["node_rank"])}


def _random_id() -> str:
    """A version 4 UUID; the module of that name is not worth its import time."""
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{'89ab'[int(text[16], 16) % 4]}{text[17:20]}-{text[20:]}"
