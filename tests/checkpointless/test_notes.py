"""Notes of what a step touches: what goes into a rank's own record, and what is refused as a note."""

from __future__ import annotations

import pytest
import torch
from hyperpodrun.checkpointless.encoding import EncodingError, encode
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
