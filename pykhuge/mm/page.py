"""struct page: one numpy array a field, indexed by page frame number.

A free page has neither flags nor references, and every array starts as zeros that cost nothing, so
that a large machine costs nothing until it is used. Work on many pages is done on whole arrays; a
compound page keeps its state on the head, except for `mapcount` and PG_anon_exclusive, which each
subpage has for itself. It is 1 << `order` pages long and begins at a multiple of that.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import lazy_zeros

__all__ = [
    "GUP_PIN_COUNTING_BIAS",
    "PG_active",
    "PG_anon",
    "PG_anon_exclusive",
    "PG_dirty",
    "PG_error",
    "PG_frozen",
    "PG_has_hwpoisoned",
    "PG_head",
    "PG_hwpoison",
    "PG_in_flight",
    "PG_isolated",
    "PG_locked",
    "PG_lru",
    "PG_mapped_shared",
    "PG_mlocked",
    "PG_private",
    "PG_referenced",
    "PG_reserved",
    "PG_swapbacked",
    "PG_swapcache",
    "PG_table",
    "PG_tail",
    "PG_unevictable",
    "PG_uptodate",
    "PG_writeback",
    "PG_young",
    "PG_zone_device",
    "Pages",
    "Pfns",
    "compound_head",
    "order_sizes",
]

Pfns = npt.NDArray[np.int64]

PG_locked = 1 << 0
PG_referenced = 1 << 1
PG_uptodate = 1 << 2
PG_dirty = 1 << 3
PG_lru = 1 << 4
PG_active = 1 << 5
PG_unevictable = 1 << 6
PG_swapbacked = 1 << 7
PG_swapcache = 1 << 8
PG_mlocked = 1 << 9
PG_reserved = 1 << 10
PG_head = 1 << 11
PG_tail = 1 << 12
PG_anon_exclusive = 1 << 13
PG_young = 1 << 14
PG_writeback = 1 << 15
# Linux keeps these three elsewhere: PAGE_MAPPING_ANON in page->mapping, the page-table mark in
# page_type, the zone in the upper bits of flags.
PG_anon = 1 << 16
PG_table = 1 << 17
PG_zone_device = 1 << 18
PG_private = 1 << 19
# memory_failure has lost what was written to it (until 6.12).
PG_error = 1 << 20
# For the audit alone: a reference held by code in progress, by an isolated page or a new page that
# nothing maps yet. Linux knows such a page only from the local variable that points to it.
PG_isolated = 1 << 24
PG_in_flight = 1 << 25
# page_ref_freeze(): a small page that collapse_file has taken out of the page cache, refcount 0.
PG_frozen = 1 << 26

# The frame is bad, and known to be; and, on the head, that one of its subpages is.
PG_hwpoison = 1 << 27
PG_has_hwpoisoned = 1 << 28
# Of a compound page, while it is scanned: more than one mm maps a part of it.
PG_mapped_shared = 1 << 29

# What a pin (FOLL_PIN) adds to the refcount of a page that is not compound.
GUP_PIN_COUNTING_BIAS = 1024


class Pages:
    """mem_map: the fields of every struct page.

    flags: uint32, PG_*.
    refcount: int32, _refcount; 0 is free or frozen.
    mapcount: int32, page-table entries that map this very page (Linux stores it less one).
    entire_mapcount: int32, PMDs that map the compound page; on the head.
    pincount: int32, _pincount of a compound page; on the head.
    mapping: int32, key of the AnonVma or AddressSpace in `Memory.mappings`; 0 is none.
    index: int64, offset in the mapping, in pages.
    private: int64, swap slot of a page in the swap cache.
    memcg: int16, key of the memory cgroup that is charged; 0 is none.
    lru_seq: int64, when the page went onto its LRU list: the list's order.
    order: uint8, of the compound page, the same on head and tails; 0 of a base page.
    """

    def __init__(self, nr_pages: int) -> None:
        def field(dtype: type[np.generic]) -> npt.NDArray[np.generic]:
            return lazy_zeros(nr_pages, dtype)

        self.nr_pages = nr_pages
        self.flags = cast("npt.NDArray[np.uint32]", field(np.uint32))
        self.refcount = cast("npt.NDArray[np.int32]", field(np.int32))
        self.mapcount = cast("npt.NDArray[np.int32]", field(np.int32))
        self.entire_mapcount = cast("npt.NDArray[np.int32]", field(np.int32))
        self.pincount = cast("npt.NDArray[np.int32]", field(np.int32))
        self.mapping = cast("npt.NDArray[np.int32]", field(np.int32))
        self.index = cast("npt.NDArray[np.int64]", field(np.int64))
        self.private = cast("npt.NDArray[np.int64]", field(np.int64))
        self.memcg = cast("npt.NDArray[np.int16]", field(np.int16))
        self.lru_seq = cast("npt.NDArray[np.int64]", field(np.int64))
        self.order = cast("npt.NDArray[np.uint8]", field(np.uint8))

    def add_refs(self, pfns: Pfns, delta: int) -> None:
        """page_ref_add() of each of `pfns` (int64[n], distinct); subpages mean their head."""
        if np.bitwise_or.reduce(self.flags[pfns]) & (PG_head | PG_tail):
            np.add.at(self.refcount, compound_head(self, pfns), delta)
        else:
            self.refcount[pfns] += delta

    def is_compound(self, pfn: int) -> bool:
        """PageCompound(): head or tail."""
        return bool(self.flags[pfn] & (PG_head | PG_tail))

    def compound_nr(self, pfn: int) -> int:
        """Pages in the compound page that `pfn` is part of; 1 for a base page."""
        return 1 << int(self.order[pfn])

    def head_of(self, pfn: int) -> int:
        """compound_head() of one page."""
        return pfn & -1 << int(self.order[pfn])

    def page_mapcount(self, pfn: int) -> int:
        """page_mapcount(): how often this very page is mapped, by PTEs and by PMDs."""
        entire = self.entire_mapcount[self.head_of(pfn)] if self.is_compound(pfn) else 0
        return int(self.mapcount[pfn] + entire)

    def total_mapcount(self, head: int) -> int:
        """total_mapcount(): PTEs and PMDs that map any part of the compound page."""
        if not self.flags[head] & PG_head:
            return int(self.mapcount[head])
        parts = self.mapcount[head : head + self.compound_nr(head)]
        return int(self.entire_mapcount[head] + parts.sum())

    def total_mapcounts(self, heads: Pfns) -> npt.NDArray[np.int64]:
        """`total_mapcount` of many (int64[n], maybe repeated). Returns: int64[n]."""
        totals = self.mapcount[heads].astype(np.int64)
        compound = self.order[heads] != 0
        if np.count_nonzero(compound):
            found, which = np.unique(heads[compound], return_inverse=True)
            counts = np.array([self.total_mapcount(head) for head in found.tolist()])
            totals[compound] = counts[which]
        return totals

    def maybe_dma_pinned(self, head: int) -> bool:
        """page_maybe_dma_pinned(): exact for compound pages, else a guess from the refcount."""
        if self.flags[head] & PG_head:
            return bool(self.pincount[head] > 0)
        return bool(self.refcount[head] >= GUP_PIN_COUNTING_BIAS)


def order_sizes(orders: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Pages in compound pages of `orders` (uint8[n]). Returns: int64[n]."""
    return np.left_shift(np.int64(1), orders)


def compound_head(pages: Pages, pfns: Pfns) -> Pfns:
    """compound_head() of many pages. pfns: int64[n]. Returns: int64[n]."""
    return pfns & np.left_shift(np.int64(-1), pages.order[pfns])
