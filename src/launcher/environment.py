"""How many nodes there are and where the first one is, where the environment says so and the command line does not.

Operators and sbatch scripts set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. Without NNODES sixteen pods would be
sixteen jobs of one node.
"""

from __future__ import annotations

import os
import re
from typing import Any

import click

from ..protocol.names import JOB_TOKEN
from .parsing import parse_nnodes

NODES, NODE_RANK, ADDRESS, PORT = "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
_DEFAULT_PORT = "29500"


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
