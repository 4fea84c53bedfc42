"""From a page to the page-table entries that map it, and the counts kept of them (mm/rmap.c).

Pages find their VMAs by way of what page->mapping names: an anon_vma, or an address_space and its
i_mmap. Invariants, which the audit recounts: NR_ANON_MAPPED and NR_FILE_MAPPED are the numbers of
base pages and subpages that any PTE or PMD maps; NR_ANON_THPS, NR_SHMEM_PMDMAPPED and
NR_FILE_PMDMAPPED are 512 for each compound page that a PMD maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.mm.mm_types import VM_LOCKED, VM_SHARED, VM_UFFD_WP, AddressSpace, AnonVma, Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_anon,
    PG_anon_exclusive,
    PG_head,
    PG_lru,
    PG_mlocked,
    PG_swapbacked,
    PG_tail,
    PG_unevictable,
    PG_uptodate,
    compound_head,
)
from pykhuge.mm.page_table import (
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_SWP_UFFD_WP,
    PAGE_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    PUD_SHIFT,
    SWP_PTE_MARKER,
    U_PRESENT,
    Ptes,
    each_block,
    is_swap_ptes,
    make_swap_pte,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.swap import lru_item
from pykhuge.mm.vmstat import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    NR_ANON_MAPPED,
    NR_ANON_THPS,
    NR_FILE_MAPPED,
    NR_FILE_PMDMAPPED,
    NR_MLOCK,
    NR_SHMEM_PMDMAPPED,
    NR_UNEVICTABLE,
)

__all__ = [
    "Mapping",
    "anon_vma_clone",
    "anon_vma_prepare",
    "mapped_item",
    "mlock_page",
    "mm_counter",
    "mod_mm_pages",
    "munlock_pages",
    "page_add_anon_rmap",
    "page_add_file_rmap",
    "page_add_huge_file_rmap",
    "page_add_new_anon_rmap",
    "page_add_new_huge_anon_rmap",
    "page_mappings",
    "page_mkclean",
    "page_move_anon_rmap",
    "page_remove_huge_rmap",
    "page_remove_rmap",
    "pmd_mapped_item",
    "pmd_of",
    "ptes_of",
    "set_pmd",
    "try_to_unmap",
    "uffd_wp_lifted",
    "unlink_anon_vmas",
]

U_KIND = np.uint32(PG_anon | PG_swapbacked)
U_ANON = np.uint32(PG_anon)
U_COMPOUND = np.uint32(PG_head | PG_tail)
MARKER_UFFD_WP = make_swap_pte(SWP_PTE_MARKER, PTE_MARKER_UFFD_WP)
NEW_ANON = PG_anon | PG_swapbacked | PG_uptodate | PG_anon_exclusive


def pmd_of(mem: Memory, mm: Mm, addr: int) -> int | None:
    """The PMD word that covers `addr`; None if its upper levels are absent (mm_find_pmd)."""
    table = mm.pmd_tables.get(addr >> PUD_SHIFT)
    if table is None:
        return None
    return int(mem.ram.words[table, (addr >> 21) % HPAGE_PMD_NR])


def set_pmd(mem: Memory, mm: Mm, addr: int, pmd: int) -> None:
    """Write the PMD word that covers `addr`; its table must be there."""
    mem.ram.words[mm.pmd_tables[addr >> PUD_SHIFT], (addr >> 21) % HPAGE_PMD_NR] = pmd


def ptes_of(mem: Memory, mm: Mm, low: int, high: int) -> Ptes:
    """The words of the page table for [low, high), which lies in one block that has a table."""
    pmd = pmd_of(mem, mm, low)
    assert pmd
    first = pte_index(low)
    return mem.ram.words[pte_pfn(pmd), first : first + (high - low >> PAGE_SHIFT)]


def uffd_wp_lifted(ptes: Ptes) -> Ptes:
    """The words without the write protection of userfaultfd; markers for it become none."""
    return np.where(ptes == MARKER_UFFD_WP, np.uint64(0), ptes & ~_uffd_wp_bits(ptes))


def _uffd_wp_bits(ptes: Ptes) -> Ptes:
    """Where each word has its mark of userfaultfd's write protection."""
    return np.where(is_swap_ptes(ptes), PAGE_SWP_UFFD_WP, PAGE_UFFD_WP).astype(np.uint64)


def anon_vma_new(mem: Memory, root: AnonVma | None = None) -> AnonVma:
    anon_vma = AnonVma(mem.next_mapping, root)
    mem.mappings[anon_vma.key] = anon_vma
    mem.next_mapping += 1
    return anon_vma


