"""Ordinary scripts of other people come out of a fault as without one, or are refused at their beginning."""

from __future__ import annotations

import ast
from collections import defaultdict
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
RANKS = {"static": 3, "plain": 3, "gan": 4, "gan11": 4, "wgan": 4}


TOGETHER = 6
"""So many trainings whose fault is an exception are one job, one after the other; a death there would end it."""
ALONE: set[str] = set()
"""Trainings that leave something behind in the process."""


def classes(script: str) -> list[ast.ClassDef]:
    return [node for node in ast.parse((WORKERS / script).read_text()).body if isinstance(node, ast.ClassDef)]


def cases(script: str) -> list[tuple[str, str]]:
    return [(script, node.name) for node in classes(script) if ast.unparse(node.bases[0]) in ("Case", "static")]


SCRIPTS = ("trainings.py", "trainings_more.py", "trainings_loops.py")
LOOPS = ("gan11", "wgan", "epochs_a", "epochs_b", "workers_b", "begin_end", "ppo", "schedule_free", "stateful")
DIES = {node.name for script in SCRIPTS for node in classes(script) if "'kill'" in ast.unparse(node)}
CASES = [*cases("trainings.py"), *cases("trainings_more.py"), *(("trainings_loops.py", name) for name in LOOPS)]


class Pairs:
    """Every training with its fault and without, several of them in a job where that can be, two jobs at a time."""

    def __init__(self, start, jobs: ThreadPoolExecutor) -> None:
        self._start = start
        self._jobs = jobs
        self._disturbed: dict[tuple[str, str], Future] = {}
        self._plain: dict[tuple[str, str], Future] = {}
        self.faults: dict[tuple[str, str], int] = {}
        """How many there are in the job of a training, which may be one of several in it."""

    def begin(self, wanted: list[tuple[str, str]]) -> None:
        together: dict[tuple[str, int], list[str]] = defaultdict(list)
        for script, name in wanted:
            ranks = RANKS.get(name, 2)
            if name in REFUSED or name in ALONE or name in DIES:
                self._disturbed[script, name] = self._submit(
                    ranks, script, name, *(() if name in REFUSED else ("fault",))
                )
            if name not in REFUSED:
                together[script, ranks].append(name)
        for (script, ranks), names in together.items():
            can = [name for name in names if name not in ALONE and name not in DIES]
            for some in (can[at : at + TOGETHER] for at in range(0, len(can), TOGETHER)):
                job = self._submit(ranks, script, ",".join(some), "fault")
                self._disturbed.update({(script, name): job for name in some})
                self.faults.update({(script, name): len(some) for name in some})
            job = self._submit(ranks, script, ",".join(names))
            self._plain.update({(script, name): job for name in names})

    def _submit(self, count: int, script: str, *arguments: str) -> Future:
        command = (f"--nproc-per-node={count}", "--inprocess-restart", WORKERS / script, *arguments)
        return self._jobs.submit(lambda: self._start(*command).wait(180))

    def disturbed(self, script: str, name: str):
        return self._disturbed[script, name].result()

    def undisturbed(self, script: str, name: str):
        return self._plain[script, name].result()


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, start_any_time) -> Iterator[Pairs]:
    with ThreadPoolExecutor(2) as jobs:
        pairs = Pairs(start_any_time, jobs)
        items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
        pairs.begin([(item.callspec.params["script"], item.callspec.params["name"]) for item in items])
        yield pairs


def digests(finished, name: str) -> list[str]:
    return sorted(line for line in finished.stdout.splitlines() if line.startswith(f"DIGEST {name} "))


@pytest.mark.parametrize(("script", "name"), [case for case in CASES if case[1] not in REFUSED])
def test_a_training_with_a_fault_ends_like_the_one_without(pairs, script, name):
    plain, disturbed = pairs.undisturbed(script, name), pairs.disturbed(script, name)
    assert plain.returncode == 0, plain.output
    assert disturbed.returncode == 0, disturbed.output
    assert len(disturbed.recoveries) >= pairs.faults.get((script, name), 1)
    assert digests(disturbed, name) == digests(plain, name)
    assert len(digests(plain, name)) == RANKS.get(name, 2)


@pytest.mark.parametrize(("script", "name"), [case for case in CASES if case[1] in REFUSED])
def test_a_training_that_cannot_be_carried_is_refused_at_once(pairs, script, name):
    finished = pairs.disturbed(script, name)
    assert finished.returncode == 93
    assert REFUSED[name] in finished.stderr
    assert not digests(finished, name)
    assert not finished.recoveries
