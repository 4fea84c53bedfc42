"""Collapsing anonymous memory: isolate, copy, and the two helpers that end it (mm/khugepaged.c).

The order of locks and of what each failure leaves behind is that of the kernel after "Memory poison
recovery in khugepaged": until every page is copied, nothing but the private huge page has changed,
so a copy that meets poison is undone by putting the page table back and the pages down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Acquire, Preempt, Release, Steps
from pykhuge.khugepaged.alloc import alloc_charge_hpage, put_hpage
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.ptes import BlockOfPtes, Bools, FirstFailure, shared_folios
from pykhuge.khugepaged.revalidate import (
    check_pmd_still_valid,
    find_pmd_or_thp_or_none,
    hugepage_vma_revalidate,
)
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.khugepaged.trace_events import (
    mm_collapse_huge_page,
    mm_collapse_huge_page_isolate,
    mm_collapse_huge_page_swapin,
)
from pykhuge.mm.copy_mc import copy_mc_pages
from pykhuge.mm.fault import SwapFault, do_swap_page, map_new_huge_page
from pykhuge.mm.huge_memory import OutOfMemory, pgtable_trans_huge_deposit
from pykhuge.mm.memory_failure import memory_failure_queue, memory_failure_work
from pykhuge.mm.mm_types import Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_head, PG_in_flight, PG_locked, PG_lru, PG_swapcache
from pykhuge.mm.page_table import PUD_SHIFT, TABLE, Ptes, is_swap_pte, pte_pfn
from pykhuge.mm.rmap import page_remove_rmap, set_pmd
from pykhuge.mm.swap import isolate_lru_pages, lru_add_drain, put_pages, putback_lru_pages
from pykhuge.mm.swap_state import free_swap_cache
from pykhuge.mm.vmstat import MM_ANONPAGES, THP_SCAN_EXCEED_NONE_PTE, THP_SCAN_EXCEED_SHARED_PTE

__all__ = ["collapse_huge_page"]

U_LOCKED = np.uint32(PG_locked)
U_UNLOCKED = np.uint32(~PG_locked & 0xFFFFFFFF)


class Isolated(NamedTuple):
    """What isolation leaves for the copy.

    block: the entries as they were then.
    pages: int64, the base pages and, behind them, the heads of compound pages: each locked, off the
    LRU, with one reference more.
    """

    result: ScanResult
    block: BlockOfPtes
    pages: Pfns


def collapse_huge_page(
    mem: Memory, mm: Mm, addr: int, referenced: int, unmapped: int, cc: CollapseControl
) -> Steps[ScanResult]:
    """Collapse the block at `addr`, which the scan found worth it.

    Args:
        addr: 2 MiB aligned.
        referenced: entries used lately, for the trace.
        unmapped: swap-type entries that the scan met; 0 spares the look for them.
    Locks: entered with mmap_lock for read, left without it.
    Kernel: collapse_huge_page.
    """
    # Allocation may take long; everything is looked at anew once the lock is back.
    yield Release(mm.mmap_lock)
    result, hpage = alloc_charge_hpage(mem, mm, cc)
    try:
        if result is ScanResult.SCAN_SUCCEED:
            result, pmd_table = yield from _prepare(mem, mm, addr, referenced, unmapped, cc)
        if result is ScanResult.SCAN_SUCCEED:
            yield Acquire(mm.mmap_lock, WRITE)
    except GeneratorExit:
        # A plain call that would have to wait is given up: the huge page goes back.
        if hpage >= 0:
            put_hpage(mem, hpage)
        raise
    if result is ScanResult.SCAN_SUCCEED:
        result, vma = hugepage_vma_revalidate(mem, mm, addr, cc, expect_anon=True)
        if result is ScanResult.SCAN_SUCCEED:
            result, pmd = check_pmd_still_valid(mem, mm, addr, pmd_table)
        if result is ScanResult.SCAN_SUCCEED:
            assert vma is not None
            result = yield from _collapse_locked(mem, vma, addr, pmd, hpage, cc)
        yield Release(mm.mmap_lock)
    if result is not ScanResult.SCAN_SUCCEED and hpage >= 0:
        put_hpage(mem, hpage)
    mem.emit(mm_collapse_huge_page(mm.hashed_ptr, result is ScanResult.SCAN_SUCCEED, result))
    if mem.version.copy_queues_memory_failure:
        memory_failure_work(mem)
    return result


def _prepare(
    mem: Memory, mm: Mm, addr: int, referenced: int, unmapped: int, cc: CollapseControl
) -> Steps[tuple[ScanResult, int]]:
    """Revalidate under mmap_lock for read, and bring in what is swapped out.

    Returns: the result, and the table that holds the block's PMD.
    """
    yield Acquire(mm.mmap_lock, READ)
    result, vma = hugepage_vma_revalidate(mem, mm, addr, cc, expect_anon=True)
    pmd = 0
    if result is ScanResult.SCAN_SUCCEED:
        result, pmd = find_pmd_or_thp_or_none(mem, mm, addr)
    if result is ScanResult.SCAN_SUCCEED and unmapped:
        assert vma is not None
        result = yield from _collapse_huge_page_swapin(mem, vma, addr, pmd, referenced)
    pmd_table = mm.pmd_tables.get(addr >> PUD_SHIFT, -1)
    yield Release(mm.mmap_lock)
    return result, pmd_table


def _collapse_huge_page_swapin(
    mem: Memory, vma: Vma, addr: int, pmd: int, referenced: int
) -> Steps[ScanResult]:
    """Bring in every swap-type entry of the block; what came in before a failure stays in.

    Reading sleeps with mmap_lock held for read: others may fault, free or reclaim meanwhile, so
    every entry is looked at when its turn comes. Locks: mmap_lock for read.
    Kernel: __collapse_huge_page_swapin.
    """
    ptes = mem.ram.words[pte_pfn(pmd)]
    swapped_in, result = 0, ScanResult.SCAN_SUCCEED
    for place in range(HPAGE_PMD_NR):
        if not is_swap_pte(int(ptes[place])):
            continue
        yield Preempt("swapin")
        if not is_swap_pte(int(ptes[place])):
            continue
        try:
            outcome = do_swap_page(mem, vma, addr + place * PAGE_SIZE, ptes, place, write=False)
        except OutOfMemory:
            outcome = SwapFault.SIGBUS
        if outcome is not SwapFault.DONE:
            retry = outcome is SwapFault.RETRY
            result = ScanResult.SCAN_PAGE_LOCK if retry else ScanResult.SCAN_FAIL
            break
        swapped_in += 1
    else:
        if swapped_in:
            lru_add_drain(mem)
    ret = int(result is ScanResult.SCAN_SUCCEED)
    if mem.version.swapin_ret_is_scan_result:
        ret = mem.version.number(result)
    mem.emit(mm_collapse_huge_page_swapin(vma.mm.hashed_ptr, swapped_in, referenced, ret))
    return result


def _collapse_locked(
    mem: Memory, vma: Vma, addr: int, pmd: int, hpage: int, cc: CollapseControl
) -> Steps[ScanResult]:
    """Steps e to i: from the cleared PMD to the huge one, or back. Locks: mmap_lock for write."""
    assert vma.anon_vma is not None
    mm, anon_vma_lock, table = vma.mm, vma.anon_vma.lock, mem.ram.words[pte_pfn(pmd)]
    yield Acquire(anon_vma_lock, WRITE)
    _pmdp_collapse_flush(mem, mm, addr, pmd)
    with mm.page_table_lock, shared_folios(mem, mm, table):
        isolated = _collapse_huge_page_isolate(mem, table, vma, addr, cc)
    if isolated.result is not ScanResult.SCAN_SUCCEED:
        with mm.page_table_lock:
            _restore_pmd(mem, mm, addr, pmd)
        yield Release(anon_vma_lock)
        return isolated.result
    # The page locks alone keep rmap away from here on.
    yield Release(anon_vma_lock)

    result = _collapse_huge_page_copy(mem, isolated.block, hpage)
    yield Preempt("copied")
    if result is not ScanResult.SCAN_SUCCEED:
        _collapse_huge_page_copy_failed(mem, mm, addr, pmd, isolated)
        return result
    _collapse_huge_page_copy_succeeded(mem, table, vma, isolated)
    with mm.page_table_lock:
        del mm.detached[addr]
        pgtable_trans_huge_deposit(mm, addr, pte_pfn(pmd))
        mem.pages.flags[hpage] &= np.uint32(~PG_in_flight & 0xFFFFFFFF)
        del mem.in_flight[hpage]
        map_new_huge_page(mem, vma, addr, hpage)
    return result


def _pmdp_collapse_flush(mem: Memory, mm: Mm, addr: int, pmd: int) -> None:
    """Take the PMD out, and out of TLBs and secondary MMUs; faults wait on mmap_lock from now."""
    for notifier in mm.mmu_notifiers:
        notifier.invalidate_range_start(addr, addr + HPAGE_PMD_SIZE)
    with mm.page_table_lock:
        set_pmd(mem, mm, addr, 0)
        mm.detached[addr] = pmd
        mm.tlb_gen += 1
    for notifier in mm.mmu_notifiers:
        notifier.invalidate_range_end(addr, addr + HPAGE_PMD_SIZE)


def _restore_pmd(mem: Memory, mm: Mm, addr: int, pmd: int) -> None:
    """pmd_populate(): point the PMD to its page table again."""
    del mm.detached[addr]
    set_pmd(mem, mm, addr, pmd & -PAGE_SIZE | TABLE)


def _collapse_huge_page_isolate(
    mem: Memory, table: Ptes, vma: Vma, addr: int, cc: CollapseControl
) -> Isolated:
    """Lock and isolate every page of the block, or none.

    Order at each entry: none or zero, present, uffd-wp, a normal page, shared, locked, referenced
    by others, on the LRU. Kernel: __collapse_huge_page_isolate.
    """
    block = BlockOfPtes(mem, table)
    failure = _first_failure(mem, block, vma, cc)
    stop = failure.place
    nr = block.before(stop)
    accepted = _accepted(block, nr)
    if len(accepted):
        isolate_lru_pages(mem, accepted, PG_locked)
    result = failure.result
    writable = None if mem.version.no_scan_page_ro else block.writable(nr)
    referenced = block.referenced(nr, cc, _test_young(vma, addr, block))
    if result is ScanResult.SCAN_SUCCEED and writable is False:
        result = ScanResult.SCAN_PAGE_RO
    elif result is ScanResult.SCAN_SUCCEED and cc.is_khugepaged and not referenced:
        result = ScanResult.SCAN_LACK_REFERENCED_PAGE
    if result is not ScanResult.SCAN_SUCCEED:
        release_pte_pages(mem, accepted)
    none_or_zero, page = (
        block.nr_none_or_zero(stop),
        block.last_page(failure, folios=mem.version.large_folios),
    )
    mem.emit(mm_collapse_huge_page_isolate(page, none_or_zero, referenced, writable, result))
    return Isolated(result, block, accepted)


def _first_failure(mem: Memory, block: BlockOfPtes, vma: Vma, cc: CollapseControl) -> FirstFailure:
    """The kernel's chain of tests at isolation; the counts of exceeded limits move here."""
    failure = FirstFailure()
    if len(block.mapped) < HPAGE_PMD_NR:
        none_limit = 0 if vma.userfaultfd_armed() else cc.limit("max_ptes_none")
        failure.beyond(block.none_or_zero, none_limit, ScanResult.SCAN_EXCEED_NONE_PTE)
        failure.beyond(block.non_present, 0, ScanResult.SCAN_PTE_NON_PRESENT)
    block.fails_uffd_wp(failure)
    block.fails_normal_page(failure)
    block.fails_shared(failure, cc, folios=mem.version.large_folios)
    first = block.first_of_heads()
    if block.any_flag & PG_locked:
        locked = block.flags[first] & U_LOCKED != 0
        failure.where(block.mapped[first], locked, ScanResult.SCAN_PAGE_LOCK)
    block.fails_refcount(mem, failure, first)
    if not block.all_flags & PG_lru:
        off_lru = block.flags[first] & np.uint32(PG_lru) == 0
        failure.where(block.mapped[first], off_lru, ScanResult.SCAN_DEL_PAGE_LRU)
    if failure.result is ScanResult.SCAN_EXCEED_NONE_PTE:
        mem.vmstat.count(THP_SCAN_EXCEED_NONE_PTE)
    elif failure.result is ScanResult.SCAN_EXCEED_SHARED_PTE:
        mem.vmstat.count(THP_SCAN_EXCEED_SHARED_PTE)
    return failure


