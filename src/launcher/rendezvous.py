"""`--rdzv-*`, `--standalone` and `--master-*`: which torchrun rendezvous they would mean, and where ours listens."""

from __future__ import annotations

import os
from typing import Any

import click

from ..agent.config import Rendezvous
from .endpoint import parse_endpoint
from .environment import ADDRESS, endpoint_of_environment, node_rank_of_environment, why_nobody_is_found

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
    because = ""
    if options["nnodes"][1] > 1 and not endpoint and address is None and not options["standalone"]:
        options, endpoint, scheduled_id, because = _discovered(options)
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
        meeting = Rendezvous(backend, endpoint, settings, because=because)
        return meeting, run_id or scheduled_id or "none"
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


def _discovered(options: dict[str, Any]) -> tuple[dict[str, Any], str, str, str]:
    """Where no endpoint was named: (options, the endpoint or nothing, the scheduler's name for the job, why)."""
    from .discovery import scheduler

    is_counted = "nnodes" not in options["given"]  # the environment has said how many nodes there are
    rank = node_rank_of_environment(options["nnodes"][1])
    endpoint = endpoint_of_environment(options["master_port"]) if is_counted or rank is not None else ""
    found = scheduler(os.environ)
    scheduled_id = "" if found is None else found.run_id
    if endpoint:
        if rank is not None and "node_rank" not in options["given"]:
            options = {**options, "node_rank": rank, "rdzv_conf": {"rank": str(rank), **options["rdzv_conf"]}}
        return options, endpoint, scheduled_id, f"{ADDRESS} in the environment"
    if found is not None:
        return options, ",".join(found.hosts), scheduled_id, "the scheduler's variables"
    if is_counted:
        raise click.UsageError(why_nobody_is_found(options))
    return options, "", "", ""


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
