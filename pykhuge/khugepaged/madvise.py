"""MADV_COLLAPSE: collapse now, heeding neither the limits nor `enabled` (madvise_collapse)."""

from __future__ import annotations

from pykhuge.hw.memory import HPAGE_PMD_SIZE
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.retract import collapse_pte_mapped_thp
from pykhuge.khugepaged.revalidate import hugepage_vma_revalidate
from pykhuge.khugepaged.scan import hpage_collapse_scan
from pykhuge.khugepaged.scan_result import CollapseError, ScanResult
from pykhuge.mm.huge_memory import hugepage_vma_check
from pykhuge.mm.mm_types import Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.swap import lru_add_drain_all

__all__ = ["madvise_collapse"]

# After these the next block may still do better; any other failure ends the call.
_GO_ON = frozenset(
    {
        ScanResult.SCAN_PMD_NULL,
        ScanResult.SCAN_PTE_NON_PRESENT,
        ScanResult.SCAN_PTE_UFFD_WP,
        ScanResult.SCAN_PAGE_RO,
        ScanResult.SCAN_LACK_REFERENCED_PAGE,
        ScanResult.SCAN_PAGE_NULL,
        ScanResult.SCAN_PAGE_COUNT,
        ScanResult.SCAN_PAGE_LOCK,
        ScanResult.SCAN_PAGE_COMPOUND,
        ScanResult.SCAN_PAGE_LRU,
        ScanResult.SCAN_DEL_PAGE_LRU,
    }
)
_DONE = frozenset({ScanResult.SCAN_SUCCEED, ScanResult.SCAN_PMD_MAPPED})


def madvise_collapse(
    mem: Memory, vma: Vma, start: int, end: int, cc: CollapseControl
) -> Steps[None]:
    """Collapse every whole block of [start, end), which lies in `vma`.

    Raises: CollapseError with the errno of the last failure, unless every block is huge afterwards.
    Locks: entered and left with mmap_lock for read, dropped and taken again on the way.
    Kernel: madvise_collapse.
    """
    mm = vma.mm
    if not hugepage_vma_check(mem, vma, enforce_sysfs=False):
        raise CollapseError(ScanResult.SCAN_VMA_CHECK, mem.version)
    lru_add_drain_all(mem)
    hstart, hend = start + HPAGE_PMD_SIZE - 1 & -HPAGE_PMD_SIZE, end & -HPAGE_PMD_SIZE
    thps, last_fail, mmap_locked = 0, ScanResult.SCAN_FAIL, True
    addr = hstart
    while addr < hend:
        result = ScanResult.SCAN_SUCCEED
        if not mmap_locked:
            yield Acquire(mm.mmap_lock, READ)
            mmap_locked = True
            result, found = hugepage_vma_revalidate(mem, mm, addr, cc, expect_anon=False)
            if found is None:
                last_fail = result
                break
            vma = found
            hend = min(hend, vma.vm_end & -HPAGE_PMD_SIZE)
        result, mmap_locked = yield from hpage_collapse_scan(mem, vma, addr, cc)
        if result is ScanResult.SCAN_PTE_MAPPED_HUGEPAGE:
            result = yield from _map_by_pmd(mem, mm, addr)
        if result in _DONE:
            thps += 1
        else:
            last_fail = result
            if result not in _GO_ON:
                break
        addr += HPAGE_PMD_SIZE
    if not mmap_locked:
        yield Acquire(mm.mmap_lock, READ)
    if thps != (hend - hstart) // HPAGE_PMD_SIZE:
        raise CollapseError(last_fail, mem.version)


def _map_by_pmd(mem: Memory, mm: Mm, addr: int) -> Steps[ScanResult]:
    """The page cache holds a huge page already: map it so."""
    yield Acquire(mm.mmap_lock, READ if mem.version.retract_without_mmap_lock else WRITE)
    task = mem.sched.current
    try:
        result = yield from collapse_pte_mapped_thp(mem, mm, addr, install_pmd=True)
    except GeneratorExit:
        mm.mmap_lock.unlock(task)
        raise
    yield Release(mm.mmap_lock)
    return result