def _test_young(vma: Vma, addr: int, block: BlockOfPtes) -> Bools | bool:
    """mmu_notifier_test_young() of each mapped entry."""
    notifiers = vma.mm.mmu_notifiers
    if not notifiers:
        return False
    addrs = (addr + block.mapped * PAGE_SIZE).tolist()
    return np.array([any(notifier.test_young(each) for notifier in notifiers) for each in addrs])


def _accepted(block: BlockOfPtes, nr: int) -> Pfns:
    """The pages behind the first `nr` mapped entries: base pages, then each compound page once."""
    if not block.compound:
        return block.pfns[:nr]
    heads = block.heads[:nr]
    base = block.pfns[:nr][block.flags[:nr] & np.uint32(PG_head) == 0]
    compound = heads[block.flags[:nr] & np.uint32(PG_head) != 0]
    return np.concatenate([base, np.array(list(dict.fromkeys(compound.tolist())), np.int64)])


def _collapse_huge_page_copy(mem: Memory, block: BlockOfPtes, hpage: int) -> ScanResult:
    """Copy 512 entries' pages into the huge page, or stop at the first poisoned line.

    Entries that are none or map the zero page clear their place. Changes: the destination's bytes
    only. Raises: KernelPanic on a machine without recovery.
    Kernel: the copying loop of __collapse_huge_page_copy.
    """
    frames = block.pfns
    if len(block.mapped) < HPAGE_PMD_NR:
        frames = np.full(HPAGE_PMD_NR, -1, np.int64)
        frames[block.mapped] = block.pfns
    mce = copy_mc_pages(
        mem, hpage, frames, consumer="__collapse_huge_page_copy", recovery=mem.recovery
    )
    if mce is None:
        return ScanResult.SCAN_SUCCEED
    if mem.version.copy_queues_memory_failure:
        memory_failure_queue(mem, mce.pfn)
    return ScanResult.SCAN_COPY_MC


