"""Names that agent and worker share: environment variables and the shape of store keys."""

from __future__ import annotations

AGENT_ENDPOINT = "HYPERPODRUN_AGENT"
"""Set in workers that can be restarted in process: the ZeroMQ endpoint of their agent."""

WORKER_IDENTITY = "HYPERPODRUN_WORKER"
"""Set beside AGENT_ENDPOINT: which worker this process is, as `format_identity` writes it."""

STATE_DIRECTORY = "HYPERPODRUN_STATE"
"""Set in workers: a directory in memory that belongs to the job on this node and outlives every worker."""

DATA_ENDPOINT = "HYPERPODRUN_DATA"
"""Set in workers: the path of the socket on which the host of the job's data producers is to be reached."""

STORE_ENDPOINT = "HYPERPODRUN_STORE"
"""Set in workers: `host:port` of their own node's store, whatever MASTER_ADDR and MASTER_PORT name."""

JOB_TOKEN = "HYPERPODRUN_JOB"
"""Set in every process of a job: marks the job's processes, also those that left their session."""


JOB_SECRET = "HYPERPODRUN_JOB_SECRET"
JOB_SECRET_FILE = "HYPERPODRUN_JOB_SECRET_FILE"
OF_AGENTS_ONLY = (JOB_SECRET, JOB_SECRET_FILE)
"""What an agent's environment may have and no worker's gets."""


def format_identity(local_rank: int, incarnation: int) -> str:
    """`<local rank>.<incarnation>`: the incarnation tells a respawned process from the one it replaces."""
    return f"{local_rank}.{incarnation}"


def parse_identity(text: str) -> tuple[int, int]:
    """(local rank, incarnation). Raises ValueError for anything `format_identity` does not write."""
    local_rank, separator, incarnation = text.partition(".")
    if not (
        separator
        and local_rank.isascii()
        and local_rank.isdecimal()
        and incarnation.isascii()
        and incarnation.isdecimal()
    ):
        raise ValueError(f"not a worker identity: {text[:40]!r}")
    return int(local_rank), int(incarnation)


def epoch_prefix(epoch: int) -> str:
    """The prefix (without its slash) of every store key of an epoch."""
    return f"hyperpodrun-epoch-{epoch}"
