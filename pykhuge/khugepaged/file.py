"""Collapsing file-backed memory: 512 entries of a page cache become one (collapse_file).

The small pages are unmapped, frozen and taken out of the cache one by one, with the new huge page,
locked and not up to date, in their place: whoever looks a page up meanwhile waits for it. They are
kept aside until the copy is known to be good. No counter of pages or huge pages moves before that;
what does move (nrpages, the charges of shmem, nr_thps) is put back with the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PLACES
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.panic import KernelPanic
from pykhuge.kernel.sched import Foresee, Preempt, Steps
from pykhuge.khugepaged.alloc import alloc_charge_hpage, put_hpage
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.ptes import FirstFailure
from pykhuge.khugepaged.retract import retract_page_tables
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.khugepaged.trace_events import mm_khugepaged_collapse_file
from pykhuge.mm.copy_mc import copy_mc_pages
from pykhuge.mm.filemap import (
    filemap_release_pages,
    find_page,
    mod_nr_thps,
    mod_nrpages,
    unlock_page,
    when_unlocked,
)
from pykhuge.mm.huge_memory import OutOfMemory
from pykhuge.mm.memory_failure import memory_failure_queue
from pykhuge.mm.mm_types import File, Mm, ShmemInode
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_dirty,
    PG_frozen,
    PG_head,
    PG_in_flight,
    PG_locked,
    PG_lru,
    PG_private,
    PG_swapbacked,
    PG_uptodate,
    PG_writeback,
    order_sizes,
)
from pykhuge.mm.regular_file import filemap_flush, page_cache_sync_readahead
from pykhuge.mm.rmap import try_to_unmap
from pykhuge.mm.shmem import (
    Sgp,
    shmem_charge,
    shmem_get_folio,
    shmem_room,
    shmem_uncharge,
)
from pykhuge.mm.swap import (
    del_pages_from_lru,
    lru_add_drain,
    lru_add_huge_page,
    lru_cache_add,
    put_pages,
)
from pykhuge.mm.vmstat import NR_FILE_PAGES, NR_FILE_THPS, NR_SHMEM, NR_SHMEM_THPS

__all__ = [
    "FileCollapse",
    "collapse_file",
    "expected_refs",
    "fail_stores",
    "is_huge_there",
    "lock_new_page",
    "nr_thps_dec",
    "nr_thps_inc",
    "take_pages",
    "takes_large_folios",
    "trace_collapse_file",
]

Bools = npt.NDArray[np.bool_]


class FileCollapse:
    """One collapse_file on its way.

    pages: int64[512], the frame taken from each place of the cache; 0 where none was.
    nr_thps: whether the mapping counts the huge page already.
    nr_none: holes that the huge page has been stored in, each charged.
    place: how far the replacing has come; 512 is all.
    """

    def __init__(self, mem: Memory, mm: Mm, file: File, start: int, hpage: int) -> None:
        self.mem = mem
        self.mm = mm
        self.file = file
        self.mapping = file.f_mapping
        self.start = start
        self.hpage = hpage
        self.shmem = file.inode if isinstance(file.inode, ShmemInode) else None
        self.pages: Pfns = np.zeros(HPAGE_PMD_NR, np.int64)
        self.nr_none = 0
        self.nr_thps = False
        self.place = 0

    @property
    def slots(self) -> Pfns:
        """The 512 entries of the cache, made if they are not there."""
        return self.mapping.i_pages.create_range(self.start)


def collapse_file(
    mem: Memory, mm: Mm, addr: int, file: File, start: int, cc: CollapseControl
) -> Steps[ScanResult]:
    """Collapse pages [start, start + 512) of `file`, which `mm` maps at `addr`.

    Returns: of a failure, the reason, all put back; of a success, what became of the page table at
    `addr`: the cache may hold the huge page, and the result be SCAN_FAIL or SCAN_PMD_NONE.
    Locks: none is held on entry; the caller holds a reference to `file`.
    """
    result, hpage = alloc_charge_hpage(mem, mm, cc)
    nr, index = 0, 0
    if result is ScanResult.SCAN_SUCCEED and file.f_mapping.fail_create_range:
        put_hpage(mem, hpage)
        result = ScanResult.SCAN_FAIL
    elif result is ScanResult.SCAN_SUCCEED:
        nr = HPAGE_PMD_NR
        collapse = FileCollapse(mem, mm, file, start, hpage)
        result, index = yield from _collapse(collapse, addr, cc)
        if collapse.hpage < 0:
            hpage = -1
    trace_collapse_file(mem, mm, hpage, index, addr, file, nr, result)
    return result


def trace_collapse_file(
    mem: Memory, mm: Mm, hpage: int, index: int, addr: int, file: File, nr: int, result: ScanResult
) -> None:
    """Record mm_khugepaged_collapse_file."""
    is_shmem, name = isinstance(file.inode, ShmemInode), file.inode.name
    in_hex = mem.version.collapse_file_addr_in_hex
    mem.emit(
        mm_khugepaged_collapse_file(
            mm.hashed_ptr, hpage, index, addr, is_shmem, name, nr, result, in_hex
        )
    )


def _collapse(c: FileCollapse, addr: int, cc: CollapseControl) -> Steps[tuple[ScanResult, int]]:
    """All of it behind the allocation. Returns: the result, and the index it came to."""
    mem = c.mem
    lock_new_page(c)
    i_mmap_rwsem = c.mapping.i_mmap_rwsem
    try:
        # It will be wanted once there is no way back.
        yield Foresee(f"{i_mmap_rwsem} is free", lambda: i_mmap_rwsem.available(WRITE))
        result = yield from take_pages(c, _take)
        index = c.start + c.place
        if result is ScanResult.SCAN_SUCCEED and c.shmem is None:
            result = yield from nr_thps_inc(c)
        c.mm.tlb_gen += 1
        if result is ScanResult.SCAN_SUCCEED:
            yield Preempt("copy")
            result, index = _copy(c)
        yield Preempt("copied")
    except GeneratorExit:
        # A plain call that would have to wait is given up: all goes back.
        _roll_back(c)
        raise
    if result is not ScanResult.SCAN_SUCCEED:
        _roll_back(c)
        return result, index
    _free_old_pages(c, c.pages[c.pages > 0])
    if mem.recovery:
        _account(c)
    _complete(c)
    try:
        result = yield from retract_page_tables(mem, c.mapping, c.start, c.mm, addr, c.hpage, cc)
    finally:
        unlock_page(mem, c.hpage)
    c.hpage = -1
    return result, index


def lock_new_page(c: FileCollapse) -> None:
    """The huge page is the mapping's, but nobody can use it: locked, and not up to date."""
    mem = c.mem
    backed = PG_swapbacked if c.shmem is not None else 0
    mem.pages.flags[c.hpage] |= np.uint32(PG_locked | backed)
    mem.pages.index[c.hpage] = c.start
    mem.pages.mapping[c.hpage] = c.mapping.key
    mem.page_locks[c.hpage] = mem.sched.current


