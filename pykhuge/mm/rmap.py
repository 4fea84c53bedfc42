"""From a page to the page-table entries that map it, and the counts kept of them (mm/rmap.c).

Anonymous pages find their VMAs by way of the anon_vma named in page->mapping. Invariants, which the
audit recounts: NR_ANON_MAPPED is the number of base pages and subpages that any PTE or PMD maps,
NR_ANON_THPS 512 for each compound page that a PMD maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.mm.mm_types import VM_LOCKED, AnonVma, Mm, Vma
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
from pykhuge.mm.page_table import PAGE_PRESENT, PUD_SHIFT, pmd_trans_huge, pte_index, pte_pfn
from pykhuge.mm.swap import lru_item
from pykhuge.mm.vmstat import NR_ANON_MAPPED, NR_ANON_THPS, NR_MLOCK, NR_UNEVICTABLE

__all__ = [
    "Mapping",
    "anon_vma_clone",
    "anon_vma_prepare",
    "mlock_page",
    "munlock_pages",
    "page_add_anon_rmap",
    "page_add_new_anon_rmap",
    "page_add_new_huge_anon_rmap",
    "page_mappings",
    "page_move_anon_rmap",
    "page_remove_huge_rmap",
    "page_remove_rmap",
    "pmd_of",
    "set_pmd",
    "unlink_anon_vmas",
]

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


def page_remove_rmap(mem: Memory, pfns: Pfns, vma: Vma) -> None:
    """One PTE less maps each of `pfns` (int64[n], distinct; base pages or subpages)."""
    pages = mem.pages
    left = pages.mapcount[pfns] - 1
    pages.mapcount[pfns] = left
    gone = pfns[left == 0] if np.count_nonzero(left) else pfns
    flags = pages.flags[gone]
    if np.bitwise_or.reduce(flags) & (PG_head | PG_tail):
        # A subpage that a PMD still maps stays counted.
        by_pmd = pages.entire_mapcount[compound_head(pages, gone)] > 0
        gone = gone[~by_pmd | (flags & np.uint32(PG_head | PG_tail) == 0)]
    if len(gone):
        mem.mod_pages(NR_ANON_MAPPED, gone, -1)
    if vma.vm_flags & VM_LOCKED:
        munlock_pages(mem, pfns[~pages_compound(mem, pfns)])


def pages_compound(mem: Memory, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """PageCompound() of many. Returns: bool[n]."""
    compound: npt.NDArray[np.bool_] = mem.pages.flags[pfns] & np.uint32(PG_head | PG_tail) != 0
    return compound


def page_remove_huge_rmap(mem: Memory, head: int, vma: Vma) -> None:
    """One PMD less maps the compound page."""
    pages = mem.pages
    pages.entire_mapcount[head] -= 1
    if pages.entire_mapcount[head] == 0:
        unmapped = HPAGE_PMD_NR - int(np.count_nonzero(pages.mapcount[head : head + HPAGE_PMD_NR]))
        mem.mod_page(NR_ANON_THPS, head, -HPAGE_PMD_NR)
        mem.mod_page(NR_ANON_MAPPED, head, -unmapped)
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
    anon_vma = mem.mappings.get(int(pages.mapping[head]))
    if anon_vma is None:
        return
    index = int(pages.index[head]) + pfn - head
    for vma in list(anon_vma.vmas):
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
