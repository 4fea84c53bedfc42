"""Collapsing file-backed memory as kernels since 6.4 do (collapse_file, reworked).

The small pages stay in the cache, locked, isolated and unmapped, until all of them are copied: who
wants one waits for its lock. Only then, with i_mmap_rwsem and i_pages held, the 512 entries become
one; holes that somebody has filled meanwhile, or that a userfaultfd must hear of, end it instead. A
roll back thus leaves the cache alone.
"""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_ORDER
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Acquire, Foresee, Preempt, Release, Steps
from pykhuge.khugepaged.alloc import alloc_charge_hpage, put_hpage
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.file import (
    FileCollapse,
    fail_stores,
    lock_new_page,
    nr_thps_dec,
    nr_thps_inc,
    take_pages,
    trace_collapse_file,
)
from pykhuge.khugepaged.retract import retract_page_tables
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.copy_mc import copy_mc_pages
from pykhuge.mm.filemap import file_pages, filemap_release_pages, mod_nrpages, unlock_page
from pykhuge.mm.gup import UserPages
from pykhuge.mm.memory_failure import memory_failure_queue
from pykhuge.mm.mm_types import VM_UFFD_MISSING, File, Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_dirty, PG_in_flight, PG_locked, PG_uptodate, order_sizes
from pykhuge.mm.rmap import try_to_unmap
from pykhuge.mm.shmem import shmem_charge, shmem_uncharge
from pykhuge.mm.swap import del_pages_from_lru, lru_add_huge_page, lru_cache_add
from pykhuge.mm.vmstat import NR_FILE_PAGES, NR_FILE_THPS, NR_SHMEM, NR_SHMEM_THPS

__all__ = ["collapse_file_6_4"]

U_LOCKED = np.uint32(PG_locked)
U_UNLOCKED = np.uint32(~PG_locked & 0xFFFFFFFF)


class KeptPages(FileCollapse):
    """One such collapse on its way.

    held: the old pages, by their heads, locked, with one reference that stands for our pin and the
        isolation's.
    charged: holes that the file pays for already; they count in nrpages, too.
    """

    def __init__(self, mem: Memory, mm: Mm, file: File, start: int, hpage: int) -> None:
        super().__init__(mem, mm, file, start, hpage)
        self.held = UserPages(mem, self.pages[:0], pinned=False)
        self.held.locked = True
        self.charged = 0


def collapse_file_6_4(
    mem: Memory, mm: Mm, addr: int, file: File, start: int, cc: CollapseControl
) -> Steps[ScanResult]:
    """Collapse pages [start, start + 512) of `file`, which `mm` maps at `addr`.

    Returns: of a failure, the reason, all put back; of a success, what `retract_page_tables` says.
    Locks: none is held on entry; the caller holds a reference to `file`.
    """
    result, hpage = alloc_charge_hpage(mem, mm, cc)
    index = 0
    if result is ScanResult.SCAN_SUCCEED and file.f_mapping.fail_create_range:
        put_hpage(mem, hpage)
        result = ScanResult.SCAN_FAIL
    elif result is ScanResult.SCAN_SUCCEED:
        result, index = yield from _collapse(KeptPages(mem, mm, file, start, hpage), addr, cc)
    trace_collapse_file(mem, mm, hpage, index, addr, file, HPAGE_PMD_NR, result)
    return result


def _collapse(c: KeptPages, addr: int, cc: CollapseControl) -> Steps[tuple[ScanResult, int]]:
    """All of it behind the allocation. Returns: the result, and the index it came to."""
    mem = c.mem
    lock_new_page(c)
    i_mmap_rwsem = c.mapping.i_mmap_rwsem
    mode = READ if mem.version.retract_without_mmap_lock else WRITE
    try:
        # It will be wanted once there is no way back.
        yield Foresee(f"{i_mmap_rwsem} is free", lambda: i_mmap_rwsem.available(mode))
        result = yield from take_pages(c, _take)
        index = c.start + c.place
        if result is ScanResult.SCAN_SUCCEED and c.shmem is None:
            result = yield from nr_thps_inc(c)
        c.mm.tlb_gen += 1
        if result is ScanResult.SCAN_SUCCEED and not _charge_holes(c):
            result = ScanResult.SCAN_FAIL
        if result is ScanResult.SCAN_SUCCEED:
            yield Preempt("copy")
            result, index = _copy(c)
        yield Preempt("copied")
        watched = result is ScanResult.SCAN_SUCCEED and c.nr_none > 0
        if watched:
            yield Acquire(i_mmap_rwsem, READ)
            result = _look_at_holes(c)
    except GeneratorExit:
        # A plain call that would have to wait is given up: all goes back.
        _roll_back(c)
        raise
    if result is ScanResult.SCAN_SUCCEED:
        # i_pages has been held since the look at the holes: nobody can fill one any more.
        _store(c)
    if watched:
        yield Release(i_mmap_rwsem)
    if result is not ScanResult.SCAN_SUCCEED:
        _roll_back(c)
        return result, index
    try:
        result = yield from retract_page_tables(mem, c.mapping, c.start, c.mm, addr, c.hpage, cc)
    finally:
        unlock_page(mem, c.hpage)
        mem.pages.flags[c.held.pfns] &= U_UNLOCKED
        c.held.release()
    return result, index


