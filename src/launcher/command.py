"""From the command line to a launch: checks what belongs together, builds the one LaunchConfig, runs the agent."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..agent.agent import Agent
from ..agent.config import LaunchConfig
from .options import with_options
from .parsing import split_script

EXIT_USAGE = 2


class LauncherCommand(click.Command):
    """torchrun's habits: `--nproc_per_node` is `--nproc-per-node`, and everything after the script is the script's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {
            "token_normalize_func": lambda name: name.replace("_", "-"),
            "allow_interspersed_args": False,
            "auto_envvar_prefix": "PET",
            "help_option_names": ["-h", "--help"],
            "max_content_width": 110,
        }
        super().__init__(*args, **kwargs)


@click.command(cls=LauncherCommand, name="hyperpodrun")
@with_options
def launcher(**options: Any) -> LaunchConfig:
    """Starts TRAINING_SCRIPT once for each worker of this node, watches over them, and recovers from faults."""
    return build_config(options)


def run(args: Sequence[str] | None = None) -> int:
    """Parses and runs; returns the exit code. Bad input is one sentence on stderr and 2."""
    try:
        config = launcher.main(args=None if args is None else list(args), standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"hyperpodrun: {error.format_message()} (hyperpodrun --help lists the options)", err=True)
        return EXIT_USAGE
    except click.Abort:
        return 130
    if not isinstance(config, LaunchConfig):  # --help
        return int(config or 0)
    try:
        agent = Agent(config)
    except OSError as error:
        click.echo(f"hyperpodrun: cannot start: {error}", err=True)
        return 1
    return agent.run().exit_code


def build_config(options: dict[str, Any]) -> LaunchConfig:
    """The launch that the options describe. Raises click.UsageError where they contradict each other."""
    if options["nnodes"] != (1, 1):
        raise click.UsageError("--nnodes: this version runs on one node; more come with the rendezvous")
    if options["module"] and options["no_python"]:
        raise click.UsageError("--module and --no-python exclude each other")
    if options["max_inprocess_restarts"] is not None and not options["inprocess_restart"]:
        raise click.UsageError("--max-inprocess-restarts needs --inprocess-restart")
    log_dir = options["log_dir"]
    return LaunchConfig(
        command=_worker_command(options),
        nproc_per_node=options["nproc_per_node"],
        run_id=options["rdzv_id"],
        role=options["role"],
        max_restarts=options["max_restarts"],
        inprocess_restart=options["inprocess_restart"],
        inprocess_timeout=options["inprocess_timeout"],
        max_inprocess_restarts=options["max_inprocess_restarts"],
        start_method=options["start_method"],
        preload=options["preload"],
        no_python=options["no_python"],
        shutdown_signal=options["shutdown_signal"],
        shutdown_timeout=options["shutdown_timeout"],
        pre_train=_script(options, "pre_train"),
        post_train=_script(options, "post_train"),
        log_dir=Path(log_dir).absolute() if log_dir else None,
        redirects=options["redirects"],
        tee=options["tee"],
    )


def _script(options: dict[str, Any], kind: str) -> tuple[str, ...]:
    try:
        return split_script(options[f"{kind}_script"], options[f"{kind}_args"])
    except click.BadParameter as error:
        raise click.UsageError(f"--{kind.replace('_', '-')}-script: {error.message}") from None


def _worker_command(options: dict[str, Any]) -> tuple[str, ...]:
    script, arguments = options["training_script"], options["training_script_args"]
    if options["no_python"]:
        return (script, *arguments)
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    if options["module"]:
        return (python, "-u", "-m", script, *arguments)
    if not os.path.exists(script):
        raise click.UsageError(f"there is no script {script}")
    return (python, "-u", script, *arguments)
