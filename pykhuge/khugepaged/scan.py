"""Deciding whether a block is worth collapsing, and collapsing it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, PLACES
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Preempt, Release, Steps
from pykhuge.khugepaged.anon import collapse_huge_page
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.file import (
    collapse_file,
    expected_refs,
    is_huge_there,
    takes_large_folios,
)
from pykhuge.khugepaged.file_6_4 import collapse_file_6_4
from pykhuge.khugepaged.ptes import FirstFailure, shared_folios
from pykhuge.khugepaged.retract import (
    collapse_pte_mapped_thp,
    khugepaged_collapse_pte_mapped_thps,
)
from pykhuge.khugepaged.revalidate import (
    find_pmd_or_thp_or_none,
    hpage_collapse_test_exit_or_disable,
    hugepage_vma_revalidate,
)
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.khugepaged.trace_events import mm_khugepaged_scan_file, mm_khugepaged_scan_pmd
from pykhuge.mm.file_table import hold_file, release_file
from pykhuge.mm.memory_failure import memory_failure_work
from pykhuge.mm.mm_slot import khugepaged_add_pte_mapped_thp
from pykhuge.mm.mm_types import File, Mm, Vma
from pykhuge.mm.mmzone import NODE_RECLAIM_DISTANCE, Memory
from pykhuge.mm.page import PG_anon, PG_head, PG_locked, PG_lru, order_sizes
from pykhuge.mm.page_table import (
    pte_pfn,
)
from pykhuge.mm.swap import lru_add_drain_all
from pykhuge.mm.vmstat import (
    THP_SCAN_EXCEED_NONE_PTE,
    THP_SCAN_EXCEED_SHARED_PTE,
    THP_SCAN_EXCEED_SWAP_PTE,
)
from pykhuge.mm.xarray import XArray

__all__ = ["hpage_collapse_scan", "khugepaged_scan_block", "khugepaged_scan_vma_block"]

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
    if cc.is_khugepaged:
        yield from khugepaged_collapse_pte_mapped_thps(mem, mm)
    yield Acquire(mm.mmap_lock, READ)
    result, vma = hugepage_vma_revalidate(mem, mm, addr, cc, expect_anon=False)
    if result is not ScanResult.SCAN_SUCCEED:
        yield Release(mm.mmap_lock)
        return result
    assert vma is not None
    result, mmap_locked = yield from khugepaged_scan_vma_block(mem, vma, addr, cc)
    if mmap_locked:
        yield Release(mm.mmap_lock)
    return result


def khugepaged_scan_vma_block(
    mem: Memory, vma: Vma, addr: int, cc: CollapseControl
) -> Steps[tuple[ScanResult, bool]]:
    """`hpage_collapse_scan`, and what the daemon makes of its result: `pages_collapsed`."""
    mm = vma.mm
    result, mmap_locked = yield from hpage_collapse_scan(mem, vma, addr, cc)
    pte_mapped = result is ScanResult.SCAN_PTE_MAPPED_HUGEPAGE and cc.is_khugepaged
    noted = False
    if pte_mapped and mem.version.retract_without_mmap_lock:
        result = yield from _collapse_pte_mapped_at_once(mem, mm, addr)
    elif pte_mapped:
        pmd_state, _ = find_pmd_or_thp_or_none(mem, mm, addr)
        table = pmd_state is ScanResult.SCAN_SUCCEED
        noted = table and khugepaged_add_pte_mapped_thp(mm, addr)
    collapsed = noted or result is ScanResult.SCAN_SUCCEED
    if collapsed and cc.is_khugepaged:
        cc.settings.count("pages_collapsed")
    return result, mmap_locked


def _collapse_pte_mapped_at_once(mem: Memory, mm: Mm, addr: int) -> Steps[ScanResult]:
    """The page cache holds a huge page: the table that maps it goes now, if it may."""
    task = mem.sched.current
    yield Acquire(mm.mmap_lock, READ)
    try:
        if hpage_collapse_test_exit_or_disable(mem, mm):
            result = ScanResult.SCAN_ANY_PROCESS
        else:
            result = yield from collapse_pte_mapped_thp(mem, mm, addr, install_pmd=False)
    except GeneratorExit:
        mm.mmap_lock.unlock(task)
        raise
    yield Release(mm.mmap_lock)
    return ScanResult.SCAN_SUCCEED if result is ScanResult.SCAN_PMD_MAPPED else result


def hpage_collapse_scan(
    mem: Memory, vma: Vma, addr: int, cc: CollapseControl
) -> Steps[tuple[ScanResult, bool]]:
    """Scan the block at `addr` by the kind of `vma`, and collapse it if it is worth it.

    Returns: the result, and whether mmap_lock is still held.
    Locks: entered with mmap_lock for read. It is dropped for a file, whose VMA may go meanwhile.
    """
    if vma.vm_file is None:
        return (yield from hpage_collapse_scan_pmd(mem, vma, addr, cc))
    file, pgoff = hold_file(mem, vma.vm_file), vma.linear_page_index(addr)
    yield Release(vma.mm.mmap_lock)
    try:
        result = yield from hpage_collapse_scan_file(mem, vma.mm, addr, file, pgoff, cc)
    except GeneratorExit:
        mem.held_files.remove(file)
        file.f_count -= 1  # a plain call, given up: whoever had the file still has it
        raise
    yield from release_file(mem, file)
    return result, False


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
            scanned = _scan_ptes(mem, pte_pfn(pmd), vma, addr, cc)
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
            None if mem.version.no_scan_page_ro else scanned.writable,
            scanned.referenced,
            scanned.none_or_zero,
            result,
            scanned.unmapped,
        )
    )
    return result, mmap_locked


def _scan_ptes(mem: Memory, table: int, vma: Vma, addr: int, cc: CollapseControl) -> Scanned:
    """The loop over the 512 entries, with the decision behind it (csrc/scan_ptes.c).

    table: its frame. Changes: cc.node_load, events.
    """
    # The notifiers are asked about the block's first address for every entry; isolation asks right.
    notified = any(notifier.test_young(addr) for notifier in vma.mm.mmu_notifiers)
    with shared_folios(mem, vma.mm, mem.ram.words[table]):
        scanned = mem.pte_scanner.scan(
            table,
            none=0 if vma.userfaultfd_armed() else cc.limit("max_ptes_none"),
            swap=cc.limit("max_ptes_swap"),
            shared=cc.limit("max_ptes_shared"),
            daemon=cc.is_khugepaged,
            notified=notified,
            reclaim_distance=NODE_RECLAIM_DISTANCE if mem.node_reclaim_mode else -1,
            folios=mem.version.large_folios,
            read_only=mem.version.no_scan_page_ro,
        )
    load = enumerate(mem.pte_scanner.node_load)
    cc.node_load = {nid: nr for nid, nr in load if nr}
    found = Scanned(
        ScanResult(scanned.result),
        scanned.page,
        bool(scanned.writable),
        scanned.referenced,
        scanned.none_or_zero,
        scanned.unmapped,
    )
    if found.result in _EXCEEDED:
        mem.vmstat.count(_EXCEEDED[found.result])
    return found


def _load_nodes(nids: npt.NDArray[np.int64], cc: CollapseControl) -> None:
    """cc->node_load[nid]++ for each page."""
    cc.node_load = {nid: n for nid, n in enumerate(np.bincount(nids).tolist()) if n}


def _scan_abort(mem: Memory, nids: npt.NDArray[np.int64]) -> int:
    """The first page whose node is too far from one met before; len(nids) if none is.

    nids: int64[n], the node of each page, in order. Kernel: hpage_collapse_scan_abort.
    """
    if mem.node_reclaim_mode:
        first_of_nodes = np.sort(np.unique(nids, return_index=True)[1]).tolist()
        for met, index in enumerate(first_of_nodes):
            distances = mem.distances[int(nids[index])]
            if any(
                distances[nids[other]] > NODE_RECLAIM_DISTANCE for other in first_of_nodes[:met]
            ):
                return int(index)
    return len(nids)


def hpage_collapse_scan_file(
    mem: Memory, mm: Mm, addr: int, file: File, start: int, cc: CollapseControl
) -> Steps[ScanResult]:
    """Scan pages [start, start + 512) of the page cache, and collapse them if it is worth it.

    Locks: none; the caller holds a reference to `file`.
    """
    scanned = _scan_entries(mem, file.f_mapping.i_pages, start, cc)
    result = scanned.result
    if result is ScanResult.SCAN_SUCCEED:
        if cc.is_khugepaged and scanned.present < HPAGE_PMD_NR - cc.limit("max_ptes_none"):
            result = ScanResult.SCAN_EXCEED_NONE_PTE
            mem.vmstat.count(THP_SCAN_EXCEED_NONE_PTE)
        else:
            yield Preempt("scanned")
            collapse = collapse_file_6_4 if mem.version.collapse_file_keeps_pages else collapse_file
            result = yield from collapse(mem, mm, addr, file, start, cc)
    mem.emit(
        mm_khugepaged_scan_file(
            mm.hashed_ptr, scanned.page, file.inode.name, scanned.present, scanned.swap, result
        )
    )
    if mem.version.copy_queues_memory_failure:
        memory_failure_work(mem)
    return result


class ScannedFile(NamedTuple):
    """What the walk of a file's 512 entries found."""

    result: ScanResult
    page: int
    present: int
    swap: int


