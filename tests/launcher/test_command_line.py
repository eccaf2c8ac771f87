"""The command line: what it accepts, what it refuses in one sentence, what it never imports."""

from __future__ import annotations

import signal
import subprocess
import sys

import click
import pytest
from hyperpodrun.agent.config import OutputMap
from hyperpodrun.launcher import UsageError, command, main, parsing
from hyperpodrun.launcher.options import OPTIONS


def config(*arguments: str):
    return command.launcher.main(args=[*arguments, "/bin/true"], standalone_mode=False)


def test_dashes_and_underscores_are_the_same():
    assert config("--nproc-per-node=3").nproc_per_node == config("--nproc_per_node=3").nproc_per_node == 3
    assert config("--max_restarts", "2").max_restarts == 2


def test_every_option_has_a_pet_variable_as_its_default(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    monkeypatch.setenv("PET_INPROCESS_RESTART", "1")
    monkeypatch.setenv("PET_STANDALONE", "1")
    monkeypatch.setenv("PET_TEE", "3")
    parsed = config()
    assert (parsed.nproc_per_node, parsed.inprocess_restart, parsed.tee.streams(7)) == (4, True, 3)
    assert config("--nproc-per-node=2").nproc_per_node == 2, "the command line wins"


def test_what_follows_the_script_is_the_scripts():
    parsed = command.launcher.main(
        args=["--no-python", "/bin/echo", "--nproc-per-node=9", "-m", "x"], standalone_mode=False
    )
    assert parsed.command == ("/bin/echo", "--nproc-per-node=9", "-m", "x")
    assert parsed.nproc_per_node == 1


def test_the_worker_command_is_python_unbuffered_a_module_or_the_program():
    assert config().command == (sys.executable, "-u", "/bin/true")
    assert config("-m").command == (sys.executable, "-u", "-m", "/bin/true")
    assert config("--no-python").command == ("/bin/true",)


@pytest.mark.parametrize(
    ("value", "streams"),
    [("0", [0, 0]), ("1", [1, 1]), ("3", [3, 3]), ("0:1,12:3", [1, 0]), ("1:2", [0, 2])],
)
def test_output_maps_name_streams_for_all_or_some_local_ranks(value, streams):
    assert [parsing.parse_outputs(value).streams(rank) for rank in (0, 1)] == streams


def test_output_maps_take_any_rank_number():
    assert parsing.parse_outputs("0:1,12:3").streams(12) == 3
    assert parsing.parse_outputs("0") == OutputMap()


@pytest.mark.parametrize("name", ["SIGTERM", "TERM", "term", "15"])
def test_signals_by_name_or_number(name):
    assert parsing.parse_signal(name) == signal.SIGTERM


def test_process_counts(monkeypatch):
    monkeypatch.setattr(parsing.os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(parsing, "_nvml_count", lambda: 0)
    assert [parsing.count_processes(value) for value in ("5", "cpu", "auto")] == [5, 6, 6]
    with pytest.raises(click.BadParameter, match="no GPU"):
        parsing.count_processes("gpu")
    monkeypatch.setattr(parsing, "_nvml_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert parsing.count_processes("gpu") == parsing.count_processes("auto") == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert parsing.count_processes("gpu") == 2


@pytest.mark.parametrize(
    ("settings", "interval", "limit"),
    [
        ("", 1, 5),
        ("keep_alive_interval=2", 2, 6),
        ("keep_alive_interval=2,keep_alive_max_attempt=4", 2, 8),
        ("heartbeat_interval=0.5,heartbeat_limit=2", 0.5, 2),
    ],
)
def test_heartbeats_in_torchruns_words_and_in_ours(settings, interval, limit):
    cluster = config("--nnodes=2", "--rdzv-endpoint=localhost", f"--rdzv-conf={settings}").cluster
    assert (cluster.heartbeat_interval, cluster.heartbeat_limit) == (interval, limit)


BAD = [
    ["--no-such-option", "x.py"],
    ["--nproc-per-node=0", "x.py"],
    ["--nproc-per-node=many", "x.py"],
    ["--nproc-per-node=²", "x.py"],
    ["--nnodes=2:1", "x.py"],
    ["--nnodes=1:2:3", "x.py"],
    ["--nnodes=2", "x.py"],
    ["--max-restarts=-1", "x.py"],
    ["--max-restarts=x", "x.py"],
    ["--tee=4", "x.py"],
    ["--tee=0:1,", "x.py"],
    ["--redirects=a:1", "x.py"],
    ["--shutdown-timeout=-1", "x.py"],
    ["--shutdown-signal=SIGNOTHING", "x.py"],
    ["--inprocess-timeout=0", "x.py"],
    ["--max-inprocess-restarts=3", "/bin/true"],
    ["-m", "--no-python", "x.py"],
    ["--pre-train-script=/nonexistent", "/bin/true"],
    ["--post-train-script=/etc/passwd", "/bin/true"],
    ["--pre-train-script=/bin/true", "--pre-train-args='", "/bin/true"],
    ["--nnodes=2", "--rdzv-endpoint=localhost", "--rdzv-conf=heartbeat_limit=0.5", "/bin/true"],
    ["--nnodes=2", "--rdzv-endpoint=localhost", "--rdzv-conf=keep_alive_max_attempt=1", "/bin/true"],
    ["/no/such/script.py"],
    [],
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, capfd):
    with pytest.raises(UsageError) as refusal:
        main(arguments)
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_bad_input_ends_the_command_with_that_sentence_and_2():
    command_line = [sys.executable, "-m", "hyperpodrun", "--nproc-per-node=many", "x.py"]
    finished = subprocess.run(command_line, capture_output=True, text=True, timeout=30, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("hyperpodrun: ")
    assert finished.stderr.count("\n") == 1


def test_bad_pet_variables_are_refused_too(monkeypatch):
    monkeypatch.setenv("PET_MAX_RESTARTS", "many")
    with pytest.raises(UsageError):
        main(["/bin/true"])


def test_help_names_every_option_and_imports_no_torch():
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hyperpodrun", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "numpy", "asyncio")}
    for option in OPTIONS:
        for parameter in getattr(option(lambda: None), "__click_params__", []):
            assert max(parameter.opts, key=len) in finished.stdout or isinstance(parameter, click.Argument)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion_is_printed_for_each_shell(shell, capfd):
    assert main([f"--print-completion={shell}"]) is None
    assert "complete" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("--nnodes 2 --start-method sp", "plain,spawn"),
        ("--nproc-per", "plain,--nproc-per-node"),
        ("--nnodes=2 --log-line", "plain,--log-line-prefix-template"),
        ("-r3 tr", "file,tr"),
        ("train.py tr", "file,tr"),
    ],
)
def test_a_command_line_that_is_not_whole_is_completed(words, completed, monkeypatch, capfd):
    monkeypatch.setenv("_HYPERPODRUN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"hyperpodrun {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert (ended.value.code, capfd.readouterr().out.strip()) == (0, completed)


def test_a_whole_launch_never_imports_torch(tmp_path):
    program = """
import sys
from hyperpodrun.launcher import main
main(["--inprocess-restart", "--nproc-per-node=2", "--no-python", "/bin/true"])
assert "zmq" in sys.modules and "hyperpodrun.rootless.server" in sys.modules
loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy")]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


def test_importing_the_package_costs_nothing():
    program = "import sys, hyperpodrun; print(dir(hyperpodrun)); assert not {'torch', 'zmq'} & set(sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HPWrapper" in finished.stdout
