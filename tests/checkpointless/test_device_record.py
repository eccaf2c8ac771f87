"""Buffers that only a device sees, in a file that outlives the process. The device here is the CPU."""

from __future__ import annotations

import pytest
import torch
from hyperpodrun.checkpointless.step.device_record import DeviceRecord, read_device_record


@pytest.fixture
def buffers() -> dict[str, torch.Tensor]:
    return {
        "mean": torch.zeros(5),
        "count": torch.zeros((), dtype=torch.int64),
        "half": torch.zeros(3, 3, dtype=torch.bfloat16),
        "flags": torch.zeros(7, dtype=torch.bool),
        "nothing": torch.zeros(0),
    }


def move(buffers: dict[str, torch.Tensor], value: int) -> None:
    for buffer in buffers.values():
        buffer.fill_(value)


def note(record: DeviceRecord, buffers: dict[str, torch.Tensor], step: int, value: int) -> None:
    move(buffers, value)
    record.note(step)


def assert_found(path, step: int, buffers: dict[str, torch.Tensor], value: int) -> None:
    found = read_device_record(path, step)
    move(buffers, value)
    assert found.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer), name


def test_the_last_steps_are_found_and_no_others(tmp_path, buffers):
    path = tmp_path / "record"
    record = DeviceRecord(path, buffers)
    for step in range(10):
        note(record, buffers, step, step)
    record.close()
    for step in range(7, 10):
        assert_found(path, step, buffers, step)
    assert read_device_record(path, 5) == {}
    assert read_device_record(path, 10) == {}


def test_the_newest_note_of_a_step_counts_however_many_there_are(tmp_path, buffers):
    path = tmp_path / "record"
    record = DeviceRecord(path, buffers)
    note(record, buffers, 1, 1)
    for value in range(50):
        note(record, buffers, 2, value)
    assert_found(path, 1, buffers, 1)
    assert_found(path, 2, buffers, 49)


def test_a_note_that_was_being_written_does_not_hide_the_one_before(tmp_path, buffers):
    path = tmp_path / "record"
    record = DeviceRecord(path, buffers)
    for value in (1, 2):
        note(record, buffers, 3, value)
    newest = max(record._slots, key=lambda slot: slot[:8].view(torch.int64).item())
    newest[:16] = 0
    assert_found(path, 3, buffers, 1)


def test_a_successor_goes_on_where_the_process_before_it_was(tmp_path, buffers):
    path = tmp_path / "record"
    first = DeviceRecord(path, buffers)
    for step in range(3):
        note(first, buffers, step, step)
    second = DeviceRecord(path, buffers)
    assert_found(path, 2, buffers, 2)
    note(second, buffers, 2, 7)
    assert_found(path, 2, buffers, 7)
    assert_found(path, 1, buffers, 1)


def test_the_file_of_other_buffers_is_replaced_and_a_damaged_one_is_not_believed(tmp_path, buffers):
    path = tmp_path / "record"
    DeviceRecord(path, buffers).note(0)
    other = {"mean": torch.ones(6)}
    DeviceRecord(path, other).note(1)
    assert read_device_record(path, 0) == {}
    assert_found(path, 1, other, 1)
    for damaged in (b"", b"HPDEVBF1", path.read_bytes()[:-1], bytes(len(path.read_bytes()))):
        path.write_bytes(damaged)
        assert read_device_record(path, 1) == {}
    assert read_device_record(tmp_path / "none", 1) == {}
