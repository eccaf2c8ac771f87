"""What one launch was asked to be: the one object that travels from the command line inward."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..control.membership.identity import Identity


@dataclass(frozen=True)
class OutputMap:
    """Which of a worker's streams go somewhere: bit 1 stdout, bit 2 stderr, by local rank."""

    default: int = 0
    by_rank: Mapping[int, int] = field(default_factory=dict)

    def streams(self, local_rank: int) -> int:
        return self.by_rank.get(local_rank, self.default if not self.by_rank else 0)


@dataclass(frozen=True)
class Rendezvous:
    """Where the job meets. `backend`, `endpoint` and `settings` are what torchrun would make of the options."""

    backend: str = "c10d"
    endpoint: str = "localhost:0"
    settings: Mapping[str, str] = field(default_factory=dict)
    host: str = "localhost"
    """What workers are told to connect to. The store of a single node stays on its loopback addresses."""
    port: int = 0
    """Where the store listens; 0: a free port."""
    because: str = ""
    """Where the endpoint is from, if nobody has named it."""


@dataclass(frozen=True)
class Cluster:
    """What an agent of a job on many nodes needs to find the others. Times in seconds."""

    seeds: tuple[str, ...]
    """`host:port` of the rendezvous endpoint, or of several; the first that can founds the job."""
    host: str
    """How this node is called in messages."""
    bind: str
    """The numeric address on which this agent listens, or `*`."""
    address: str
    """The host that it offers to others."""
    own_seed: int | None
    """Which of the seeds this machine is."""
    first_port: int
    as_seed: bool = True
    """At the endpoint it offers the name by which the others have found it: one agent, one address, one connection."""
    order: int = -1
    identity: Identity = field(default_factory=Identity)
    """What is to be run."""
    secret: bytes | None = field(default=None, repr=False)
    """None: insecure."""
    interface: str | None = None
    """The network interface on which workers listen."""
    min_quorum: int | None = None
    heartbeat_interval: float = 1.0
    heartbeat_limit: float = 5.0
    join_timeout: float = 600.0
    last_call_timeout: float = 30.0
    close_timeout: float = 5.0


@dataclass(frozen=True)
class LaunchConfig:
    """One launch. Times in seconds."""

    command: tuple[str, ...]
    """The whole worker command, interpreter included."""
    script: str = ""
    """The training script, as it was named."""
    script_text: bytes | None = field(default=None, repr=False)
    """Its text, where it is in no file that workers could read."""
    imports_from_here: bool = False
    """Its modules are looked for in the working directory, as those of `python -` are."""
    nproc_per_node: int = 1
    nodes: tuple[int, int] = (1, 1)
    """How many nodes at least and at most."""
    node_rank: int = 0
    run_id: str = "none"
    rendezvous: Rendezvous = Rendezvous()
    rootless: bool = True
    """False: one store, the first node's, which the workers of all nodes dial."""
    cluster: Cluster | None = None
    """None: the job is on this node only."""
    local_addr: str | None = None
    role: str = "default"
    max_restarts: int = 0
    inprocess_restart: bool = False
    inprocess_timeout: float | None = None
    """Limit for a worker to reach the barrier; None: DEFAULT_BARRIER_TIMEOUT, and longer at the first start."""
    max_inprocess_restarts: int | None = None
    monitor_interval: float = 0.1
    signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    """Those that end the job and are passed on to the workers."""
    forwarded_signals: tuple[int, ...] = ()
    """Those that are only passed on, to workers that have a handler for them."""
    start_method: str = "standby"
    """`spawn`: every worker is started cold. Anything else: forked from a standby source where that can be done."""
    preload: tuple[str, ...] = ()
    """Modules that the standby source imports as well."""
    no_python: bool = False
    shutdown_signal: int = signal.SIGTERM
    shutdown_timeout: float = 30.0
    pre_train: tuple[str, ...] = ()
    post_train: tuple[str, ...] = ()
    log_dir: Path | None = None
    redirects: OutputMap = OutputMap()
    tee: OutputMap = OutputMap()
    console_ranks: frozenset[int] | None = None
    """The local ranks whose output is shown; None: all."""
    stdout_filters: tuple[str, ...] = ()
    """Teed lines that contain one of these are also written to `filtered_stdout.log`."""
    stderr_filters: tuple[str, ...] = ()
    line_prefix: str | None = None
    """Template of the prefix of teed lines: `${role_name}`, `${rank}`, `${local_rank}`, `${hostname}`."""
    logs_specs: str | None = None
    """Entry point of a class that decides where output goes, instead of the layout of `logs.py`."""
    event_log: str = "null"
    virtual_local_rank: bool = False
    numa_binding: str | None = None
    cores: tuple[str, ...] = ()
    """The cores of each local rank, as numactl takes them; empty: not bound."""

    def shows(self, local_rank: int) -> bool:
        """Whether the console shows the output of this rank."""
        return self.console_ranks is None or local_rank in self.console_ranks


DEFAULT_BARRIER_TIMEOUT = 60.0
DEFAULT_START_TIMEOUT = 600.0
"""A first start may index a data set on one rank while the others wait; a recovery does not."""
