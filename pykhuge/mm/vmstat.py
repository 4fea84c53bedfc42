"""Counters: NR_* by node, events by machine. The one place where a counter changes.

`VmStat.ledger`, when set, receives every change as a posting (counter, delta, function), so that
what a rollback undoes can be held against what it undoes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pykhuge.kernel.panic import KernelBug

__all__ = [
    "EVENTS",
    "MM_COUNTERS",
    "NODE_STATS",
    "Ledger",
    "Posting",
    "VmStat",
]

# /proc/vmstat's names, in its order, as far as the model has them.
NODE_STATS = (
    "nr_free_pages",
    "nr_mlock",
    "nr_inactive_anon",
    "nr_active_anon",
    "nr_inactive_file",
    "nr_active_file",
    "nr_unevictable",
    "nr_isolated_anon",
    "nr_isolated_file",
    "nr_anon_pages",
    "nr_mapped",
    "nr_file_pages",
    "nr_dirty",
    "nr_writeback",
    "nr_shmem",
    "nr_shmem_hugepages",
    "nr_shmem_pmdmapped",
    "nr_file_hugepages",
    "nr_file_pmdmapped",
    "nr_anon_transparent_hugepages",
    "nr_page_table_pages",
    "nr_swapcached",
)
(
    NR_FREE_PAGES,
    NR_MLOCK,
    NR_INACTIVE_ANON,
    NR_ACTIVE_ANON,
    NR_INACTIVE_FILE,
    NR_ACTIVE_FILE,
    NR_UNEVICTABLE,
    NR_ISOLATED_ANON,
    NR_ISOLATED_FILE,
    NR_ANON_MAPPED,
    NR_FILE_MAPPED,
    NR_FILE_PAGES,
    NR_FILE_DIRTY,
    NR_WRITEBACK,
    NR_SHMEM,
    NR_SHMEM_THPS,
    NR_SHMEM_PMDMAPPED,
    NR_FILE_THPS,
    NR_FILE_PMDMAPPED,
    NR_ANON_THPS,
    NR_PAGETABLE,
    NR_SWAPCACHE,
) = range(len(NODE_STATS))
# Counted in base pages, shown in huge pages (vmstat_item_print_in_thp).
PRINTED_IN_THP = frozenset(
    {NR_SHMEM_THPS, NR_SHMEM_PMDMAPPED, NR_FILE_THPS, NR_FILE_PMDMAPPED, NR_ANON_THPS}
)

EVENTS = (
    "pswpin",
    "pswpout",
    "pgfault",
    "pgmajfault",
    "pgmigrate_success",
    "pgmigrate_fail",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "thp_fault_fallback_charge",
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
    "thp_file_alloc",
    "thp_file_fallback",
    "thp_file_fallback_charge",
    "thp_file_mapped",
    "thp_split_page",
    "thp_split_page_failed",
    "thp_split_pmd",
    "thp_scan_exceed_none_pte",
    "thp_scan_exceed_swap_pte",
    "thp_scan_exceed_share_pte",
    "thp_zero_page_alloc",
    "thp_zero_page_alloc_failed",
)
(
    PSWPIN,
    PSWPOUT,
    PGFAULT,
    PGMAJFAULT,
    PGMIGRATE_SUCCESS,
    PGMIGRATE_FAIL,
    THP_FAULT_ALLOC,
    THP_FAULT_FALLBACK,
    THP_FAULT_FALLBACK_CHARGE,
    THP_COLLAPSE_ALLOC,
    THP_COLLAPSE_ALLOC_FAILED,
    THP_FILE_ALLOC,
    THP_FILE_FALLBACK,
    THP_FILE_FALLBACK_CHARGE,
    THP_FILE_MAPPED,
    THP_SPLIT_PAGE,
    THP_SPLIT_PAGE_FAILED,
    THP_SPLIT_PMD,
    THP_SCAN_EXCEED_NONE_PTE,
    THP_SCAN_EXCEED_SWAP_PTE,
    THP_SCAN_EXCEED_SHARED_PTE,
    THP_ZERO_PAGE_ALLOC,
    THP_ZERO_PAGE_ALLOC_FAILED,
) = range(len(EVENTS))

# struct mm_rss_stat, one set for each mm.
MM_COUNTERS = ("MM_FILEPAGES", "MM_ANONPAGES", "MM_SWAPENTS", "MM_SHMEMPAGES")
MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES = range(len(MM_COUNTERS))


class Posting(NamedTuple):
    """One change of one counter: `owner` is a node ("node0"), "event", or an mm ("mm:42")."""

    owner: str
    counter: str
    delta: int
    function: str


class Ledger:
    """Every posting while it was open, in order."""

    def __init__(self) -> None:
        self.postings: list[Posting] = []

    def __iter__(self) -> Iterator[Posting]:
        return iter(self.postings)

    def balance(self) -> dict[tuple[str, str], int]:
        """What did not cancel, by (owner, counter)."""
        total: Counter[tuple[str, str]] = Counter()
        for posting in self.postings:
            total[posting.owner, posting.counter] += posting.delta
        return {key: delta for key, delta in total.items() if delta}

    def assert_cancels(self, *, except_for: Iterable[str] = ()) -> None:
        """Check that all postings cancel, apart from the counters named.

        Raises: KernelBug naming the functions that posted to each counter that is left over.
        """
        allowed = frozenset(except_for)
        findings = [
            f"{owner} {counter} is off by {delta:+d}: {self._posted(owner, counter)}"
            for (owner, counter), delta in self.balance().items()
            if counter not in allowed
        ]
        if findings:
            raise KernelBug(*findings)

    def _posted(self, owner: str, counter: str) -> str:
        by_function: Counter[str] = Counter()
        for posting in self.postings:
            if (posting.owner, posting.counter) == (owner, counter):
                by_function[posting.function] += posting.delta
        return ", ".join(f"{function} {delta:+d}" for function, delta in by_function.items())


class VmStat:
    """All counters of one machine. `node[nid][NR_*]` and `event[...]` are read freely."""

    def __init__(self, nr_nodes: int) -> None:
        self.node = [[0] * len(NODE_STATS) for _ in range(nr_nodes)]
        self.event = [0] * len(EVENTS)
        self.ledger: Ledger | None = None

    def mod_node(self, item: int, delta: int, nid: int = 0) -> None:
        """mod_node_page_state(): `delta` pages more of NR_* `item` on node `nid`."""
        self.node[nid][item] += delta
        if self.ledger is not None:
            self.post(f"node{nid}", NODE_STATS[item], delta)

    def count(self, event: int, delta: int = 1) -> None:
        """count_vm_events()."""
        self.event[event] += delta
        if self.ledger is not None:
            self.post("event", EVENTS[event], delta)

    def mod_mm(self, rss_stat: list[int], item: int, delta: int, owner: str) -> None:
        """add_mm_counter() on `rss_stat`, the counters of the mm called `owner`."""
        rss_stat[item] += delta
        if self.ledger is not None:
            self.post(owner, MM_COUNTERS[item], delta)

    def total(self, item: int) -> int:
        """global_node_page_state()."""
        return sum(node[item] for node in self.node)

    def post(self, owner: str, counter: str, delta: int) -> None:
        """Record a change of a counter that is kept elsewhere (a cgroup's usage, page tables)."""
        if self.ledger is None:
            return
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(_ACCOUNTING_FILES) and frame.f_back is not None:
            frame = frame.f_back
        self.ledger.postings.append(Posting(owner, counter, delta, frame.f_code.co_name))


# Callers that only spread a change over nodes: the function behind them is the one to name.
_ACCOUNTING_FILES = ("mm/vmstat.py", "mm/mmzone.py", "mm/page_alloc.py")
