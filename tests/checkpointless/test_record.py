"""The record of a rank: what its process noted is there when the process is not."""

from __future__ import annotations

import errno
import os
import signal
from types import SimpleNamespace

import pytest
from hyperpodrun.checkpointless.step.history import History
from hyperpodrun.checkpointless.step.record import RankRecord, _read_slots, read_record


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


def test_a_note_holds_until_the_step_that_is_reached(tmp_path):
    path = tmp_path / "rank-0"
    record = RankRecord(path)
    record.write(3, b"since 3")
    for step in (4, 5, 6):
        assert read_record(path, step) is None
        record.reach(step)
        assert read_record(path, step) == b"since 3"
    record.write(7, b"since 7", keep=(5, 6))
    assert [read_record(path, step) for step in (2, 5, 6, 7, 8)] == [None, b"since 3", b"since 3", b"since 7", None]


def test_after_a_rollback_what_was_noted_of_later_steps_does_not_hold(tmp_path):
    path = tmp_path / "rank-0"
    record = RankRecord(path)
    for step in (40, 41, 42):
        record.write(step, str(step).encode(), keep=(step - 1, step))
    record.write(40, b"again", keep=(40,))
    assert [read_record(path, step) for step in (40, 41, 42)] == [b"again", None, None]
    record.reach(41)
    record.reach(42)
    assert [read_record(path, step) for step in (40, 41, 42)] == [b"again"] * 3


def test_the_two_points_and_the_step_that_is_noted_stay_while_it_is_noted_anew(tmp_path):
    path = tmp_path / "rank-0"
    record = RankRecord(path)
    record.write(4, b"four")
    record.write(8, b"eight", keep=(4,))
    for number in range(10):
        record.write(9, b"nine %d" % number, keep=(4, 8))
        assert [read_record(path, step) for step in (4, 8, 9)] == [b"four", b"eight", b"nine %d" % number]


def test_the_same_note_is_written_once(tmp_path, monkeypatch):
    record, payload, written = RankRecord(tmp_path / "rank-0"), b"the same" * 1000, []
    write = record._write_note
    monkeypatch.setattr(record, "_write_note", lambda payload: written.append(len(payload)) or write(payload))
    for step in range(10):
        record.write(step, payload, keep=(step - 1, step))
    assert written == [len(payload)]
    assert [read_record(tmp_path / "rank-0", step) for step in (7, 8, 9)] == [payload] * 3


def test_what_shares_a_note_survives_when_the_note_of_one_is_written_anew(tmp_path):
    path, shared = tmp_path / "rank-0", b"shared" * 100
    record = RankRecord(path)
    for step in (1, 2, 3):
        record.write(step, shared)
    record.write(2, b"own")
    record.write(3, b"of its own", keep=(1, 2))
    assert [read_record(path, step) for step in (1, 2, 3)] == [shared, b"own", b"of its own"]
    record = RankRecord(path)  # the next process of this rank
    record.write(4, shared, keep=(1, 2, 3))
    assert [read_record(path, step) for step in (1, 2, 3, 4)] == [shared, b"own", b"of its own", shared]


NOTES_BEGIN = 4096


@pytest.mark.parametrize("position", [0, 12, 20, 28, 36, 42, 46, NOTES_BEGIN, NOTES_BEGIN + 60])
def test_with_a_damaged_slot_notes_are_believed_of_their_very_step(tmp_path, position):
    path = tmp_path / "rank-0"
    record = RankRecord(path)
    record.write(1, b"x" * 100)
    record.write(2, b"y" * 100)
    record.reach(3)
    assert read_record(path, 3) == b"y" * 100
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    assert [read_record(path, step) for step in (1, 2, 3)] == [None, b"y" * 100, None]


def test_a_killed_writer_leaves_whole_notes(tmp_path):
    path = tmp_path / "rank-0"
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        record, step = RankRecord(path), 0
        while True:
            record.write(step, str(step).encode() * 4000, keep=(step - 2, step - 1))
            if step == 100:
                os.write(told, b"x")
            step += 1
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    steps = sorted({slot.since for slot in _slots(path)})
    assert len(steps) >= 3, "only the one that was being replaced may be lost"
    for step in steps[-3:-1]:
        assert read_record(path, step) == str(step).encode() * 4000


def _slots(path):
    with path.open("rb") as file:
        return [slot for slot in _read_slots(file.fileno()) if slot]


def test_there_is_no_record_where_there_is_no_file(tmp_path):
    assert read_record(tmp_path / "rank-9", 1) is None


def test_where_there_is_no_room_the_notes_of_before_stay(tmp_path, monkeypatch):
    record = RankRecord(tmp_path / "rank-0")
    for step in (1, 2, 3):
        record.write(step, b"note %d" % step)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:20], offset))
    with pytest.raises(OSError, match="only 20 of 400000 bytes"):
        record.write(3, b"x" * 400_000)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)  # else a small one would meet a full disk as SIGBUS
    with pytest.raises(OSError, match="no space"):
        record.write(3, b"x" * 4000)
    monkeypatch.undo()
    assert [read_record(tmp_path / "rank-0", step) for step in (1, 2, 3)] == [b"note 1", b"note 2", b"note 3"]
    record.write(3, b"x" * 4000)
    assert read_record(tmp_path / "rank-0", 3) == b"x" * 4000


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_goes_on_without_a_record_where_memory_is_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "posix_fallocate", _full)
    history = History()
    history.open(tmp_path / "rank-0")
    history.rewrite(SimpleNamespace(step=1), _taker(b"one"), (0, 1))
    (said,) = caplog.messages
    assert f"not recorded in {tmp_path}: [Errno {errno.ENOSPC}]" in said
    assert read_record(tmp_path / "rank-0", 1) is None


def test_a_record_that_could_not_be_written_says_nothing_of_later_steps(tmp_path, monkeypatch, caplog):
    history = History()
    history.open(tmp_path / "rank-0")
    history.rewrite(SimpleNamespace(step=1), _taker(b"one"), (0, 1))
    monkeypatch.setattr(os, "posix_fallocate", _full)
    history.rewrite(SimpleNamespace(step=2), _taker(b"two"), (1, 2))
    monkeypatch.undo()
    for step in (3, 4):
        history.rewrite(SimpleNamespace(step=step), _taker(b"later"), (step - 1, step))
    assert len(caplog.messages) == 1
    assert [read_record(tmp_path / "rank-0", step) for step in (1, 2, 3, 4)] == [b"one", None, None, None]


def _taker(payload: bytes) -> SimpleNamespace:
    return SimpleNamespace(local_bytes=lambda small: payload)