def _take(c: FileCollapse, slots: Pfns, first: int, stop: int) -> None:
    """Lock, isolate and unmap the pages of places [first, stop); holes are but counted."""
    assert isinstance(c, KeptPages)
    mem, part = c.mem, slots[first:stop]
    c.nr_none += int(np.count_nonzero(part == 0))
    frames = file_pages(mem, part, np.arange(first, stop))
    pfns = part[(part > 0) & (frames == part)]
    if not len(pfns):
        return
    mem.pages.flags[pfns] |= U_LOCKED
    mem.pages.refcount[pfns] += 1
    c.held.pfns = np.concatenate([c.held.pfns, pfns])
    del_pages_from_lru(mem, pfns)
    filemap_release_pages(mem, pfns)
    try_to_unmap(mem, c.mapping, c.start + first, frames)
    c.pages[first:stop] = frames


def _charge_holes(c: KeptPages) -> bool:
    """Let the file pay for all the holes at once; False if it cannot."""
    if c.nr_none:
        assert c.shmem is not None
        if not shmem_charge(c.mem, c.shmem, c.nr_none):
            return False
        c.charged = c.nr_none
        c.mem.charged_ahead[c.mapping.key] += c.charged
    return True


def _copy(c: KeptPages) -> tuple[ScanResult, int]:
    """Copy the pages and clear the holes in order, up to the first poisoned line.

    Returns: the result, and the index of the page that stopped it, or the end.
    Raises: KernelPanic on a machine without recovery.
    """
    mem, frames = c.mem, np.where(c.pages > 0, c.pages, -1)
    mce = copy_mc_pages(mem, c.hpage, frames, consumer="collapse_file", recovery=mem.recovery)
    if mce is None:
        return ScanResult.SCAN_SUCCEED, c.start + HPAGE_PMD_NR
    if mem.version.copy_queues_memory_failure:
        memory_failure_queue(mem, mce.pfn)
    return ScanResult.SCAN_COPY_MC, c.start + int((c.pages == mce.pfn).argmax())


def _look_at_holes(c: KeptPages) -> ScanResult:
    """Whether the holes are still there, and nobody waits to hear of them.

    Who watches for missing pages has seen the holes: to fill them would suppress the event.
    Locks: i_mmap_rwsem for read, i_pages.
    """
    holes = np.flatnonzero(c.slots == 0)
    if fail_stores(c, holes).any():
        return ScanResult.SCAN_STORE_FAILED
    if len(holes) != c.nr_none:
        return ScanResult.SCAN_PAGE_FILLED
    end = c.start + HPAGE_PMD_NR
    for vma in c.mapping.i_mmap:
        # The kernel's range includes its end.
        overlaps = vma.vm_pgoff <= end and vma.linear_page_index(vma.vm_end) > c.start
        if overlaps and vma.vm_flags & VM_UFFD_MISSING:
            return ScanResult.SCAN_EXCEED_NONE_PTE
    return ScanResult.SCAN_SUCCEED


def _store(c: KeptPages) -> None:
    """The huge page is up to date and takes the place of all 512 entries. Locks: i_pages."""
    mem, hpage, old = c.mem, c.hpage, c.held.pfns
    for item in (NR_FILE_PAGES,) if c.shmem is None else (NR_FILE_PAGES, NR_SHMEM):
        mem.mod_page(item, hpage, HPAGE_PMD_NR)
        mem.mod_pages(item, c.pages[c.pages > 0], -1)
    mem.mod_page(NR_FILE_THPS if c.shmem is None else NR_SHMEM_THPS, hpage, HPAGE_PMD_NR)
    del mem.in_flight[hpage]
    dirty = PG_dirty if c.shmem is not None else 0
    flags = mem.pages.flags[hpage] & np.uint32(~PG_in_flight & 0xFFFFFFFF)
    mem.pages.flags[hpage] = flags | np.uint32(PG_uptodate | dirty)
    mem.pages.refcount[hpage] += HPAGE_PMD_NR - 1
    lru_add_huge_page(mem, hpage)
    c.mapping.i_pages.store_range(c.start, HPAGE_PMD_NR, hpage, HPAGE_PMD_ORDER)
    mem.charged_ahead[c.mapping.key] -= c.charged
    # The cache's references go with the entries; ours keep the pages until the tables are gone.
    mem.pages.mapping[old] = 0
    mem.pages.refcount[old] -= order_sizes(mem.pages.order[old])


def _roll_back(c: KeptPages) -> None:
    """Unlock the pages, on their way to their lists; they stay unmapped. The cache is as it was."""
    mem, pfns = c.mem, c.held.pfns
    if c.charged:
        assert c.shmem is not None
        mod_nrpages(mem, c.mapping, -c.charged)
        shmem_uncharge(mem, c.shmem, c.charged)
        mem.charged_ahead[c.mapping.key] -= c.charged
    mem.pages.flags[pfns] &= U_UNLOCKED
    c.held.hand_over()
    if len(pfns):
        lru_cache_add(mem, pfns)
    c.mapping.i_pages.shrink(c.start)
    if c.nr_thps:
        nr_thps_dec(c)
    mem.pages.mapping[c.hpage] = 0
    unlock_page(mem, c.hpage)
    put_hpage(mem, c.hpage)
