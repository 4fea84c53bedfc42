"""Reclaiming pages, on demand (mm/vmscan.c, as MADV_PAGEOUT uses it)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.mm.filemap import (
    file_end,
    filemap_releasable,
    filemap_release_pages,
    filemap_remove_pages,
    split_file_page,
    unmap_compound,
)
from pykhuge.mm.huge_memory import split_huge_page, split_huge_pmd
from pykhuge.mm.mm_types import AddressSpace, ShmemInode, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_locked,
    PG_lru,
    PG_private,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_tail,
    PG_unevictable,
    PG_writeback,
    PG_young,
    PG_zone_device,
)
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    U_PRESENT,
    Ptes,
    each_block,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.rmap import (
    mapped_by_another,
    page_remove_rmap,
    pmd_of,
    ptes_of,
    set_pmd,
    try_to_unmap,
)
from pykhuge.mm.shmem import shmem_recalc_inode, shmem_writepage
from pykhuge.mm.swap import isolate_lru_pages, lru_add_drain, lru_item, put_pages, putback_lru_pages
from pykhuge.mm.swap_state import (
    add_to_swap,
    delete_from_swap_cache,
    folio_swapped,
    get_swap_pages,
    swap_writepage,
    unmap_to_swap,
)
from pykhuge.mm.vmstat import MM_ANONPAGES
from pykhuge.mm.xarray import SHADOW
from pykhuge.mm.zap import zap_page_range

__all__ = ["mark_page_lazyfree_range", "pageout_range"]

U_COMPOUND = PG_head | PG_tail


def pageout_range(mem: Memory, vma: Vma, start: int, end: int) -> None:
    """Reclaim the pages of [start, end) that this mm alone maps and that are on an LRU list.

    Others stay: shared, locked, pinned, or not on a list. Pages that cannot be written stay in the
    swap cache. Locks: mmap_lock. Kernel: madvise_pageout.
    """
    lru_add_drain(mem)
    for low, high in each_block(start, end):
        _reclaim_huge_file_page(mem, vma, low, high)
        ptes = _small_ptes(mem, vma, low, high, to_swap=True)
        for place in _small_places(mem, vma, ptes, to_swap=True):
            pte = int(ptes[place])
            pfn = pte_pfn(pte)
            if pte & PAGE_PRESENT and pfn != mem.zero_pfn and _may_reclaim(mem, pfn):
                ptes[place] &= np.uint64(~PAGE_ACCESSED & (1 << 64) - 1)
                if mem.pages.flags[pfn] & PG_anon:
                    _reclaim(mem, vma, ptes, place, pfn)
                else:
                    _reclaim_file_page(mem, pfn)


def _reclaim_huge_file_page(mem: Memory, vma: Vma, low: int, high: int) -> None:
    """A huge page of a file is split, which unmaps it; as a whole it is reclaimed then."""
    pmd = pmd_of(mem, vma.mm, low)
    if vma.vm_file is None or not pmd or not pmd_trans_huge(pmd):
        return
    head, mapping = pte_pfn(pmd), vma.vm_file.f_mapping
    if _others_map(mem, vma, head):
        return
    if high - low < HPAGE_PMD_SIZE:
        _split(mem, head)  # and the PMD is gone, and with it what the walk would look at
    else:
        _reclaim_file_folio(mem, mapping, head)


def _reclaim_file_folio(mem: Memory, mapping: AddressSpace, head: int) -> None:
    """shrink_folio_list() of a compound page of a page cache, which this mm alone maps.

    Since 6.14 shmem is not split for that, unless the end of the file lies in it or swap has no
    room: its pages are told apart here, but have one entry in the cache if all were written.
    """
    if mem.pages.flags[head] & (PG_locked | PG_lru) != PG_lru:
        return
    index, nr = int(mem.pages.index[head]), mem.pages.compound_nr(head)
    order, inode = int(mem.pages.order[head]), mapping.host
    whole = mem.version.shmem_swaps_huge and isinstance(inode, ShmemInode)
    if whole:
        unmap_compound(mem, mapping, head)
        whole = not index < file_end(mapping) < index + nr and _room_for(mem, nr)
    if not _split(mem, head, to_swap=whole):
        return
    for _, entries in mapping.i_pages.entries(index, index + nr):
        for pfn in entries.tolist():
            _reclaim_file_page(mem, pfn)
    values = mapping.i_pages.node(index)[index % HPAGE_PMD_NR :][:nr]
    if whole and (values < 0).all():
        mapping.i_pages.store_range(index, nr, values, order)


def _reclaim_file_page(mem: Memory, pfn: int) -> None:
    """shrink_folio_list() of one small page of a page cache, which at most one entry maps.

    Dirty shmem goes to swap; clean pages are dropped, and a disk file's leave a shadow. Dirty pages
    of a disk file stay: only kswapd writes those.
    """
    one, pages = np.array([pfn]), mem.pages
    mapping = mem.mappings[int(pages.mapping[pfn])]
    assert isinstance(mapping, AddressSpace)
    index = int(pages.index[pfn])
    isolate_lru_pages(mem, one)
    try_to_unmap(mem, mapping, index, one)
    pages.flags[pfn] &= np.uint32(~(PG_referenced | PG_young) & 0xFFFFFFFF)
    shmem = mapping.host if isinstance(mapping.host, ShmemInode) else None
    unused = pages.refcount[pfn] == 2 + bool(pages.flags[pfn] & PG_private)
    unused &= bool(filemap_releasable(mem, one)[0])
    if unused and not pages.flags[pfn] & PG_writeback:
        if not pages.flags[pfn] & PG_dirty:
            filemap_release_pages(mem, one)
            filemap_remove_pages(
                mem, mapping, np.array([index]), one, value=0 if shmem is not None else SHADOW
            )
        elif (
            shmem is not None
            and shmem_writepage(mem, shmem, index, pfn)
            and pages.refcount[pfn] == 2
        ):
            delete_from_swap_cache(mem, pfn)
    putback_lru_pages(mem, one)


def mark_page_lazyfree_range(mem: Memory, vma: Vma, start: int, end: int) -> None:
    """MADV_FREE: pages of [start, end) may be dropped instead of written, until written to again.

    They move to the inactive file list, their entries become clean and old; swapped-out ones are
    freed at once. Locks: mmap_lock. Kernel: madvise_free_pte_range.
    """
    lru_add_drain(mem)
    for low, high in each_block(start, end):
        if high - low == HPAGE_PMD_SIZE and _free_huge_pmd(mem, vma, low):
            continue
        ptes = _small_ptes(mem, vma, low, high)
        for place in _small_places(mem, vma, ptes, to_swap=False):
            pte = int(ptes[place])
            addr = low + (place << PAGE_SHIFT)
            if pte and not pte & PAGE_PRESENT:
                zap_page_range(mem, vma, addr, addr + (1 << PAGE_SHIFT))
            elif pte and pte_pfn(pte) != mem.zero_pfn and _may_lazyfree(mem, pte_pfn(pte)):
                ptes[place] = pte & ~(PAGE_ACCESSED | PAGE_DIRTY)
                _mark_lazyfree(mem, pte_pfn(pte))


def _free_huge_pmd(mem: Memory, vma: Vma, addr: int) -> bool:
    """MADV_FREE of one whole huge page, which stays whole. False if no huge PMD is there.

    Kernel: madvise_free_huge_pmd.
    """
    pmd = pmd_of(mem, vma.mm, addr)
    if not pmd or not pmd_trans_huge(pmd):
        return False
    head = pte_pfn(pmd)
    alone = head != mem.huge_zero_pfn and not _others_map(mem, vma, head)
    if alone and not mem.pages.flags[head] & PG_locked:
        set_pmd(mem, vma.mm, addr, pmd & ~(PAGE_ACCESSED | PAGE_DIRTY))
        mem.pages.flags[head] &= np.uint32(~PG_dirty & 0xFFFFFFFF)
        _mark_lazyfree(mem, head)
    return True


def _small_ptes(mem: Memory, vma: Vma, low: int, high: int, *, to_swap: bool = False) -> Ptes:
    """The entries of [low, high), after splitting a huge page there; none if it stays, or is gone.

    to_swap: a huge page that lies in the range as a whole is one for swap, or is dropped.
    """
    pmd = pmd_of(mem, vma.mm, low)
    if pmd and pmd_trans_huge(pmd):
        head = pte_pfn(pmd)
        alone = vma.vm_file is None and head != mem.huge_zero_pfn
        if not alone or _others_map(mem, vma, head):
            return mem.ram.words[0, :0]
        whole = to_swap and high - low == HPAGE_PMD_SIZE
        if whole and _in_use(mem, head) and mem.pages.flags[head] & PG_swapbacked:
            return mem.ram.words[0, :0]
        if whole and not mem.pages.flags[head] & PG_swapbacked:
            split_huge_pmd(mem, vma, low)
            _discard_lazyfree(mem, vma, ptes_of(mem, vma.mm, low, high), head)
            return mem.ram.words[0, :0]
        if not split_huge_page(mem, head, to_swap=whole and _room_for(mem, HPAGE_PMD_NR)):
            return mem.ram.words[0, :0]
        pmd = pmd_of(mem, vma.mm, low)
    if not pmd:
        return mem.ram.words[0, :0]
    first = pte_index(low)
    return mem.ram.words[pte_pfn(pmd), first : first + (high - low >> PAGE_SHIFT)]


def _small_places(mem: Memory, vma: Vma, ptes: Ptes, *, to_swap: bool) -> Iterator[int]:
    """The places of `ptes` that map no part of a compound page; those are dealt with on the way."""
    place = 0
    while place < len(ptes):
        pte = int(ptes[place])
        if not pte & PAGE_PRESENT or not mem.pages.is_compound(pte_pfn(pte)):
            yield place
            place += 1
            continue
        done = _large_folio(mem, vma, ptes, place, to_swap=to_swap)
        if done is None:
            return
        place += done


def _large_folio(mem: Memory, vma: Vma, ptes: Ptes, place: int, *, to_swap: bool) -> int | None:
    """MADV_FREE, or MADV_PAGEOUT, of a compound page mapped by `ptes` from `place` on.

    The series splits one that a single entry maps, and walks no further otherwise. Later kernels
    take it whole if all of it is in the range, and split it if not and it is this mm's alone.
    Returns: how many entries are done with, 0 if it was split; None if the walk ends here.
    """
    pages, head = mem.pages, mem.pages.head_of(pte_pfn(int(ptes[place])))
    if not mem.version.large_folios:
        return 0 if pages.total_mapcount(head) == 1 and _split(mem, head) else None
    nr, batch = pages.compound_nr(head), _pte_batch(mem, ptes[place:], head)
    if batch < nr:
        split = not mapped_by_another(mem, vma.mm, head) and _split(mem, head)
        return 0 if split else batch
    alone = pages.total_mapcount(head) == nr
    if to_swap:
        split = alone and _reclaim_folio(mem, vma, ptes[place : place + nr], head)
        return 0 if split else nr
    if not pages.flags[head] & PG_dirty or (alone and not pages.flags[head] & PG_locked):
        ptes[place : place + nr] &= np.uint64(~(PAGE_ACCESSED | PAGE_DIRTY) & (1 << 64) - 1)
        pages.flags[head] &= np.uint32(~PG_dirty & 0xFFFFFFFF)
        _mark_lazyfree(mem, head)
    return nr


def _pte_batch(mem: Memory, ptes: Ptes, head: int) -> int:
    """madvise_folio_pte_batch(): how many entries from the first on map page after page of it."""
    first = pte_pfn(int(ptes[0]))
    pfns = np.arange(first, head + mem.pages.compound_nr(head))[: len(ptes)]
    ptes = ptes[: len(pfns)]
    alike = (pte_pfns(ptes) == pfns) & (ptes & U_PRESENT != 0)
    return len(alike) if alike.all() else int(alike.argmin())


def _reclaim_folio(mem: Memory, vma: Vma, ptes: Ptes, head: int) -> bool:
    """shrink_folio_list() of a compound page that `ptes` alone map.

    Returns: whether it was split, for its pages to go to swap one by one.
    """
    mapping, flags = mem.mappings[int(mem.pages.mapping[head])], mem.pages.flags[head]
    if isinstance(mapping, AddressSpace):
        _reclaim_file_folio(mem, mapping, head)
    elif flags & (PG_lru | PG_locked) == PG_lru:
        if flags & PG_swapbacked:
            fits = _room_for(mem, len(ptes))
            return not _in_use(mem, head) and _split(mem, head, to_swap=fits)
        _discard_lazyfree(mem, vma, ptes, head)
    return False


def _in_use(mem: Memory, head: int) -> bool:
    """Not can_split_folio(): somebody refers to it besides those who map it, or has locked it."""
    locked = mem.pages.flags[head] & PG_locked
    return bool(locked) or mem.pages.refcount[head] != mem.pages.total_mapcount(head)


def _others_map(mem: Memory, vma: Vma, head: int) -> bool:
    """Whether a compound page is not this mm's alone, or, at the series, mapped more than once."""
    if mem.version.large_folios:
        return mapped_by_another(mem, vma.mm, head)
    return mem.pages.total_mapcount(head) != 1


