"""The file that `accelerate config` has written, as far as it speaks of the program and not of its launch.

`accelerate launch` turns it into variables of the environment that `Accelerator` and `TrainingArguments` read; here the
same variables are set in the process itself. Those that are set already count more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ...checkpointless.errors import UnsupportedStateError

_log = logging.getLogger("hyperpodrun.integrations")

FILE = "ACCELERATE_CONFIG_FILE"
_VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "use_cpu": "ACCELERATE_USE_CPU",
    "debug": "ACCELERATE_DEBUG_MODE",
    "enable_cpu_affinity": "ACCELERATE_CPU_AFFINITY",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
_DYNAMO = ("backend", "mode", "use_dynamic", "use_fullgraph", "use_regional_compilation")
_REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TPU", "TP")


def apply_config(environ: MutableMapping[str, str]) -> None:
    """Sets what the file says and the environment does not."""
    path = _path(environ)
    if path is None:
        return
    said = _read(path)
    kind = str(said.get("distributed_type") or "NO").upper()
    if kind in _REFUSED:
        raise UnsupportedStateError(
            f"{path} says distributed_type: {kind}, and a recoverable function trains with DDP only: run it with a "
            f"file of another type (named by {FILE}), or write the loop with CheckpointManager (docs/checkpointless.md)"
        )
    for name, value in variables(said).items():
        environ.setdefault(name, value)
    world = environ.get("WORLD_SIZE")
    processes = said.get("num_processes")
    if world is not None and processes is not None and str(processes) != world and environ.get("RANK") == "0":
        _log.warning(
            "%s says num_processes: %s, and this job has %s: the launcher's --nproc-per-node and --nnodes count",
            path,
            processes,
            world,
        )


def variables(said: Mapping[str, Any]) -> dict[str, str]:
    """What `accelerate launch` would set."""
    found = {name: _text(said[key]) for key, name in _VARIABLES.items() if said.get(key) not in (None, False)}
    dynamo = said.get("dynamo_config") or {}
    for key in _DYNAMO:
        value = dynamo.get(f"dynamo_{key}")
        if value not in (None, False):
            found[f"ACCELERATE_DYNAMO_{key.upper()}"] = _text(value)
    return found


def _text(value: Any) -> str:
    return "true" if value is True else str(value)


def _path(environ: Mapping[str, str]) -> Path | None:
    """The file that is named, or the one that `accelerate config` writes to where nothing is named."""
    named = environ.get(FILE)
    if named:
        return Path(named)
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()
    default = home / "accelerate" / "default_config.yaml"
    return default if default.is_file() else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            said = json.loads(text)
        else:
            import yaml

            said = yaml.safe_load(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"the configuration of accelerate in {path} cannot be read: {error}") from None
    except Exception as error:  # yaml's own
        raise ValueError(f"{path} is not the YAML of a configuration of accelerate: {error}") from None
    if not isinstance(said, Mapping):
        raise ValueError(f"{path} is not a configuration of accelerate: it has no names with values")
    return said
