"""Each of the 31 scan results by each path that can come to it.

A path is what collapses, and where: khugepaged and MADV_COLLAPSE in anonymous memory and in a page
cache, and MADV_COLLAPSE where the page cache is huge already (collapse_pte_mapped_thp). That
khugepaged goes that last way too, with blocks it has noted, it tells nobody.
"""

from __future__ import annotations

from functools import partial

from pykhuge.tools.acceptance import anon_results, file_results
from pykhuge.tools.acceptance.scan_kit import UNTRACED, Case, play
from pykhuge.tools.acceptance.scenario import Scenario

__all__ = ["PATHS", "impossible", "path_of", "scenarios"]

GROUP = "scan result"
K_ANON, K_FILE = "khugepaged anon", "khugepaged file"
M_ANON, M_FILE = "madvise anon", "madvise file"
PTES = "pte-mapped file"
PATHS = (K_ANON, K_FILE, M_ANON, M_FILE, PTES)
# What the trace says, and what MADV_COLLAPSE fails with: facts, not taken from the model.
EXPECTED = {
    "FAIL": ("failed", "EINVAL"),
    "SUCCEED": ("succeeded", "0"),
    "PMD_NULL": ("pmd_null", "EINVAL"),
    "PMD_NONE": ("pmd_none", "EINVAL"),
    "PMD_MAPPED": ("page_pmd_mapped", "0"),
    "EXCEED_NONE_PTE": ("exceed_none_pte", "EINVAL"),
    "EXCEED_SWAP_PTE": ("exceed_swap_pte", "EINVAL"),
    "EXCEED_SHARED_PTE": ("exceed_shared_pte", "EINVAL"),
    "PTE_NON_PRESENT": ("pte_non_present", "EINVAL"),
    "PTE_UFFD_WP": ("pte_uffd_wp", "EINVAL"),
    # MADV_COLLAPSE maps the huge page then, and that is what counts.
    "PTE_MAPPED_HUGEPAGE": ("pte_mapped_hugepage", "0"),
    "PAGE_RO": ("no_writable_page", "EINVAL"),
    "LACK_REFERENCED_PAGE": ("lack_referenced_page", "EINVAL"),
    "PAGE_NULL": ("page_null", "EINVAL"),
    "SCAN_ABORT": ("scan_aborted", "EINVAL"),
    "PAGE_COUNT": ("not_suitable_page_count", "EAGAIN"),
    "PAGE_LRU": ("page_not_in_lru", "EAGAIN"),
    "PAGE_LOCK": ("page_locked", "EAGAIN"),
    "PAGE_ANON": ("page_not_anon", "EINVAL"),
    "PAGE_COMPOUND": ("page_compound", "EINVAL"),
    "ANY_PROCESS": ("no_process_for_page", "EINVAL"),
    "VMA_NULL": ("vma_null", "EINVAL"),
    "VMA_CHECK": ("vma_check_failed", "EINVAL"),
    "ADDRESS_RANGE": ("not_suitable_address_range", "EINVAL"),
    "DEL_PAGE_LRU": ("could_not_delete_page_from_lru", "EAGAIN"),
    "ALLOC_HUGE_PAGE_FAIL": ("alloc_huge_page_failed", "ENOMEM"),
    "CGROUP_CHARGE_FAIL": ("ccgroup_charge_failed", "EBUSY"),
    "TRUNCATED": ("truncated", "EINVAL"),
    "PAGE_HAS_PRIVATE": ("page_has_private", "EINVAL"),
    "STORE_FAILED": ("store_failed", "EINVAL"),
    "COPY_MC": ("copy_poisoned_page", "EINVAL"),
}
# MADV_COLLAPSE of a file looks at the VMA between two blocks; no event tells what it found.
UNTRACED_OF_FILES = {"VMA_NULL", "VMA_CHECK", "ADDRESS_RANGE"}