def anon_vma_prepare(mem: Memory, vma: Vma) -> None:
    """Give `vma` an anon_vma before its first page: a mergeable neighbour's, or a new one."""
    if vma.anon_vma is not None:
        return
    anon_vma = _mergeable_anon_vma(vma) or anon_vma_new(mem)
    vma.anon_vma = anon_vma
    _chain(vma, anon_vma)


def anon_vma_clone(vma: Vma, source: Vma) -> None:
    """Let `vma` find every page `source` may hold (split, mremap and fork)."""
    for anon_vma in source.anon_vma_chain:
        _chain(vma, anon_vma)


def unlink_anon_vmas(mem: Memory, vma: Vma) -> None:
    """Take `vma` out of its anon_vmas; one that no VMA and no page needs any more is gone."""
    for anon_vma in vma.anon_vma_chain:
        anon_vma.vmas.remove(vma)
        if not anon_vma.vmas:
            mem.mappings.pop(anon_vma.key, None)
    vma.anon_vma_chain = []
    vma.anon_vma = None


def _chain(vma: Vma, anon_vma: AnonVma) -> None:
    anon_vma.vmas.append(vma)
    vma.anon_vma_chain.append(anon_vma)


def _mergeable_anon_vma(vma: Vma) -> AnonVma | None:
    """find_mergeable_anon_vma(): a neighbour that would merge but for its protection."""
    for other in vma.mm.vmas:
        adjacent = other.vm_end == vma.vm_start or other.vm_start == vma.vm_end
        alike = (other.vm_flags ^ vma.vm_flags) & ~0x7 == 0
        continues = other.vm_pgoff - (other.vm_start >> PAGE_SHIFT) == vma.vm_pgoff - (
            vma.vm_start >> PAGE_SHIFT
        )
        # Only a VMA that never forked away from another: its chain is its own anon_vma alone.
        if (
            adjacent
            and alike
            and continues
            and other.vm_file is vma.vm_file
            and other.anon_vma is not None
            and len(other.anon_vma_chain) == 1
        ):
            return other.anon_vma
    return None


def page_add_new_anon_rmap(mem: Memory, pfns: Pfns, vma: Vma, indexes: Pfns) -> None:
    """First mapping of new base pages: exclusive to `vma`. indexes: int64[n], page->index."""
    assert vma.anon_vma is not None
    pages = mem.pages
    pages.flags[pfns] |= np.uint32(NEW_ANON)
    pages.mapcount[pfns] = 1
    pages.mapping[pfns] = vma.anon_vma.key
    pages.index[pfns] = indexes
    mem.mod_pages(NR_ANON_MAPPED, pfns, +1)


def page_add_new_huge_anon_rmap(mem: Memory, head: int, vma: Vma, addr: int) -> None:
    """First mapping of a new compound page, by a PMD."""
    assert vma.anon_vma is not None
    pages = mem.pages
    pages.flags[head] |= np.uint32(NEW_ANON)
    pages.entire_mapcount[head] = 1
    pages.mapping[head] = vma.anon_vma.key
    pages.index[head] = vma.linear_page_index(addr)
    mem.mod_page(NR_ANON_THPS, head, HPAGE_PMD_NR)
    mem.mod_page(NR_ANON_MAPPED, head, HPAGE_PMD_NR)


def page_add_anon_rmap(mem: Memory, pfn: int, vma: Vma, addr: int, *, exclusive: bool) -> None:
    """One more PTE maps a base page, as after swap-in."""
    assert vma.anon_vma is not None
    pages = mem.pages
    if pages.mapcount[pfn] == 0:
        mem.mod_page(NR_ANON_MAPPED, pfn, +1)
        anon_vma = vma.anon_vma if exclusive else vma.anon_vma.root or vma.anon_vma
        pages.flags[pfn] |= np.uint32(PG_anon)
        pages.mapping[pfn] = anon_vma.key
        pages.index[pfn] = vma.linear_page_index(addr)
    pages.mapcount[pfn] += 1
    if exclusive:
        pages.flags[pfn] |= np.uint32(PG_anon_exclusive)
    if vma.vm_flags & VM_LOCKED:
        mlock_page(mem, pfn)


def page_move_anon_rmap(mem: Memory, pfn: int, vma: Vma) -> None:
    """The page has become exclusive to `vma`."""
    assert vma.anon_vma is not None
    mem.pages.mapping[mem.pages.head_of(pfn)] = vma.anon_vma.key
    mem.pages.flags[pfn] |= np.uint32(PG_anon_exclusive)


