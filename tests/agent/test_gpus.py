"""What the agent does when a GPU reports an error; that one does, and is heard, needs a GPU: `tests/gpu`."""

from __future__ import annotations

import pytest
from hyperpodrun.agent.node.gpus import GpuWatch, concerned
from hyperpodrun.agent.output.console import Console
from hyperpodrun.agent.output.logs import Outputs
from hyperpodrun.agent.workers.workers import Worker
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.gpu_errors import judge_rows


@pytest.fixture
def workers() -> list[Worker]:
    """Ranks 4 to 7 of a job, on local ranks 0 to 3."""
    return [Worker(4 + local_rank, local_rank, 10 + local_rank, Outputs()) for local_rank in range(4)]


@pytest.fixture
def heard(workers, monkeypatch):
    """(watch, events, reasons to leave) on a node whose workers see GPUs 0 and 1."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    console, events, reasons = Console(), [], []
    yield GpuWatch(console, workers, events.append, reasons.append), events, reasons
    console.close()


def test_a_programs_own_error_is_only_logged(heard, capfd):
    watch, events, reasons = heard
    watch.on_error(1, 31, frozenset())
    watch.on_error(1, 12345, frozenset())
    assert (events, reasons) == ([], [])


def test_untrustworthy_memory_condemns_the_processes_on_the_gpu_and_no_other(heard):
    watch, events, reasons = heard
    watch.on_error(1, 94, frozenset())
    assert events == [
        ev.Condemned(rank, incarnation, "GPU 1 reported Xid 94 (contained memory error)")
        for rank, incarnation in ((5, 11), (7, 13))
    ]
    assert reasons == []


def test_a_gpu_that_needs_a_reset_takes_its_node_out_of_the_job(heard):
    watch, events, reasons = heard
    watch.on_error(0, 79, frozenset())
    assert events == []
    (reason,) = reasons
    assert reason.startswith("GPU 0 reported Xid 79 (the GPU has fallen off the bus): this node cannot train before")


def test_after_the_end_nothing_is_done(heard):
    watch, events, reasons = heard
    watch.close()
    watch.on_error(0, 79, frozenset())
    watch.on_error(0, 94, frozenset())
    assert (events, reasons) == ([], [])


def test_devices_named_by_uuid_concern_nobody_unless_nvml_knows_the_processes(workers):
    assert concerned(workers, 0, frozenset({1}), []) == []


@pytest.mark.parametrize(
    ("pending", "failed", "word"), [(False, False, None), (True, False, "reset"), (True, True, "replaced")]
)
def test_remapped_rows_ask_for_a_reset_or_a_new_gpu(pending, failed, word):
    advice = judge_rows(pending=pending, failed=failed)
    assert (advice is None) if word is None else (word in advice)