# Why a path cannot come to a result.
_ONLY_CACHE = "only a page cache has it"
_NO_LIMIT = "only khugepaged heeds limits, and whether pages are in use"
_CALLER = "the caller itself uses the mm: it cannot be exiting"
_NO_PTES = "the entries of page tables are not looked at"
_NOT_HUGE_BEFORE = "no PMD maps a block huge before the page cache is"
_NO_SECOND_LOOK = "khugepaged passes such a VMA over, and does not look at a file's again"
_ONLY_PTES = "only MADV_COLLAPSE of what is huge already looks the page up"
_LOOKS_AT_TABLES = "it looks at the page table and the huge page in the cache alone"
IMPOSSIBLE: dict[str, dict[str, str]] = {
    K_ANON: {
        _ONLY_CACHE: "PTE_MAPPED_HUGEPAGE PAGE_COMPOUND TRUNCATED PAGE_HAS_PRIVATE STORE_FAILED",
    },
    M_ANON: {
        _ONLY_CACHE: "PTE_MAPPED_HUGEPAGE PAGE_COMPOUND TRUNCATED PAGE_HAS_PRIVATE STORE_FAILED",
        _NO_LIMIT: "EXCEED_SWAP_PTE EXCEED_SHARED_PTE LACK_REFERENCED_PAGE",
        _CALLER: "ANY_PROCESS",
    },
    K_FILE: {
        _NO_PTES: "EXCEED_SHARED_PTE PTE_NON_PRESENT PAGE_RO LACK_REFERENCED_PAGE",
        _NOT_HUGE_BEFORE: "PMD_MAPPED",
        _NO_SECOND_LOOK: "VMA_NULL VMA_CHECK ADDRESS_RANGE",
        _ONLY_PTES: "PAGE_NULL",
    },
    M_FILE: {
        _NO_LIMIT: "EXCEED_NONE_PTE EXCEED_SWAP_PTE",
        _NO_PTES: "EXCEED_SHARED_PTE PTE_NON_PRESENT PAGE_RO LACK_REFERENCED_PAGE",
        _NOT_HUGE_BEFORE: "PMD_MAPPED",
        _CALLER: "ANY_PROCESS",
        _ONLY_PTES: "PAGE_NULL",
    },
    PTES: {
        "an empty PMD is what it fills": "PMD_NONE",
        "that is what leads to it": "PTE_MAPPED_HUGEPAGE",
        "a VMA that is gone or too short is SCAN_VMA_CHECK to it": "VMA_NULL ADDRESS_RANGE",
        "the cache of the model has no large folios of other orders": "PAGE_COMPOUND",
        _CALLER: "ANY_PROCESS",
        _NO_LIMIT: "EXCEED_NONE_PTE EXCEED_SWAP_PTE EXCEED_SHARED_PTE LACK_REFERENCED_PAGE",
        _LOOKS_AT_TABLES: "PAGE_RO SCAN_ABORT PAGE_COUNT PAGE_LRU PAGE_LOCK PAGE_ANON"
        " DEL_PAGE_LRU ALLOC_HUGE_PAGE_FAIL CGROUP_CHARGE_FAIL TRUNCATED PAGE_HAS_PRIVATE"
        " STORE_FAILED COPY_MC",
    },
}


def impossible() -> dict[tuple[str, str], str]:
    """Why, for each result (SCAN_...) and path that cannot come to it."""
    return {
        (f"SCAN_{name}", path): reason
        for path, reasons in IMPOSSIBLE.items()
        for reason, names in reasons.items()
        for name in names.split()
    }


def path_of(scenario: Scenario) -> str:
    """Which of PATHS it goes."""
    return f"{scenario.context} {'anon' if scenario.memory == 'anon' else 'file'}"


def scenarios() -> list[Scenario]:
    """All of them, in the order of the enum."""
    cases = sorted((*anon_results.CASES, *file_results.CASES), key=lambda case: case.result)
    return [_scenario(case, path) for case in cases for path in case.paths]


def _scenario(case: Case, path: str) -> Scenario:
    context, memory = path.split()
    name = case.result.name.removeprefix("SCAN_")
    expected, number = EXPECTED[name]
    if context != "khugepaged":
        expected += f", {number}"
    if context == "pte-mapped" or (path == "madvise shmem" and name in UNTRACED_OF_FILES):
        expected += UNTRACED
    title = case.result.name + f", {case.note}" * bool(case.note)
    return Scenario(GROUP, title, memory, context, expected, partial(play, case, context))
