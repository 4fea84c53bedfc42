"""Reclaiming pages, on demand (mm/vmscan.c, as MADV_PAGEOUT uses it)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.mm.filemap import (
    filemap_releasable,
    filemap_release_pages,
    filemap_remove_pages,
    split_huge_file_page,
)
from pykhuge.mm.huge_memory import split_huge_page
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
from pykhuge.mm.rmap import mapped_by_another, page_remove_rmap, pmd_of, set_pmd, try_to_unmap
from pykhuge.mm.shmem import shmem_recalc_inode, shmem_writepage
from pykhuge.mm.swap import isolate_lru_pages, lru_add_drain, lru_item, put_pages, putback_lru_pages
from pykhuge.mm.swap_state import (
    add_to_swap,
    delete_from_swap_cache,
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
        for place in range(len(ptes)):
            pte = int(ptes[place])
            pfn = pte_pfn(pte)
            if not pte & PAGE_PRESENT or pfn == mem.zero_pfn:
                continue
            if mem.pages.flags[pfn] & U_COMPOUND and not _split_folio(
                mem, vma, ptes, place, to_swap=True
            ):
                break
            if _may_reclaim(mem, pfn):
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
    alone = mem.pages.total_mapcount(head) == 1
    if not alone or not _split(mem, head):
        return
    if high - low < HPAGE_PMD_SIZE:
        return  # the PMD is gone with the split, and with it what the walk would look at
    first = vma.linear_page_index(low)
    for _, entries in mapping.i_pages.entries(first, first + (high - low >> PAGE_SHIFT)):
        for pfn in entries.tolist():
            _reclaim_file_page(mem, pfn)
    inode = mapping.host
    if mem.version.shmem_swaps_huge and isinstance(inode, ShmemInode):
        slots = mapping.i_pages.node(first)
        if len(slots) == HPAGE_PMD_NR and (slots < 0).all():
            inode.swapped_huge.add(first)


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
        for place in range(len(ptes)):
            pte = int(ptes[place])
            addr = low + (place << PAGE_SHIFT)
            if pte and not pte & PAGE_PRESENT:
                zap_page_range(mem, vma, addr, addr + (1 << PAGE_SHIFT))
                continue
            compound = pte and mem.pages.flags[pte_pfn(pte)] & U_COMPOUND
            if compound and not _split_folio(mem, vma, ptes, place):
                break
            if pte and pte_pfn(pte) != mem.zero_pfn and _may_lazyfree(mem, pte_pfn(pte)):
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
    alone = head != mem.huge_zero_pfn and mem.pages.total_mapcount(head) == 1
    if alone and not mem.pages.flags[head] & PG_locked:
        set_pmd(mem, vma.mm, addr, pmd & ~(PAGE_ACCESSED | PAGE_DIRTY))
        if mem.pages.flags[head] & PG_lru and mem.pages.flags[head] & PG_swapbacked:
            _mark_lazyfree(mem, head)
    return True


def _small_ptes(mem: Memory, vma: Vma, low: int, high: int, *, to_swap: bool = False) -> Ptes:
    """The entries of [low, high), after splitting a huge page there; none if it stays.

    to_swap: a huge page that lies in the range as a whole is one for swap.
    """
    pmd = pmd_of(mem, vma.mm, low)
    if pmd and pmd_trans_huge(pmd):
        head = pte_pfn(pmd)
        alone = vma.vm_file is None and head != mem.huge_zero_pfn
        if not alone or mem.pages.total_mapcount(head) != 1:
            return mem.ram.words[0, :0]
        whole = to_swap and high - low == HPAGE_PMD_SIZE
        if not split_huge_page(mem, head, to_swap=whole and _room_for_huge(mem)):
            return mem.ram.words[0, :0]
        pmd = pmd_of(mem, vma.mm, low)
    if not pmd:
        return mem.ram.words[0, :0]
    first = pte_index(low)
    return mem.ram.words[pte_pfn(pmd), first : first + (high - low >> PAGE_SHIFT)]


def _split_folio(mem: Memory, vma: Vma, ptes: Ptes, place: int, *, to_swap: bool = False) -> bool:
    """A compound page mapped by PTEs is split if this mm alone maps it. False: the walk ends here.

    The series wants all of it mapped by one entry, and walks no further otherwise. Later kernels
    look whether another mm maps it, and go on; a whole one of theirs goes to swap as it is.
    """
    head = mem.pages.head_of(pte_pfn(int(ptes[place])))
    if not mem.version.large_folios:
        return mem.pages.total_mapcount(head) == 1 and _split(mem, head)
    if not mapped_by_another(mem, vma.mm, head):
        batch = pte_pfns(ptes) - np.arange(len(ptes)) == pte_pfn(int(ptes[place])) - place
        whole = int(np.count_nonzero(batch & (ptes & U_PRESENT != 0))) == HPAGE_PMD_NR
        if whole and not to_swap:
            ptes[:] &= np.uint64(~(PAGE_ACCESSED | PAGE_DIRTY) & (1 << 64) - 1)
            _mark_lazyfree(mem, head)
        else:
            _split(mem, head, to_swap=whole and _room_for_huge(mem))
    return True


def _split(mem: Memory, head: int, *, to_swap: bool = False) -> bool:
    """split_huge_page(); nobody maps a file's pages then, and those behind its end are gone."""
    mapping = mem.mappings[int(mem.pages.mapping[head])]
    if not isinstance(mapping, AddressSpace):
        return split_huge_page(mem, head, to_swap=to_swap)
    if not split_huge_file_page(mem, mapping, head):
        return False
    if isinstance(mapping.host, ShmemInode):
        shmem_recalc_inode(mem, mapping.host)
    return True


