"""What torchrun accepts we accept, with the same meaning; what it refuses we refuse. The exceptions are named below.

torchrun's side is its own parser and its own config_from_args, in this process. `docs/torchrun.md` explains each
exception.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import uuid
from collections import Counter
from unittest import mock

import pytest
import torch.distributed.run as torchrun
from hyperpodrun.launcher import UsageError, command, parsing
from hyperpodrun.launcher.endpoint import parse_endpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.elastic.multiprocessing.api import Std, to_map
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

SCRIPT = "/bin/true"
EXAMPLES = 1200
RANKS = 4

VALUES = {
    "--nnodes": ["1", "1:1", "1:2", "1:4", " 1", "0", "2:1", "1:2:3", "x", "", "1:"],
    "--nproc-per-node": ["1", "2", "+3", "4", "cpu", "auto", "gpu", "xpu", "many", "0", "-1", "1.5", ""],
    "--rdzv-backend": ["static", "c10d", "nothing", ""],
    "--rdzv-endpoint": ["", "localhost", "localhost:0", "127.0.0.1:29511", "[::1]:29512", "host:x", "a b:1", "[::1]"],
    "--rdzv-id": ["job", "", "7"],
    "--rdzv-conf": ["", "timeout=9", " a = b , join_timeout=2", "a", "a=", "=b", "a=b,", "a=b=c"],
    "--max-restarts": ["0", "3", "-1", "x", "1_0", ""],
    "--monitor-interval": ["0.5", "5", "1e-3", "x", "0", "-1"],
    "--start-method": ["spawn", "fork", "forkserver", "thread"],
    "--event-log-handler": ["null", "console", "dynamic_rendezvous"],
    "--role": ["trainer", "", "a b", "-x y", "-3"],
    "--log-dir": ["", "/tmp", "/dev/null", "/etc/passwd"],
    "--redirects": ["0", "3", "0:1", "0:1,1:2", "0:3,0:1", "4", "a", "0:", "0:1,", ""],
    "--tee": ["1", "2", "2:3,3:0", "12", "-1"],
    "--local-ranks-filter": ["", "0", "0,2", " 1 , 3", "a", "0,", ","],
    "--duplicate-stdout-filters": ["", "apple", "a,b", "a,,b", "a,,,b", ","],
    "--duplicate-stderr-filters": ["pear", ",,"],
    "--node-rank": ["0", "x", "1.0", ""],
    "--master-addr": ["127.0.0.1", "localhost", "[::1]", "example.org"],
    "--master-port": ["29510", "0", "x", "70000", ""],
    "--local-addr": ["127.0.0.1", ""],
    "--numa-binding": ["somewhere"],
    "--signals-to-handle": ["SIGTERM", "SIGTERM,SIGUSR1", " SIGINT , SIGUSR2"],
    "--shutdown-timeout": ["0", "1", "60", "x", "-1"],
}
FLAGS = ["--standalone", "--module", "--no-python", "--run-path", "--virtual-local-rank"]
SHORT = {"-r": "--redirects", "-t": "--tee"}
NAMES = [*VALUES, *FLAGS]
NO_PET = {"--numa-binding"}


def spelled(name: str) -> st.SearchStrategy[str]:
    """The option's name with dashes, underscores, or a beginning of one of them."""
    both = [name, "--" + name[2:].replace("-", "_")]
    shortened = st.sampled_from(both).flatmap(lambda full: st.integers(4, len(full)).map(lambda end: full[:end]))
    return st.one_of(st.sampled_from(both), st.sampled_from(both), shortened)


@st.composite
def one_option(draw) -> list[str]:
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return [draw(st.sampled_from(["--nonsense", "-x", "--nnodes", "-3", "-m=1", "--module=1", "-mt", "-m-t"]))]
    if kind <= 2:
        short = draw(st.sampled_from(sorted(SHORT)))
        value = draw(st.sampled_from(VALUES[SHORT[short]]))
        return draw(st.sampled_from([[short, value], [short + value], [f"{short}={value}"], [f"-m{short[1]}{value}"]]))
    if kind <= 5:
        flag = draw(st.sampled_from(FLAGS))
        return ["-m"] if flag == "--module" and draw(st.booleans()) else [draw(spelled(flag))]
    name = draw(st.sampled_from(sorted(VALUES)))
    written, value = draw(spelled(name)), draw(st.sampled_from(VALUES[name]))
    return [f"{written}={value}"] if draw(st.booleans()) else [written, value]


