"""`hyperpodrun.launcher.main` in programs that were written for torchrun's, and in notebooks."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import subprocess
import sys

import hyperpodrun.launcher as launcher
import pytest
from hyperpodrun.launcher import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

ROOT = """
import json, os, sys, time
if os.environ["RANK"] == "1":
    extra = {"py_callstack": "root", "timestamp": str(int(time.time()))}
    message = {"message": "ValueError: the root cause", "extraInfo": extra}
    json.dump({"message": message}, open(os.environ["TORCHELASTIC_ERROR_FILE"], "w"))
    sys.exit(3)
time.sleep(3600)
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_except_with_torchelastics_class_catches_ours(script):
    with pytest.raises(ChildFailedError) as failed:
        main(["--nproc-per-node=2", "--start-method=spawn", str(script(ROOT))])
    error = failed.value
    assert isinstance(error, launcher.ChildFailedError)
    rank, failure = error.get_first_failure()
    assert (rank, failure.exitcode, error.exit_code) == (1, 3, 1)
    assert "ValueError: the root cause" in str(failure.message)
    assert list(error.failures) == [1, 0], "whom the launcher stopped is named after the root cause"
    stopped = error.failures[0]
    assert (stopped.local_rank, stopped.exitcode, stopped.signal_name()) == (0, -signal.SIGTERM, "SIGTERM")
    banner = str(error)
    assert banner.index("rank      : 1") < banner.index("Failures:") < banner.index("rank      : 0")
    assert "the launcher stopped it with SIGTERM" in banner
    assert "FAILED" in error.format_msg(), "torch's own form of it"
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ChildFailedError)
    assert (str(again), again.exit_code, again.failures) == (banner, 1, error.failures)


def test_record_leaves_the_root_cause_in_the_error_file(script, tmp_path, monkeypatch):
    file = tmp_path / "reply.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    @record
    def program(worker: str) -> None:
        main(["--nproc-per-node=2", "--start-method=spawn", worker])

    with pytest.raises(ChildFailedError):
        program(str(script(ROOT)))
    written = json.loads(file.read_text())["message"]
    assert (written["message"], written["errorCode"]) == ("ValueError: the root cause", 3)
    file.unlink()
    with pytest.raises(ChildFailedError):  # nobody has recorded anything: no banner takes the place of a cause
        program(str(script("import sys; sys.exit(4)")))
    assert not file.exists()
    with pytest.raises(ChildFailedError):  # what the worker has written is of no use, and hides nothing else
        program(str(script("import os; open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write('{'); os._exit(5)")))
    assert not file.exists()


def test_a_signal_is_torchelastics_exception_too(script):
    with pytest.raises(SignalException) as stopped:
        main(["--no-python", "--start-method=spawn", "sh", "-c", "kill -TERM $PPID; exec sleep 3600"])
    assert isinstance(stopped.value, launcher.SignalException)
    assert (stopped.value.sigval, stopped.value.exit_code) == (signal.SIGTERM, 143)
    again = pickle.loads(pickle.dumps(stopped.value))
    assert (again.sigval, str(again)) == (signal.SIGTERM, str(stopped.value))


def test_a_program_without_torch_gets_errors_of_ours_and_no_torch():
    program = """
import sys
from hyperpodrun.launcher import ChildFailedError, main
try:
    main(["--no-python", "false"])
except ChildFailedError as error:
    assert type(error) is ChildFailedError
    assert error.get_first_failure()[1].exitcode == 1
    assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


class Notebook:
    """What a notebook has for sys.stdout: it takes text, and has no bytes below."""

    encoding = "UTF-8"

    def __init__(self) -> None:
        self.shown: list[str] = []

    def write(self, text: str) -> int:
        assert isinstance(text, str)
        self.shown.append(text)
        return len(text)

    def flush(self) -> None:
        pass


class Copy(Notebook):
    """A copy for a log, which passes everything else on to the stream that it has replaced."""

    def __getattr__(self, name: str) -> object:
        return getattr(sys.__stdout__, name)


class Ascii(Notebook):
    encoding = "ascii"


class NoFlush:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def write(self, text: str) -> None:
        self.shown.append(text)


class Breaks(Notebook):
    def write(self, text: str) -> int:
        super().write(text)
        raise RuntimeError("the kernel is gone")


@pytest.mark.parametrize("kind", [Notebook, Copy, Ascii, NoFlush, Breaks])
def test_tee_writes_to_a_stream_that_has_replaced_stdout(kind, capfd):
    stream = kind()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(io.StringIO()) as errors:
        main(["--tee=3", "--no-python", "printf", "caf\\303\\251 \\377\\n"])
    expected = "[default0]:caf\\xe9 \\ufffd\n" if kind is Ascii else "[default0]:café \ufffd\n"
    assert "".join(stream.shown) == expected
    assert errors.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_the_handlers_that_a_program_has_for_its_own_signals_stay(tmp_path):
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        main(["--no-python", "sh", "-c", "kill -USR1 $PPID"])
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_job_that_only_started_its_processes_anew_shows_no_table_of_recoveries(run, script):
    finished = run("--max-restarts=1", "--start-method=spawn", "--no-python", "false")
    assert finished.returncode == 1, finished.output
    assert "restart number=1 limit=1" in finished.stderr
    assert not [line for line in finished.stderr.splitlines() if line.startswith(("1 recovery", "#"))]
