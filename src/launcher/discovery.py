"""Where the other nodes are: the endpoint of the command line, SLURM's variables, or those of an Indexed Job."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..agent.config import Cluster
from ..control.membership.identity import Identity
from ..protocol.names import JOB_SECRET, JOB_SECRET_FILE
from ..rendezvous.addresses import (
    format_address,
    interface_of,
    interruptibly,
    is_local,
    is_loopback,
    is_written_loopback,
    own_address_outside,
    own_address_towards,
    parse_address,
    resolve,
)
from .endpoint import parse_endpoint
from .environment import port_base
from .machine_secret import machine_secret

SERVICE = "HYPERPODRUN_SERVICE"
"""The headless Service of an Indexed Job, where the pod's own name does not tell it."""
_SEEDS = 3
"""So many hosts of a scheduler's list are asked; one of them must be there when the job begins."""


@dataclass(frozen=True)
class Scheduler:
    """What a scheduler says of the job. `order`: this node's place in it."""

    hosts: tuple[str, ...]
    order: int
    run_id: str


def scheduler(environ: Mapping[str, str]) -> Scheduler | None:
    """SLURM's step, or the Indexed Job that this pod is of; None where there is neither."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes and environ.get("SLURM_NODEID", "").isdecimal():
        run_id = environ.get("SLURM_JOB_ID", "none")
        return Scheduler(tuple(expand_nodelist(nodes)[:_SEEDS]), int(environ["SLURM_NODEID"]), run_id)
    index = environ.get("JOB_COMPLETION_INDEX", "")
    if index.isdecimal():
        job = socket.gethostname().partition(".")[0].removesuffix(f"-{index}")
        service = environ.get(SERVICE) or interruptibly(socket.getfqdn).partition(".")[2].partition(".")[0] or job
        hosts = tuple(f"{job}-{number}.{service}" for number in range(_SEEDS))
        return Scheduler(hosts, int(index), job)
    return None


def expand_nodelist(text: str) -> list[str]:
    """SLURM's compressed host list, `gpu[01-03,7],login`, in order."""
    hosts: list[str] = []
    for item in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        parts = re.split(r"\[([^\]]*)\]", item)
        expanded = [""]
        for number, part in enumerate(parts):
            choices = [part] if number % 2 == 0 else _expand_ranges(part)
            expanded = [before + choice for before in expanded for choice in choices]
        hosts += expanded
    return hosts


def _expand_ranges(text: str) -> list[str]:
    numbers: list[str] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        if not dash:
            numbers.append(first)
            continue
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def find_cluster(
    options: dict[str, Any],
    endpoint: str,
    settings: Mapping[str, str],
    run_id: str,
    identity: Identity | None = None,
) -> Cluster:
    """How this agent finds the others. Raises click.UsageError."""
    settings = _in_our_words(settings)
    base = port_base()
    seeds = tuple(_seed(item, base) for item in endpoint.split(",") if item.strip())
    if not seeds:
        raise click.UsageError(f"--nnodes {options['nnodes'][1]}: name a host of the job with --rdzv-endpoint HOST")
    resolved = [resolve(parse_address(seed)[0]) for seed in seeds]
    own = next((number for number, seed in enumerate(seeds) if _is_here(seed, resolved[number])), None)
    if settings.get("is_host", "").lower() in ("0", "false", "f", "no", "n"):
        own = None
    local = options["local_addr"] or _local_address(seeds, resolved, own)
    # Only what is written as loopback: a machine's own name leads there by its hosts file, and its job is on many.
    on_one_machine = all(is_written_loopback(parse_address(seed)[0]) for seed in seeds)
    numeric = local if _is_numeric(local) else _numeric(local)
    if numeric is None:
        raise click.UsageError(f"--local-addr {local}: nobody knows this host")
    known = scheduler(os.environ)
    order = _rank(settings)
    if order <= 0 and known is not None:  # 0 is also what --node-rank is when nobody gives it
        order = known.order
    interval, limit = _heartbeats(settings)
    return Cluster(
        seeds=seeds,
        host=socket.gethostname(),
        bind=numeric if on_one_machine else "*",
        address=local,
        as_seed=not options["local_addr"],
        own_seed=own,
        first_port=base if own is None else parse_address(seeds[own])[1],
        order=order,
        identity=identity or Identity(),
        secret=_secret(options, on_one_machine=on_one_machine),
        interface=interface_of(numeric),
        min_quorum=options["min_nodes"],
        heartbeat_interval=interval,
        heartbeat_limit=limit,
        join_timeout=_seconds(settings, "join_timeout", _static_timeout(options, settings)),
        last_call_timeout=_seconds(settings, "last_call_timeout", 30.0),
        close_timeout=_seconds(settings, "close_timeout", 5.0),
    )


