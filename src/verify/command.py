"""The subcommand: its options, and the order of things."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..launcher.arguments import Arguments
from ..launcher.command import launcher, parse
from ..launcher.errors import UsageError
from ..launcher.options import torchrun_names
from ..testing.grammar import parse_injections
from ..testing.settings import INJECT
from . import workspace
from .compare import Difference, closing_lines, first_difference, missing_line, unseeded
from .launch import Ended, Runner
from .plan import plan
from .report import DIFFERENT, EQUAL, NON_DETERMINISTIC, NOT_COMPARED, Report, result_of

_PATIENCE = 10
"""A run with a fault may take so many times as long as one without, and a minute or two for the recovery."""
_PATIENCE_S = 180.0


class VerifyCommand(click.Command):
    """Its own options may stand among the launcher's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        launchers = [parameter for parameter in launcher.params if isinstance(parameter, click.Option)]
        line = Arguments([*own, *launchers], torchrun_names()).normalise(args)
        end = line.index("--") if "--" in line else len(line)
        names = {name for option in own for name in option.opts}
        mine = [word for word in line[:end] if word.partition("=")[0] in names]
        ctx.obj = [word for word in line[:end] if word.partition("=")[0] not in names] + line[end:]
        return super().parse_args(ctx, mine)


@click.command(
    cls=VerifyCommand,
    name="hyperpodrun verify",
    options_metavar="[OPTIONS] [OPTIONS OF A LAUNCH] TRAINING_SCRIPT [ARGUMENTS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 all runs with faults were equal to the undisturbed ones; 1 one was different; 2 the command "
    "line is wrong; 3 the undisturbed runs differ from each other; 4 a run failed, or could not be compared.",
)
@click.option("--faults", type=click.IntRange(min=1), default=8, show_default=True, help="Runs with a fault.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed draws other faults.")
@click.option(
    "--inject",
    "injections",
    multiple=True,
    metavar="FAULT",
    help="A run with this fault instead of drawn ones, as in the table; several in one run are separated by ';'. "
    "May be repeated.",
)
@click.option(
    "--share",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A file or directory that all runs read instead of a copy, such as a data set. May be repeated.",
)
@click.option("--keep", is_flag=True, help="Leave the runs' directories, with their logs, and say where.")
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> int:
    """Runs a script twice undisturbed and then with faults, and compares everything that it trained, bit for bit."""
    return verify(ctx.obj, **options)


def main(arguments: Sequence[str]) -> int:
    """The exit code. Raises UsageError with one sentence."""
    try:
        code = command.main(args=list(arguments), standalone_mode=False)
    except click.UsageError as error:
        raise UsageError(" ".join(error.format_message().split())) from None
    return int(code or 0)


