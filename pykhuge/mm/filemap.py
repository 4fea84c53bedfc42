"""The page cache of a file: what goes in, is found, is truncated (mm/filemap.c, mm/truncate.c).

A cached page has one reference from the cache (a compound page one for each of its pages), names
its AddressSpace in page->mapping, and counts in NR_FILE_PAGES, shmem pages in NR_SHMEM too. A page
that is locked is somebody's: whoever wants it waits and looks anew, because it may be another one
by then. While a collapse is under way, its new huge page stands locked, and not up to date, in all
512 slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE
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
    compound_head,
    order_sizes,
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
from pykhuge.mm.xarray import SHADOW, piece_orders, value_slots
from pykhuge.mm.zap import unmap_mapping_range

__all__ = [
    "add_compound_to_page_cache",
    "add_to_page_cache",
    "drop_cache",
    "file_end",
    "file_page",
    "file_pages",
    "filemap_releasable",
    "filemap_release_pages",
    "filemap_remove_compound",
    "filemap_remove_pages",
    "find_page",
    "foresee_page_locks",
    "foresee_truncation",
    "mod_nr_thps",
    "mod_nrpages",
    "mod_swapped",
    "split_file_page",
    "split_partial_page",
    "truncate_pages",
    "unlock_page",
    "unmap_compound",
    "wait_on_page",
    "wait_on_page_writeback",
    "when_unlocked",
    "zero_partial_page",
]

P = ParamSpec("P")
T = TypeVar("T")

U_LOCKED = np.uint32(PG_locked)
# What a page must not be to leave the cache without writeback.
_BUSY = np.uint32(PG_locked | PG_writeback | PG_dirty)


def file_page(mem: Memory, entry: int, index: int) -> int:
    """folio_file_page(): the frame of page `index` behind a cache entry that is a page."""
    return entry + index % mem.pages.compound_nr(entry)


def file_pages(mem: Memory, entries: Pfns, indexes: Pfns) -> Pfns:
    """`file_page` of many entries (int64[n], no values), those that are holes stay 0."""
    orders = mem.pages.order[entries]
    if not np.count_nonzero(orders):
        return entries
    return entries + (indexes & order_sizes(orders) - 1)


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


def add_compound_to_page_cache(mem: Memory, mapping: AddressSpace, index: int, head: int) -> None:
    """A new compound page of shmem enters the cache, over holes or values."""
    pages, nr = mem.pages, mem.pages.compound_nr(head)
    pages.mapping[head] = mapping.key
    pages.index[head] = index
    pages.refcount[head] += nr
    pages.flags[head] |= np.uint32(PG_swapbacked)
    mem.mod_page(NR_SHMEM, head, nr)
    mem.mod_page(NR_FILE_PAGES, head, nr)
    _count_huge(mem, mapping, head, +1)
    mapping.i_pages.store_range(index, nr, head, int(pages.order[head]))
    mod_nrpages(mem, mapping, nr)


def _count_huge(mem: Memory, mapping: AddressSpace, head: int, sign: int) -> None:
    """A compound page comes into the cache, or goes; those smaller than a PMD count nowhere."""
    if mem.pages.order[head] != HPAGE_PMD_ORDER:
        return
    shmem = isinstance(mapping.host, ShmemInode)
    mem.mod_page(NR_SHMEM_THPS if shmem else NR_FILE_THPS, head, sign * HPAGE_PMD_NR)
    if not shmem:
        mod_nr_thps(mem, mapping, sign)


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


def filemap_remove_compound(mem: Memory, mapping: AddressSpace, head: int) -> None:
    """`filemap_remove_pages` of a compound page."""
    pages, nr = mem.pages, mem.pages.compound_nr(head)
    mem.mod_page(NR_FILE_PAGES, head, -nr)
    if isinstance(mapping.host, ShmemInode):
        mem.mod_page(NR_SHMEM, head, -nr)
    _count_huge(mem, mapping, head, -1)
    pages.mapping[head] = 0
    mapping.i_pages.store_range(int(pages.index[head]), nr, 0, 0)
    mod_nrpages(mem, mapping, -nr)
    pages.refcount[head] -= nr - 1
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


def split_file_page(
    mem: Memory,
    mapping: AddressSpace,
    head: int,
    *,
    around: int | None = None,
    pinned: int | None = None,
    to_swap: bool = False,
) -> bool:
    """split_huge_page(), folio_split() of a cached compound page; nobody maps what comes of it.

    Pieces behind the end of the file leave the cache. False if somebody else refers to the page.

    Args:
        around: subpage that alone becomes a small page; the rest stays as large as it can
            (Linux 6.15). All become small if not given.
        pinned: subpage to which the caller has a reference, which it keeps with its piece.
        to_swap: it is swapped out as one: its pages are told apart, but it is not split by name.
    """
    pages, index, nr = mem.pages, int(mem.pages.index[head]), mem.pages.compound_nr(head)
    told = nr == HPAGE_PMD_NR and not to_swap
    expected = nr + pages.total_mapcount(head) + (pinned is not None)
    if pages.flags[head] & PG_locked or pages.refcount[head] != expected:
        mem.vmstat.count(THP_SPLIT_PAGE_FAILED, told)
        return False
    unmap_compound(mem, mapping, head)
    mem.vmstat.count(THP_SPLIT_PAGE, told)
    _count_huge(mem, mapping, head, -1)
    orders = np.zeros(nr, np.uint8)
    if around is not None:
        orders = piece_orders(int(pages.order[head]), around - head)
    subpages = np.arange(head, head + nr)
    _make_pieces(mem, subpages, orders)
    if pinned is not None:
        pages.refcount[pages.head_of(pinned)] += 1
    entries = compound_head(pages, subpages)
    mapping.i_pages.store_range(index, nr, entries, orders)
    _remove_behind_end(mem, mapping, np.unique(entries))
    return True


def unmap_compound(mem: Memory, mapping: AddressSpace, head: int) -> None:
    """unmap_folio(): nobody maps the cached compound page any more."""
    index = int(mem.pages.index[head])
    for vma in mapping.i_mmap:
        addr = vma.address_of(index)
        pmd = pmd_of(mem, vma.mm, addr) if vma.vm_start <= addr < vma.vm_end else None
        if pmd and pmd_trans_huge(pmd) and pte_pfn(pmd) == head:
            split_huge_pmd(mem, vma, addr)
    try_to_unmap(mem, mapping, index, np.arange(head, head + mem.pages.compound_nr(head)))


def _make_pieces(mem: Memory, subpages: Pfns, orders: npt.NDArray[np.uint8]) -> None:
    """__split_folio_to_order(): `subpages` (int64[n]) of one compound page get `orders` (uint8[n]).

    The pieces are what the page was, and have the references of the cache alone.
    """
    pages, head = mem.pages, int(subpages[0])
    index = int(pages.index[head])
    pages.order[subpages] = orders
    sizes = order_sizes(orders)
    first = subpages % sizes == 0
    gone = PG_head | PG_tail | PG_mlocked | PG_unevictable | PG_has_hwpoisoned | PG_hwpoison
    kept = np.where(sizes > 1, PG_head, 0) | int(pages.flags[head]) & ~gone
    own = pages.flags[subpages] & np.uint32(PG_hwpoison)
    if pages.flags[head] & PG_has_hwpoisoned:
        starts = np.flatnonzero(first)
        bad = np.logical_or.reduceat(own != 0, starts) & (sizes[starts] > 1)
        kept[starts[bad]] |= PG_has_hwpoisoned
    pages.flags[subpages] = own | np.where(first, kept, PG_tail).astype(np.uint32)
    pages.refcount[subpages] = np.where(first, sizes, 0)
    pages.index[subpages] = index + subpages - head
    for name in ("mapping", "memcg", "lru_seq"):
        values = getattr(pages, name)
        values[subpages] = np.where(first, values[head], 0)


def file_end(mapping: AddressSpace) -> int:
    """The first page index behind the file, and what was preallocated of it (shmem_fallocend)."""
    end = -(-mapping.host.i_size // PAGE_SIZE)
    return max(end, mapping.host.fallocend) if isinstance(mapping.host, ShmemInode) else end


def _remove_behind_end(mem: Memory, mapping: AddressSpace, heads: Pfns) -> None:
    """The pieces that lie behind the end of the file leave the cache."""
    behind = heads[mem.pages.index[heads] >= file_end(mapping)]
    small = behind[mem.pages.order[behind] == 0]
    filemap_remove_pages(mem, mapping, mem.pages.index[small], small)
    for head in behind[mem.pages.order[behind] > 0].tolist():
        filemap_remove_compound(mem, mapping, head)


def foresee_page_locks(mem: Memory, mapping: AddressSpace, first: int, last: int) -> Steps[None]:
    """To be asked before a call changes anything: it will wait for pages [first, last)."""

    def unlocked() -> bool:
        return not any(
            (mem.pages.flags[entries[entries > 0]] & U_LOCKED).any()
            for _, entries in mapping.i_pages.entries(first, last)
        )

    yield Foresee(f"pages of {mapping.host.name} are unlocked", unlocked)


def foresee_truncation(mem: Memory, mapping: AddressSpace, first: int, last: int) -> Steps[None]:
    """To be asked before a call changes anything: it will end in `truncate_pages`."""
    i_mmap = mapping.i_mmap_rwsem
    yield Foresee(f"{i_mmap} is free", lambda: i_mmap.available(READ))
    yield from foresee_page_locks(mem, mapping, first, last)


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
        large = _compound_pages(mapping, indexes, entries)
        for head in np.unique(entries[large]).tolist():
            busy = _remove_compound(mem, mapping, first, last, head) or busy
        busy = _remove_small(mem, mapping, indexes[~large], entries[~large]) or busy
    return busy


def _compound_pages(mapping: AddressSpace, indexes: Pfns, entries: Pfns) -> npt.NDArray[np.bool_]:
    """Which entries of one node (int64[n], none of them a hole) are compound pages."""
    orders = mapping.i_pages.node_orders(int(indexes[0]))[indexes % HPAGE_PMD_NR]
    compound: npt.NDArray[np.bool_] = (orders > 0) & (entries > 0)
    return compound


def _remove_compound(
    mem: Memory, mapping: AddressSpace, first: int, last: int, head: int
) -> int | None:
    """Remove a compound page, or what of it lies in [first, last); returns it if it is locked.

    One that cannot be split is zeroed where its pages would have gone.
    Kernel: truncate_inode_partial_folio.
    """
    if mem.pages.flags[head] & PG_locked:
        return head
    index, nr = int(mem.pages.index[head]), mem.pages.compound_nr(head)
    first, last = max(first, index), min(last, index + nr)
    if last - first == nr:
        # Somebody may have mapped it again meanwhile (truncate_cleanup_folio).
        unmap_mapping_range(mem, mapping, first, last, even_cows=False)
        filemap_remove_compound(mem, mapping, head)
        return None
    if isinstance(mapping.host, ShmemInode):
        set_page_dirty(mem, np.array([head]))
    cuts = [cut - index for cut in (first, last) if cut < index + nr]
    if split_partial_page(mem, mapping, head, *cuts):
        return _remove_range(mem, mapping, first, last)
    mem.ram.pages[head + first - index : head + last - index] = 0
    return None


def split_partial_page(mem: Memory, mapping: AddressSpace, head: int, *cuts: int) -> bool:
    """Split a compound page at its pages `cuts`: the first to go, and the first to stay behind it.

    All of it becomes small pages; later kernels split shmem around each cut instead.
    """
    if not (mem.version.split_leaves_pieces and isinstance(mapping.host, ShmemInode)):
        return split_file_page(mem, mapping, head)
    first, *others = cuts
    if not split_file_page(mem, mapping, head, around=head + first):
        return False
    for cut in others:
        if mem.pages.is_compound(head + cut):
            split_file_page(mem, mapping, mem.pages.head_of(head + cut), around=head + cut)
    return True


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
    """invalidate_mapping_pages(): clean pages that nobody uses leave the cache."""
    for indexes, entries in mapping.i_pages.entries(0, 1 << 52):
        large = _compound_pages(mapping, indexes, entries)
        for head in np.unique(entries[large]).tolist():
            idle = mem.pages.refcount[head] == mem.pages.compound_nr(head)
            if idle and not mem.pages.flags[head] & _BUSY:
                filemap_remove_compound(mem, mapping, head)
        _drop_small(mem, mapping, indexes[~large], entries[~large])


def _drop_small(mem: Memory, mapping: AddressSpace, indexes: Pfns, entries: Pfns) -> None:
    mapping.i_pages.store(indexes[entries == SHADOW], 0)
    indexes, pfns = indexes[entries > 0], entries[entries > 0]  # what is on swap stays there
    idle = (mem.pages.flags[pfns] & _BUSY == 0) & filemap_releasable(mem, pfns)
    filemap_release_pages(mem, pfns[idle])
    idle &= mem.pages.refcount[pfns] == 1
    filemap_remove_pages(mem, mapping, indexes[idle], pfns[idle])
