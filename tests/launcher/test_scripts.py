"""A script that is in no file is read once and run by every worker of every attempt; looking at it takes nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from hyperpodrun.agent.workers.imports import Imports, PythonCommand, scan
from hyperpodrun.launcher import scripts

TEXT = b"print('here')\n"


def test_a_script_from_a_pipe_runs_on_every_rank_in_every_attempt(tmp_path):
    (tmp_path / "beside.py").write_text("word = 'ran'")
    text = "import beside, os, sys\nprint(beside.word, sys.argv[1], os.environ['RANK'])\n"
    text += "sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT']) == 0)"
    command = [sys.executable, "-m", "hyperpodrun", "--nproc-per-node=2", "--max-restarts=1", "-", "word"]
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"ran word 0", "ran word 1"} == set(lines)
    assert 2 < len(lines) <= 4, "both attempts have run it"


def test_pipes_sockets_and_fifos_are_read_to_their_end(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, TEXT)
    os.close(writing)
    assert scripts.text_of(f"/dev/fd/{reading}") == TEXT
    os.close(reading)
    here, there = socket.socketpair()
    there.sendall(TEXT)
    there.close()
    here.setblocking(False)
    assert scripts.text_of(f"/proc/self/fd/{here.fileno()}") == TEXT
    here.close()
    fifo = tmp_path / "fifo.py"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(TEXT,))
    writer.start()
    assert scripts.text_of(str(fifo)) == TEXT
    writer.join()


def test_what_workers_can_read_themselves_is_left_to_them(tmp_path):
    path = tmp_path / "train.py"
    path.write_bytes(TEXT)
    assert scripts.text_of(str(path)) is None
    assert scripts.text_of(str(tmp_path)) is None
    with path.open("rb") as file:  # which no worker inherits
        assert scripts.text_of(f"/dev/fd/{file.fileno()}") == TEXT


def test_a_device_without_end_and_an_empty_pipe_are_refused():
    with pytest.raises(click.UsageError, match="does not end"):
        scripts.text_of("/dev/zero")
    assert scripts.text_of("/dev/null") == b""
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(click.UsageError, match="is empty"):
        scripts.text_of(f"/dev/fd/{reading}")
    os.close(reading)


def test_standard_input_that_is_nothing_is_no_script(tmp_path):
    for script in ("-", "/dev/stdin"):
        command = [sys.executable, "-m", "hyperpodrun", script]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"the script {script} is empty" in done.stderr


def test_verify_wants_a_script_that_can_be_run_again(tmp_path):
    command = [sys.executable, "-m", "hyperpodrun", "verify", "-"]
    done = subprocess.run(command, input="print()", cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "verify runs a script several times" in done.stderr


def test_the_search_for_imports_opens_regular_files_only(tmp_path: Path):
    fifo = tmp_path / "__main__.py"
    os.mkfifo(fifo)  # opened for reading, it would wait for a writer
    assert scan(PythonCommand(str(tmp_path), module=False)) is Imports.NOTHING
    assert scan(PythonCommand(str(fifo), module=False)) is Imports.NOTHING
