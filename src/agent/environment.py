"""The environment of a worker process: torchrun's contract, and the few names of our own."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from string import Template

from ..control.job.commands import Layout, LocalSlot
from ..protocol import names
from .config import LaunchConfig

GLOO_DEFAULTS = {
    # One set and one multi_get per rank while a group comes up, instead of 2W+1 calls; values that do not grow with W.
    "GLOO_ENABLE_STORE_V2_API": "1",
    "GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER": "1",
}

_SCRIPT = "script.py"
OMP_NOTICE = (
    "hyperpodrun: OMP_NUM_THREADS is not set: each worker gets 1, so that together they do not overload this machine; "
    "set it to what suits your program\n"
)


def epoch_environment(
    config: LaunchConfig, slot: LocalSlot, layout: Layout, epoch: int, store_address: tuple[str, int]
) -> dict[str, str]:
    """What changes from epoch to epoch, or could: set at the start of a process and again with every epoch."""
    return {
        "MASTER_ADDR": store_address[0],
        "MASTER_PORT": str(store_address[1]),
        "RANK": str(slot.rank),
        "LOCAL_RANK": "0" if config.virtual_local_rank else str(slot.local_rank),
        "GROUP_RANK": str(layout.node_rank),
        "ROLE_RANK": str(layout.role_rank + slot.local_rank),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_WORLD_SIZE": str(layout.local_world_size),
        "GROUP_WORLD_SIZE": str(layout.nodes),
        "ROLE_WORLD_SIZE": str(layout.role_world_size),
        "JOB_RESTART_COUNT": str(epoch),
        "TORCHELASTIC_RESTART_COUNT": str(epoch),
    }


def worker_environment(
    config: LaunchConfig,
    *,
    slot: LocalSlot,
    layout: Layout,
    epoch: int,
    store_address: tuple[str, int],
    own_store: tuple[str, int],
    agent_endpoint: str | None,
    state_directory: Path | None,
    data_endpoint: str | None,
    job_token: str,
    error_file: str,
) -> dict[str, str]:
    """The whole environment of one worker: the launcher's own, overlaid."""
    environment = dict(os.environ)
    for name in names.OF_AGENTS_ONLY:
        environment.pop(name, None)
    for name, value in GLOO_DEFAULTS.items():
        environment.setdefault(name, value)
    # On one machine: do not ask a resolver which of its addresses to use, and stay off the network. On many: listen
    # where the others can reach this one, which the host's name need not lead to.
    interface = "lo" if config.cluster is None else config.cluster.interface
    if interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    if config.inprocess_restart:
        # A restart breaks connections on purpose; what torch's C++ code warns of then is no news.
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.imports_from_here:
        environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [environment.get("PYTHONPATH")])])
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if config.nproc_per_node > 1:  # and OMP_NOTICE says so
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment.update(epoch_environment(config, slot, layout, epoch, store_address))
    environment.update(
        {
            "ROLE_NAME": config.role,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
            "TORCHELASTIC_RUN_ID": config.run_id,
            "TORCHELASTIC_ERROR_FILE": error_file,
            "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(signal.Signals(number).name for number in config.signals),
            names.STORE_ENDPOINT: f"{own_store[0]}:{own_store[1]}",
            names.JOB_TOKEN: job_token,
            names.WORKER_IDENTITY: names.format_identity(slot.local_rank, slot.incarnation),
        }
    )
    if config.virtual_local_rank:
        environment["CUDA_VISIBLE_DEVICES"] = _own_device(slot.local_rank)
    environment.pop(names.AGENT_ENDPOINT, None)
    environment.pop(names.STATE_DIRECTORY, None)
    if state_directory is not None:
        environment[names.STATE_DIRECTORY] = str(state_directory)
    if agent_endpoint is not None:
        environment[names.AGENT_ENDPOINT] = agent_endpoint
    environment.pop(names.DATA_ENDPOINT, None)
    if data_endpoint is not None:
        environment[names.DATA_ENDPOINT] = data_endpoint
    return environment


def with_script_in(config: LaunchConfig, directory: Path) -> LaunchConfig:
    """The same launch, with a script that is in no file in one of this directory: it ends with the job."""
    if config.script_text is None:
        return config
    path = directory / _SCRIPT
    path.write_bytes(config.script_text)
    words = list(config.command)
    words[words.index(config.script)] = str(path)
    return replace(config, command=tuple(words), script_text=None)


def worker_command(config: LaunchConfig, local_rank: int) -> tuple[str, ...]:
    """The command of one worker: bound to its cores, `${local_rank}` replaced as torchrun does it."""
    program, *arguments = config.command
    if any("$" in argument for argument in arguments):
        arguments = [Template(argument).safe_substitute(local_rank=str(local_rank)) for argument in arguments]
    binding = ("numactl", f"--physcpubind={config.cores[local_rank]}") if config.cores else ()
    return (*binding, program, *arguments)


def _own_device(local_rank: int) -> str:
    """The GPU that a worker sees as its only one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(local_rank) if visible is None else visible.split(",")[local_rank].strip()
