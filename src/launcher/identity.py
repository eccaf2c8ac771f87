"""What this launch was asked to run, as agents of a job on many nodes state it to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
import xxhash

from ..agent.reading import read_regular
from ..agent.workers.imports import source_of
from ..control.membership.identity import MEANT, OF_A_ROLE, Identity
from .environment import ROOTLESS

_OF_THE_JOB = ("inprocess_restart", "max_restarts", "max_inprocess_restarts", "inprocess_timeout", "min_nodes")
"""Options that whoever leads acts by, and anybody may come to lead."""
_HOOKS = ("pre_train_script", "pre_train_args", "post_train_script", "post_train_args")


def identity_of(options: Mapping[str, Any], text: bytes | None, settings: Mapping[str, str]) -> Identity:
    """`text`: of the script, where it is in no file. Raises click.UsageError."""
    script = options["training_script"]
    low, high = options["nnodes"]
    # As it was written: `gpu` can be another number on each node.
    stated = {"--nnodes": f"{low}:{high}", OF_A_ROLE: str(options["nproc_as_written"])[:100]}
    for name in _OF_THE_JOB:
        if options[name] not in (None, False):
            stated[f"--{name.replace('_', '-')}"] = f"{options[name]:g}" if options[name] is not True else "1"
    if not options.get("rootless", True):
        stated[ROOTLESS] = "0"
    for name in _HOOKS:
        if options[name]:
            stated[f"--{name.replace('_', '-')}"] = str(options[name])[:1000]
    return Identity(
        script=_name(script)[:1000],
        text=_digest([_text(options) if text is None else text]),
        arguments=_digest([_kind(options), *(os.fsencode(word) for word in options["training_script_args"])]),
        options=tuple(stated.items()),
        may_differ=_is_meant(settings),
    )


def _text(options: Mapping[str, Any]) -> bytes:
    """What is run; the name where that cannot be read: a program, perhaps built for another machine."""
    script = options["training_script"]
    if options["module"]:
        path = source_of(script)
    elif os.path.isdir(script):
        path = os.path.join(script, "__main__.py")
    else:
        path = script
    found = None if path is None else read_regular(path)
    if found is None or (options["no_python"] and not found.startswith(b"#!")):
        return os.fsencode(os.path.basename(script))
    return found


def _kind(options: Mapping[str, Any]) -> bytes:
    return b"-m" if options["module"] else b"program" if options["no_python"] else b"script"


def _name(script: str) -> str:
    return script.encode(errors="replace").decode()


def _digest(parts: Sequence[bytes]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _is_meant(settings: Mapping[str, str]) -> bool:
    value = settings.get(MEANT, "0")
    if value not in ("0", "1"):
        raise click.UsageError(f"--rdzv-conf {MEANT}={value}: 1 is yes, 0 is no")
    return value == "1"
