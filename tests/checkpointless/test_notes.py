"""Notes of what a step touches: what goes into a rank's own record, and what is refused as a note."""

from __future__ import annotations

import pytest
import torch
from hyperpodrun.checkpointless.encoding import EncodingError, encode
from hyperpodrun.checkpointless.manager import CheckpointManager
from hyperpodrun.checkpointless.notes import NoteTaker


def test_a_large_table_does_not_keep_small_buffers_out_of_the_record():
    """Batch norm's statistics differ from rank to rank; a table of 16 MB is the same everywhere."""
    taker = NoteTaker()
    taker.set_buffers({"table": torch.zeros(4 << 20), "mean": torch.arange(3.0), "count": torch.tensor(7)})
    recorded = NoteTaker.from_bytes(1, taker.local_bytes(taker.take(1)))
    assert {name: contents.tolist() for name, (_, contents) in recorded.buffers.items()} == {
        "mean": [0.0, 1.0, 2.0],
        "count": 7,
    }
    assert set(NoteTaker.from_bytes(1, taker.whole_bytes(taker.take(1))).buffers) == {"table", "mean", "count"}


@pytest.mark.parametrize("value", [{}, [], {"generators": 1, "buffers": {}, "local": {}, "shared": {}}], ids=repr)
def test_what_is_no_note_is_refused(value):
    with pytest.raises(EncodingError):
        NoteTaker.from_bytes(1, encode(value))


class Counter:
    """Equal to any other one; but not the same."""

    def __init__(self) -> None:
        self.count = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_an_object_that_equals_the_registered_one_is_another_one_all_the_same():
    manager = CheckpointManager()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Counter(), Counter()
    for counter in (first, second):
        manager.register(model=model, optimizer=optimizer, counter=counter)
    assert manager.restore() == 0
    assert manager._registry is not None
    assert manager._registry.objects["counter"] is second


def test_an_update_before_the_first_step_is_nothing_to_be_carried():
    """Such as a warm-up of the optimizer while the script is set up."""
    manager = CheckpointManager()
    model = torch.nn.Linear(1, 1)
    manager.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with manager.update():
        pass
    assert manager.restore() == 0
    assert list(manager.steps(2)) == [0, 1]
