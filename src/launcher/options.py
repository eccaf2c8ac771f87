"""The command line: every option declared once, in the order in which --help shows it.

Each option has a dash and an underscore spelling, and its default comes from `PET_<NAME>` unless torchrun has no such
variable for it. What their beginnings and `-r3` mean is in `arguments.py`; `docs/torchrun.md` has a row for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from . import parsing
from .completion import SHELLS, complete_file, print_completion
from .environment import nodes_of_environment, workers_of_environment
from .parsing import Parsed

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class PetOption(click.Option):
    """An option whose default is `PET_<NAME>`, also when that is empty."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return os.environ.get(self.envvar) if isinstance(self.envvar, str) else None


class NodesOption(PetOption):
    """`PET_NNODES`, or `NNODES`."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        return nodes_of_environment() if value is None else value


class WorkersOption(PetOption):
    """`PET_NPROC_PER_NODE`, or `N_PROC_PER_NODE`."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        return workers_of_environment() if value is None else value


class PetFlag(click.types.BoolParamType):
    """A flag's variable is a number, as in torchrun: 0 is off."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if not isinstance(value, str):
            return bool(value)
        try:
            return bool(int(value))
        except ValueError:
            self.fail(f"{value!r} is not a number: 1 is on, 0 is off", param, ctx)


def _option(*names: str, pet: bool = True, **settings: Any) -> Decorator:
    name = max(names, key=len).removeprefix("--").replace("-", "_")
    kind = settings.pop("cls", PetOption)
    return click.option(*names, cls=kind, envvar=f"PET_{name.upper()}" if pet else None, **settings)


def _flag(*names: str, **settings: Any) -> Decorator:
    return _option(*names, is_flag=True, type=PetFlag(), default=False, **settings)


TORCHRUN_OPTIONS: list[Decorator] = [
    _option(
        "--nnodes",
        cls=NodesOption,
        type=Parsed("N|MIN:MAX", parsing.parse_nnodes),
        default="1:1",
        help="Number of nodes, or a range.  [default: NNODES, or 1]",
    ),
    _option(
        "--nproc-per-node",
        cls=WorkersOption,
        type=Parsed("N|auto|cpu|gpu|xpu", parsing.count_processes),
        default="1",
        help="Workers on this node; auto: one for each GPU, or for each core where there is none.  "
        "[default: N_PROC_PER_NODE, or 1]",
    ),
    _option(
        "--rdzv-backend",
        metavar="NAME",
        default="static",
        help="c10d, static and hyperpod are all hyperpodrun's own rendezvous.",
    ),
    _option("--rdzv-endpoint", metavar="HOST[:PORT]", default="", help="Where the job's store listens."),
    _option("--rdzv-id", metavar="NAME", help="Name of the job, in its environment and in log directories."),
    _option(
        "--rdzv-conf",
        type=Parsed("KEY=VALUE,...", parsing.parse_rendezvous_settings),
        default="",
        help="More about the rendezvous.",
    ),
    _flag("--standalone", help="One node that needs no other, on a free port. What a single node is anyway."),
    _option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="How often all processes of the job may be started anew, on however many nodes.",
    ),
    _option(
        "--monitor-interval",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        default=0.1,
        help="Not needed: the end of a process is seen at once.",
    ),
    _option(
        "--start-method",
        type=click.Choice(["standby", "spawn", "fork", "forkserver"]),
        default="standby",
        show_default=True,
        help="spawn: every worker is a new process. Otherwise it is forked from one that has imported torch already.",
    ),
    _option(
        "--event-log-handler",
        type=click.Choice(["null", "console", "dynamic_rendezvous"]),
        default="null",
        show_default=True,
        help="Where torchelastic's events go, one JSON object a line.",
    ),
    _option("--role", metavar="NAME", default="default", help="Role of the workers, shown in log prefixes."),
    _flag("-m", "--module", help="TRAINING_SCRIPT is a Python module, as in `python -m`."),
    _flag("--no-python", help="TRAINING_SCRIPT is an executable; do not put Python before it."),
    _flag("--run-path", help="Run TRAINING_SCRIPT with runpy.run_path, its errors recorded."),
    _option("--log-dir", metavar="DIR", help="Where logs, error files and recoveries.jsonl go."),
    _option(
        "-r",
        "--redirects",
        type=Parsed("MAP", parsing.parse_outputs),
        default="0",
        help="Streams to write to files: 1 stdout, 2 stderr, 3 both, or RANK:STREAMS,...",
    ),
    _option(
        "-t",
        "--tee",
        type=Parsed("MAP", parsing.parse_outputs),
        default="0",
        help="Streams to write to files and to the console.",
    ),
    _option(
        "--local-ranks-filter",
        type=Parsed("RANK,...", parsing.parse_ranks),
        default="",
        help="Show only these local ranks on the console; files are written for all.",
    ),
    _option(
        "--duplicate-stdout-filters",
        type=Parsed("TEXT,...", parsing.parse_texts),
        help="Copy teed stdout lines that contain one of these to filtered_stdout.log; ,, is a comma.",
    ),
    _option(
        "--duplicate-stderr-filters",
        type=Parsed("TEXT,...", parsing.parse_texts),
        help="The same for stderr and filtered_stderr.log.",
    ),
    _option("--node-rank", type=int, default=0, help="Rank of this node, with the static backend."),
    _option("--master-addr", metavar="HOST", help="Where the static backend's store listens.  [default: localhost]"),
    _option("--master-port", type=click.IntRange(0, 65535), help="And its port.  [default: a free one on one node]"),
    _option("--local-addr", metavar="HOST", help="This node's address for other nodes."),
    _option("--logs-specs", pet=False, metavar="NAME", help="Entry point of the group torchrun.logs_specs."),
    _option(
        "--numa-binding",
        pet=False,
        type=click.Choice(["node", "socket", "exclusive", "core-complex"]),
        help="Bind each worker to the cores near its GPU, with numactl.",
    ),
    _option(
        "--signals-to-handle",
        type=Parsed("SIGNAL,...", parsing.parse_signals),
        default="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        help="Signals that are passed on to the workers and end the job.  [default: TERM, INT, HUP, QUIT]",
    ),
    _option(
        "--shutdown-timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="From the first signal to SIGKILL.  [default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, or 30]",
    ),
    _flag("--virtual-local-rank", help="LOCAL_RANK is 0 everywhere and each worker sees its own GPU only."),
]

NEWER_TORCHRUN_OPTIONS: list[Decorator] = [
    _option(
        "--log-line-prefix-template",
        metavar="TEMPLATE",
        help="What teed lines begin with; ${role_name}, ${rank}, ${local_rank} and ${hostname} are replaced in it.  "
        "[default: TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE, or [${role_name}${local_rank}]:]",
    ),
    _option(
        "--print-completion",
        pet=False,
        type=click.Choice(SHELLS),
        is_eager=True,
        expose_value=False,
        callback=print_completion,
        help="Print what makes this shell complete the options, and exit.",
    ),
]
"""Of torch 2.14. Their beginnings do not make those of earlier options ambiguous."""

HYPERPOD_OPTIONS: list[Decorator] = [
    _flag("--inprocess-restart", help="After a fault, re-enter functions under HPWrapper in the surviving processes."),
    _option(
        "--inprocess-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="A worker that has not reached the barrier by then is replaced.  [default: 60 after a fault, 600 before "
        "the first epoch]",
    ),
    _option(
        "--preload",
        type=Parsed("MODULE,...", parsing.parse_modules),
        default="",
        help="Modules that are imported beforehand too; they must start no thread and touch no GPU.",
    ),
    _option(
        "--shutdown-signal",
        type=Parsed("SIGNAL", parsing.parse_signal),
        default="SIGTERM",
        show_default=True,
        help="What workers are sent first when they are stopped.",
    ),
    _option("--pre-train-script", metavar="FILE", help="Run before training, at every start of all processes."),
    _option("--pre-train-args", metavar="ARGS", help="Its arguments, in one string."),
    _option("--post-train-script", metavar="FILE", help="Run once after training has succeeded."),
    _option("--post-train-args", metavar="ARGS", help="Its arguments, in one string."),
    _option("--server-host", metavar="HOST", help="Accepted; this version serves no HTTP."),
    _option("--server-port", type=click.IntRange(0, 65535), help="Accepted; this version serves no HTTP."),
    _option("--server-log-level", metavar="LEVEL", help="Accepted; this version serves no HTTP."),
    _option(
        "--server-shutdown-timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Accepted; this version serves no HTTP.",
    ),
]

OWN_OPTIONS: list[Decorator] = [
    _option(
        "--max-inprocess-restarts",
        type=click.IntRange(min=0),
        help="How often the job may restart in process.  [default: as long as it makes progress]",
    ),
    _option(
        "--signals-to-forward",
        type=Parsed("SIGNAL,...", parsing.parse_forwarded),
        default="SIGUSR1,SIGUSR2",
        help="Signals that are passed on to workers that have a handler for them; the job goes on.  [default: USR1, "
        "USR2]",
    ),
    _option(
        "--min-nodes",
        type=click.IntRange(min=1),
        help="So many nodes may go on when the others are lost, also without a majority.  [default: a majority]",
    ),
    _option(
        "--job-secret-file",
        metavar="FILE",
        help="The secret by which the agents of a job on many nodes know each other; or HYPERPODRUN_JOB_SECRET.",
    ),
    _flag("--insecure", help="Many nodes without a secret: everybody who reaches the port can join, and command."),
]

OPTIONS: list[Decorator] = [
    *TORCHRUN_OPTIONS,
    *NEWER_TORCHRUN_OPTIONS,
    *HYPERPOD_OPTIONS,
    *OWN_OPTIONS,
    click.argument("training_script", shell_complete=complete_file),
    click.argument("training_script_args", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_file),
]


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options on one callback."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def torchrun_names() -> list[str]:
    """The full names of torchrun's options, as all its releases that we know have them."""

    def declare() -> None: ...

    for option in TORCHRUN_OPTIONS:
        option(declare)
    return [max(parameter.opts, key=len) for parameter in declare.__click_params__]  # type: ignore[attr-defined]
