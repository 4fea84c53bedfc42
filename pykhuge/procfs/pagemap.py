"""/proc/pid/pagemap: a word for each page of an address space (fs/proc/task_mmu.c)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE
from pykhuge.mm.errors import check_int
from pykhuge.mm.mm import TASK_SIZE
from pykhuge.mm.mm_types import Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_anon, compound_head
from pykhuge.mm.page_table import (
    PAGE_PSE,
    PAGE_SWP_UFFD_WP,
    PAGE_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    SWP_HWPOISON,
    SWP_PTE_MARKER,
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    is_swap_ptes,
    pte_pfns,
    swp_offsets,
)
from pykhuge.procfs.kpage import Bools, page_mapcounts
from pykhuge.procfs.walk import page_words

__all__ = ["PM_FILE", "PM_MMAP_EXCLUSIVE", "PM_PRESENT", "PM_SWAP", "PM_UFFD_WP", "pagemap"]

PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
MAX_SWAPFILES_SHIFT = 5


def pagemap(mem: Memory, mm: Mm, addr: int, length: int) -> Ptes:
    """The words of [addr, addr + length), a whole number of pages.

    Bits 0..54 are the frame, or the type (0..4) and offset (5..54) of a swap entry; bit 56 says
    mapped once, 57 write-protected by userfaultfd, 61 of a file or shared, 62 swap entry, 63
    present. Bit 55 (soft-dirty) is not modelled. As at v6.4 a huge PMD never has bit 61, and its
    bit 56 is the head's for all of its pages.
    Returns: uint64[length / 4096]. Raises: ValueError.
    """
    check_int(addr=addr, length=length)
    if not 0 <= addr < TASK_SIZE or addr % PAGE_SIZE:
        raise ValueError(f"addr={addr:#x}: allowed multiples of {PAGE_SIZE} below {TASK_SIZE:#x}")
    if not 0 <= length <= TASK_SIZE - addr or length % PAGE_SIZE:
        raise ValueError(
            f"length={length:#x}: allowed multiples of {PAGE_SIZE} up to {TASK_SIZE - addr:#x}"
        )
    result = np.zeros(length >> PAGE_SHIFT, np.uint64)
    for start, words in page_words(mem, mm, addr, addr + length):
        place = start - addr >> PAGE_SHIFT
        result[place : place + len(words)] = _entries(mem, words)
    return result


def _entries(mem: Memory, words: Ptes) -> Ptes:
    """pte_to_pagemap_entry(), and what pagemap_pmd_range says of a huge PMD."""
    result = np.zeros(len(words), np.uint64)
    present = words & U_PRESENT != 0
    result[present] = _present_entries(mem, words[present])
    swapped = is_swap_ptes(words)
    result[swapped] = _swap_entries(mem, words[swapped])
    return result


def _present_entries(mem: Memory, words: Ptes) -> Ptes:
    pfns = pte_pfns(words)
    huge = words & np.uint64(PAGE_PSE) != 0
    # vm_normal_page() does not know the zero page.
    normal = pfns != mem.zero_pfn
    result = pfns.astype(np.uint64) | np.uint64(PM_PRESENT)
    result[words & np.uint64(PAGE_UFFD_WP) != 0] |= np.uint64(PM_UFFD_WP)
    return result | _page_bits(
        mem, np.where(huge, pfns & -HPAGE_PMD_NR, pfns), normal, normal & ~huge
    )


def _swap_entries(mem: Memory, words: Ptes) -> Ptes:
    kinds, offsets = words >> np.uint64(SWP_TYPE_SHIFT), swp_offsets(words)
    result = kinds | (offsets.astype(np.uint64) << np.uint64(MAX_SWAPFILES_SHIFT))
    result |= np.uint64(PM_SWAP)
    marked = (kinds == SWP_PTE_MARKER) & (offsets & PTE_MARKER_UFFD_WP != 0)
    result[marked | (words & np.uint64(PAGE_SWP_UFFD_WP) != 0)] |= np.uint64(PM_UFFD_WP)
    # Migration and device entries name a page; a hwpoison entry is not asked for its page.
    paged = (kinds > SWP_HWPOISON) & (kinds < SWP_PTE_MARKER)
    migration = paged & (kinds <= SWP_HWPOISON + 3)
    pfns = np.where(paged, offsets, 0)
    return result | _page_bits(mem, pfns, paged & ~migration, paged)


def _page_bits(mem: Memory, pfns: Pfns, counted: Bools, of_file: Bools) -> Ptes:
    """PM_MMAP_EXCLUSIVE for pages mapped once, if `counted`; PM_FILE if not anonymous."""
    anon = mem.pages.flags[compound_head(mem.pages, pfns)] & np.uint32(PG_anon) != 0
    result = np.zeros(len(pfns), np.uint64)
    result[counted & (page_mapcounts(mem, pfns) == 1)] |= np.uint64(PM_MMAP_EXCLUSIVE)
    result[of_file & ~anon] |= np.uint64(PM_FILE)
    return result
