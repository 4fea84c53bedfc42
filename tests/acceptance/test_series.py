"""The manual tests of the patch series, over 1,000 placements of poison each."""

import pytest

from pykhuge.tools.acceptance import Scenario
from pykhuge.tools.acceptance.series import scenarios

SEEDS = 1000


def of_name(name: str, seeds: int = SEEDS) -> list[object]:
    """The scenarios of that name, one for each kind of memory."""
    chosen = [each for each in scenarios(seeds) if each.name == name]
    return [pytest.param(each, id=f"{each.context}-{each.memory}") for each in chosen]


@pytest.mark.parametrize("scenario", of_name("two tasks"))
def test_two_tasks(scenario: Scenario) -> None:
    """Blocks with a bad line are skipped at every pass, all others huge, every byte is right."""
    assert scenario.play() == scenario.expected


@pytest.mark.parametrize("scenario", of_name("two tasks, before the series"))
def test_two_tasks_before_the_series(scenario: Scenario) -> None:
    """The same poison is a panic."""
    assert scenario.play() == scenario.expected
