"""enum scan_result: what became of a block, its text in the trace, its errno to MADV_COLLAPSE."""

from __future__ import annotations

import enum
import errno
import os

from pykhuge.kernel.version import KernelVersion

__all__ = ["CollapseError", "ScanResult"]


class ScanResult(enum.IntEnum):
    """enum scan_result (mm/khugepaged.c), with the kernel's numbers.

    Those of a later kernel: `KernelVersion.number`.
    """

    SCAN_FAIL = 0
    SCAN_SUCCEED = 1
    SCAN_PMD_NULL = 2
    SCAN_PMD_NONE = 3
    SCAN_PMD_MAPPED = 4
    SCAN_EXCEED_NONE_PTE = 5
    SCAN_EXCEED_SWAP_PTE = 6
    SCAN_EXCEED_SHARED_PTE = 7
    SCAN_PTE_NON_PRESENT = 8
    SCAN_PTE_UFFD_WP = 9
    SCAN_PTE_MAPPED_HUGEPAGE = 10
    SCAN_PAGE_RO = 11
    SCAN_LACK_REFERENCED_PAGE = 12
    SCAN_PAGE_NULL = 13
    SCAN_SCAN_ABORT = 14
    SCAN_PAGE_COUNT = 15
    SCAN_PAGE_LRU = 16
    SCAN_PAGE_LOCK = 17
    SCAN_PAGE_ANON = 18
    SCAN_PAGE_COMPOUND = 19
    SCAN_ANY_PROCESS = 20
    SCAN_VMA_NULL = 21
    SCAN_VMA_CHECK = 22
    SCAN_ADDRESS_RANGE = 23
    SCAN_DEL_PAGE_LRU = 24
    SCAN_ALLOC_HUGE_PAGE_FAIL = 25
    SCAN_CGROUP_CHARGE_FAIL = 26
    SCAN_TRUNCATED = 27
    SCAN_PAGE_HAS_PRIVATE = 28
    SCAN_STORE_FAILED = 29
    SCAN_COPY_MC = 30
    SCAN_PAGE_FILLED = 31  # since 6.4

    @property
    def text(self) -> str:
        """The name that trace events print."""
        return _TEXT[self]

    @property
    def errno(self) -> int:
        """What MADV_COLLAPSE returns if this was the last failure; 0 for the two successes."""
        return _ERRNO.get(self, errno.EINVAL)

    def errno_of(self, version: KernelVersion) -> int:
        """What MADV_COLLAPSE of kernel `version` returns for it."""
        if version.exceed_none_is_ebusy and self is ScanResult.SCAN_EXCEED_NONE_PTE:
            return errno.EBUSY
        return self.errno


_TEXT = (
    "failed",
    "succeeded",
    "pmd_null",
    "pmd_none",
    "page_pmd_mapped",
    "exceed_none_pte",
    "exceed_swap_pte",
    "exceed_shared_pte",
    "pte_non_present",
    "pte_uffd_wp",
    "pte_mapped_hugepage",
    "no_writable_page",
    "lack_referenced_page",
    "page_null",
    "scan_aborted",
    "not_suitable_page_count",
    "page_not_in_lru",
    "page_locked",
    "page_not_anon",
    "page_compound",
    "no_process_for_page",
    "vma_null",
    "vma_check_failed",
    "not_suitable_address_range",
    "could_not_delete_page_from_lru",
    "alloc_huge_page_failed",
    "ccgroup_charge_failed",
    "truncated",
    "page_has_private",
    "store_failed",
    "copy_poisoned_page",
    "page_filled",
)

_ERRNO = {
    ScanResult.SCAN_SUCCEED: 0,
    ScanResult.SCAN_PMD_MAPPED: 0,
    ScanResult.SCAN_ALLOC_HUGE_PAGE_FAIL: errno.ENOMEM,
    ScanResult.SCAN_CGROUP_CHARGE_FAIL: errno.EBUSY,
    ScanResult.SCAN_PAGE_COUNT: errno.EAGAIN,
    ScanResult.SCAN_PAGE_LRU: errno.EAGAIN,
    ScanResult.SCAN_PAGE_LOCK: errno.EAGAIN,
    ScanResult.SCAN_DEL_PAGE_LRU: errno.EAGAIN,
    ScanResult.SCAN_PAGE_FILLED: errno.EAGAIN,
}


class CollapseError(OSError):
    """MADV_COLLAPSE failed: `errno`, and the last `scan_result` behind it."""

    def __init__(self, scan_result: ScanResult, version: KernelVersion = KernelVersion.REF) -> None:
        self.scan_result = scan_result
        number = scan_result.errno_of(version)
        super().__init__(number, f"{os.strerror(number)}: {scan_result.name}")
