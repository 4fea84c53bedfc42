"""New pages of a process: allocated, charged, and put into its page tables (mm/memory.c)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.mm.huge_memory import alloc_page_table
from pykhuge.mm.mm_types import VM_LOCKED, VM_WRITE, Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns
from pykhuge.mm.page_alloc import alloc_pages, charge
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_USER,
    PUD_SHIFT,
    TABLE,
    Ptes,
    pfn_ptes,
    pte_pfn,
)
from pykhuge.mm.rmap import mlock_page, page_add_new_anon_rmap, pmd_of, set_pmd
from pykhuge.mm.swap import lru_cache_add
from pykhuge.mm.vmstat import MM_ANONPAGES

__all__ = ["VM_PAGE_PROT", "map_new_pages", "new_user_pages", "pmd_table", "pte_table"]

# vm_page_prot of a private mapping: never writable, so that a write faults once.
VM_PAGE_PROT = PAGE_PRESENT | PAGE_USER | PAGE_ACCESSED


def pmd_table(mem: Memory, mm: Mm, addr: int) -> int:
    """The table that holds the PMD of `addr`, made if there is none. Raises: OutOfMemory."""
    if addr >> PUD_SHIFT not in mm.pmd_tables:
        mm.pmd_tables[addr >> PUD_SHIFT] = alloc_page_table(mem, mm)
    return mm.pmd_tables[addr >> PUD_SHIFT]


def pte_table(mem: Memory, mm: Mm, addr: int) -> int:
    """The page table of the block at `addr`, made if there is none. Raises: OutOfMemory."""
    pmd_table(mem, mm, addr)
    pmd = pmd_of(mem, mm, addr)
    if not pmd:
        table = alloc_page_table(mem, mm)
        set_pmd(mem, mm, addr, (table << PAGE_SHIFT) | TABLE)
        return table
    return pte_pfn(pmd)


def new_user_pages(mem: Memory, vma: Vma, nr: int) -> Pfns:
    """Up to `nr` pages, charged to the mm's cgroup."""
    memcg = vma.mm.memcg
    if memcg.key:
        nr = min(nr, memcg.limit - memcg.usage)
    pfns = alloc_pages(mem, nr, vma.mm.preferred_node)
    charge(mem, memcg, len(pfns))
    mem.pages.memcg[pfns] = memcg.key
    return pfns


def map_new_pages(mem: Memory, vma: Vma, addr: int, pfns: Pfns, ptes: Ptes) -> None:
    """Map new pages writable where the VMA is; they wait in the LRU batch."""
    if not len(pfns):
        return
    prot = VM_PAGE_PROT
    if vma.vm_flags & VM_WRITE:
        prot |= PAGE_DIRTY | PAGE_RW
    first = vma.linear_page_index(addr)
    page_add_new_anon_rmap(mem, pfns, vma, np.arange(first, first + len(pfns)))
    mem.mod_mm(vma.mm, MM_ANONPAGES, len(pfns))
    if vma.vm_flags & VM_LOCKED:
        for pfn in pfns.tolist():
            mlock_page(mem, pfn)
    ptes[: len(pfns)] = pfn_ptes(pfns, prot)
    mem.pages.refcount[pfns] += 1
    lru_cache_add(mem, pfns)