def _scan_entries(mem: Memory, i_pages: XArray, start: int, cc: CollapseControl) -> ScannedFile:
    """The walk over the entries that are not holes. Changes: cc.node_load, events.

    An entry of order k is met once, at its first place, and counts 2**k pages. A value that exceeds
    max_ptes_swap stands as -1 in the trace: Linux makes a frame number of it that means nothing.
    """
    pages, failure = mem.pages, FirstFailure()
    slots, sizes = i_pages.node(start), order_sizes(i_pages.node_orders(start))
    met_at = PLACES & -sizes
    values = met_at[slots < 0]
    failure.beyond(values, cc.limit("max_ptes_swap"), ScanResult.SCAN_EXCEED_SWAP_PTE)
    places = np.flatnonzero((slots > 0) & (met_at == PLACES))
    pfns = slots[places]
    flags = pages.flags[pfns]
    compound = flags & np.uint32(PG_head) != 0
    if compound.any():
        cached = is_huge_there(mem, pfns, start)
        failure.where(places, compound & cached, ScanResult.SCAN_PTE_MAPPED_HUGEPAGE)
        if not takes_large_folios(mem):
            failure.where(places, compound & ~cached, ScanResult.SCAN_PAGE_COMPOUND)
    nids = mem.nids_of(pfns)
    abort = _scan_abort(mem, nids)
    if abort < len(nids):
        failure.at(int(places[abort]), ScanResult.SCAN_SCAN_ABORT)
    failure.where(places, flags & U_LRU == 0, ScanResult.SCAN_PAGE_LRU)
    extra = pages.refcount[pfns] != expected_refs(mem, pfns, flags)
    failure.where(places, extra, ScanResult.SCAN_PAGE_COUNT)
    if failure.result is ScanResult.SCAN_EXCEED_SWAP_PTE:
        mem.vmstat.count(THP_SCAN_EXCEED_SWAP_PTE)
    met = int(np.searchsorted(places, failure.place))
    _load_nodes(nids[:met], cc)
    page = int(slots[failure.place]) if failure.place < HPAGE_PMD_NR else -1
    swap = int(np.searchsorted(values, failure.place, side="right"))
    return ScannedFile(failure.result, max(page, -1), int(sizes[places[:met]].sum()), swap)
