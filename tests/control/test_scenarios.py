"""The controller's behaviour as text: every file in tests/scenarios must come out as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hyperpodrun.control.job.commands import Command
from hyperpodrun.control.job.events import Event
from hyperpodrun.control.job.state import JobState, Phase
from hyperpodrun.control.job.transitions import TRANSITIONS, Transition
from scenario_language import ScenarioError, play

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_the_job_answers_as_written(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text()
    played = play(written)
    if request.config.getoption("regenerate_scenarios", default=False):
        path.write_text(played)
        return
    assert played == written, f"{path.name} has changed; pytest tests/control --regenerate-scenarios rewrites it"


def test_every_transition_of_the_table_is_in_a_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set()

    def recorder(key: tuple[Phase, type[Event]], transition: Transition) -> Transition:
        def record(job: JobState, event: Event, now: float) -> list[Command]:
            taken.add(key)
            return transition(job, event, now)

        return record

    for key, transition in list(TRANSITIONS.items()):
        monkeypatch.setitem(TRANSITIONS, key, recorder(key, transition))
    for path in SCENARIOS:
        play(path.read_text())
    assert taken == set(TRANSITIONS)


def test_every_scenario_says_what_it_shows() -> None:
    assert len(SCENARIOS) >= 20
    assert all(path.read_text().startswith("# ") for path in SCENARIOS)


@pytest.mark.parametrize(
    "text",
    [
        "begin\n",
        "config ranks=1\nrank 0 sings\n",
        "config ranks=1 size=2\n",
        "config ranks=1\nrank 0 arrive now\n",
    ],
)
def test_a_line_that_is_not_in_the_language_is_refused(text: str) -> None:
    with pytest.raises(ScenarioError):
        play(text)
