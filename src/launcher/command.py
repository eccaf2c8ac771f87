"""From the command line to a launch: checks what belongs together, builds the one LaunchConfig, runs the agent."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..agent.agent import Agent
from ..agent.config import LaunchConfig
from ..control.job.commands import EXIT_SIGNAL_BASE, End
from .arguments import Arguments
from .completion import NAME
from .environment import is_rootless, port_base, workers_of_environment
from .errors import LaunchError, UsageError, child_failed, stopped_by_signal
from .options import torchrun_names, with_options
from .parsing import split_script
from .rendezvous import meeting_point
from .scripts import STDIN, text_of
from .subcommands import SUBCOMMANDS

DEFAULT_SHUTDOWN_TIMEOUT = 30.0
_NPROC = "--nproc-per-node="


class LauncherCommand(click.Command):
    """A click command that reads its command line as argparse would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["epilog"] = "\b\nBeside launches:\n" + "\n".join(
            f"  hyperpodrun {name} [OPTIONS] ...  {meaning}" for name, meaning in SUBCOMMANDS.items()
        )
        kwargs["context_settings"] = {
            "allow_interspersed_args": False,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 110,
        }
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        try:
            words = Arguments(options, torchrun_names()).normalise(args)
        except click.UsageError:
            if not ctx.resilient_parsing:  # a shell completes a command line that is not whole yet
                raise
            words = args
        end = words.index("--") if "--" in words else len(words)
        written = [word.partition("=")[2] for word in words[:end] if word.startswith(_NPROC)]
        ctx.meta[_NPROC] = written[-1] if written else _workers_as_given()
        return super().parse_args(ctx, words)


@click.command(cls=LauncherCommand, name=NAME)
@with_options
def launcher(**options: Any) -> LaunchConfig:
    """Starts TRAINING_SCRIPT once for each worker of this node, watches over them, and recovers from faults.

    Options can be written with dashes or underscores, or by a beginning that only one has; their defaults come from
    PET_<NAME>. What follows the script is the script's, ${local_rank} replaced in it.
    """
    context = click.get_current_context()
    source = context.get_parameter_source
    given = {name for name in options if source(name) is not ParameterSource.DEFAULT}
    if source("nnodes") is ParameterSource.ENVIRONMENT and "PET_NNODES" not in os.environ:
        given.remove("nnodes")
    return build_config({**options, "given": given, "nproc_as_written": context.meta[_NPROC]})


def parse(args: Sequence[str] | None = None) -> LaunchConfig | None:
    """The launch that the arguments (default: those of this process) and `PET_*` describe, None after --help.

    Raises UsageError with one sentence.
    """
    try:
        config = launcher.main(args=None if args is None else list(args), prog_name=NAME, standalone_mode=False)
    except click.UsageError as error:
        raise UsageError(" ".join(error.format_message().split())) from None
    return config if isinstance(config, LaunchConfig) else None


def run(args: Sequence[str] | None = None) -> None:
    """Parses and runs. Returns when every worker has succeeded, and raises a LaunchError otherwise."""
    config = parse(args)
    if config is None:
        return
    if os.environ.get("HYPERPODRUN_INJECT"):
        _announce_faults()
    try:
        agent = Agent(config)
    except OSError as error:
        raise LaunchError(f"cannot start: {error}") from error
    end = agent.run()
    if end.exit_code != 0:
        raise _failure(agent, config, end)


def _announce_faults() -> None:
    """Faults on purpose: refused before anything has started, or said loudly."""
    from ..testing.settings import announcement, wanted_faults

    try:
        faults = wanted_faults()
    except ValueError as error:
        raise UsageError(str(error)) from None
    if faults:
        print(f"hyperpodrun: {announcement(faults)}", file=sys.stderr, flush=True)


def _failure(agent: Agent, config: LaunchConfig, end: End) -> LaunchError:
    if end.exit_code > EXIT_SIGNAL_BASE:
        signum = signal.Signals(end.exit_code - EXIT_SIGNAL_BASE)
        return stopped_by_signal(f"process {os.getpid()} got signal {signum.name}", signum)
    failures = agent.failures(end.cause)
    if not failures:
        return LaunchError(end.reason, end.exit_code)
    return child_failed(config.script, failures, end.exit_code)


