"""Each of the 31 scan results by each path that can come to it, and why by the others not."""

import pytest

from pykhuge import ScanResult
from pykhuge.tools.acceptance import Scenario
from pykhuge.tools.acceptance.scan_results import PATHS, impossible, path_of, scenarios

# SCAN_PAGE_FILLED came with 6.4.
OF_REF = [each for each in ScanResult if each is not ScanResult.SCAN_PAGE_FILLED]

SCENARIOS = scenarios()


@pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda each: f"{each.name}-{each.context}-{each.memory}"
)
def test_scan_result(scenario: Scenario) -> None:
    """The trace's word, and the errno of MADV_COLLAPSE."""
    assert scenario.play() == scenario.expected


def test_every_result_is_produced_by_every_path_or_cannot_be() -> None:
    """31 results by 5 paths: each cell is a scenario, or has a reason, and none both."""
    produced = {(each.name.partition(",")[0], path_of(each)) for each in SCENARIOS}
    reasons = impossible()
    table = {(result.name, path) for result in OF_REF for path in PATHS}
    assert len(OF_REF) == 31
    assert produced | set(reasons) == table
    assert not produced & set(reasons)
    assert all(reasons.values())


def test_scenarios_have_names_of_their_own() -> None:
    """A filter can choose any of them, and every result is there."""
    ids = [each.id for each in SCENARIOS]
    assert len(ids) == len(set(ids))
    assert {each.name.partition(",")[0] for each in SCENARIOS} == {each.name for each in OF_REF}
