"""Deciding whether a block is worth collapsing, and collapsing it (hpage_collapse_scan_pmd)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.khugepaged.anon import collapse_huge_page
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.ptes import BlockOfPtes, Bools, FirstFailure
from pykhuge.khugepaged.revalidate import find_pmd_or_thp_or_none, hugepage_vma_revalidate
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.khugepaged.trace_events import mm_khugepaged_scan_pmd
from pykhuge.mm.mm_types import Mm, Vma
from pykhuge.mm.mmzone import NODE_RECLAIM_DISTANCE, Memory
from pykhuge.mm.page import PG_anon, PG_locked, PG_lru
from pykhuge.mm.page_table import (
    PAGE_SWP_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    SWP_PTE_MARKER,
    SWP_TYPE_SHIFT,
    Ptes,
    pte_pfn,
    swp_offsets,
)
from pykhuge.mm.swap import lru_add_drain_all
from pykhuge.mm.vmstat import (
    THP_SCAN_EXCEED_NONE_PTE,
    THP_SCAN_EXCEED_SHARED_PTE,
    THP_SCAN_EXCEED_SWAP_PTE,
)

__all__ = ["hpage_collapse_scan_pmd", "khugepaged_scan_block"]

U_LRU = np.uint32(PG_lru)
U_LOCKED = np.uint32(PG_locked)
U_ANON = np.uint32(PG_anon)

_EXCEEDED = {
    ScanResult.SCAN_EXCEED_NONE_PTE: THP_SCAN_EXCEED_NONE_PTE,
    ScanResult.SCAN_EXCEED_SWAP_PTE: THP_SCAN_EXCEED_SWAP_PTE,
    ScanResult.SCAN_EXCEED_SHARED_PTE: THP_SCAN_EXCEED_SHARED_PTE,
}


class Scanned(NamedTuple):
    """What the loop over 512 entries found; the fields of the trace event."""

    result: ScanResult
    page: int = -1
    writable: bool = False
    referenced: int = 0
    none_or_zero: int = 0
    unmapped: int = 0


def khugepaged_scan_block(mem: Memory, mm: Mm, addr: int, cc: CollapseControl) -> Steps[ScanResult]:
    """One block as the daemon comes to it: LRU batches drained, mmap_lock taken, VMA looked at.

    A block the daemon would pass over yields the result of that look, without a trace event.
    """
    lru_add_drain_all(mem)
    yield Acquire(mm.mmap_lock, READ)
    result, vma = hugepage_vma_revalidate(mem, mm, addr, cc, expect_anon=False)
    if result is not ScanResult.SCAN_SUCCEED:
        yield Release(mm.mmap_lock)
        return result
    assert vma is not None
    result, mmap_locked = yield from hpage_collapse_scan_pmd(mem, vma, addr, cc)
    if mmap_locked:
        yield Release(mm.mmap_lock)
    if result is ScanResult.SCAN_SUCCEED and cc.is_khugepaged:
        cc.settings.pages_collapsed = (cc.settings.pages_collapsed + 1) % (1 << 32)
    return result


def hpage_collapse_scan_pmd(
    mem: Memory, vma: Vma, addr: int, cc: CollapseControl
) -> Steps[tuple[ScanResult, bool]]:
    """Scan the block at `addr` of `vma`, and collapse it if it is worth it.

    Returns: the result, and whether mmap_lock is still held.
    Locks: entered with mmap_lock for read; it is dropped once a collapse is tried.
    Kernel: hpage_collapse_scan_pmd.
    """
    mm = vma.mm
    result, pmd = find_pmd_or_thp_or_none(mem, mm, addr)
    scanned = Scanned(result)
    mmap_locked = True
    if result is ScanResult.SCAN_SUCCEED:
        with mm.page_table_lock:
            scanned = _scan_ptes(mem, mem.ram.words[pte_pfn(pmd)], vma, addr, cc)
        result = scanned.result
        if result is ScanResult.SCAN_SUCCEED:
            mmap_locked = False
            result = yield from collapse_huge_page(
                mem, mm, addr, scanned.referenced, scanned.unmapped, cc
            )
    mem.emit(
        mm_khugepaged_scan_pmd(
            mm.hashed_ptr,
            scanned.page,
            scanned.writable,
            scanned.referenced,
            scanned.none_or_zero,
            result,
            scanned.unmapped,
        )
    )
    return result, mmap_locked


def _scan_ptes(mem: Memory, table: Ptes, vma: Vma, addr: int, cc: CollapseControl) -> Scanned:
    """The loop over the 512 entries, with the decision behind it. Changes: cc.node_load, events."""
    block = BlockOfPtes(mem, table)
    failure = _first_failure(mem, block, table, vma, cc)
    stop, result = failure.place, failure.result
    if result in _EXCEEDED:
        mem.vmstat.count(_EXCEEDED[result])
    nr = block.before(stop)
    # The writable bit is noted before the page is looked at, "referenced" after all tests.
    at_stop = stop < HPAGE_PMD_NR and nr < len(block.mapped) and int(block.mapped[nr]) == stop
    writable = block.writable(nr + (at_stop and result is not ScanResult.SCAN_PTE_UFFD_WP))
    # The notifiers are asked about the block's first address for every entry; isolation asks right.
    notified = any(notifier.test_young(addr) for notifier in vma.mm.mmu_notifiers)
    referenced = block.referenced(nr, cc, notified)
    unmapped = int(np.count_nonzero(block.non_present <= stop))
    if result is ScanResult.SCAN_SUCCEED:
        lacking = referenced == 0 or (unmapped > 0 and referenced < HPAGE_PMD_NR // 2)
        if not writable:
            result = ScanResult.SCAN_PAGE_RO
        elif cc.is_khugepaged and lacking:
            result = ScanResult.SCAN_LACK_REFERENCED_PAGE
    page = block.last_page(failure)
    return Scanned(result, page, writable, referenced, block.nr_none_or_zero(stop), unmapped)


def _first_failure(
    mem: Memory, block: BlockOfPtes, table: Ptes, vma: Vma, cc: CollapseControl
) -> FirstFailure:
    """The chain of tests of the scanning loop, in its order."""
    failure = FirstFailure()
    if len(block.mapped) < HPAGE_PMD_NR:
        failure.beyond(
            block.non_present, cc.limit("max_ptes_swap"), ScanResult.SCAN_EXCEED_SWAP_PTE
        )
        if len(block.non_present):
            uffd_wp = _swp_uffd_wp_any(table[block.non_present])
            failure.where(block.non_present, uffd_wp, ScanResult.SCAN_PTE_UFFD_WP)
        none_limit = 0 if vma.userfaultfd_armed() else cc.limit("max_ptes_none")
        failure.beyond(block.none_or_zero, none_limit, ScanResult.SCAN_EXCEED_NONE_PTE)
    block.fails_uffd_wp(failure)
    block.fails_normal_page(failure)
    block.fails_shared(failure, cc)
    _scan_nodes(mem, block, failure, cc)
    if not block.all_flags & PG_lru:
        failure.where(block.mapped, block.flags & U_LRU == 0, ScanResult.SCAN_PAGE_LRU)
    if block.any_flag & PG_locked:
        failure.where(block.mapped, block.flags & U_LOCKED != 0, ScanResult.SCAN_PAGE_LOCK)
    if not block.all_flags & PG_anon:
        failure.where(block.mapped, block.flags & U_ANON == 0, ScanResult.SCAN_PAGE_ANON)
    block.fails_refcount(mem, failure, slice(None))
    return failure


def _swp_uffd_wp_any(swapped: Ptes) -> Bools:
    """pte_swp_uffd_wp_any(): a swap entry with the bit, or a marker that stands for it."""
    marker = swapped >> np.uint64(SWP_TYPE_SHIFT) == SWP_PTE_MARKER
    marked = marker & (swp_offsets(swapped) & PTE_MARKER_UFFD_WP != 0)
    uffd_wp: Bools = (swapped & np.uint64(PAGE_SWP_UFFD_WP) != 0) | marked
    return uffd_wp


def _scan_nodes(
    mem: Memory, block: BlockOfPtes, failure: FirstFailure, cc: CollapseControl
) -> None:
    """Count the pages of each node up to the failure, and refuse a block spread too far.

    Kernel: hpage_collapse_scan_abort, cc->node_load.
    """
    if len(mem.nodes) == 1:
        cc.node_load = {0: len(block.mapped)}
        return
    nids = mem.nids_of(block.heads)
    cc.node_load = {}
    if mem.node_reclaim_mode:
        first_of_nodes = np.sort(np.unique(nids, return_index=True)[1])
        for index in first_of_nodes.tolist():
            nid = int(nids[index])
            seen = [int(nids[other]) for other in first_of_nodes.tolist() if other < index]
            if any(mem.distances[nid][other] > NODE_RECLAIM_DISTANCE for other in seen):
                failure.at(int(block.mapped[index]), ScanResult.SCAN_SCAN_ABORT)
                break
    counted = nids[: block.before(failure.place)]
    cc.node_load = {nid: n for nid, n in enumerate(np.bincount(counted).tolist()) if n}
