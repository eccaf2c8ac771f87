"""What the main thread asks the monitor while it can be interrupted."""

from __future__ import annotations

import threading

import pytest
from hyperpodrun.inprocess.connection import AgentConnection
from hyperpodrun.inprocess.interrupt import InterruptGate
from hyperpodrun.inprocess.monitor import Monitor

DEADLINE_S = 10.0


@pytest.fixture
def monitor(tmp_path):
    """Of an agent that says nothing."""
    monitor = Monitor(AgentConnection(f"ipc://{tmp_path}/agent", "0.1"), InterruptGate())
    yield monitor
    monitor.close()


def test_whether_an_epoch_has_failed_is_known_without_a_lock(monitor):
    """An interrupt between taking a lock and releasing it would leave it taken: seen on GPUs, where the monitor then
    waited for it at the next fault."""
    asked = threading.Thread(target=monitor.faulted, args=[0], daemon=True)
    with monitor._changed:
        asked.start()
        asked.join(DEADLINE_S)
        assert not asked.is_alive()
