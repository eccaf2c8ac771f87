"""The launcher's own output and that of teed workers, where disk, console or descriptors are not as they should be."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time

import pytest
from hyperpodrun.agent.output.console import Console, Filtered
from hyperpodrun.agent.output.printer import Printer


@pytest.mark.parametrize("lost", ["file", "filtered"])
def test_a_full_disk_costs_the_log_file_and_never_the_worker(tmp_path, capfdbinary, lost):
    """/dev/full takes nothing."""
    read_end, write_end = os.pipe()
    paths = {"file": tmp_path / "stdout.log", "filtered": tmp_path / "filtered.log"}
    paths[lost].symlink_to("/dev/full")
    shown = io.BytesIO()
    console = Console()
    filtered = Filtered(paths["filtered"], (b"line",))
    stream = console.tee(read_end, paths["file"].open("ab", buffering=0), shown, "[0]:", filtered)
    written = b"".join(b"line %d\n" % number for number in range(50_000))  # more than a pipe holds
    with open(write_end, "wb") as pipe:
        pipe.write(written)
    console.end(stream)
    console.close()
    assert shown.getvalue() == b"".join(b"[0]:" + line for line in written.splitlines(keepends=True))
    assert capfdbinary.readouterr().err.count(b"log-file-lost") == 1
    kept = "filtered" if lost == "file" else "file"
    assert paths[kept].read_bytes() == (written if kept == "file" else shown.getvalue())


def test_a_console_that_takes_nothing_stops_no_worker_and_later_tells_what_it_has_missed(tmp_path):
    lines = [b"line %d\n" % number for number in range(100_000)]
    read_end, write_end = os.pipe()
    shown, console_end = os.pipe()
    console = Console(Printer(backlog_bytes=100_000, patience=0.1))
    with open(console_end, "wb", buffering=0) as target, (tmp_path / "stdout.log").open("ab", buffering=0) as file:
        stream = console.tee(read_end, file, target, "[0]:")
        with open(write_end, "wb") as pipe:  # returns although nobody reads from the console
            pipe.writelines(lines)
        console.end(stream)
        wait_until(lambda: stream.finished, 20)
        assert (tmp_path / "stdout.log").read_bytes() == b"".join(lines)
        seen: list[bytes] = []
        with open(shown, "rb") as console_reader:
            reader = threading.Thread(target=lambda: seen.append(console_reader.read()))
            reader.start()
            console.close()
            target.close()
            reader.join(20)
    rows = seen[0].splitlines(keepends=True)
    notices = [row for row in rows if b"are not shown" in row]
    assert notices[-1] == rows[-1]
    assert all(str(tmp_path / "stdout.log").encode() in notice for notice in notices)
    numbers = [int(row.removeprefix(b"[0]:line ")) for row in rows if row not in notices]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + sum(int(notice.split()[1]) for notice in notices) == len(lines)


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_writes_on_into_the_pipe_of_a_dead_worker_is_not_waited_for(run, script):
    body = "import subprocess; subprocess.Popen(['yes']); print('done')"
    finished = run("--tee=1", "--redirects=2", script(body), timeout=30)
    assert finished.returncode == 0, finished.output[:1000]


def test_a_launcher_without_standard_streams_runs_the_job(script, tmp_path):
    worker = script("import os, sys; print('out'); print('err', file=sys.stderr); os.close(1); os.close(2)")
    command = f"exec {sys.executable} -m hyperpodrun --log-dir={tmp_path / 'logs'} --tee=3 --nproc-per-node=2 {worker}"
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], timeout=30).returncode == 0
    for stream, text in (("stdout", "out\n"), ("stderr", "err\n")):
        files = list((tmp_path / "logs").glob(f"*/attempt_0/*/{stream}.log"))
        assert [file.read_text() for file in files] == [text, text]