def build_config(options: dict[str, Any]) -> LaunchConfig:
    """The launch that the options describe; `given` names those that were written, or are in `PET_*`.

    Raises click.UsageError where they contradict each other.
    """
    if options["max_inprocess_restarts"] is not None and not options["inprocess_restart"]:
        raise click.UsageError("--max-inprocess-restarts needs --inprocess-restart")
    if options["logs_specs"] is not None:
        _check_logs_specs(options["logs_specs"])
    port_base()  # wrong is wrong, also where it is not used
    rootless = is_rootless()
    rendezvous, run_id = meeting_point(options)
    command, text = _worker_command(options)
    cluster = None
    if options["nnodes"][1] > 1 and not options["standalone"]:
        from .discovery import find_cluster
        from .identity import identity_of

        identity = identity_of({**options, "rootless": rootless}, text, rendezvous.settings)
        cluster = find_cluster(options, rendezvous.endpoint, rendezvous.settings, run_id, identity)
    workers = options["nproc_per_node"]
    if options["virtual_local_rank"]:
        _check_visible_devices(workers)
    return LaunchConfig(
        command=command,
        script=options["training_script"],
        script_text=text,
        imports_from_here=text is not None and options["training_script"] == STDIN,
        nproc_per_node=workers,
        nodes=options["nnodes"],
        node_rank=options["node_rank"],
        run_id=run_id,
        rendezvous=rendezvous,
        rootless=rootless,
        cluster=cluster,
        local_addr=options["local_addr"],
        role=options["role"],
        max_restarts=options["max_restarts"],
        inprocess_restart=options["inprocess_restart"],
        inprocess_timeout=options["inprocess_timeout"],
        max_inprocess_restarts=options["max_inprocess_restarts"],
        monitor_interval=options["monitor_interval"],
        start_method=options["start_method"],
        signals=options["signals_to_handle"],
        forwarded_signals=_forwarded(options),
        preload=options["preload"],
        no_python=options["no_python"],
        shutdown_signal=options["shutdown_signal"],
        shutdown_timeout=_shutdown_timeout(options["shutdown_timeout"]),
        pre_train=_hook(options, "pre_train"),
        post_train=_hook(options, "post_train"),
        log_dir=_log_dir(options["log_dir"]),
        logs_specs=options["logs_specs"],
        redirects=options["redirects"],
        tee=options["tee"],
        console_ranks=options["local_ranks_filter"],
        stdout_filters=options["duplicate_stdout_filters"] or (),
        stderr_filters=options["duplicate_stderr_filters"] or (),
        line_prefix=options["log_line_prefix_template"]
        or os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
        or None,
        event_log=options["event_log_handler"],
        virtual_local_rank=options["virtual_local_rank"],
        numa_binding=options["numa_binding"],
        cores=_cores(options["numa_binding"], workers),
    )


def _workers_as_given() -> str:
    """`--nproc-per-node` where it is not on the command line."""
    value = os.environ.get("PET_NPROC_PER_NODE")
    return workers_of_environment() or "1" if value is None else value


def _cores(mode: str | None, workers: int) -> tuple[str, ...]:
    if mode is None:
        return ()
    from .numa import bind

    return bind(mode, workers)


def _log_dir(value: str | None) -> Path | None:
    if not value:
        return None
    if os.path.isfile(value):
        raise click.UsageError(f"--log-dir {value} is a file")
    return Path(value).absolute()


def _check_logs_specs(name: str) -> None:
    from importlib import metadata

    if not list(metadata.entry_points().select(group="torchrun.logs_specs", name=name)):
        raise click.UsageError(f"--logs-specs: no installed package has an entry point torchrun.logs_specs:{name}")


def _shutdown_timeout(value: float | None) -> float:
    if value is not None:
        return value
    text = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    if text is None:
        return DEFAULT_SHUTDOWN_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise click.UsageError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={text!r} is not a number of seconds")
    return seconds


def _forwarded(options: dict[str, Any]) -> tuple[int, ...]:
    """What is handled ends the job: torchrun's word for SIGUSR1 is kept where it is given."""
    handled = options["signals_to_handle"]
    for signum in options["signals_to_forward"]:
        if signum in handled and signum not in (signal.SIGUSR1, signal.SIGUSR2):
            name = signal.Signals(signum).name
            raise click.UsageError(f"--signals-to-forward {name}: --signals-to-handle has it too, and ends the job")
    return tuple(signum for signum in options["signals_to_forward"] if signum not in handled)


def _check_visible_devices(workers: int) -> None:
    """Each worker gets one of the GPUs that the launcher may use, where that is limited."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and workers > len(visible.split(",")):
        raise click.UsageError(
            f"--virtual-local-rank: {workers} workers need as many GPUs, and CUDA_VISIBLE_DEVICES is {visible!r}"
        )


def _hook(options: dict[str, Any], kind: str) -> tuple[str, ...]:
    try:
        return split_script(options[f"{kind}_script"], options[f"{kind}_args"])
    except click.BadParameter as error:
        raise click.UsageError(f"--{kind.replace('_', '-')}-script: {error.message}") from None


def _worker_command(options: dict[str, Any]) -> tuple[tuple[str, ...], bytes | None]:
    """And the script's text, where workers cannot read it themselves."""
    script, arguments = options["training_script"], options["training_script_args"]
    if options["run_path"]:
        return (*_run_path_command(), script, *arguments), _existing(script)
    if options["no_python"]:
        if options["module"]:
            raise click.UsageError("--module and --no-python exclude each other")
        return (script, *arguments), None
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    if options["module"]:
        return (python, "-u", "-m", script, *arguments), None
    return (python, "-u", script, *arguments), _existing(script)


def _run_path_command() -> tuple[str, ...]:
    return (sys.executable, "-u", "-m", f"{__package__.partition('.')[0]}.inprocess.run_path")


def _existing(script: str) -> bytes | None:
    """The text of one that is there, if it is in no file."""
    if script != STDIN and not os.path.exists(script):
        raise click.UsageError(f"there is no script {script}")
    return text_of(script)
