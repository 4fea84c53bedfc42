"""The page tables as the views of /proc walk them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.mm.mm_types import Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page_table import PMD_SHIFT, PUD_SHIFT, Ptes, pmd_trans_huge, pte_index, pte_pfn

__all__ = ["page_words"]

_EACH_PAGE = np.arange(HPAGE_PMD_NR, dtype=np.uint64) << np.uint64(PAGE_SHIFT)


def page_words(mem: Memory, mm: Mm, start: int, end: int) -> Iterator[tuple[int, Ptes]]:
    """Walk [start, end): address and words of what each PMD maps that is not none.

    Words are one for each 4 KiB page. A huge PMD is 512 words, each with the frame of its own
    page, and keeps PAGE_PSE, which no PTE has. A detached table is not seen.
    """
    for gib in sorted(mm.pmd_tables):
        base = gib << PUD_SHIFT
        low, high = max(start, base), min(end, base + (1 << PUD_SHIFT))
        if low >= high:
            continue
        first = (low - base) >> PMD_SHIFT
        pmds = mem.ram.words[mm.pmd_tables[gib], first : (high - base - 1 >> PMD_SHIFT) + 1]
        for place in np.flatnonzero(pmds).tolist():
            addr, pmd = base + (first + place) * HPAGE_PMD_SIZE, int(pmds[place])
            words = mem.ram.words[pte_pfn(pmd)]
            if pmd_trans_huge(pmd):
                words = np.uint64(pmd) + _EACH_PAGE
            from_, to = max(addr, low), min(addr + HPAGE_PMD_SIZE, high)
            skip = pte_index(from_)
            yield from_, words[skip : skip + (to - from_ >> PAGE_SHIFT)]
