"""What may have changed while mmap_lock was dropped."""

from __future__ import annotations

from typing import NamedTuple

from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.fault import find_vma
from pykhuge.mm.huge_memory import hugepage_vma_check, transhuge_vma_suitable
from pykhuge.mm.mm_types import MMF_DISABLE_THP, Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page_table import PAGE_PRESENT, pmd_trans_huge
from pykhuge.mm.rmap import pmd_of

__all__ = [
    "Revalidated",
    "check_pmd_still_valid",
    "find_pmd_or_thp_or_none",
    "hpage_collapse_test_exit_or_disable",
    "hugepage_vma_revalidate",
]


class Revalidated(NamedTuple):
    """`vma` is set on SCAN_SUCCEED."""

    result: ScanResult
    vma: Vma | None


def hpage_collapse_test_exit_or_disable(mem: Memory, mm: Mm) -> bool:
    """Whether nobody is left to collapse for, or, in later kernels, nobody who wants it."""
    disabled = mem.version.disable_thp_is_exit and mm.flags & MMF_DISABLE_THP
    return mm.mm_users == 0 or bool(disabled)


def hugepage_vma_revalidate(
    mem: Memory, mm: Mm, addr: int, cc: CollapseControl, *, expect_anon: bool
) -> Revalidated:
    """Look the VMA at `addr` up anew, and check that its block may still be collapsed.

    Locks: mmap_lock. Kernel: hugepage_vma_revalidate (mm/khugepaged.c).
    """
    if hpage_collapse_test_exit_or_disable(mem, mm):
        return Revalidated(ScanResult.SCAN_ANY_PROCESS, None)
    vma = find_vma(mm, addr)
    if vma is None:
        return Revalidated(ScanResult.SCAN_VMA_NULL, None)
    if not transhuge_vma_suitable(vma, addr):
        return Revalidated(ScanResult.SCAN_ADDRESS_RANGE, None)
    if not hugepage_vma_check(mem, vma, enforce_sysfs=cc.is_khugepaged):
        return Revalidated(ScanResult.SCAN_VMA_CHECK, None)
    if expect_anon and (vma.anon_vma is None or vma.vm_file is not None):
        return Revalidated(ScanResult.SCAN_PAGE_ANON, None)
    return Revalidated(ScanResult.SCAN_SUCCEED, vma)


def find_pmd_or_thp_or_none(mem: Memory, mm: Mm, addr: int) -> tuple[ScanResult, int]:
    """The state of the PMD at `addr`, and its word."""
    pmd = pmd_of(mem, mm, addr)
    if pmd is None:
        return ScanResult.SCAN_PMD_NULL, 0
    if pmd == 0:
        return ScanResult.SCAN_PMD_NONE, 0
    if not pmd & PAGE_PRESENT:
        return ScanResult.SCAN_PMD_NULL, 0
    if pmd_trans_huge(pmd):
        return ScanResult.SCAN_PMD_MAPPED, pmd
    return ScanResult.SCAN_SUCCEED, pmd


def check_pmd_still_valid(mem: Memory, mm: Mm, addr: int, pmd_table: int) -> tuple[ScanResult, int]:
    """The same, and SCAN_FAIL if the PMD lies in another table than `pmd_table` by now."""
    result, pmd = find_pmd_or_thp_or_none(mem, mm, addr)
    if result is ScanResult.SCAN_SUCCEED and mm.pmd_tables[addr >> 30] != pmd_table:
        return ScanResult.SCAN_FAIL, 0
    return result, pmd
