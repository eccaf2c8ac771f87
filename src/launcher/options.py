"""The command line: every option declared once, in the order in which --help shows it.

Each option has a dash and an underscore spelling, and its default comes from `PET_<NAME>`, as in torchrun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .parsing import Parsed, count_processes, parse_modules, parse_nnodes, parse_outputs, parse_signal

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

OPTIONS: list[Decorator] = [
    click.option(
        "--nnodes",
        type=Parsed("N|MIN:MAX", parse_nnodes),
        default="1",
        help="Number of nodes.",
    ),
    click.option(
        "--nproc-per-node",
        type=Parsed("N|auto|cpu|gpu", count_processes),
        default="1",
        help="Workers on this node; auto: one for each GPU, or for each core where there is none.",
    ),
    click.option("--standalone", is_flag=True, help="One node that needs no other. What a single node is anyway."),
    click.option(
        "--rdzv-id", default="none", help="Name of the job, in its environment and in the names of log directories."
    ),
    click.option("--role", default="default", help="Role of the workers, shown in log prefixes."),
    click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="How often all processes may be started anew.",
    ),
    click.option(
        "--inprocess-restart",
        is_flag=True,
        help="After a fault, re-enter functions under HPWrapper in the surviving processes.",
    ),
    click.option(
        "--inprocess-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="A worker that has not reached the barrier by then is replaced.  [default: 60 after a fault, 600 before "
        "the first epoch]",
    ),
    click.option(
        "--max-inprocess-restarts",
        type=click.IntRange(min=0),
        help="How often the job may restart in process.  [default: as long as it makes progress]",
    ),
    click.option(
        "--start-method",
        type=click.Choice(["standby", "spawn", "fork", "forkserver"]),
        default="standby",
        show_default=True,
        help="spawn: every worker is a new process. Otherwise it is forked from one that has imported torch already.",
    ),
    click.option(
        "--preload",
        type=Parsed("MODULE,...", parse_modules),
        default="",
        help="Modules that are imported beforehand too; they must start no thread and touch no GPU.",
    ),
    click.option(
        "--shutdown-signal",
        type=Parsed("SIGNAL", parse_signal),
        default="SIGTERM",
        show_default=True,
        help="What workers are sent first when they are stopped.",
    ),
    click.option(
        "--shutdown-timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=30.0,
        show_default=True,
        help="From that signal to SIGKILL.",
    ),
    click.option("--pre-train-script", metavar="FILE", help="Run before training, at every start of all processes."),
    click.option("--pre-train-args", metavar="ARGS", help="Its arguments, in one string."),
    click.option("--post-train-script", metavar="FILE", help="Run once after training has succeeded."),
    click.option("--post-train-args", metavar="ARGS", help="Its arguments, in one string."),
    click.option("--log-dir", metavar="DIR", help="Where logs, error files and recoveries.jsonl go."),
    click.option(
        "-r",
        "--redirects",
        type=Parsed("MAP", parse_outputs),
        default="0",
        help="Streams to write to files: 1 stdout, 2 stderr, 3 both, or RANK:STREAMS,...",
    ),
    click.option(
        "-t",
        "--tee",
        type=Parsed("MAP", parse_outputs),
        default="0",
        help="Streams to write to files and to the console.",
    ),
    click.option("-m", "--module", is_flag=True, help="TRAINING_SCRIPT is a Python module, as in `python -m`."),
    click.option("--no-python", is_flag=True, help="TRAINING_SCRIPT is an executable; do not put Python before it."),
    click.argument("training_script"),
    click.argument("training_script_args", nargs=-1, type=click.UNPROCESSED),
]


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options on one callback."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function