def _collapse_huge_page_copy_succeeded(
    mem: Memory, table: Ptes, vma: Vma, isolated: Isolated
) -> None:
    """Give up the small pages: entries cleared, mappings and references dropped.

    The mappings go before the isolation's references here: a page that nobody else has then never
    reaches its LRU list, which leaves the counters as the kernel's order does.
    Kernel: __collapse_huge_page_copy_succeeded.
    """
    block = isolated.block
    table[:] = 0
    if len(block.none_or_zero):
        mem.mod_mm(vma.mm, MM_ANONPAGES, len(block.none_or_zero))
    page_remove_rmap(mem, block.pfns, vma)
    put_pages(mem, block.pfns)
    if block.any_flag & PG_swapcache:
        mem.pages.flags[isolated.pages] &= U_UNLOCKED
        free_swap_cache(mem, isolated.pages)
    putback_lru_pages(mem, isolated.pages, PG_locked)


def _collapse_huge_page_copy_failed(
    mem: Memory, mm: Mm, addr: int, pmd: int, isolated: Isolated
) -> None:
    """Put everything back as it was: the entries were never touched.

    The PMD comes first: once a page is unlocked, others may look for the entries that map it.
    Kernel: __collapse_huge_page_copy_failed.
    """
    with mm.page_table_lock:
        _restore_pmd(mem, mm, addr, pmd)
    release_pte_pages(mem, isolated.pages)


def release_pte_pages(mem: Memory, pages: Pfns) -> None:
    """Unlock and put back isolated pages.

    Base pages go from the last entry to the first, then compound ones as they were met.
    """
    if not len(pages):
        return
    compound = mem.pages.flags[pages] & np.uint32(PG_head) != 0
    order = (
        np.concatenate([pages[~compound][::-1], pages[compound]]) if compound.any() else pages[::-1]
    )
    putback_lru_pages(mem, order, PG_locked)
