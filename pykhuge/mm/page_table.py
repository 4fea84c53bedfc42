"""Page-table words in the x86-64 layout, and how they are made.

A table is a row of 512 uint64 words in physical memory (`Memory.ram.words[pfn]`): page tables are
pages here as they are there. `ptes` below is such a row, `pte` one word as an int.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE

__all__ = [
    "PMD_SHIFT",
    "PUD_SHIFT",
    "Ptes",
    "each_block",
    "is_marker",
    "is_poison_marker",
    "is_swap_pte",
    "is_swap_ptes",
    "make_swap_pte",
    "pfn_ptes",
    "pmd_trans_huge",
    "pte_pfn",
    "pte_pfns",
    "run_of_none",
    "swp_offset",
    "swp_offsets",
    "swp_type",
]

Ptes = npt.NDArray[np.uint64]

PMD_SHIFT = 21
PUD_SHIFT = 30

PAGE_PRESENT = 1 << 0
PAGE_RW = 1 << 1
PAGE_USER = 1 << 2
PAGE_ACCESSED = 1 << 5
PAGE_DIRTY = 1 << 6
PAGE_PSE = 1 << 7
PAGE_SPECIAL = 1 << 9
PAGE_UFFD_WP = 1 << 10
PAGE_NX = 1 << 63
PFN_MASK = ((1 << 52) - 1) & -PAGE_SIZE
TABLE = PAGE_PRESENT | PAGE_RW | PAGE_USER | PAGE_ACCESSED | PAGE_DIRTY

# Swap-type words: not present, not zero. Type in bits 59..63, offset inverted in bits 9..58, so
# that a speculative walk of it leads nowhere (L1TF).
PAGE_SWP_UFFD_WP = 1 << 2
PAGE_SWP_EXCLUSIVE = 1 << 3
SWP_TYPE_SHIFT = 59
SWP_OFFSET_SHIFT = 9
SWP_OFFSET_MASK = (1 << (SWP_TYPE_SHIFT - SWP_OFFSET_SHIFT)) - 1
# swap_entry types above the swap files: MAX_SWAPFILES is 23 with all of hwpoison, migration,
# device-private and markers configured.
SWP_HWPOISON = 23
SWP_MIGRATION_READ = 24
SWP_PTE_MARKER = 31
PTE_MARKER_UFFD_WP = 1 << 0
PTE_MARKER_POISONED = 1 << 1

U_PRESENT = np.uint64(PAGE_PRESENT)
U_PFN_MASK = np.uint64(PFN_MASK)
U_PAGE_SHIFT = np.uint64(PAGE_SHIFT)


def pte_pfn(pte: int) -> int:
    """Page frame number of a present word, PTE or PMD."""
    return (pte & PFN_MASK) >> PAGE_SHIFT


def pte_pfns(ptes: Ptes) -> npt.NDArray[np.int64]:
    """Page frame numbers of present words. ptes: uint64[n]. Returns: int64[n]."""
    return ((ptes & U_PFN_MASK) >> U_PAGE_SHIFT).view(np.int64)


def pfn_ptes(pfns: npt.NDArray[np.int64], prot: int) -> Ptes:
    """Present words that map `pfns` (int64[n]) with the bits of `prot`. Returns: uint64[n]."""
    return (pfns.astype(np.uint64) << U_PAGE_SHIFT) | np.uint64(prot)


def pmd_trans_huge(pmd: int) -> bool:
    """Whether the PMD maps a huge page instead of pointing to a table."""
    return bool(pmd & PAGE_PSE)


def make_swap_pte(kind: int, offset: int, *, exclusive: bool = False, uffd_wp: bool = False) -> int:
    """swp_entry_to_pte(): `kind` is the swap file or a SWP_* type."""
    word = (kind << SWP_TYPE_SHIFT) | ((~offset & SWP_OFFSET_MASK) << SWP_OFFSET_SHIFT)
    return word | PAGE_SWP_EXCLUSIVE * exclusive | PAGE_SWP_UFFD_WP * uffd_wp


def is_swap_pte(pte: int) -> bool:
    """Neither none nor present: swap, migration, hwpoison, or a marker."""
    return pte != 0 and not pte & PAGE_PRESENT


def is_marker(pte: int) -> bool:
    """A marker that stands where a file's page was (PTE_MARKER_UFFD_WP)."""
    return _has_marker(pte, PTE_MARKER_UFFD_WP)


def is_poison_marker(pte: int) -> bool:
    """A marker that UFFDIO_POISON has set (PTE_MARKER_POISONED, from Linux 6.6 on)."""
    return _has_marker(pte, PTE_MARKER_POISONED)


def _has_marker(pte: int, bit: int) -> bool:
    return is_swap_pte(pte) and swp_type(pte) == SWP_PTE_MARKER and bool(swp_offset(pte) & bit)


def is_swap_ptes(ptes: Ptes) -> npt.NDArray[np.bool_]:
    """`is_swap_pte` of many. Returns: bool[n]."""
    result: npt.NDArray[np.bool_] = (ptes != 0) & (ptes & U_PRESENT == 0)
    return result


def swp_type(pte: int) -> int:
    """The swap file of a swap-type word, or its SWP_* kind."""
    return pte >> SWP_TYPE_SHIFT


def swp_offset(pte: int) -> int:
    """The slot of a swap-type word."""
    return ~(pte >> SWP_OFFSET_SHIFT) & SWP_OFFSET_MASK


def swp_offsets(ptes: Ptes) -> npt.NDArray[np.int64]:
    """`swp_offset` of many. Returns: int64[n]."""
    return ((~ptes >> np.uint64(SWP_OFFSET_SHIFT)) & np.uint64(SWP_OFFSET_MASK)).view(np.int64)


def pte_index(addr: int) -> int:
    """Which of the 512 words of its table maps `addr`."""
    return (addr >> PAGE_SHIFT) % HPAGE_PMD_NR


def run_of_none(words: npt.NDArray[Any]) -> int:
    """How many entries, of a page table or a page cache, are none before the first that is not."""
    some = words != 0
    return int(some.argmax()) if some.any() else len(words)


def each_block(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at 2 MiB boundaries."""
    while start < end:
        stop = min(end, (start & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE)
        yield start, stop
        start = stop