def mapped_item(flags: int) -> int:
    """The NR_* counter of mapped pages that a page with `flags` (its head's) counts in."""
    return NR_ANON_MAPPED if flags & PG_anon else NR_FILE_MAPPED


def pmd_mapped_item(flags: int) -> int:
    """The NR_* counter of pages mapped by PMDs that a huge page with `flags` counts in."""
    if flags & PG_anon:
        return NR_ANON_THPS
    return NR_SHMEM_PMDMAPPED if flags & PG_swapbacked else NR_FILE_PMDMAPPED


def mm_counter(flags: int) -> int:
    """mm_counter(): which of an mm's MM_* counters a page with `flags` (its head's) counts in."""
    if flags & PG_anon:
        return MM_ANONPAGES
    return MM_SHMEMPAGES if flags & PG_swapbacked else MM_FILEPAGES


def mod_mm_pages(mem: Memory, mm: Mm, pfns: Pfns, sign: int) -> None:
    """Count mapped pages (int64[n], base pages or subpages) in the mm's MM_* counters."""
    flags = mem.pages.flags[pfns]
    if np.bitwise_or.reduce(flags) & U_COMPOUND:
        flags = mem.pages.flags[compound_head(mem.pages, pfns)]
    kinds = flags & U_KIND
    if np.count_nonzero(kinds != kinds[:1]) == 0:
        if len(pfns):
            mem.mod_mm(mm, mm_counter(int(kinds[0])), sign * len(pfns))
        return
    for kind in set(kinds.tolist()):
        mem.mod_mm(mm, mm_counter(kind), sign * int(np.count_nonzero(kinds == kind)))


def _mod_mapped(mem: Memory, pfns: Pfns, sign: int) -> None:
    """Pages (int64[n], base pages or subpages) have become mapped, or unmapped."""
    if not len(pfns):
        return
    flags = mem.pages.flags[pfns]
    if np.bitwise_or.reduce(flags) & U_COMPOUND:
        flags = mem.pages.flags[compound_head(mem.pages, pfns)]
    anon = flags & U_ANON != 0
    nr_anon = np.count_nonzero(anon)
    if nr_anon:
        mem.mod_pages(NR_ANON_MAPPED, pfns if nr_anon == len(pfns) else pfns[anon], sign)
    if nr_anon < len(pfns):
        mem.mod_pages(NR_FILE_MAPPED, pfns[~anon], sign)


def page_add_file_rmap(mem: Memory, pfns: Pfns, vma: Vma) -> None:
    """One more PTE maps each of `pfns` (int64[n], distinct; pages of one page cache)."""
    pages = mem.pages
    newly = pages.mapcount[pfns] == 0
    if np.bitwise_or.reduce(pages.flags[pfns]) & U_COMPOUND:
        newly &= pages.entire_mapcount[compound_head(pages, pfns)] == 0
    _mod_mapped(mem, pfns[newly], +1)
    pages.mapcount[pfns] += 1
    if vma.vm_flags & VM_LOCKED:
        for pfn in pfns[~pages_compound(mem, pfns)].tolist():
            mlock_page(mem, pfn)


def page_add_huge_file_rmap(mem: Memory, head: int, vma: Vma) -> None:
    """One more PMD maps the compound page of a page cache."""
    pages = mem.pages
    if pages.entire_mapcount[head] == 0:
        flags = int(pages.flags[head])
        mapped = int(np.count_nonzero(pages.mapcount[head : head + HPAGE_PMD_NR]))
        mem.mod_page(pmd_mapped_item(flags), head, HPAGE_PMD_NR)
        mem.mod_page(mapped_item(flags), head, HPAGE_PMD_NR - mapped)
    pages.entire_mapcount[head] += 1
    if vma.vm_flags & VM_LOCKED:
        mlock_page(mem, head)


def page_remove_rmap(mem: Memory, pfns: Pfns, vma: Vma) -> None:
    """One PTE less maps each of `pfns` (int64[n], distinct; base pages or subpages)."""
    pages = mem.pages
    left = pages.mapcount[pfns] - 1
    pages.mapcount[pfns] = left
    gone = pfns[left == 0] if np.count_nonzero(left) else pfns
    flags = pages.flags[gone]
    if np.bitwise_or.reduce(flags) & U_COMPOUND:
        # A subpage that a PMD still maps stays counted.
        by_pmd = pages.entire_mapcount[compound_head(pages, gone)] > 0
        gone = gone[~by_pmd | (flags & U_COMPOUND == 0)]
    _mod_mapped(mem, gone, -1)
    if vma.vm_flags & VM_LOCKED:
        munlock_pages(mem, pfns[~pages_compound(mem, pfns)])


