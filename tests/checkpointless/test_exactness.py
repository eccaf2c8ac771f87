"""Runs with faults end bit for bit like the run without: a sample; `scripts/bench exactness` does all of them."""

from __future__ import annotations

from pathlib import Path

import exactness
import pytest

WORKERS = Path(__file__).parent / "workers"
SAMPLE = [exactness.plan(seed) for seed in range(1006, 1015)]
SHARDED = [exactness.plan_hsdp(seed) for seed in range(4)]
"""Five more with faults that were thought of are in test_shards.py."""


@pytest.mark.parametrize("wanted", [*SAMPLE, *SHARDED], ids=str)
def test_a_seeded_run_with_faults_ends_like_the_one_without(runs, wanted):
    assert (wrong := runs.wrong(wanted)) is None, wrong


@pytest.mark.parametrize(
    "wanted",
    [
        exactness.Plan("exact.py", (), ("kill:1:5:forward", "kill:1::receiving", "exit:1::restore"), 2),
        exactness.Plan("exact.py", ("--rebuild",), ("kill:1:5:forward", "raise:1::receiving", "raise:0::restore"), 2),
        exactness.Plan(
            "exact.py", ("--rebuild", "--offload"), ("kill:0:5:inside", "kill:0::receiving", "raise:1::restore"), 2
        ),
        exactness.Plan("exact.py", ("--stream",), ("kill:1:5:forward", "raise:0::sending"), 2),
        exactness.Plan("exact.py", (), ("kill:3:5:forward", "kill:3::source")),
        exactness.Plan("exact.py", ("--stream",), ("kill:3:5:forward", "kill:0::sending")),
    ],
    ids=str,
)
def test_a_fault_in_a_restore_costs_no_state_but_that_of_who_was_receiving(runs, wanted):
    """With two ranks the source is the only holder: what befalls the restore must not make it doubt itself."""
    assert (wrong := runs.wrong(wanted)) is None, wrong
    assert runs.ended(wanted).stderr.count("fault ") == len(wanted.faults)
    states = [row["state"] for row in runs.ended(wanted).recoveries if row.get("state")]
    assert states == ["memory"] * len(wanted.faults)


@pytest.mark.parametrize(
    "wanted", [exactness.Plan("exact.py", ("--checksum", "--damaged=0"), ("kill:3:6:forward",))], ids=str
)
def test_a_rank_that_sends_wrong_bytes_is_not_used_again(runs, wanted):
    assert (wrong := runs.wrong(wanted)) is None, wrong
    assert "from rank 0 has a wrong checksum" in runs.ended(wanted).stderr


@pytest.mark.parametrize(
    "wanted", [exactness.Plan("exact.py", ("--rollback",), ("kill:2:0:before", "raise:0:1:between"))], ids=str
)
def test_a_run_whose_first_step_is_repeated_arranges_its_gradients_as_one_that_begins(runs, wanted):
    """DDP's buckets, and what it sends when it is made, are those of a beginning, on new ranks and on old ones."""
    assert (wrong := runs.wrong(wanted)) is None, wrong


@pytest.mark.parametrize("wanted", [exactness.Plan("exact.py", ("--rollback",), ("kill:1:6:after",), 2)], ids=str)
def test_a_step_that_cannot_be_completed_everywhere_is_rolled_back(runs, wanted):
    """Everybody is behind the update and none at the end of its step: what changes there must not be lost."""
    assert (wrong := runs.wrong(wanted)) is None, wrong


@pytest.mark.parametrize(
    "wanted",
    [
        exactness.Plan("exact.py", ("--buffers-on-device",), ("kill:0:5:allreduce", "kill:1:6:after"), 2),
        exactness.Plan("exact.py", ("--buffers-on-device", "--rebuild"), ("kill:0:6:before", "exit:0::restore"), 2),
    ],
    ids=str,
)
def test_a_lost_rank_has_its_own_buffers_again_when_only_the_device_has_seen_them(runs, wanted):
    """Batch norm's statistics differ from rank to rank. Here the device is the CPU; tests/gpu has the same on a GPU."""
    assert (wrong := runs.wrong(wanted)) is None, wrong


def test_all_moments_and_kinds_are_among_the_seeds_of_the_sample():
    faults = [fault.split(":") for wanted in SAMPLE for fault in wanted.faults]
    assert {kind for kind, _, _, _ in faults} == set(exactness.KINDS)
    assert {moment for _, _, _, moment in faults} >= set(exactness.MOMENTS)
    assert len({moment for _, _, _, moment in faults} & set(exactness.RESTORE_MOMENTS)) > 1


def test_the_scale_of_gradients_and_the_steps_it_leaves_out_are_repeated(run):
    """It overflows in the first steps, so that there are updates in which the scale alone changes."""
    command = ("--nproc-per-node=2", "--inprocess-restart", WORKERS / "exact.py", "--scaler=3e38")
    faults = ("--fault", "kill:1:1:after", "--fault", "raise:0:5:before", "--fault", "kill:0:8:after")
    plain, disturbed = run(*command), run(*command, "--rebuild", "--rollback", *faults)
    assert disturbed.returncode == 0, disturbed.output
    assert disturbed.digest == plain.digest
    assert plain.stdout.count("is left out") > 1
