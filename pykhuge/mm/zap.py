"""Emptying page-table entries, of one VMA or of all that map a file (mm/memory.c)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_SIZE
from pykhuge.mm.huge_memory import (
    clear_huge_pmd,
    free_page_table,
    pgtable_trans_huge_withdraw,
    split_huge_pmd,
)
from pykhuge.mm.mm_types import AddressSpace, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_anon, compound_head
from pykhuge.mm.page_table import (
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    each_block,
    is_swap_ptes,
    pmd_trans_huge,
    pte_pfn,
    pte_pfns,
    swp_offsets,
)
from pykhuge.mm.rmap import (
    MARKER_UFFD_WP,
    drop_file_ptes,
    leave_markers,
    page_remove_rmap,
    pmd_of,
    ptes_of,
    set_pmd,
)
from pykhuge.mm.swap import lru_add_drain, put_pages
from pykhuge.mm.swap_state import free_swap_cache, swap_free
from pykhuge.mm.vmstat import MM_ANONPAGES, MM_SWAPENTS

__all__ = ["madvise_dontneed", "swap_slots", "unmap_mapping_range", "zap_page_range"]


def zap_page_range(
    mem: Memory,
    vma: Vma,
    start: int,
    end: int,
    *,
    even_cows: bool = True,
    drop_markers: bool = False,
) -> None:
    """Empty the page-table entries of [start, end), which lies in `vma`; the tables stay.

    This CPU's LRU batch is drained first, so that no page waits in it to be freed.

    Args:
        even_cows: also the private copies of a private file mapping; False spares them.
        drop_markers: userfaultfd write protection of a file is forgotten too, as by munmap.
    Kernel: unmap_region, zap_page_range_single, zap_pte_range, zap_huge_pmd. Locks: mmap_lock, or
    i_mmap_rwsem of the file.
    """
    lru_add_drain(mem)
    for low, high in each_block(start, end):
        pmd = pmd_of(mem, vma.mm, low)
        if not pmd:
            continue
        if pmd_trans_huge(pmd):
            if high - low == HPAGE_PMD_SIZE:
                _zap_huge_pmd(mem, vma, low, pmd)
                continue
            split_huge_pmd(mem, vma, low)
        if pmd_of(mem, vma.mm, low):
            _zap_ptes(mem, vma, ptes_of(mem, vma.mm, low, high), even_cows, drop_markers)


def madvise_dontneed(mem: Memory, vma: Vma, start: int, end: int) -> None:
    """Empty the entries of [start, end); later kernels free the tables this leaves empty.

    Only a table whose whole block lies in the range goes; a marker in it keeps it.
    Kernel: madvise_dontneed_single_vma; zap_pte_range with reclaim_pt.
    """
    zap_page_range(mem, vma, start, end)
    if not mem.version.dontneed_frees_page_table:
        return
    for low, high in each_block(start, end):
        pmd = pmd_of(mem, vma.mm, low)
        if high - low < HPAGE_PMD_SIZE or not pmd or pmd_trans_huge(pmd):
            continue
        if not ptes_of(mem, vma.mm, low, high).any():
            set_pmd(mem, vma.mm, low, 0)
            free_page_table(mem, vma.mm, pte_pfn(pmd))


def _zap_huge_pmd(mem: Memory, vma: Vma, addr: int, pmd: int) -> None:
    if vma.vm_file is None:
        free_page_table(mem, vma.mm, pgtable_trans_huge_withdraw(vma.mm, addr))
    clear_huge_pmd(mem, vma, addr, pmd)


def _zap_ptes(mem: Memory, vma: Vma, ptes: Ptes, even_cows: bool, drop_markers: bool) -> None:
    words = ptes.copy()
    if vma.vm_file is None:
        ptes[:] = 0
    else:
        _zap_file_ptes(mem, vma, ptes, words, drop_markers)
        if not even_cows:
            return
        swapped = np.flatnonzero(is_swap_ptes(words) & (words != MARKER_UFFD_WP))
        _clear_copies(vma, ptes, swapped, words, drop_markers)
    for slot in swap_slots(words[is_swap_ptes(words)]):
        swap_free(mem, slot)
        mem.mod_mm(vma.mm, MM_SWAPENTS, -1)
        cached = mem.swap.cache.get(slot)
        if cached is not None:
            free_swap_cache(mem, np.array([cached]))
    present = np.flatnonzero(words & U_PRESENT)
    pfns = pte_pfns(words[present])
    present, pfns = present[pfns != mem.zero_pfn], pfns[pfns != mem.zero_pfn]
    if vma.vm_file is not None:
        anon = mem.pages.flags[compound_head(mem.pages, pfns)] & np.uint32(PG_anon) != 0
        _clear_copies(vma, ptes, present[anon], words, drop_markers)
        pfns = pfns[anon]
    if len(pfns):
        page_remove_rmap(mem, pfns, vma)
        mem.mod_mm(vma.mm, MM_ANONPAGES, -len(pfns))
        free_swap_cache(mem, pfns)
        put_pages(mem, pfns)


def _zap_file_ptes(mem: Memory, vma: Vma, ptes: Ptes, words: Ptes, drop_markers: bool) -> None:
    """The entries of cached pages and the zero page; markers if they are to be dropped."""
    present = np.flatnonzero(words & U_PRESENT)
    zero = pte_pfns(words[present]) == mem.zero_pfn
    ptes[present[zero]] = 0
    present = present[~zero]
    heads = compound_head(mem.pages, pte_pfns(words[present]))
    places = present[mem.pages.flags[heads] & np.uint32(PG_anon) == 0]
    if len(places):
        pfns = pte_pfns(words[places])
        ptes[places] = 0
        drop_file_ptes(mem, vma, words[places], pfns)
        if not drop_markers:
            leave_markers(vma, ptes, places, words[places])
        put_pages(mem, pfns)
    if drop_markers:
        ptes[is_swap_ptes(words) & (words >> np.uint64(SWP_TYPE_SHIFT) != 0)] = 0


def _clear_copies(vma: Vma, ptes: Ptes, places: Pfns, words: Ptes, drop_markers: bool) -> None:
    """Empty the entries of a private mapping's own pages, in memory and on swap."""
    ptes[places] = 0
    if not drop_markers:
        leave_markers(vma, ptes, places, words[places])


def swap_slots(swapped: Ptes) -> list[int]:
    """The slots among swap-type words; markers and other special entries have none."""
    real = swapped[swapped >> np.uint64(SWP_TYPE_SHIFT) == 0]
    return [int(slot) for slot in swp_offsets(real)]


def unmap_mapping_range(
    mem: Memory, mapping: AddressSpace, first: int, last: int, *, even_cows: bool
) -> None:
    """Empty the entries of pages [first, last) of a file in every VMA that maps it."""
    for vma in list(mapping.i_mmap):
        low = max(vma.address_of(first), vma.vm_start)
        high = min(vma.address_of(last), vma.vm_end)
        if low < high:
            zap_page_range(mem, vma, low, high, even_cows=even_cows)