def take_pages(
    c: FileCollapse, take: Callable[[FileCollapse, Pfns, int, int], None]
) -> Steps[ScanResult]:
    """Pass all 512 entries to `take`, or stop at the first that does not let it.

    take(c, entries, first, stop) isolates and unmaps the pages of places [first, stop).
    What is looked at together is what the kernel's loop would pass one by one without sleeping.
    """
    brought_in = -1
    while c.place < HPAGE_PMD_NR:
        slots = c.slots.copy()
        asleep = _first_asleep(c, slots)
        failure = _first_failure(c, slots)
        stop = min(asleep, failure.place)
        take(c, slots, c.place, stop)
        c.place = stop
        if asleep < HPAGE_PMD_NR and asleep <= failure.place:
            yield Preempt("swapin" if c.shmem is not None else "readahead")
            if not (yield from _bring_in(c, c.start + stop)):
                return ScanResult.SCAN_FAIL
            brought_in = stop
        elif failure.result is not ScanResult.SCAN_SUCCEED:
            _fail_at(c, int(slots[stop]), failure.result, flush=stop != brought_in)
            return failure.result
    return ScanResult.SCAN_SUCCEED


def _first_asleep(c: FileCollapse, slots: Pfns) -> int:
    """The first place whose page must be brought in first, for which the kernel sleeps."""
    flags = c.mem.pages.flags[slots * (slots > 0)]
    if c.shmem is not None:
        absent = (slots < 0) | ((slots > 0) & (flags & np.uint32(PG_uptodate) == 0))
    else:
        absent = slots <= 0
    absent[: c.place] = False
    return int(absent.argmax()) if absent.any() else HPAGE_PMD_NR