def _is_here(seed: str, addresses: list[str]) -> bool:
    """Whether a seed is this machine. In a pod its name can be known here before it is known to anybody else."""
    if any(is_local(address) for address in addresses):
        return True
    return not addresses and parse_address(seed)[0].partition(".")[0] == socket.gethostname().partition(".")[0]


def _in_our_words(settings: Mapping[str, str]) -> Mapping[str, str]:
    """torchrun forgets a node when `keep_alive_max_attempt` beats, one each `keep_alive_interval`, do not come."""
    if not {"keep_alive_interval", "keep_alive_max_attempt"} & set(settings):
        return settings
    interval = _seconds(settings, "keep_alive_interval", 5.0)
    limit = interval * _seconds(settings, "keep_alive_max_attempt", 3.0)
    return {"heartbeat_interval": str(interval), "heartbeat_limit": str(limit), **settings}


def _seed(endpoint: str, base: int) -> str:
    host, port = parse_endpoint(endpoint, base)
    return format_address(host, port or base)


def _numeric(name: str) -> str | None:
    """An address of this machine by one of its names: not loopback, unless the name says so."""
    found = resolve(name)
    outside = [address for address in found if is_written_loopback(name) or not is_loopback(address)]
    return outside[0] if outside else own_address_outside() if found else None


def _local_address(seeds: Sequence[str], resolved: list[list[str]], own: int | None) -> str:
    """The address from which this machine reaches the endpoint: the others reach it there, too."""
    targets = [address for number, found in enumerate(resolved) if number != own for address in found]
    targets += [address for address in (resolved[own] if own is not None else []) if not is_loopback(address)]
    for target in targets:
        found = own_address_towards(target)
        if found is not None and is_loopback(found) == is_loopback(target):
            return found
    if own is not None and resolved[own] and is_written_loopback(parse_address(seeds[own])[0]):
        return resolved[own][0]
    return own_address_outside()  # nobody knows the endpoint's name yet, or it leads to this machine's loopback


def _is_numeric(address: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, address.partition("%")[0])
        except OSError:
            continue
        return True
    return False


def _seconds(settings: Mapping[str, str], name: str, default: float) -> float:
    text = settings.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise click.UsageError(f"--rdzv-conf {name}={text} is not a number of seconds")
    return seconds


def _static_timeout(options: dict[str, Any], settings: Mapping[str, str]) -> float:
    """torchrun reads `timeout` with the static rendezvous only: how long the nodes wait for each other."""
    return _seconds(settings, "timeout", 600.0) if options.get("rdzv_backend") == "static" else 600.0


def _heartbeats(settings: Mapping[str, str]) -> tuple[float, float]:
    """(interval, limit). Who is silent for less than two intervals has perhaps lost one message."""
    interval = _seconds(settings, "heartbeat_interval", 1.0)
    limit = _seconds(settings, "heartbeat_limit", 5.0)
    if limit < 2 * interval:
        raise click.UsageError(
            f"--rdzv-conf heartbeat_limit={limit:g} is less than twice the heartbeat_interval={interval:g}: "
            "every node would soon be taken for lost"
        )
    return interval, limit


def _rank(settings: Mapping[str, str]) -> int:
    """Where this node wants to stand; -1: in the order of arrival."""
    text = settings.get("rank", "-1")
    if not re.fullmatch(r"-1|[0-9]{1,6}", text):
        raise click.UsageError(f"--rdzv-conf rank={text} is not a node's rank")
    return int(text)


def _secret(options: dict[str, Any], *, on_one_machine: bool) -> bytes | None:
    """The job's secret. Never on the command line, where everybody on the machine could read it."""
    path = options["job_secret_file"] or os.environ.get(JOB_SECRET_FILE)
    if path:
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise click.UsageError(f"the job's secret cannot be read from {path}: {error.strerror}") from None
    else:
        secret = os.environ.get(JOB_SECRET, "").encode()
    if secret:
        if len(secret) < 16:
            raise click.UsageError("the job's secret is shorter than 16 bytes: `openssl rand -hex 32` makes a good one")
        return secret
    if options["insecure"]:
        return None
    if on_one_machine:
        try:
            return machine_secret()
        except OSError as error:
            raise click.UsageError(
                f"the agents on this machine need a secret, and there is no place for it ({error}): "
                "--job-secret-file FILE, or --insecure to let every user of the machine join"
            ) from None
    raise click.UsageError(
        "a job on many nodes needs a secret, the same on each: --job-secret-file FILE, or the variable "
        f"{JOB_SECRET}; --insecure runs it without, for everybody on the network to join and to command"
    )
