"""Where two runs first differ, and what is no difference."""

from __future__ import annotations

from hyperpodrun.verify.compare import closing_lines, first_difference, missing_line, unseeded
from hyperpodrun.verify.plan import plan
from hyperpodrun.verify.records import RankRecord, read_records

PLACES = ["forward", "backward", "before-update", "in-update", "after-update"]


def record(steps=5, lines=(), results=(), **changed):
    """A rank's record. changed: weight_3="other" is what `weight` is after step 3."""
    found = RankRecord(lines=list(lines), results={"result": dict(results)} if results else {})
    for step in range(steps):
        digests = {"weight": f"w{step}", "bias": f"b{step}", "generator.torch": "g"}
        digests |= {name.rpartition("_")[0]: v for name, v in changed.items() if name.endswith(f"_{step}")}
        found.steps[step], found.places[step] = digests, list(PLACES)
    return found


def test_the_first_step_counts_then_the_lowest_rank():
    ours = {0: record(), 1: record(), 2: record()}
    theirs = {0: record(weight_4="x"), 1: record(bias_3="x", weight_3="x"), 2: record(weight_3="x")}
    assert str(first_difference(ours, theirs)) == "weight, bias on rank 1 after step 3"
    assert first_difference(ours, ours) is None


def test_a_step_that_one_run_has_no_record_of_is_not_compared_but_the_last_one_must_be_there():
    cut_off = record()
    del cut_off.steps[2]
    assert first_difference({0: record()}, {0: cut_off}) is None
    assert "the last step (4 in one run, 3 in the other)" in str(first_difference({0: record()}, {0: record(4)}))
    assert "no record" in str(first_difference({0: record(), 1: record()}, {0: record()}))


def test_an_object_that_is_there_in_one_run_only_is_a_difference():
    assert "extra on rank 0 after step 1" in str(first_difference({0: record()}, {0: record(extra_1="x")}))


def test_a_generator_that_differs_without_faults_is_left_out():
    other = record(**{"generator.torch_3": "x"})
    left_out = unseeded({0: record()}, {0: other})
    assert left_out == {"generator.torch"}
    assert first_difference({0: record()}, {0: other}, left_out) is None
    assert first_difference({0: record()}, {0: other}) is not None


def test_declared_results_are_compared():
    one, other = record(results={"result": "1"}), record(results={"result": "2"})
    assert str(first_difference({0: one}, {0: other})) == "result result on rank 0 at the end"


def test_of_output_the_last_line_that_does_not_change_from_run_to_run_must_be_there():
    one = record(lines=["step 1 loss 3.1", "accuracy 0.75", "took 3.1 s"])
    other = record(lines=["step 1 loss 3.1", "accuracy 0.75", "took 2.9 s"])
    lines = closing_lines({0: one}, {0: other})
    assert lines == {0: "accuracy 0.75"}
    repeated = record(lines=["step 1 loss 3.1", "resumed", "step 1 loss 3.1", "accuracy 0.75", "took 9 s"])
    assert missing_line(lines, {0: repeated}) is None
    assert "'accuracy 0.75'" in str(missing_line(lines, {0: record(lines=["accuracy 0.5"])}))
    assert closing_lines({0: record(results={"result": "1"}, lines=["x"])}, {0: record(lines=["x"])}) == {}


def test_a_later_line_of_a_step_counts_and_half_a_line_does_not(tmp_path):
    (tmp_path / "rank-3.jsonl").write_text(
        '{"step": 0, "digests": {"w": "old"}, "places": []}\n{"step": 0, "dig{"fired": "kill"}\n'
        '{"step": 0, "digests": {"w": "new"}, "places": []}\n'
    )
    assert read_records(tmp_path, tmp_path)[3].steps == {0: {"w": "new"}}


def test_faults_are_drawn_where_all_ranks_come_by_and_never_in_the_last_step():
    ranks = {0: record(), 1: record()}
    ranks[1].places[2].remove("forward")
    faults = [fault for seed in range(40) for fault in plan(ranks, 10, seed)]
    assert plan(ranks, 10, 3) == plan(ranks, 10, 3) != plan(ranks, 10, 4)
    assert not [fault for fault in faults if "step=4" in fault or "step=2,where=forward" in fault]
    assert {fault.partition(":")[0] for fault in faults} == {"raise", "kill"}
    assert {fault.rpartition("=")[2] for fault in plan(ranks, 5, 0)} == set(PLACES)
    assert len({(fault.partition(":")[0], fault.rpartition("=")[2]) for fault in plan(ranks, 10, 0)}) == 10


def test_a_single_rank_is_not_killed_and_a_single_step_not_broken():
    assert {fault.partition(":")[0] for fault in plan({0: record()}, 10, 0)} == {"raise"}
    assert plan({0: record(1)}, 10, 0) == []
