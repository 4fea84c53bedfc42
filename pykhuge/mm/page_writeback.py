"""Dirty pages, and their way to the disk (mm/page-writeback.c).

NR_FILE_DIRTY and NR_WRITEBACK count pages of regular files alone: shmem and anonymous pages are
dirty too, but have nowhere to be written to but swap.
"""

from __future__ import annotations

import numpy as np

from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_swapbacked,
    PG_tail,
    PG_writeback,
    compound_head,
)
from pykhuge.mm.vmstat import NR_FILE_DIRTY, NR_WRITEBACK

__all__ = ["clear_page_dirty", "finish_io", "set_page_dirty", "start_page_writeback"]

U_COMPOUND = np.uint32(PG_head | PG_tail)
U_DIRTY = np.uint32(PG_dirty)
U_CLEAN = np.uint32(~PG_dirty & 0xFFFFFFFF)
U_UNCOUNTED = np.uint32(PG_anon | PG_swapbacked | PG_dirty)


def set_page_dirty(mem: Memory, pfns: Pfns) -> None:
    """folio_mark_dirty() of each page. pfns: int64[n], distinct; subpages mean their head."""
    heads, flags = pfns, mem.pages.flags[pfns]
    if np.bitwise_or.reduce(flags) & U_COMPOUND:
        heads = np.unique(compound_head(mem.pages, pfns))
        flags = mem.pages.flags[heads]
    mem.pages.flags[heads] = flags | U_DIRTY
    newly = heads[flags & U_UNCOUNTED == 0]
    if len(newly):
        mem.mod_pages(NR_FILE_DIRTY, newly, +1)


def clear_page_dirty(mem: Memory, pfns: Pfns) -> None:
    """folio_cancel_dirty(), and the first half of writeback. pfns: int64[n], distinct heads."""
    flags = mem.pages.flags[pfns]
    mem.pages.flags[pfns] = flags & U_CLEAN
    counted = pfns[flags & U_UNCOUNTED == U_DIRTY]
    if len(counted):
        mem.mod_pages(NR_FILE_DIRTY, counted, -1)


def start_page_writeback(mem: Memory, pfns: Pfns) -> None:
    """folio_start_writeback() of dirty pages (int64[n], distinct): clean now, on their way."""
    clear_page_dirty(mem, pfns)
    mem.pages.flags[pfns] |= np.uint32(PG_writeback)
    mem.mod_pages(NR_WRITEBACK, pfns, +1)
    mem.writeback.update(pfns.tolist())


def finish_io(mem: Memory) -> None:
    """Time passes: the disk has all pages that were on their way (folio_end_writeback)."""
    if mem.writeback:
        pfns = np.array(sorted(mem.writeback), np.int64)
        mem.writeback.clear()
        mem.pages.flags[pfns] &= np.uint32(~PG_writeback & 0xFFFFFFFF)
        mem.mod_pages(NR_WRITEBACK, pfns, -1)