def _split(mem: Memory, head: int, *, to_swap: bool = False) -> bool:
    """split_huge_page(); nobody maps a file's pages then, and those behind its end are gone."""
    mapping = mem.mappings[int(mem.pages.mapping[head])]
    if not isinstance(mapping, AddressSpace):
        return split_huge_page(mem, head, to_swap=to_swap)
    if not split_file_page(mem, mapping, head, to_swap=to_swap):
        return False
    if isinstance(mapping.host, ShmemInode):
        shmem_recalc_inode(mem, mapping.host)
    return True


def _room_for(mem: Memory, nr: int) -> bool:
    """CONFIG_THP_SWAP: whether a compound page of `nr` pages can be written as a whole."""
    device = mem.swap
    return len(device.free) + device.nr_slots - device.next_slot >= nr


def _may_reclaim(mem: Memory, pfn: int) -> bool:
    flags = int(mem.pages.flags[pfn])
    unsuitable = U_COMPOUND | PG_locked | PG_zone_device
    return bool(flags & PG_lru) and not flags & unsuitable and mem.pages.mapcount[pfn] == 1


def _may_lazyfree(mem: Memory, pfn: int) -> bool:
    """Whether the content of a small page may be given up; it has left the swap cache then."""
    flags = int(mem.pages.flags[pfn])
    if flags & PG_zone_device:
        return False
    if flags & (PG_swapcache | PG_dirty):
        # A clean page may be shared: whoever writes to it makes its own entry dirty.
        if flags & PG_locked or mem.pages.mapcount[pfn] != 1:
            return False
        if flags & PG_swapcache:
            if folio_swapped(mem, pfn):
                return False
            delete_from_swap_cache(mem, pfn)
        mem.pages.flags[pfn] &= np.uint32(~PG_dirty & 0xFFFFFFFF)
    return True


