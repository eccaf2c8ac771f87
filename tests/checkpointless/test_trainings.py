"""Ordinary scripts of other people come out of a fault as without one, or are refused at their beginning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"
REFUSED = {
    "unregistered": "an Adam trains 'model.weight', which is registered, and is not registered itself",
    "mp": "hold different parameters or optimizer state under the same names after step 1",
    "fsdp1": "register(model=...): it is wrapped in FullyShardedDataParallel (FSDP1)",
    "sched": "register(sched=...): builtins.function at ['fn'] cannot be carried",
    "prefetched": "'loader' moved between restore() and the first step",
}
"""By training: what is said of it, at its beginning."""
RANKS = {"static": 3, "plain": 3}


def cases(script: str) -> list[tuple[str, str]]:
    found = ast.parse((WORKERS / script).read_text()).body
    classes = [node for node in found if isinstance(node, ast.ClassDef)]
    return [(script, node.name) for node in classes if ast.unparse(node.bases[0]) in ("Case", "static")]


LOOPS = ("epochs_a", "epochs_b", "workers_b", "begin_end", "ppo", "schedule_free", "stateful")
CASES = [*cases("trainings.py"), *cases("trainings_more.py"), *(("trainings_loops.py", name) for name in LOOPS)]


class Pairs:
    """Every training with its fault, two jobs at a time; without faults all of a script and a size are one job."""

    def __init__(self, start, jobs: ThreadPoolExecutor) -> None:
        self._start = start
        self._jobs = jobs
        self._begun: dict[tuple[str, str], Future] = {}
        self._plain: dict[tuple[str, int], Future] = {}

    def begin(self, script: str, name: str) -> None:
        count = RANKS.get(name, 2)
        fault = () if name in REFUSED else ("fault",)
        self._begun[script, name] = self._submit(count, script, name, *fault)

    def begin_undisturbed(self) -> None:
        for script, name in self._begun:
            key = script, RANKS.get(name, 2)
            if name not in REFUSED and key not in self._plain:
                together = [n for s, n in self._begun if (s, RANKS.get(n, 2)) == key and n not in REFUSED]
                self._plain[key] = self._submit(key[1], script, ",".join(together))

    def _submit(self, count: int, script: str, *arguments: str) -> Future:
        command = (f"--nproc-per-node={count}", "--inprocess-restart", WORKERS / script, *arguments)
        return self._jobs.submit(lambda: self._start(*command).wait(180))

    def disturbed(self, script: str, name: str):
        return self._begun[script, name].result()

    def undisturbed(self, script: str, name: str):
        return self._plain[script, RANKS.get(name, 2)].result()


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, start_any_time) -> Iterator[Pairs]:
    with ThreadPoolExecutor(2) as jobs:
        pairs = Pairs(start_any_time, jobs)
        for item in request.session.items:
            if item.path == request.path and "name" in getattr(item, "fixturenames", ()):
                pairs.begin(item.callspec.params["script"], item.callspec.params["name"])
        pairs.begin_undisturbed()
        yield pairs


def digests(finished, name: str) -> list[str]:
    return sorted(line for line in finished.stdout.splitlines() if line.startswith(f"DIGEST {name} "))


@pytest.mark.parametrize(("script", "name"), [case for case in CASES if case[1] not in REFUSED])
def test_a_training_with_a_fault_ends_like_the_one_without(pairs, script, name):
    plain, disturbed = pairs.undisturbed(script, name), pairs.disturbed(script, name)
    assert plain.returncode == 0, plain.output
    assert disturbed.returncode == 0, disturbed.output
    assert len(disturbed.recoveries) >= 1
    assert digests(disturbed, name) == digests(plain, name)
    assert len(digests(plain, name)) == RANKS.get(name, 2)


@pytest.mark.parametrize(("script", "name"), [case for case in CASES if case[1] in REFUSED])
def test_a_training_that_cannot_be_carried_is_refused_at_once(pairs, script, name):
    finished = pairs.disturbed(script, name)
    assert finished.returncode == 93
    assert REFUSED[name] in finished.stderr
    assert not digests(finished, name)
    assert not finished.recoveries
