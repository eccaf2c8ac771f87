"""What agents do as text: every file in tests/scenarios/membership must come out as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
from membership_language import play
from scenario_language import ScenarioError

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios" / "membership").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_the_agents_do_as_written(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text()
    played = play(written)
    if request.config.getoption("regenerate_scenarios", default=False):
        path.write_text(played)
        return
    assert played == written, f"{path.name} has changed; pytest tests/control --regenerate-scenarios rewrites it"


def test_every_scenario_says_what_it_shows() -> None:
    assert len(SCENARIOS) >= 10
    assert all(path.read_text().startswith("# ") for path in SCENARIOS)


@pytest.mark.parametrize(
    "text", ["a start\n", "config nodes=1\na sings\n", "config nodes=1 size=2\n", "config nodes=1\nb dies\n"]
)
def test_a_line_that_is_not_in_the_language_is_refused(text: str) -> None:
    with pytest.raises(ScenarioError):
        play(text)