def _mark_lazyfree(mem: Memory, head: int) -> None:
    """folio_mark_lazyfree(): move a page of the LRU lists to the inactive file list."""
    flags = int(mem.pages.flags[head])
    wanted = PG_lru | PG_swapbacked
    if flags & (wanted | PG_swapcache | PG_unevictable) != wanted:
        return
    lazy = flags & ~(PG_swapbacked | PG_active | PG_referenced)
    mem.pages.flags[head] = lazy
    nr = mem.pages.compound_nr(head)
    mem.mod_page(lru_item(flags), head, -nr)
    mem.mod_page(lru_item(lazy), head, +nr)


def _reclaim(mem: Memory, vma: Vma, ptes: Ptes, place: int, pfn: int) -> None:
    """shrink_folio_list() of one page that `ptes[place]` alone maps."""
    one, pages = np.array([pfn]), mem.pages
    pages.flags[pfn] &= np.uint32(~(PG_referenced | PG_young) & 0xFFFFFFFF)
    if not pages.flags[pfn] & PG_swapbacked:
        _discard_lazyfree(mem, vma, ptes[place : place + 1], pfn)
        return
    if pages.maybe_dma_pinned(pfn):
        return
    cached = bool(pages.flags[pfn] & PG_swapcache)
    slots = [int(pages.private[pfn])] if cached else get_swap_pages(mem, 1)
    if not slots:
        return
    isolate_lru_pages(mem, one)
    if not cached:
        add_to_swap(mem, pfn, slots[0])
    unmap_to_swap(mem, vma, ptes, place, pfn, slots[0])
    written = not pages.flags[pfn] & PG_dirty or swap_writepage(mem, pfn)
    # The isolation and the swap cache are all that refers to it, unless somebody else does.
    if written and pages.refcount[pfn] == 2:
        delete_from_swap_cache(mem, pfn)
    putback_lru_pages(mem, one)


def _discard_lazyfree(mem: Memory, vma: Vma, ptes: Ptes, head: int) -> None:
    """Drop a lazily freed page, which `ptes` alone map, if it is clean and nobody else's.

    Else it becomes swap-backed again and stays where it is, a compound page as one.
    """
    pages, flags, nr = mem.pages, int(mem.pages.flags[head]), len(ptes)
    dirty = np.bitwise_or.reduce(ptes) & np.uint64(PAGE_DIRTY) or flags & PG_dirty
    if dirty or pages.refcount[head] != nr:
        pages.flags[head] = flags | PG_swapbacked
        mem.mod_page(lru_item(flags), head, -nr)
        mem.mod_page(lru_item(flags | PG_swapbacked), head, +nr)
        return
    ptes[:] = 0
    page_remove_rmap(mem, np.arange(head, head + nr), vma)
    mem.mod_mm(vma.mm, MM_ANONPAGES, -nr)
    pages.refcount[head] -= nr - 1
    put_pages(mem, np.array([head]))
