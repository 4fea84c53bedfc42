"""The page cache of a file: what goes in, is found, is truncated (mm/filemap.c, mm/truncate.c).

A cached page has one reference from the cache (a huge page 512), names its AddressSpace in
page->mapping, and counts in NR_FILE_PAGES, shmem pages in NR_SHMEM too. A page that is locked is
somebody's: whoever wants it waits and looks anew, because it may be another one by then. While a
collapse is under way, its new huge page stands locked, and not up to date, in all 512 slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Foresee, Release, Steps, Until
from pykhuge.mm.errors import PageLocked
from pykhuge.mm.huge_memory import split_huge_pmd
from pykhuge.mm.mm_types import AddressSpace, ShmemInode
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_dirty,
    PG_has_hwpoisoned,
    PG_head,
    PG_hwpoison,
    PG_locked,
    PG_mlocked,
    PG_private,
    PG_swapbacked,
    PG_tail,
    PG_unevictable,
    PG_writeback,
)
from pykhuge.mm.page_table import pmd_trans_huge, pte_pfn
from pykhuge.mm.page_writeback import clear_page_dirty, finish_io, set_page_dirty
from pykhuge.mm.rmap import pmd_of, try_to_unmap
from pykhuge.mm.swap import put_pages
from pykhuge.mm.swap_state import free_swap_cache, swap_free
from pykhuge.mm.vmstat import (
    NR_FILE_PAGES,
    NR_FILE_THPS,
    NR_SHMEM,
    NR_SHMEM_THPS,
    THP_SPLIT_PAGE,
    THP_SPLIT_PAGE_FAILED,
)
from pykhuge.mm.xarray import SHADOW, value_slots
from pykhuge.mm.zap import unmap_mapping_range

__all__ = [
    "add_huge_to_page_cache",
    "add_to_page_cache",
    "drop_cache",
    "file_page",
    "filemap_releasable",
    "filemap_release_pages",
    "filemap_remove_huge",
    "filemap_remove_pages",
    "find_page",
    "foresee_page_locks",
    "mod_nr_thps",
    "mod_nrpages",
    "mod_swapped",
    "split_huge_file_page",
    "truncate_pages",
    "unlock_page",
    "wait_on_page",
    "wait_on_page_writeback",
    "when_unlocked",
    "zero_partial_page",
]

P = ParamSpec("P")
T = TypeVar("T")

U_LOCKED = np.uint32(PG_locked)


def file_page(mem: Memory, entry: int, index: int) -> int:
    """folio_file_page(): the frame of page `index` behind a cache entry that is a page."""
    return entry + index % HPAGE_PMD_NR if mem.pages.flags[entry] & PG_head else entry


def find_page(mem: Memory, mapping: AddressSpace, index: int) -> int | None:
    """The frame of page `index`, unlocked; None for a hole or a value. Raises: PageLocked."""
    entry = mapping.i_pages.load(index)
    if entry <= 0:
        return None
    if mem.pages.flags[entry] & PG_locked:
        raise PageLocked(entry)
    return file_page(mem, entry, index)


def wait_on_page(mem: Memory, pfn: int) -> Steps[None]:
    """folio_lock(), and let go again: sleep until the page is unlocked."""
    flags = mem.pages.flags
    yield Until(f"page {pfn:#x} is unlocked", lambda: not flags[pfn] & PG_locked)


def when_unlocked(mem: Memory, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Steps[T]:
    """Make a call that finds pages, again after each wait for one of them that was locked."""
    while True:
        try:
            return call(*args, **kwargs)
        except PageLocked as locked:
            busy = locked.pfn
        yield from wait_on_page(mem, busy)


def unlock_page(mem: Memory, pfn: int) -> None:
    """unlock_page() of a page in `Memory.page_locks`; those who wait for it may go on."""
    mem.pages.flags[pfn] &= np.uint32(~PG_locked & 0xFFFFFFFF)
    del mem.page_locks[pfn]


def mod_nrpages(mem: Memory, mapping: AddressSpace, nr: int) -> None:
    """The cache holds `nr` pages more."""
    mapping.nrpages += nr
    mem.vmstat.post(mapping.host.name, "nrpages", nr)


def mod_nr_thps(mem: Memory, mapping: AddressSpace, nr: int) -> None:
    """filemap_nr_thps_inc(), filemap_nr_thps_dec()."""
    mapping.nr_thps += nr
    mem.vmstat.post(mapping.host.name, "nr_thps", nr)


def mod_swapped(mem: Memory, inode: ShmemInode, nr: int) -> None:
    """`nr` pages more of a shmem file are on swap."""
    inode.swapped += nr
    mem.vmstat.post(inode.name, "swapped", nr)


def add_to_page_cache(mem: Memory, mapping: AddressSpace, indexes: Pfns, pfns: Pfns) -> None:
    """New pages enter the cache at `indexes`, over holes or values; a reference more for each."""
    pages = mem.pages
    pages.mapping[pfns] = mapping.key
    pages.index[pfns] = indexes
    pages.refcount[pfns] += 1
    if isinstance(mapping.host, ShmemInode):
        pages.flags[pfns] |= np.uint32(PG_swapbacked)
        mem.mod_pages(NR_SHMEM, pfns, +1)
    mem.mod_pages(NR_FILE_PAGES, pfns, +1)
    mapping.i_pages.store(indexes, pfns)
    mod_nrpages(mem, mapping, len(pfns))


def add_huge_to_page_cache(mem: Memory, mapping: AddressSpace, index: int, head: int) -> None:
    """A new huge page of shmem enters the cache; 512 references more."""
    pages = mem.pages
    pages.mapping[head] = mapping.key
    pages.index[head] = index
    pages.refcount[head] += HPAGE_PMD_NR
    pages.flags[head] |= np.uint32(PG_swapbacked)
    for item in (NR_SHMEM, NR_FILE_PAGES, NR_SHMEM_THPS):
        mem.mod_page(item, head, HPAGE_PMD_NR)
    mapping.i_pages.store_order_9(index, head)
    mod_nrpages(mem, mapping, HPAGE_PMD_NR)


def filemap_remove_pages(
    mem: Memory, mapping: AddressSpace, indexes: Pfns, pfns: Pfns, *, value: int = 0
) -> None:
    """Small pages leave the cache, `value` in their place; the cache's references are dropped.

    Locks: they are not locked by anybody else. Kernel: filemap_remove_folio,
    shmem_delete_from_page_cache.
    """
    if not len(pfns):
        return
    if isinstance(mapping.host, ShmemInode):
        mem.mod_pages(NR_SHMEM, pfns, -1)
    mem.mod_pages(NR_FILE_PAGES, pfns, -1)
    clear_page_dirty(mem, pfns)
    mem.pages.mapping[pfns] = 0
    mapping.i_pages.store(indexes, value)
    mod_nrpages(mem, mapping, -len(pfns))
    put_pages(mem, pfns)


def filemap_remove_huge(mem: Memory, mapping: AddressSpace, index: int, head: int) -> None:
    """A huge page leaves the cache, with the cache's 512 references."""
    shmem = isinstance(mapping.host, ShmemInode)
    mem.mod_page(NR_FILE_PAGES, head, -HPAGE_PMD_NR)
    mem.mod_page(NR_SHMEM_THPS if shmem else NR_FILE_THPS, head, -HPAGE_PMD_NR)
    if shmem:
        mem.mod_page(NR_SHMEM, head, -HPAGE_PMD_NR)
    else:
        mod_nr_thps(mem, mapping, -1)
    mem.pages.mapping[head] = 0
    mapping.i_pages.store_order_9(index, 0)
    mod_nrpages(mem, mapping, -HPAGE_PMD_NR)
    mem.pages.refcount[head] -= HPAGE_PMD_NR - 1
    put_pages(mem, np.array([head]))