SCRIPTS = st.sampled_from(
    [[SCRIPT]] * 12
    + [["--", SCRIPT], [SCRIPT, "--"], [SCRIPT, "--", "x"], ["--", SCRIPT, "--", "x"], [SCRIPT, "--", "--"], [], ["--"]]
)
SCRIPT_ARGUMENTS = st.lists(
    st.sampled_from(["a", "--nnodes=9", "-m", "--tee", "3", "--", "-r3", "", "$x", "-5", "--lr=1", "-h"]), max_size=4
)
COMMAND_LINES = st.tuples(st.lists(one_option(), max_size=4), SCRIPTS, SCRIPT_ARGUMENTS).map(
    lambda parts: [*(token for tokens in parts[0] for token in tokens), *parts[1], *(parts[2] if parts[1] else [])]
)


@st.composite
def environments(draw) -> dict[str, str]:
    result = {}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)):
        values = ["0", "1", "2", "-1", "true", ""] if name in FLAGS else VALUES[name]
        if name not in NO_PET:
            result[f"PET_{name[2:].replace('-', '_').upper()}"] = draw(st.sampled_from(values))
    return result


class Refused(Exception):
    """torchrun does not start such a job."""


class ShowsHelp(Exception):
    """And does nothing else."""


def torchruns(arguments: list[str]) -> tuple[dict, tuple[str, ...]]:
    """What torchrun would run, from its own code, or Refused."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            args = torchrun.parse_args(arguments)
            with mock.patch.object(torchrun, "elastic_launch") as launch:
                torchrun.run(args)
        except SystemExit as end:
            if end.code == 0:
                raise ShowsHelp from None
            raise Refused(said.getvalue().splitlines()[-1]) from None
        except Exception as error:  # it refuses with whatever its code happens to raise
            raise Refused(f"{type(error).__name__}: {error}") from None
    config = launch.call_args.kwargs["config"]
    entry = launch.call_args.kwargs["entrypoint"]
    words = tuple(launch.return_value.call_args.args)
    command_line = (sys.executable, "-u", "-m", "hyperpodrun.inprocess.run_path") if callable(entry) else (entry,)
    return vars(config), (*command_line, *words)


def ours(arguments: list[str]) -> tuple[dict, tuple[str, ...]]:
    config = command.parse(arguments)
    if config is None:
        raise ShowsHelp
    return vars(config), config.command


def later_refusal(theirs: dict) -> str | None:
    """torchrun refuses some things only when it has begun to start the job."""
    if theirs["nproc_per_node"] <= 0 or not theirs["monitor_interval"] > 0:
        return "WorkerSpec"
    if theirs["rdzv_backend"] not in ("static", "c10d"):
        return "backend"
    try:
        _, port = parse_rendezvous_endpoint(theirs["rdzv_endpoint"], default_port=-1)
    except ValueError:
        return "endpoint"
    if port == -1 and theirs["rdzv_backend"] == "static":
        return "port"
    return None


def documented_exception(reason: str, arguments: list[str], environment: dict[str, str]) -> str | None:
    """Why we take, on purpose, what torchrun refuses."""
    if "ambiguous option" in reason:
        written = reason.partition("ambiguous option: ")[2].split(" ")[0].partition("=")[0]
        if not any(word.partition("=")[0] == written for word in before_script(arguments)):
            return "a beginning among the script's own arguments"
        full = {name for name in NAMES for form in (name, name.replace("-", "_").replace("__", "--", 1))
                if form.startswith(written)}  # fmt: skip
        if len(full) == 1:
            return "both spellings of one option begin like that"
    option = reason.partition("error: argument ")[2].partition("/")[0].partition(":")[0]
    if option and "invalid" in reason and sum(word.startswith(option[:4]) for word in before_script(arguments)) > 1:
        return "a wrong value before another one for the same option"
    return None


def before_script(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index(SCRIPT)] if SCRIPT in arguments else arguments


STANDBY = {"spawn": "standby"}


def assert_same(theirs: dict, mine: dict, arguments: list[str]) -> None:
    same = {
        "nodes": (theirs["min_nodes"], theirs["max_nodes"]),
        "nproc_per_node": theirs["nproc_per_node"],
        "role": theirs["role"],
        "max_restarts": theirs["max_restarts"],
        "monitor_interval": theirs["monitor_interval"],
        # Not given it is "spawn" there and "standby" here: documented, and as new a process for the script.
        "start_method": STANDBY.get(theirs["start_method"], theirs["start_method"])
        if mine["start_method"] == "standby"
        else theirs["start_method"],
        "local_addr": theirs["local_addr"],
        "event_log": theirs["event_log_handler"],
        "virtual_local_rank": theirs["virtual_local_rank"],
        "shutdown_timeout": theirs["shutdown_timeout"],
        "stdout_filters": tuple(theirs["duplicate_stdout_filters"]),
        "stderr_filters": tuple(theirs["duplicate_stderr_filters"]),
        "line_prefix": theirs["log_line_prefix_template"],
    }
    assert {name: mine[name] for name in same} == same
    names = [signal.Signals(number).name for number in mine["signals"]]
    assert names == [name.strip() for name in theirs["signals_to_handle"].split(",")]
    logs = theirs["logs_specs"]
    ranks = None if logs._local_ranks_filter is None else frozenset(logs._local_ranks_filter)
    assert mine["console_ranks"] == ranks
    for name, streams in (("redirects", logs._redirects), ("tee", logs._tee)):
        wanted = to_map(streams if isinstance(streams, dict) else Std(streams), RANKS)
        assert [mine[name].streams(rank) for rank in range(RANKS)] == [wanted[rank] for rank in range(RANKS)]

    meeting = mine["rendezvous"]
    assert (meeting.backend, meeting.endpoint) == (theirs["rdzv_backend"], theirs["rdzv_endpoint"])
    configs = {key: str(value) for key, value in theirs["rdzv_configs"].items()}
    if "timeout" not in meeting.settings:
        configs.pop("timeout")
    assert meeting.settings == configs
    if meeting.endpoint:
        default = {"c10d": 29400}.get(meeting.backend)
        assert parse_endpoint(meeting.endpoint, default) == parse_rendezvous_endpoint(meeting.endpoint, default)
    try:
        uuid.UUID(theirs["run_id"])
    except ValueError:
        assert mine["run_id"] == theirs["run_id"]


TALLY: Counter[str] = Counter()


@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(arguments=COMMAND_LINES, environment=environments())
def _compare(arguments: list[str], environment: dict[str, str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "OMP_"))}
    # Where the other nodes are, and by what they know each other, is no matter of options.
    known = {"HYPERPODRUN_JOB_SECRET": "a secret that is long enough"}
    unknown_hosts = mock.patch("hyperpodrun.launcher.discovery.resolve", return_value=[])
    with mock.patch.dict(os.environ, {**clean, **environment, **known}, clear=True), unknown_hosts:
        try:
            theirs, their_command = torchruns(arguments)
            reason = later_refusal(theirs)
        except Refused as refusal:
            reason = str(refusal)
        except ShowsHelp:
            reason = "help"
        os.environ.pop("OMP_NUM_THREADS", None)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                mine, my_command = ours(arguments)
        except ShowsHelp:
            assert reason is not None
            TALLY["help" if reason == "help" else "help is shown also beside a wrong value"] += 1
            return
        except UsageError as refusal:
            assert "\n" not in str(refusal)
            if reason is None:
                excuse = refuses_on_purpose(str(refusal), environment)
                assert excuse, f"only hyperpodrun refuses: {refusal}"
                TALLY[excuse] += 1
            else:
                TALLY["both refuse"] += 1
            return
    if reason is not None:
        excuse = documented_exception(reason, arguments, environment)
        assert excuse, f"only torchrun refuses: {reason}"
        TALLY[excuse] += 1
        return
    assert my_command == their_command
    assert_same(theirs, mine, arguments)
    TALLY["both accept"] += 1


def refuses_on_purpose(refusal: str, environment: dict[str, str]) -> str | None:
    """Why we refuse, on purpose, what torchrun takes."""
    if "--start-method" in refusal and "PET_START_METHOD" in environment:
        return "a start method that does not exist, in PET_START_METHOD"
    if refusal.startswith("there is no script"):
        return "a script that does not exist"
    return None


@pytest.mark.timeout(180)
def test_the_same_command_lines_are_accepted_and_mean_the_same(monkeypatch):
    monkeypatch.setattr(torchrun.logger, "level", logging.ERROR)
    monkeypatch.setattr(parsing, "_xpu_count", lambda: 0)  # which would ask torch, in a process of its own
    TALLY.clear()
    _compare()
    print(dict(TALLY))
    assert sum(TALLY.values()) >= 1000
    assert TALLY["both accept"] >= 300
    assert TALLY["both refuse"] >= 200
