"""The kernel's khugepaged selftest, in its 45 combinations: a test for each of its tests."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from pykhuge.tools.acceptance import Scenario
from pykhuge.tools.acceptance.kselftest import NR_COMBINATIONS, scenarios

SCENARIOS = scenarios()
Test = TypeVar("Test", bound=Callable[[Scenario], None])


def in_all_combinations(test: Test) -> Test:
    """Run the test with each scenario that has its name."""
    name = test.__name__.removeprefix("test_")
    chosen = [each for each in SCENARIOS if each.name == name]
    ids = [f"{each.context}-{each.memory}" for each in chosen]
    return pytest.mark.parametrize("scenario", chosen, ids=ids)(test)


def test_there_are_as_many_combinations_as_in_the_kernel() -> None:
    """45 with types and contexts, alloc_at_fault, and the files again on a tmpfs; none twice."""
    ids = [each.id for each in SCENARIOS]
    assert len(ids) == len(set(ids))
    in_contexts = [each for each in SCENARIOS if each.context != "fault"]
    on_tmpfs = [each.id for each in in_contexts if each.memory == "tmpfs"]
    assert len(in_contexts) - len(on_tmpfs) == NR_COMBINATIONS == 45
    assert on_tmpfs == [
        "collapse_full[khugepaged-tmpfs]",
        "collapse_full[madvise-tmpfs]",
        "collapse_single_pte_entry[khugepaged-tmpfs]",
        "collapse_single_pte_entry[madvise-tmpfs]",
        "collapse_full_of_compound[khugepaged-tmpfs]",
        "collapse_full_of_compound[madvise-tmpfs]",
        "madvise_collapse_existing_thps[madvise-tmpfs]",
        "madvise_retracted_page_tables[madvise-tmpfs]",
    ]
    by_memory = dict.fromkeys(("anon", "file", "shmem"), 0)
    for each in in_contexts:
        if each.memory in by_memory:
            by_memory[each.memory] += 1
    assert by_memory == {"anon": 25, "file": 12, "shmem": 8}


@in_all_combinations
def test_alloc_at_fault(scenario: Scenario) -> None:
    """The first touch brings in a huge page; MADV_DONTNEED of one page splits its PMD."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_full(scenario: Scenario) -> None:
    """Four full blocks collapse."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_empty(scenario: Scenario) -> None:
    """A block that nobody has touched does not."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_single_pte_entry(scenario: Scenario) -> None:
    """A block with one page of 512 does."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_max_ptes_none(scenario: Scenario) -> None:
    """One hole more than the limit stops the daemon alone; as many do not."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_single_pte_entry_compound(scenario: Scenario) -> None:
    """One entry that maps a page of a huge one is enough."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_full_of_compound(scenario: Scenario) -> None:
    """512 entries that map one huge page become one PMD again."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_compound_extreme(scenario: Scenario) -> None:
    """So do 512 entries, each into another huge page."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_swapin_single_pte(scenario: Scenario) -> None:
    """A page on swap is brought in."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_max_ptes_swap(scenario: Scenario) -> None:
    """One page more on swap than the limit stops the daemon alone; as many do not."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_fork(scenario: Scenario) -> None:
    """A child collapses a block with a shared page; the parent keeps its small one."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_fork_compound(scenario: Scenario) -> None:
    """A child collapses what it shares as a huge page; the parent keeps that."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_collapse_max_ptes_shared(scenario: Scenario) -> None:
    """One shared page more than the limit stops the daemon alone; as many do not."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_madvise_collapse_existing_thps(scenario: Scenario) -> None:
    """MADV_COLLAPSE of what is huge already succeeds."""
    assert scenario.play() == scenario.expected


@in_all_combinations
def test_madvise_retracted_page_tables(scenario: Scenario) -> None:
    """MADV_COLLAPSE installs the PMD that the daemon has left empty."""
    assert scenario.play() == scenario.expected