def verify(
    launch: list[str], *, faults: int, seed: int, injections: tuple[str, ...], share: tuple[Path, ...], keep: bool
) -> int:
    """`launch`: a command line of the launcher, with full names."""
    if os.environ.get(INJECT):
        raise UsageError(f"verify chooses the faults: unset {INJECT}, or give them with --inject")
    for text in injections:
        try:
            parse_injections(text)
        except ValueError as error:
            raise UsageError(f"--inject: {error}") from None
    config = parse(launch)
    if config is None:
        return EQUAL
    if config.cluster is not None:
        raise UsageError("verify runs on one machine: leave out --nnodes")
    if config.script_text is not None:
        raise UsageError(f"verify runs a script several times: give it one in a file instead of {config.script}")
    source = Path.cwd()
    shared = tuple(path.absolute() for path in share)
    files, size = workspace.measure(source, shared)
    root = Path(tempfile.mkdtemp(prefix=workspace.PREFIX))
    shown = [word for word in launch if word != "--"]
    report = Report(shown, seed=seed, faults=len(injections) or faults, files=files, size=size)
    try:
        return _Verification(Runner(launch, root, source, shared, keep), report).run(faults, seed, injections)
    finally:
        if keep:
            report.say(f"the runs are in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


class _Verification:
    def __init__(self, runner: Runner, report: Report) -> None:
        self._runner, self._report = runner, report
        self._left_out: frozenset[str] = frozenset()
        """Generators that nobody has seeded."""

    def run(self, faults: int, seed: int, injections: tuple[str, ...]) -> int:
        first = self._undisturbed("undisturbed 1")
        if first is None:
            return NOT_COMPARED
        second = self._undisturbed("undisturbed 2", first)
        if second is None:
            return NOT_COMPARED
        difference = self._difference(first, second)
        if difference is not None:
            return self._not_deterministic(difference)
        wanted = list(injections) or plan(first.records, faults, seed)
        if not wanted:
            self._report.verdict(
                "Nothing to compare: the loop has a single step, or none in which a fault could fire.",
                "give the script more steps",
            )
            return NOT_COMPARED
        return self._disturbed(first, second, wanted)

    def _difference(self, one: Ended, other: Ended) -> Difference | None:
        return first_difference(one.records, other.records, self._left_out)

    def _undisturbed(self, name: str, before: Ended | None = None) -> Ended | None:
        """None: there is nothing to compare with, and that has been said."""
        ended = self._runner.run()
        steps = max((len(record.steps) for record in ended.records.values()), default=0)
        well = f"{steps} steps on {len(ended.records)} rank{'s' * (len(ended.records) != 1)}"
        difference = None
        if before is not None and ended.finished:
            self._left_out = unseeded(before.records, ended.records)
            difference = self._difference(before, ended)
        result, _ = result_of(ended, difference)
        self._report.row(name, ended, well if result == "equal" else result)
        if ended.refused:
            self._report.verdict(
                "The job is refused, without any fault: something that it registers cannot be carried over one.",
                "the sentence above names it",
            )
        elif not ended.finished:
            self._report.verdict(
                "The job fails without any fault.",
                f"run it without verify: hyperpodrun --inprocess-restart {self._report.command}",
            )
        elif not steps:
            self._report.verdict(
                "No step was recorded: the script has no loop over a CheckpointManager's steps.",
                'README.md, "Make your script recoverable", has the eight lines',
            )
        return ended if ended.finished and steps else None

    def _not_deterministic(self, difference: Difference) -> int:
        self._report.verdict(
            f"Not deterministic: two runs without any fault differ; first in {difference}.",
            "This is not about recovery: no run of this script can be compared with another, so none was broken.",
            "Seed every generator, and make kernels deterministic: torch.use_deterministic_algorithms(True), and on a "
            "CPU torch.set_num_threads(1).",
        )
        return NON_DETERMINISTIC

    def _disturbed(self, first: Ended, second: Ended, wanted: list[str]) -> int:
        lines = closing_lines(first.records, second.records)
        limit = _PATIENCE * first.seconds + _PATIENCE_S
        codes: list[int] = []
        unregistered = dict[str, str]()
        worst = ""
        for number, faults in enumerate(wanted, 1):
            ended = self._runner.run(faults, limit)
            difference = None
            if ended.finished:
                difference = self._difference(first, ended) or missing_line(lines, ended.records)
            result, code = result_of(ended, difference)
            self._report.row(str(number), ended, result)
            if code and (not worst or (code == DIFFERENT and DIFFERENT not in codes)):
                worst = faults
            codes.append(code)
        for ended in (first, second):
            for _, record in sorted(ended.records.items()):
                unregistered = {**record.unregistered, **unregistered}
        self._report.unregistered(list(unregistered.values()))
        return self._conclude(first, codes, worst, bool(lines))

    def _conclude(self, first: Ended, codes: list[int], worst: str, by_output: bool) -> int:
        equal = codes.count(EQUAL)
        objects = len({name for record in first.records.values() for found in record.steps.values() for name in found})
        declared = any(record.results for record in first.records.values())
        outcome = "the results that ranks declared" if declared else "the last line of each rank" if by_output else ""
        compared = (
            f"Compared: everything registered and the global generators, {objects} digests of each rank after each step"
            + (f", and {outcome}." if outcome else ".")
        )
        if self._left_out:
            compared += f" Left out, because nobody seeds them: {', '.join(sorted(self._left_out))}."
        if equal == len(codes):
            self._report.verdict(f"{equal} of {equal} runs with a fault were equal to the undisturbed ones.", compared)
            return EQUAL
        if DIFFERENT in codes:
            self._report.verdict(
                f"{codes.count(DIFFERENT)} of {len(codes)} runs with a fault ended DIFFERENT; {equal} were equal.",
                compared,
                "What differs first was not brought back, or is read from something that is not registered.",
                f"To look at such a run: {self._report.repeat(worst)}",
            )
            return DIFFERENT
        self._report.verdict(
            f"{equal} of {len(codes)} runs with a fault were equal, none was different, but {len(codes) - equal} could "
            "not be compared.",
            "The table says how they ended.",
            f"To look at such a run: {self._report.repeat(worst)}",
        )
        return NOT_COMPARED