def _room_for_huge(mem: Memory) -> bool:
    """CONFIG_THP_SWAP: whether a huge page can be written as a whole."""
    device = mem.swap
    return len(device.free) + device.nr_slots - device.next_slot >= HPAGE_PMD_NR


def _may_reclaim(mem: Memory, pfn: int) -> bool:
    flags = int(mem.pages.flags[pfn])
    unsuitable = U_COMPOUND | PG_locked | PG_zone_device
    return bool(flags & PG_lru) and not flags & unsuitable and mem.pages.mapcount[pfn] == 1


def _may_lazyfree(mem: Memory, pfn: int) -> bool:
    flags = int(mem.pages.flags[pfn])
    wanted = PG_lru | PG_swapbacked
    refused = U_COMPOUND | PG_locked | PG_swapcache | PG_zone_device
    # A clean page may be shared: whoever writes to it makes its own entry dirty.
    alone = not flags & PG_dirty or mem.pages.mapcount[pfn] == 1
    return flags & wanted == wanted and not flags & refused and bool(alone)


def _mark_lazyfree(mem: Memory, pfn: int) -> None:
    flags = int(mem.pages.flags[pfn])
    lazy = flags & ~(PG_swapbacked | PG_active | PG_referenced | PG_dirty)
    mem.pages.flags[pfn] = lazy
    nr = mem.pages.compound_nr(pfn)
    mem.mod_page(lru_item(flags), pfn, -nr)
    mem.mod_page(lru_item(lazy), pfn, +nr)


def _reclaim(mem: Memory, vma: Vma, ptes: Ptes, place: int, pfn: int) -> None:
    """shrink_folio_list() of one page that `ptes[place]` alone maps."""
    one, pages = np.array([pfn]), mem.pages
    pages.flags[pfn] &= np.uint32(~(PG_referenced | PG_young) & 0xFFFFFFFF)
    if not pages.flags[pfn] & PG_swapbacked:
        _discard_lazyfree(mem, vma, ptes, place, pfn)
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


def _discard_lazyfree(mem: Memory, vma: Vma, ptes: Ptes, place: int, pfn: int) -> None:
    """A lazily freed page is dropped if still clean; a dirty one becomes swap-backed again."""
    pages, flags = mem.pages, int(mem.pages.flags[pfn])
    if int(ptes[place]) & PAGE_DIRTY or flags & PG_dirty or pages.refcount[pfn] != 1:
        pages.flags[pfn] = flags | PG_swapbacked
        mem.mod_page(lru_item(flags), pfn, -1)
        mem.mod_page(lru_item(flags | PG_swapbacked), pfn, +1)
        return
    ptes[place] = 0
    one = np.array([pfn])
    page_remove_rmap(mem, one, vma)
    mem.mod_mm(vma.mm, MM_ANONPAGES, -1)
    put_pages(mem, one)
