"""The kernel's tests of lost memory, and what a collapse meets behind them."""

import pytest

from pykhuge.tools.acceptance import Scenario
from pykhuge.tools.acceptance.memory_failure import scenarios

SCENARIOS = scenarios()


@pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda each: f"{each.name}-{each.context}-{each.memory}"
)
def test_memory_failure(scenario: Scenario) -> None:
    """Signals, content, and what is told of the frame; or the result of the collapse."""
    assert scenario.play() == scenario.expected
