"""What the environment says where the command line does not: nodes, workers, the first node; HyperPod's variables.

Operators and sbatch scripts set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. Without NNODES sixteen pods would be
sixteen jobs of one node.
"""

from __future__ import annotations

import os
import re
from typing import Any

import click

from ..protocol.names import JOB_TOKEN
from .parsing import MAX_LOCAL_RANKS, parse_nnodes

NODES, NODE_RANK, ADDRESS, PORT = "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
WORKERS, PORT_BASE, ROOTLESS = "N_PROC_PER_NODE", "HPCT_PORT_BASE", "HPCT_USE_ROOTLESS"
_DEFAULT_PORT = "29500"
_DEFAULT_PORT_BASE = 17000


def nodes_of_environment() -> str | None:
    """NNODES; None where it is not there, or is that of the job that this launch runs in. Raises click.UsageError."""
    text = os.environ.get(NODES, "").strip()
    if not text or JOB_TOKEN in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    try:
        parse_nnodes(text)
    except click.BadParameter:
        raise click.UsageError(f"{NODES}={text!r} in the environment is neither N nor MIN:MAX") from None
    return text


def workers_of_environment() -> str | None:
    """N_PROC_PER_NODE, as text; None where it is not there, or is that of the job that this launch runs in.

    Raises click.UsageError.
    """
    text = os.environ.get(WORKERS, "").strip()
    if not text or JOB_TOKEN in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= MAX_LOCAL_RANKS:
        raise click.UsageError(f"{WORKERS}={text!r} in the environment is not a number from 1 to {MAX_LOCAL_RANKS}")
    return text


def port_base() -> int:
    """HPCT_PORT_BASE: the first port that agents try. Raises click.UsageError."""
    text = os.environ.get(PORT_BASE, "").strip() or str(_DEFAULT_PORT_BASE)
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1024 <= int(text) <= 65000:
        raise click.UsageError(f"{PORT_BASE}={text!r} is not a port from 1024 to 65000")
    return int(text)


def is_rootless() -> bool:
    """HPCT_USE_ROOTLESS: 0 is one store for all nodes, the first node's. Raises click.UsageError."""
    text = os.environ.get(ROOTLESS, "").strip() or "1"
    if text not in ("0", "1"):
        raise click.UsageError(
            f"{ROOTLESS}={text!r}: 1 shares the job's store among its nodes, 0 leaves it to the first"
        )
    return text == "1"


def endpoint_of_environment(port: int | None) -> str:
    """MASTER_ADDR and MASTER_PORT, or the port that was given, as an endpoint; empty where there is no address."""
    host = os.environ.get(ADDRESS, "").strip()
    if not host:
        return ""
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{shown}:{port or os.environ.get(PORT, '').strip() or _DEFAULT_PORT}"


def node_rank_of_environment(nodes: int) -> int | None:
    """NODE_RANK. Raises click.UsageError for one that does not exist."""
    text = os.environ.get(NODE_RANK, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) >= nodes:
        raise click.UsageError(f"{NODE_RANK}={text!r} in the environment: there are nodes 0 to {nodes - 1}")
    return int(text)


def why_nobody_is_found(options: dict[str, Any]) -> str:
    """A sentence for NNODES without a rendezvous."""
    nodes = os.environ.get(NODES, "").strip()
    remedy = (
        f"name a host of the job with --rdzv-endpoint HOST or with {ADDRESS} and {NODE_RANK}; --nnodes=1 runs each "
        "node by itself"
    )
    if options["inprocess_restart"] or any(options[name] is not None for name in options if name.startswith("server_")):
        return (
            f"{NODES}={nodes} without a rendezvous, and with --inprocess-restart or --server-*, leaves the job to "
            f"HyperPod's operator, which this version cannot talk to: {remedy}"
        )
    return f"{NODES}={nodes} in the environment, and nothing says where the other nodes are: {remedy}"
