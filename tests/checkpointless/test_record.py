"""The record of a rank: what its process noted is there when the process is not."""

from __future__ import annotations

import os
import signal

import pytest
from hyperpodrun.checkpointless.record import RankRecord, read_record


def test_the_last_three_notes_can_be_read(tmp_path):
    record = RankRecord(tmp_path / "rank-0")
    for step in range(5):
        record.write(step, f"note {step}".encode(), keep=(step - 1, step))
    assert read_record(tmp_path / "rank-0", 4) == b"note 4"
    assert read_record(tmp_path / "rank-0", 3) == b"note 3"
    assert read_record(tmp_path / "rank-0", 0) is None


def test_what_is_to_be_kept_is_not_written_over(tmp_path):
    record = RankRecord(tmp_path / "rank-0")
    record.write(4, b"four")
    record.write(8, b"eight", keep=(4, 8))
    for step in range(9, 20):
        record.write(step, b"window", keep=(4, 8))
    assert read_record(tmp_path / "rank-0", 4) == b"four"
    assert read_record(tmp_path / "rank-0", 8) == b"eight"
    assert read_record(tmp_path / "rank-0", 19) == b"window"


def test_a_note_can_be_written_again(tmp_path):
    record = RankRecord(tmp_path / "rank-0")
    record.write(1, b"a long first version")
    record.write(1, b"second")
    assert read_record(tmp_path / "rank-0", 1) == b"second"


def test_notes_of_before_a_rollback_give_way(tmp_path):
    record = RankRecord(tmp_path / "rank-0")
    for step in (40, 41, 42, 30, 31, 32):
        record.write(step, str(step).encode(), keep=(step,))
    assert [read_record(tmp_path / "rank-0", step) for step in (30, 31, 32)] == [b"30", b"31", b"32"]


@pytest.mark.parametrize("position", [0, 20, 40, 60])
def test_a_slot_that_is_damaged_is_passed_over(tmp_path, position):
    path = tmp_path / "rank-0"
    record = RankRecord(path)
    record.write(1, b"x" * 100)
    record.write(2, b"y" * 100)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    assert read_record(path, 1) is None
    assert read_record(path, 2) == b"y" * 100


def test_a_killed_writer_leaves_whole_notes(tmp_path):
    path = tmp_path / "rank-0"
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        record, step = RankRecord(path), 0
        while True:
            record.write(step, str(step).encode() * 4000, keep=(step - 1, step))
            if step == 100:
                os.write(told, b"x")
            step += 1
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    record = RankRecord(path)
    steps = sorted(step for step in record._steps if step is not None)
    assert len(steps) >= 2
    for step in steps:
        assert read_record(path, step) == str(step).encode() * 4000


def test_there_is_no_record_where_there_is_no_file(tmp_path):
    assert read_record(tmp_path / "rank-9", 1) is None