def _first_failure(c: FileCollapse, slots: Pfns) -> FirstFailure:
    """The chain of tests of the loop, in its order, for the places not yet passed."""
    pages, failure = c.mem.pages, FirstFailure()
    ahead = PLACES[c.place :]
    slots = slots[c.place :]
    holes = ahead[slots == 0]
    if c.shmem is not None:
        if c.place == 0 and slots[0] == 0 and not slots.any():
            failure.at(0, ScanResult.SCAN_TRUNCATED)
        if not c.mem.version.collapse_file_keeps_pages:
            failure.beyond(holes, shmem_room(c.mem, c.shmem), ScanResult.SCAN_FAIL)
            failure.where(holes, fail_stores(c, holes), ScanResult.SCAN_STORE_FAILED)
    places = ahead[slots > 0]
    pfns = slots[slots > 0]
    flags = pages.flags[pfns]

    def test(mask: Bools, result: ScanResult) -> None:
        failure.where(places, mask, result)

    if c.shmem is None:
        test(flags & np.uint32(PG_dirty | PG_writeback) != 0, ScanResult.SCAN_FAIL)
    test(flags & np.uint32(PG_locked) != 0, ScanResult.SCAN_PAGE_LOCK)
    if c.shmem is None:
        test(flags & np.uint32(PG_uptodate) == 0, ScanResult.SCAN_FAIL)
    compound = flags & np.uint32(PG_head) != 0
    if compound.any():
        cached = is_huge_there(c.mem, pfns, c.start)
        test(compound & cached, ScanResult.SCAN_PTE_MAPPED_HUGEPAGE)
        if not takes_large_folios(c.mem):
            test(compound & ~cached, ScanResult.SCAN_PAGE_COMPOUND)
    test(flags & np.uint32(PG_lru) == 0, ScanResult.SCAN_DEL_PAGE_LRU)
    private = flags & np.uint32(PG_private) != 0
    if private.any():
        test(private & (pages.private[pfns] != 0), ScanResult.SCAN_PAGE_HAS_PRIVATE)
    # But for our own pin and the isolation, the cache must be all that refers to it.
    expected = expected_refs(c.mem, pfns, flags)
    test(pages.refcount[pfns] != expected, ScanResult.SCAN_PAGE_COUNT)
    return failure