def filemap_releasable(mem: Memory, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which of `pfns` filemap_release_folio() would not fail for. Returns: bool[n]."""
    kept = mem.pages.flags[pfns] & np.uint32(PG_private) != 0
    releasable: npt.NDArray[np.bool_] = ~kept | (mem.pages.private[pfns] == 0)
    return releasable


def filemap_release_pages(mem: Memory, pfns: Pfns) -> None:
    """filemap_release_folio(): the file system gives up what it keeps with each page."""
    private = pfns[mem.pages.flags[pfns] & np.uint32(PG_private) != 0]
    mem.pages.flags[private] &= np.uint32(~PG_private & 0xFFFFFFFF)
    mem.pages.private[private] = 0
    mem.pages.refcount[private] -= 1


def split_huge_file_page(
    mem: Memory, mapping: AddressSpace, head: int, *, pinned: int | None = None
) -> bool:
    """split_huge_page() of a cached huge page: 512 small ones in its place, mapped by nobody.

    Pages behind the end of the file leave the cache. False if somebody else refers to it.

    Args:
        pinned: subpage to which the caller has a reference, which it keeps.
    """
    pages, index = mem.pages, int(mem.pages.index[head])
    expected = HPAGE_PMD_NR + pages.total_mapcount(head) + (pinned is not None)
    if pages.flags[head] & PG_locked or pages.refcount[head] != expected:
        mem.vmstat.count(THP_SPLIT_PAGE_FAILED)
        return False
    for vma in mapping.i_mmap:
        addr = vma.address_of(index)
        pmd = pmd_of(mem, vma.mm, addr) if vma.vm_start <= addr < vma.vm_end else None
        if pmd and pmd_trans_huge(pmd) and pte_pfn(pmd) == head:
            split_huge_pmd(mem, vma, addr)
    subpages = np.arange(head, head + HPAGE_PMD_NR)
    try_to_unmap(mem, mapping, index, subpages)
    mem.vmstat.count(THP_SPLIT_PAGE)
    shmem = isinstance(mapping.host, ShmemInode)
    mem.mod_page(NR_SHMEM_THPS if shmem else NR_FILE_THPS, head, -HPAGE_PMD_NR)
    if not shmem:
        mod_nr_thps(mem, mapping, -1)
    gone = PG_head | PG_tail | PG_mlocked | PG_unevictable | PG_has_hwpoisoned | PG_hwpoison
    own = pages.flags[subpages] & np.uint32(PG_hwpoison)
    pages.flags[subpages] = pages.flags[head] & np.uint32(~gone & 0xFFFFFFFF) | own
    pages.refcount[subpages] = 1
    if pinned is not None:
        pages.refcount[pinned] += 1
    pages.mapping[subpages] = mapping.key
    indexes = pages.index[subpages] = index + np.arange(HPAGE_PMD_NR)
    pages.memcg[subpages] = pages.memcg[head]
    pages.lru_seq[subpages] = pages.lru_seq[head]
    mapping.i_pages.split(index)[:] = subpages
    end = -(-mapping.host.i_size // PAGE_SIZE)
    if isinstance(mapping.host, ShmemInode):
        end = max(end, mapping.host.fallocend)
    filemap_remove_pages(mem, mapping, indexes[indexes >= end], subpages[indexes >= end])
    return True


def foresee_page_locks(mem: Memory, mapping: AddressSpace, first: int, last: int) -> Steps[None]:
    """To be asked before a call changes anything: it will wait for pages [first, last)."""

    def unlocked() -> bool:
        return not any(
            (mem.pages.flags[entries[entries > 0]] & U_LOCKED).any()
            for _, entries in mapping.i_pages.entries(first, last)
        )

    yield Foresee(f"pages of {mapping.host.name} are unlocked", unlocked)


def truncate_pages(
    mem: Memory, mapping: AddressSpace, first: int, last: int, *, even_cows: bool
) -> Steps[None]:
    """Pages [first, last) of a file leave every page table and the cache; values go too.

    Waits for pages that are locked or under writeback.

    Args:
        even_cows: private copies of the pages go as well (truncation, not hole punching).
    Kernel: truncate_inode_pages_range, shmem_undo_range.
    """
    yield Acquire(mapping.i_mmap_rwsem, READ)
    unmap_mapping_range(mem, mapping, first, last, even_cows=even_cows)
    yield Release(mapping.i_mmap_rwsem)
    while (busy := _remove_range(mem, mapping, first, last)) is not None:
        yield from wait_on_page(mem, busy)


def _remove_range(mem: Memory, mapping: AddressSpace, first: int, last: int) -> int | None:
    """Remove what is not locked; returns a page that is."""
    busy: int | None = None
    for indexes, entries in mapping.i_pages.entries(first, last):
        if mapping.i_pages.order(int(indexes[0])):
            busy = _remove_huge(mem, mapping, indexes, int(entries[0])) or busy
        else:
            busy = _remove_small(mem, mapping, indexes, entries) or busy
    return busy


def _remove_huge(mem: Memory, mapping: AddressSpace, indexes: Pfns, head: int) -> int | None:
    """Remove a huge page, or some of its pages after splitting it; returns it if it is locked.

    One that cannot be split is zeroed where the pages would have gone.
    Kernel: truncate_inode_partial_folio.
    """
    index = int(indexes[0])
    if mem.pages.flags[head] & PG_locked:
        return head
    if len(indexes) == HPAGE_PMD_NR:
        # Somebody may have mapped it again meanwhile (truncate_cleanup_folio).
        unmap_mapping_range(mem, mapping, index, index + HPAGE_PMD_NR, even_cows=False)
        filemap_remove_huge(mem, mapping, index, head)
        return None
    if isinstance(mapping.host, ShmemInode):
        set_page_dirty(mem, np.array([head]))
    if split_huge_file_page(mem, mapping, head):
        pfns = mapping.i_pages.node(index)[indexes % HPAGE_PMD_NR]
        _remove_small(mem, mapping, indexes[pfns != 0], pfns[pfns != 0])
    else:
        mem.ram.pages[head + indexes % HPAGE_PMD_NR] = 0
    return None


def _remove_small(mem: Memory, mapping: AddressSpace, indexes: Pfns, entries: Pfns) -> int | None:
    values = entries < 0
    if values.any():
        mapping.i_pages.store(indexes[values], 0)
        slots = value_slots(entries[values]).tolist()
        for slot in slots:
            mem.swap.shmem.discard(slot)
            swap_free(mem, slot)
            if (cached := mem.swap.cache.get(slot)) is not None:
                free_swap_cache(mem, np.array([cached]))
        if isinstance(mapping.host, ShmemInode):
            mod_swapped(mem, mapping.host, -len(slots))
    indexes, pfns = indexes[~values], entries[~values]
    locked = mem.pages.flags[pfns] & U_LOCKED != 0
    free, freed = indexes[~locked], pfns[~locked]
    for index in free[mem.pages.mapcount[freed] > 0].tolist():
        unmap_mapping_range(mem, mapping, index, index + 1, even_cows=False)
    wait_on_page_writeback(mem, freed)
    filemap_release_pages(mem, freed)
    filemap_remove_pages(mem, mapping, free, freed)
    return int(pfns[locked][0]) if locked.any() else None


def wait_on_page_writeback(mem: Memory, pfns: Pfns) -> None:
    """The disk finishes what it is writing; time passes meanwhile."""
    if np.count_nonzero(mem.pages.flags[pfns] & np.uint32(PG_writeback)):
        finish_io(mem)


def zero_partial_page(mem: Memory, mapping: AddressSpace, start: int, end: int) -> None:
    """Zero bytes [start, end) of a file, which lie in one page, if that page is cached.

    Raises: PageLocked.
    """
    pfn = find_page(mem, mapping, start >> PAGE_SHIFT)
    if pfn is not None and start < end:
        mem.ram.pages[pfn, start % PAGE_SIZE : (end - 1) % PAGE_SIZE + 1] = 0


def drop_cache(mem: Memory, mapping: AddressSpace) -> None:
    """invalidate_mapping_pages(): clean pages that nobody uses leave a disk file's cache."""
    for indexes, entries in mapping.i_pages.entries(0, 1 << 52):
        if not mapping.i_pages.order(int(indexes[0])):
            _drop_small(mem, mapping, indexes, entries)
            continue
        head = int(entries[0])
        idle = mem.pages.refcount[head] == HPAGE_PMD_NR
        if idle and not mem.pages.flags[head] & PG_locked:
            filemap_remove_huge(mem, mapping, int(indexes[0]), head)


def _drop_small(mem: Memory, mapping: AddressSpace, indexes: Pfns, entries: Pfns) -> None:
    shadows = entries == SHADOW
    mapping.i_pages.store(indexes[shadows], 0)
    indexes, pfns = indexes[~shadows], entries[~shadows]
    busy = np.uint32(PG_locked | PG_writeback | PG_dirty)
    idle = (mem.pages.flags[pfns] & busy == 0) & filemap_releasable(mem, pfns)
    filemap_release_pages(mem, pfns[idle])
    idle &= mem.pages.refcount[pfns] == 1
    filemap_remove_pages(mem, mapping, indexes[idle], pfns[idle])
