"""Acceptance: the scenarios by which the kernel's own people judge this work, run on machines.

scenario       what a scenario is
series         the manual tests of the patch series, over many seeds
kselftest      the kernel's khugepaged selftest; selftest_kit has its settings, memory, contexts
memory_failure the kernel's memory-failure selftest, and userfaultfd's poison
scan_results   each scan result by each path; anon_results and file_results say how
"""

from __future__ import annotations

from pykhuge.tools.acceptance import kselftest, memory_failure, scan_results, series
from pykhuge.tools.acceptance.scenario import Mismatch, Scenario, Verdict

__all__ = ["Mismatch", "Scenario", "Verdict", "all_scenarios"]


def all_scenarios(seeds: int) -> list[Scenario]:
    """Every scenario, in the order of the table; the series' tests try `seeds` random seeds."""
    return [
        *series.scenarios(seeds),
        *kselftest.scenarios(),
        *memory_failure.scenarios(),
        *scan_results.scenarios(),
    ]