def expected_refs(mem: Memory, heads: Pfns, flags: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
    """folio_expected_ref_count() of cached pages (int64[n]) with `flags`. Returns: int[n]."""
    of_others: npt.NDArray[Any] = (flags & np.uint32(PG_private) != 0) + np.int32(1)
    if np.count_nonzero(flags & np.uint32(PG_head)):
        of_others = of_others - 1 + order_sizes(mem.pages.order[heads])
        return of_others + mem.pages.total_mapcounts(heads)
    return of_others + mem.pages.mapcount[heads]


def takes_large_folios(mem: Memory) -> bool:
    """Whether compound pages that are smaller than a huge page are collapsed, too.

    To replace and freeze pages one by one, as the series does, is not for them.
    """
    return mem.version.large_folios and mem.version.collapse_file_keeps_pages


def is_huge_there(mem: Memory, heads: Pfns, start: int) -> Bools:
    """Which of `heads` (int64[n]) are huge pages that begin at page `start`. Returns: bool[n]."""
    huge: Bools = mem.pages.order[heads] == HPAGE_PMD_ORDER
    huge &= mem.pages.index[heads] == start
    return huge


def fail_stores(c: FileCollapse, places: Pfns) -> Bools:
    """At which of `places` no entry can be stored, for want of a node. Returns: bool[n]."""
    return np.isin(c.start + places, sorted(c.mapping.fail_stores))


def _take(c: FileCollapse, slots: Pfns, first: int, stop: int) -> None:
    """Replace places [first, stop): pages are isolated, unmapped and frozen, holes charged."""
    if first == stop:
        return
    mem, part = c.mem, slots[first:stop]
    nr_holes = int(np.count_nonzero(part == 0))
    if nr_holes:
        assert c.shmem is not None
        shmem_charge(mem, c.shmem, nr_holes)
        c.nr_none += nr_holes
    pfns = part[part > 0]
    if len(pfns):
        del_pages_from_lru(mem, pfns)
        filemap_release_pages(mem, pfns)
        try_to_unmap(mem, c.mapping, c.start + first, part)
        mem.pages.refcount[pfns] = 0
        mem.pages.flags[pfns] |= np.uint32(PG_locked | PG_frozen)
        c.pages[first:stop] = part
    c.slots[first:stop] = c.hpage


def _fail_at(c: FileCollapse, entry: int, result: ScanResult, *, flush: bool) -> None:
    """What a failing page has gone through by then, and what is undone of it at once.

    flush: a dirty page is written, but not one that has just been read in.
    """
    mem = c.mem
    if flush and result is ScanResult.SCAN_FAIL and entry > 0 and mem.pages.flags[entry] & PG_dirty:
        filemap_flush(mem, c.mapping)
    if result not in (ScanResult.SCAN_PAGE_HAS_PRIVATE, ScanResult.SCAN_PAGE_COUNT):
        return
    one = np.array([entry])
    mem.pages.refcount[one] += 1
    del_pages_from_lru(mem, one)
    if result is ScanResult.SCAN_PAGE_COUNT:
        filemap_release_pages(mem, one)
        frames = np.arange(entry, entry + mem.pages.compound_nr(entry))
        try_to_unmap(mem, c.mapping, c.start + c.place, frames)
    lru_cache_add(mem, one)


def _bring_in(c: FileCollapse, index: int) -> Steps[bool]:
    """Swap in, clear or read page `index`; says whether it is there now."""
    mem, memcg, nid = c.mem, c.mm.memcg, c.mm.preferred_node
    if c.shmem is None:
        nr = HPAGE_PMD_NR - index % HPAGE_PMD_NR
        page_cache_sync_readahead(mem, c.file, index, nr, memcg=memcg, nid=nid)
        lru_add_drain(mem)
        return (yield from when_unlocked(mem, find_page, mem, c.mapping, index)) is not None
    noalloc = Sgp.SGP_NOALLOC
    try:
        yield from when_unlocked(
            mem, shmem_get_folio, mem, c.shmem, index, noalloc, memcg=memcg, nid=nid
        )
    except (OSError, OutOfMemory):
        return False
    if mem.version.collapse_file_drains_shmem:
        lru_add_drain(mem)
    return True


def nr_thps_inc(c: FileCollapse) -> Steps[ScanResult]:
    """Announce the huge page, and look whether somebody may write.

    A full barrier lies between the two, as one does between i_writecount and nr_thps in
    do_dentry_open: one of the two sees the other.
    """
    mem = c.mem
    mod_nr_thps(mem, c.mapping, +1)
    c.nr_thps = True
    if not mem.recovery:
        mem.mod_page(NR_FILE_THPS, c.hpage, HPAGE_PMD_NR)
    yield Preempt("nr_thps")
    if c.file.inode.i_writecount <= 0:
        return ScanResult.SCAN_SUCCEED
    if not mem.recovery:
        mem.mod_page(NR_FILE_THPS, c.hpage, -HPAGE_PMD_NR)
    nr_thps_dec(c)
    return ScanResult.SCAN_FAIL


def nr_thps_dec(c: FileCollapse) -> None:
    """The huge page is not coming after all."""
    mod_nr_thps(c.mem, c.mapping, -1)
    c.nr_thps = False


def _copy(c: FileCollapse) -> tuple[ScanResult, int]:
    """Copy the pages and clear the holes in order, up to the first poisoned line.

    Before the series everything was accounted first, and each page freed behind its copy.
    Returns: the result, and the index of the page that stopped it, or the end.
    Raises: KernelPanic on a machine without recovery.
    """
    mem = c.mem
    if not mem.recovery:
        _account(c)
    frames = np.where(c.pages > 0, c.pages, -1)
    try:
        mce = copy_mc_pages(mem, c.hpage, frames, consumer="collapse_file", recovery=mem.recovery)
    except KernelPanic:
        copied = c.pages[: int((c.pages == mem.poison.log[-1].pfn).argmax())]
        _free_old_pages(c, copied[copied > 0])
        raise
    if mce is None:
        return ScanResult.SCAN_SUCCEED, c.start + HPAGE_PMD_NR
    if mem.version.copy_queues_memory_failure:
        memory_failure_queue(mem, mce.pfn)
    return ScanResult.SCAN_COPY_MC, c.start + int((c.pages == mce.pfn).argmax())


def _free_old_pages(c: FileCollapse, pfns: Pfns) -> None:
    pages = c.mem.pages
    pages.mapping[pfns] = 0
    pages.refcount[pfns] = 1
    pages.flags[pfns] &= np.uint32(~(PG_frozen | PG_locked) & 0xFFFFFFFF)
    put_pages(c.mem, pfns)


def _account(c: FileCollapse) -> None:
    """The counters move, and the 512 entries become one. Locks: i_pages."""
    mem = c.mem
    if c.shmem is not None:
        mem.mod_page(NR_SHMEM_THPS, c.hpage, HPAGE_PMD_NR)
    elif mem.recovery:
        mem.mod_page(NR_FILE_THPS, c.hpage, HPAGE_PMD_NR)
    if c.nr_none:
        mem.mod_page(NR_FILE_PAGES, c.hpage, c.nr_none)
        mem.mod_page(NR_SHMEM, c.hpage, c.nr_none)
    c.mapping.i_pages.store_range(c.start, HPAGE_PMD_NR, c.hpage, HPAGE_PMD_ORDER)


def _complete(c: FileCollapse) -> None:
    """The huge page is up to date, dirty if it is shmem's, the cache's own, and on its list."""
    mem = c.mem
    del mem.in_flight[c.hpage]
    dirty = PG_dirty if c.shmem is not None else 0
    flags = mem.pages.flags[c.hpage] & np.uint32(~PG_in_flight & 0xFFFFFFFF)
    mem.pages.flags[c.hpage] = flags | np.uint32(PG_uptodate | dirty)
    mem.pages.refcount[c.hpage] += HPAGE_PMD_NR - 1
    lru_add_huge_page(mem, c.hpage)


def _roll_back(c: FileCollapse) -> None:
    """Put the cache back as it was, holes and all, and the pages on their way to their lists.

    They stay unmapped: whoever touches them finds them by a fault.
    """
    mem, slots = c.mem, c.slots
    if c.nr_none:
        assert c.shmem is not None
        mod_nrpages(mem, c.mapping, -c.nr_none)
        shmem_uncharge(mem, c.shmem, c.nr_none)
    taken = slots == c.hpage
    slots[taken] = c.pages[taken]
    pfns = c.pages[c.pages > 0]
    if len(pfns):
        mem.pages.refcount[pfns] = 2
        mem.pages.flags[pfns] &= np.uint32(~(PG_frozen | PG_locked) & 0xFFFFFFFF)
        lru_cache_add(mem, pfns)
    c.mapping.i_pages.shrink(c.start)
    if c.nr_thps:
        nr_thps_dec(c)
    mem.pages.mapping[c.hpage] = 0
    unlock_page(mem, c.hpage)
    put_hpage(mem, c.hpage)
