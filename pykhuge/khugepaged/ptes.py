"""512 page-table entries looked at together, as the kernel's loops look at them one by one.

`BlockOfPtes` sorts the entries into kinds; `FirstFailure` finds where a loop with a chain of tests
would have stopped: at the lowest entry that fails any test, and there for the first test it fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, PLACES
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.mm_types import Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_head,
    PG_mapped_shared,
    PG_referenced,
    PG_swapcache,
    PG_tail,
    PG_young,
    PG_zone_device,
    compound_head,
    order_sizes,
)
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_SPECIAL,
    PAGE_UFFD_WP,
    U_PRESENT,
    Ptes,
    pte_pfns,
)
from pykhuge.mm.rmap import mapped_by_another

__all__ = ["BlockOfPtes", "FirstFailure", "shared_folios"]

Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]

U_ACCESSED = np.uint64(PAGE_ACCESSED)

U_COMPOUND = np.uint32(PG_head | PG_tail)
U_SWAPCACHE = np.uint32(PG_swapcache)
U_REFERENCED = np.uint32(PG_referenced | PG_young)
U_UFFD_WP = np.uint64(PAGE_UFFD_WP)
U_MAPPED_SHARED = np.uint32(PG_mapped_shared)
U_ZONE_DEVICE = np.uint32(PG_zone_device)
# The tests behind compound_head(): where one fails, the loop's variable is that page's head.
_LOOKED_AT = frozenset(
    {
        ScanResult.SCAN_SCAN_ABORT,
        ScanResult.SCAN_PAGE_LRU,
        ScanResult.SCAN_PAGE_LOCK,
        ScanResult.SCAN_PAGE_ANON,
        ScanResult.SCAN_PAGE_COUNT,
        ScanResult.SCAN_DEL_PAGE_LRU,
    }
)
NO_PLACES = PLACES[:0]


def _or(words: npt.NDArray[Any]) -> int:
    """All bits that any word has."""
    return int(np.bitwise_or.reduce(words))


def _and(words: npt.NDArray[Any]) -> int:
    """All bits that every word has; -1 if there is no word."""
    return int(np.bitwise_and.reduce(words)) if len(words) else -1


@contextlib.contextmanager
def shared_folios(mem: Memory, mm: Mm, table: Ptes) -> Iterator[None]:
    """Mark the compound pages behind a table of `mm` that others map too, where that is asked."""
    heads: set[int] = set()
    if mem.version.large_folios:
        pfns = pte_pfns(table[table & U_PRESENT != 0])
        compound = pfns[mem.pages.flags[pfns] & U_COMPOUND != 0]
        heads = set(compound_head(mem.pages, compound).tolist())
    marked = np.array([head for head in heads if mapped_by_another(mem, mm, head)], np.int64)
    mem.pages.flags[marked] |= U_MAPPED_SHARED
    try:
        yield
    finally:
        mem.pages.flags[marked] &= ~U_MAPPED_SHARED


class FirstFailure:
    """Where the loop stops, and why; `place` is 512 and `result` SCAN_SUCCEED if it does not.

    Tests are offered in the order of the kernel's chain: of two at one place the first stays.
    """

    __slots__ = ("place", "result")

    def __init__(self) -> None:
        self.place = HPAGE_PMD_NR
        self.result = ScanResult.SCAN_SUCCEED

    def at(self, place: int, result: ScanResult) -> None:
        """The test for `result` fails at `place`."""
        if place < self.place:
            self.place, self.result = place, result

    def where(self, places: Places, failing: Bools, result: ScanResult) -> None:
        """The test for `result` fails at those of `places` that are marked."""
        if np.count_nonzero(failing):
            self.at(int(places[failing.argmax()]), result)

    def beyond(self, places: Places, limit: int, result: ScanResult) -> None:
        """The test for `result` lets `limit` of `places` pass and fails at the next one."""
        if len(places) > limit:
            self.at(int(places[limit]), result)


class BlockOfPtes:
    """One page table's entries and the pages behind them.

    none_or_zero, non_present: places (0..511) of these kinds, ascending.
    mapped: places of the entries that map a page; `ptes`, `pfns`, `heads`, `flags` (of the head)
    and `mapcount` (page_mapcount of the very page) go with these, element by element.
    any_pte, all_ptes, any_flag, all_flags: the OR and the AND of `ptes` and of `flags`, so that
    most tests are one test of a word.
    """

    def __init__(self, mem: Memory, table: Ptes) -> None:
        pages = mem.pages
        self.any_pte, self.all_ptes = _or(table), _and(table)
        if self.all_ptes & PAGE_PRESENT and not self.any_pte & PAGE_SPECIAL:
            self.none_or_zero = self.non_present = NO_PLACES
            self.mapped, self.ptes = PLACES, table.copy()
        else:
            self._sort_kinds(mem, table)
        self.pfns = pte_pfns(self.ptes)
        self.heads: Pfns = self.pfns
        self.flags = pages.flags[self.pfns]
        self.mapcount = pages.mapcount[self.pfns]
        self.any_flag, self.all_flags = _or(self.flags), _and(self.flags)
        self.compound = bool(self.any_flag & (PG_head | PG_tail))
        if self.compound:
            self._look_at_heads(mem)

    def _sort_kinds(self, mem: Memory, table: Ptes) -> None:
        present = table & U_PRESENT != 0
        normal = present & (pte_pfns(table) != mem.zero_pfn)
        non_present = (table != 0) & ~present
        self.mapped = np.flatnonzero(normal)
        self.non_present = np.flatnonzero(non_present)
        self.none_or_zero = np.flatnonzero(~(normal | non_present))
        self.ptes = table[self.mapped]
        self.any_pte, self.all_ptes = _or(self.ptes), _and(self.ptes)

    def _look_at_heads(self, mem: Memory) -> None:
        compound = self.flags & U_COMPOUND != 0
        self.heads = compound_head(mem.pages, self.pfns)
        self.flags = mem.pages.flags[self.heads]
        self.mapcount = self.mapcount + mem.pages.entire_mapcount[self.heads] * compound
        self.any_flag, self.all_flags = _or(self.flags), _and(self.flags)

    def fails_refcount(self, mem: Memory, failure: FirstFailure, chosen: Places | slice) -> None:
        """!is_refcount_suitable(): more than page tables and swap cache refers to the page.

        chosen: the mapped entries to ask about, by their number among these.
        """
        expected: npt.NDArray[Any] = self.mapcount
        if self.compound:
            expected = mem.pages.total_mapcounts(self.heads)
        if self.any_flag & PG_swapcache:
            size = order_sizes(mem.pages.order[self.heads])
            expected = expected + (self.flags & U_SWAPCACHE != 0) * size
        unsuitable = mem.pages.refcount[self.heads] != expected
        failure.where(self.mapped[chosen], unsuitable[chosen], ScanResult.SCAN_PAGE_COUNT)

    def before(self, stop: int) -> int:
        """How many mapped entries lie below place `stop`."""
        return len(self.mapped) if stop == HPAGE_PMD_NR else int(np.searchsorted(self.mapped, stop))

    def referenced(self, nr: int, cc: CollapseControl, notified: Bools | bool) -> int:
        """How many of the first `nr` mapped entries were used lately; the daemon alone asks.

        notified: what mmu_notifier_test_young() says, of each mapped entry or of all.
        """
        if not cc.is_khugepaged:
            return 0
        if self.all_ptes & PAGE_ACCESSED:
            return nr
        young = self.ptes[:nr] & U_ACCESSED != 0
        young |= self.flags[:nr] & U_REFERENCED != 0
        young |= notified if isinstance(notified, bool) else notified[:nr]
        return int(np.count_nonzero(young))

    def writable(self, nr: int) -> bool:
        """Whether any of the first `nr` mapped entries may be written."""
        return bool((self.any_pte if nr == len(self.ptes) else _or(self.ptes[:nr])) & PAGE_RW)

    def nr_none_or_zero(self, stop: int) -> int:
        """How many none and zero entries the loop has counted when it stops at place `stop`."""
        if stop == HPAGE_PMD_NR:
            return len(self.none_or_zero)
        return int(np.searchsorted(self.none_or_zero, stop, side="right"))

    def first_of_heads(self) -> Places | slice:
        """The mapped entries at which a page is met first: a compound page is looked at once."""
        if not self.compound:
            return slice(None)
        return np.sort(np.unique(self.heads, return_index=True)[1])

    def last_page(self, failure: FirstFailure, *, folios: bool) -> int:
        """The page that the loop's variable holds when it ends; -1 for none.

        folios: a later kernel's, which holds the head and is set once the page is a normal one.
        """
        nr = self.before(failure.place)
        if folios and failure.result is ScanResult.SCAN_EXCEED_SHARED_PTE:
            return int(self.heads[nr])
        if folios and failure.result is ScanResult.SCAN_PAGE_NULL:
            return int(self.heads[nr - 1]) if nr else -1
        if failure.result is ScanResult.SCAN_PAGE_NULL:
            return int(self.pfns[nr])
        if failure.result is ScanResult.SCAN_EXCEED_SHARED_PTE:
            return int(self.pfns[nr])
        if failure.result in _LOOKED_AT:
            return int(self.heads[nr])
        return int(self.heads[nr - 1]) if nr else -1

    def fails_uffd_wp(self, failure: FirstFailure) -> None:
        """A present entry is write-protected by userfaultfd."""
        if self.any_pte & PAGE_UFFD_WP:
            failure.where(self.mapped, self.ptes & U_UFFD_WP != 0, ScanResult.SCAN_PTE_UFFD_WP)

    def fails_normal_page(self, failure: FirstFailure) -> None:
        """An entry maps a zone-device page."""
        if self.any_flag & PG_zone_device:
            failure.where(self.mapped, self.flags & U_ZONE_DEVICE != 0, ScanResult.SCAN_PAGE_NULL)

    def fails_shared(self, failure: FirstFailure, cc: CollapseControl, *, folios: bool) -> None:
        """More pages than max_ptes_shared are mapped more than once, or part of what is."""
        if self.mapcount.max(initial=0) > 1 or self.any_flag & PG_mapped_shared:
            many = self.mapcount > 1
            if folios and self.compound:
                many = np.where(
                    self.flags & np.uint32(PG_head), self.flags & U_MAPPED_SHARED != 0, many
                )
            shared = self.mapped[many]
            failure.beyond(shared, cc.limit("max_ptes_shared"), ScanResult.SCAN_EXCEED_SHARED_PTE)
