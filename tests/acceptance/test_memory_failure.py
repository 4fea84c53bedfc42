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


def test_every_test_of_the_kernels_is_there_in_each_variant() -> None:
    """Three kinds of page, lost or given up; the poison test for private and shared memory."""
    found = [(each.name, each.context, each.memory) for each in SCENARIOS]
    kinds = {"anon": "anon", "clean_pagecache": "file", "dirty_pagecache": "file"}
    for name, memory in kinds.items():
        for variant in ("madv_hard", "madv_soft"):
            assert (name, variant, memory) in found
    assert [each for each in found if each[0] == "poison"] == [
        ("poison", "userfaultfd", "anon"),
        ("poison", "userfaultfd", "shmem"),
    ]
    assert len(found) == len(set(found))