def pages_compound(mem: Memory, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """PageCompound() of many. Returns: bool[n]."""
    compound: npt.NDArray[np.bool_] = mem.pages.flags[pfns] & U_COMPOUND != 0
    return compound


def page_remove_huge_rmap(mem: Memory, head: int, vma: Vma) -> None:
    """One PMD less maps the compound page."""
    pages = mem.pages
    pages.entire_mapcount[head] -= 1
    if pages.entire_mapcount[head] == 0:
        unmapped = HPAGE_PMD_NR - int(np.count_nonzero(pages.mapcount[head : head + HPAGE_PMD_NR]))
        flags = int(pages.flags[head])
        mem.mod_page(pmd_mapped_item(flags), head, -HPAGE_PMD_NR)
        mem.mod_page(mapped_item(flags), head, -unmapped)
    if vma.vm_flags & VM_LOCKED:
        munlock_pages(mem, np.array([head]))


def mlock_page(mem: Memory, head: int) -> None:
    """mlock_folio(): PG_mlocked, and onto the unevictable list at once: mlock has no batch here."""
    pages = mem.pages
    flags = int(pages.flags[head])
    if flags & PG_mlocked:
        return
    nr = pages.compound_nr(head)
    pages.flags[head] |= np.uint32(PG_mlocked | PG_unevictable)
    mem.mod_page(NR_MLOCK, head, nr)
    if flags & PG_lru and not flags & PG_unevictable:
        mem.mod_page(lru_item(flags), head, -nr)
        mem.mod_page(NR_UNEVICTABLE, head, nr)


def munlock_pages(mem: Memory, heads: Pfns) -> None:
    """munlock_folio() of those that no VM_LOCKED VMA holds by other entries."""
    pages = mem.pages
    for head in heads.tolist():
        flags = int(pages.flags[head])
        if not flags & PG_mlocked or _still_mlocked(mem, head):
            continue
        nr = pages.compound_nr(head)
        flags &= ~(PG_mlocked | PG_unevictable)
        pages.flags[head] = flags
        mem.mod_page(NR_MLOCK, head, -nr)
        if flags & PG_lru:
            mem.mod_page(NR_UNEVICTABLE, head, -nr)
            mem.mod_page(lru_item(flags), head, nr)


def _still_mlocked(mem: Memory, head: int) -> bool:
    # A compound page is mlocked by PMDs alone: one mapped by PTEs could be split and reclaimed.
    compound = mem.pages.is_compound(head)
    return mem.pages.total_mapcount(head) > 0 and any(
        mapping.vma.vm_flags & VM_LOCKED and (mapping.table < 0 or not compound)
        for mapping in page_mappings(mem, head)
    )


class Mapping(NamedTuple):
    """One entry that maps a page: at `addr` of `vma`, PTE `slot` of `table`, or a PMD (-1)."""

    vma: Vma
    addr: int
    table: int
    slot: int


def page_mappings(mem: Memory, pfn: int) -> Iterator[Mapping]:
    """rmap_walk(): every entry that maps this page; the PMDs of a compound page with its head."""
    pages = mem.pages
    head = pages.head_of(pfn)
    mapping = mem.mappings.get(int(pages.mapping[head]))
    if mapping is None:
        return
    index = int(pages.index[head]) + pfn - head
    vmas = mapping.i_mmap if isinstance(mapping, AddressSpace) else mapping.vmas
    for vma in list(vmas):
        addr = vma.address_of(index)
        if not vma.vm_start <= addr < vma.vm_end:
            continue
        pmd = pmd_of(mem, vma.mm, addr)
        if not pmd:
            continue
        if pmd_trans_huge(pmd):
            if pte_pfn(pmd) == head and addr % HPAGE_PMD_SIZE == (pfn - head) * PAGE_SIZE:
                yield Mapping(vma, addr & -HPAGE_PMD_SIZE, -1, -1)
            continue
        table, slot = pte_pfn(pmd), pte_index(addr)
        pte = int(mem.ram.words[table, slot])
        if pte & PAGE_PRESENT and pte_pfn(pte) == pfn:
            yield Mapping(vma, addr, table, slot)


def mapped_by_another(mem: Memory, mm: Mm, head: int) -> bool:
    """folio_maybe_mapped_shared() of a compound page that `mm` maps: another one does, too."""
    mapping = mem.mappings.get(int(mem.pages.mapping[head]))
    if mapping is None:
        return False
    vmas = mapping.i_mmap if isinstance(mapping, AddressSpace) else mapping.vmas
    return any(vma.mm is not mm and _maps_part(mem, vma, head) for vma in vmas)


def _maps_part(mem: Memory, vma: Vma, head: int) -> bool:
    nr = mem.pages.compound_nr(head)
    start = vma.address_of(int(mem.pages.index[head]))
    for low, high in each_block(
        max(start, vma.vm_start), min(start + (nr << PAGE_SHIFT), vma.vm_end)
    ):
        pmd = pmd_of(mem, vma.mm, low)
        if not pmd:
            continue
        if pmd_trans_huge(pmd):
            if pte_pfn(pmd) == head:
                return True
            continue
        ptes = ptes_of(mem, vma.mm, low, high)
        mapped = (ptes & U_PRESENT != 0) & (pte_pfns(ptes) & -nr == head)
        if mapped.any():
            return True
    return False


def try_to_unmap(mem: Memory, mapping: AddressSpace, start: int, pages: Pfns) -> None:
    """Take pages of a page cache out of every page table, mlocked or not.

    PMDs that map a huge page are for `split_huge_pmd`.

    Dirty entries make their page dirty; write protection by userfaultfd stays behind as a marker.
    pages: int64[n], the page cached at `start`, `start` + 1, ...; 0 is left alone.
    """
    for vma in mapping.i_mmap:
        first = max(vma.address_of(start), vma.vm_start)
        last = min(vma.address_of(start + len(pages)), vma.vm_end)
        for low, high in each_block(first, last):
            pmd = pmd_of(mem, vma.mm, low)
            if pmd and not pmd_trans_huge(pmd):
                place = vma.linear_page_index(low) - start
                ptes = ptes_of(mem, vma.mm, low, high)
                expected = pages[place : place + len(ptes)]
                mapped = (ptes & U_PRESENT != 0) & (pte_pfns(ptes) == expected) & (expected != 0)
                if np.count_nonzero(mapped):
                    for notifier in vma.mm.mmu_notifiers:
                        notifier.invalidate_range_start(low, high)
                    _unmap_ptes(mem, vma, ptes, expected, mapped)
                    for notifier in vma.mm.mmu_notifiers:
                        notifier.invalidate_range_end(low, high)


def _unmap_ptes(
    mem: Memory, vma: Vma, ptes: Ptes, pages: Pfns, mapped: npt.NDArray[np.bool_]
) -> None:
    pfns, words = pages[mapped], ptes[mapped]
    ptes[mapped] = 0
    drop_file_ptes(mem, vma, words, pfns)
    leave_markers(vma, ptes, mapped, words)
    mem.pages.add_refs(pfns, -1)


def drop_file_ptes(mem: Memory, vma: Vma, words: Ptes, pfns: Pfns) -> None:
    """The counts of entries `words` (uint64[n], cleared already) of cached pages `pfns` go."""
    dirty = words & np.uint64(PAGE_DIRTY) != 0
    if np.count_nonzero(dirty):
        set_page_dirty(mem, pfns[dirty])
    page_remove_rmap(mem, pfns, vma)
    mod_mm_pages(mem, vma.mm, pfns, -1)


def leave_markers(vma: Vma, ptes: Ptes, places: npt.NDArray[np.bool_] | Pfns, words: Ptes) -> None:
    """pte_install_uffd_wp_if_needed(): protected entries leave a marker in a watched file VMA."""
    if vma.vm_flags & VM_UFFD_WP:
        ptes[places] = np.where(words & _uffd_wp_bits(words), np.uint64(MARKER_UFFD_WP), 0)


def page_mkclean(mem: Memory, pfns: Pfns) -> None:
    """folio_mkclean(): shared entries of small pages become clean and read-only.

    Their next write is noticed by a fault. pfns: int64[n].
    """
    for pfn in pfns[mem.pages.mapcount[pfns] > 0].tolist():
        for mapping in page_mappings(mem, pfn):
            if mapping.vma.vm_flags & VM_SHARED:
                clean = np.uint64(~(PAGE_DIRTY | PAGE_RW) & (1 << 64) - 1)
                mem.ram.words[mapping.table, mapping.slot] &= clean
