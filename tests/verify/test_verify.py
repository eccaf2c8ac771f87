"""`hyperpodrun verify` on whole jobs: what it finds, what it says, and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hyperpodrun.verify.launch import Runner

WORKER = Path(__file__).parent / "workers" / "train.py"
EMPTY = WORKER.with_name("empty.py")


@pytest.fixture
def verify(tmp_path):
    """verify(*arguments): in an empty directory, with the temporary files in another one that must be empty again."""
    here, temporary = tmp_path / "here", tmp_path / "tmp"
    here.mkdir()
    temporary.mkdir()

    def run(*arguments, python=()):
        finished = subprocess.run(
            [sys.executable, *python, "-m", "hyperpodrun", "verify", *map(str, arguments)],
            cwd=here,
            env={**os.environ, "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        if "--keep" not in arguments:
            assert not list(temporary.iterdir())
        assert not list(here.iterdir()), "a run wrote into the working directory"
        return finished

    return run


def test_a_sound_job_is_equal_also_when_a_fault_takes_all_ranks_one_step_back(verify):
    back = "raise:rank=0,step=3,where=in-update;raise:rank=1,step=3,where=in-update"
    lost = "kill:rank=1,step=4,where=backward"
    finished = verify("--nproc-per-node=2", "--inject", f"{back};{lost}", WORKER)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1 of 1 runs with a fault were equal to the undisturbed ones." in finished.stdout
    assert "the last line of each rank" in finished.stdout
    assert finished.stdout.count("equal, recovered in") == 1
    assert "not registered" not in finished.stdout


def test_what_was_forgotten_is_named_and_where_it_was_first_seen(verify):
    finished = verify("--inject=kill:rank=1,step=2,where=backward", "--keep", "--nproc-per-node=2", WORKER, "forgotten")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "DIFFERENT: model.weight, model.bias" in finished.stdout
    assert "after step 2" in finished.stdout or "after step 3" in finished.stdout
    assert "step 0 changed the tensor average, which is not registered" in finished.stdout
    assert "verify --keep --inject 'kill:rank=1,step=2,where=backward' --nproc-per-node=2" in finished.stdout
    kept = Path(finished.stdout.splitlines()[-1].removeprefix("the runs are in "))
    assert sorted(path.name for path in (kept / "2").iterdir()) == [
        *("home", "launcher.log", "logs", "tmp", "trace", "work")
    ]


def test_a_job_that_is_not_deterministic_is_not_called_wrong(verify):
    finished = verify("--faults=1", WORKER, "random")
    assert finished.returncode == 3, finished.stdout + finished.stderr
    assert "Not deterministic: two runs without any fault differ; first in model.weight, model.bias" in finished.stdout
    assert "on rank 0 after step 0" in finished.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((WORKER, "refused"), "refused: register(callback=...): a builtin_function_or_method has no state_dict"),
        ((EMPTY, "there is no data"), "The job fails without any fault."),
        ((EMPTY,), "No step was recorded"),
    ],
    ids=["refused", "fails", "without a manager"],
)
def test_a_job_that_cannot_be_compared_is_no_success(verify, command, said):
    finished = verify("--faults=1", *command)
    assert finished.returncode == 4, finished.stdout + finished.stderr
    assert said in finished.stdout
    assert finished.stdout.count("undisturbed 1") == 1


def test_it_imports_no_torch_itself(verify):
    finished = verify("--faults=1", EMPTY, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "hyperpodrun.verify.launch" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "numpy")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults=0", WORKER], "--faults"),
        (["--inject=kill", WORKER], "'kill' is not KIND:rank=R,step=S"),
        (["no-such-script.py"], "there is no script no-such-script.py"),
        ([], "TRAINING_SCRIPT"),
        (["--nproc-per-node=many", WORKER], "many"),
        (["--share=nowhere", WORKER], "nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_2(verify, arguments, said):
    finished = verify(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr


def test_a_run_that_does_not_end_is_stopped(tmp_path):
    script = tmp_path / "source" / "endless.py"
    script.parent.mkdir()
    script.write_text("import time\nwhile True: time.sleep(60)")
    runner = Runner(["--log-dir=elsewhere", "--", "endless.py"], tmp_path / "runs", script.parent, (), keep=False)
    ended = runner.run(limit=1.0)
    assert not ended.finished
    assert ended.sentence == "had not ended after 1 s and was stopped"
    assert [path.name for path in tmp_path.rglob("*")] == ["source", "runs", "endless.py"]


def test_a_signal_ends_it_and_the_run_under_way_and_nothing_is_left(tmp_path):
    script, pid_file = tmp_path / "endless.py", tmp_path / "pid"
    script.write_text(
        f"import os, time\nopen({str(pid_file)!r} + '~', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(pid_file)!r} + '~', {str(pid_file)!r})\nwhile True: time.sleep(60)"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "hyperpodrun", "verify", script.name]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(temporary.iterdir())
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_help_tells_its_options_and_exit_codes(verify):
    finished = verify("--help")
    assert finished.returncode == 0
    for word in ("--faults", "--seed", "--inject", "--share", "--keep", "3 the undisturbed runs differ"):
        assert word in " ".join(finished.stdout.split())


def test_a_script_of_that_name_is_launched_where_there_is_one(tmp_path):
    def launch(*arguments):
        command = [sys.executable, "-m", "hyperpodrun", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert "there is no script verify" in launch("--", "verify").stderr
    (tmp_path / "verify").write_text("print('a script')")
    assert launch("verify").stdout == launch("--", "verify").stdout == "a script\n"
    help_text = launch("--help").stdout
    assert "hyperpodrun verify" in help_text
