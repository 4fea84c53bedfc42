"""Which of two causes wins, in the scan and at isolation, whose chains of tests differ.

The chains are those of section 3.1 and 3.3 of the behavioural reference. Of causes on different
entries the lower entry's wins, on one entry the earlier test's.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    discard,
    fill,
    isolates,
    madv_collapse,
    pageout,
    paused,
    pfn_of,
    ptes_of,
    scans,
    touch,
)

from pykhuge import PROT_READ, Machine, Process, ScanResult
from pykhuge.mm.page import PG_anon, PG_lru
from pykhuge.mm.page_table import PAGE_ACCESSED
from pykhuge.mm.vmstat import NR_INACTIVE_ANON

S = ScanResult


class Site(NamedTuple):
    """Where a cause is put: one page of a block."""

    machine: Machine
    process: Process
    block: int
    page: int
    stack: ExitStack

    @property
    def addr(self) -> int:
        return self.block + self.page * PAGE


def none(site: Site) -> None:
    discard(site.process, site.block, [site.page])


def zero(site: Site) -> None:
    none(site)
    touch(site.process, site.block, [site.page])


def swap(site: Site) -> None:
    pageout(site.process, site.block, [site.page])


def uffd_wp(site: Site) -> None:
    uffd = site.process.userfaultfd()
    uffd.register(site.block, HPAGE, missing=False, wp=True)
    uffd.writeprotect(site.addr, PAGE)
    # Registered for good would arm the VMA for holes too; the limits are 0 here anyway.


def null(site: Site) -> None:
    site.process.migrate_to_device(site.addr)


def shared(site: Site) -> None:
    child = site.process.fork("child")
    discard(child, site.block, set(range(NR)) - {site.page})


def lru(site: Site) -> None:
    site.stack.enter_context(off_the_lru(site))


def lock(site: Site) -> None:
    site.stack.callback(site.process.lock_page(site.addr).release)


def count(site: Site) -> None:
    site.stack.callback(site.process.get(site.addr, 1).release)


def anon(site: Site) -> None:
    site.stack.enter_context(not_anonymous(site))


@contextmanager
def off_the_lru(site: Site) -> Iterator[None]:
    """By hand: on no list, though nobody else refers to the page."""
    pfn, mem = pfn_of(site.process, site.block, site.page), site.machine.mem
    mem.pages.flags[pfn] &= ~np.uint32(PG_lru)
    mem.vmstat.mod_node(NR_INACTIVE_ANON, -1, mem.nid_of(pfn))
    yield
    mem.pages.flags[pfn] |= np.uint32(PG_lru)
    mem.vmstat.mod_node(NR_INACTIVE_ANON, +1, mem.nid_of(pfn))


@contextmanager
def not_anonymous(site: Site) -> Iterator[None]:
    """By hand: an anonymous VMA never maps such a page."""
    pfn, flags = pfn_of(site.process, site.block, site.page), site.machine.mem.pages.flags
    flags[pfn] &= ~np.uint32(PG_anon)
    yield
    flags[pfn] |= np.uint32(PG_anon)


class Cause(NamedTuple):
    """What fails, in the scan and at isolation; whether scan_pfn then names the failing page."""

    put: Callable[[Site], None]
    scan: ScanResult
    isolate: ScanResult
    names_page: bool


CAUSES = {
    "none": Cause(none, S.SCAN_EXCEED_NONE_PTE, S.SCAN_EXCEED_NONE_PTE, False),
    "zero": Cause(zero, S.SCAN_EXCEED_NONE_PTE, S.SCAN_EXCEED_NONE_PTE, False),
    "swap": Cause(swap, S.SCAN_EXCEED_SWAP_PTE, S.SCAN_PTE_NON_PRESENT, False),
    "shared": Cause(shared, S.SCAN_EXCEED_SHARED_PTE, S.SCAN_EXCEED_SHARED_PTE, True),
    "null": Cause(null, S.SCAN_PAGE_NULL, S.SCAN_PAGE_NULL, True),
    "uffd_wp": Cause(uffd_wp, S.SCAN_PTE_UFFD_WP, S.SCAN_PTE_UFFD_WP, False),
    "lru": Cause(lru, S.SCAN_PAGE_LRU, S.SCAN_DEL_PAGE_LRU, True),
    "lock": Cause(lock, S.SCAN_PAGE_LOCK, S.SCAN_PAGE_LOCK, True),
    "count": Cause(count, S.SCAN_PAGE_COUNT, S.SCAN_PAGE_COUNT, True),
}
# To be put in this order: one that changes what the next one needs would spoil it.
ORDER = list(CAUSES)


@pytest.fixture
def full(machine: Machine, process: Process, block: int) -> int:
    """A block without a hole, and limits that let no exception pass."""
    settings = machine.khugepaged_settings
    settings.max_ptes_none = settings.max_ptes_swap = settings.max_ptes_shared = 0
    fill(process, block)
    machine.lru_add_drain_all()
    return block


def put_causes(
    machine: Machine, process: Process, block: int, places: dict[str, int], stack: ExitStack
) -> None:
    for name in sorted(places, key=ORDER.index):
        CAUSES[name].put(Site(machine, process, block, places[name], stack))


PAIRS = [(a, b) for a, b in itertools.permutations(CAUSES, 2) if {a, b} != {"none", "zero"}]


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_scan_stops_at_the_lower_entry(
    machine: Machine, process: Process, full: int, low: str, high: str
) -> None:
    """Two causes on entries 100 and 101: the scan names the first, whatever the tests' order."""
    before, at = pfn_of(process, full, 99), pfn_of(process, full, 100)
    with ExitStack() as stack:
        put_causes(machine, process, full, {low: 100, high: 101}, stack)
        if low == "null":
            at = pfn_of(process, full, 100)
        machine.trace.clear()
        assert machine.collapse(process, full) is CAUSES[low].scan
        (event,) = scans(machine)
        assert event.scan_pfn == (at if CAUSES[low].names_page else before)
        assert event.referenced == 100
        assert event.none_or_zero == (low in ("none", "zero"))
        assert event.unmapped == (low == "swap")
        assert event.writable is ("shared" not in (low, high))
    assert machine.vmstat()["thp_collapse_alloc"] == 0


@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_isolation_stops_at_the_lower_entry(
    machine: Machine, process: Process, full: int, low: str, high: str
) -> None:
    """The same at isolation, with what the collapse locked so far given back."""
    before, at = pfn_of(process, full, 99), pfn_of(process, full, 100)
    task = paused(machine, process, full, "prepared")
    with ExitStack() as stack:
        put_causes(machine, process, full, {low: 100, high: 101}, stack)
        if low == "null":
            at = pfn_of(process, full, 100)
        machine.trace.clear()
        assert task.finish() is CAUSES[low].isolate
        (event,) = isolates(machine)
        assert event.status is CAUSES[low].isolate
        assert event.scan_pfn == (at if CAUSES[low].names_page else before)
        assert event.referenced == 100
        assert event.none_or_zero == (low in ("none", "zero"))
        assert event.writable is ("shared" not in (low, high))
        assert machine.vmstat()["nr_isolated_anon"] == 0


# Two causes on one entry, the winner first. Kinds of entries exclude each other: what is none is
# not locked. A page in a device has no LRU place and is never locked; it can be shared.
SAME_ENTRY_SCAN = [
    ("swap", "uffd_wp"),
    ("uffd_wp", "null"),
    ("uffd_wp", "shared"),
    ("uffd_wp", "lru"),
    ("uffd_wp", "lock"),
    ("uffd_wp", "count"),
    ("null", "count"),
    ("shared", "lru"),
    ("shared", "lock"),
    ("shared", "count"),
    ("lru", "lock"),
    ("lru", "count"),
    ("lock", "count"),
]
SAME_ENTRY_ISOLATE = [
    ("swap", "uffd_wp"),
    ("uffd_wp", "null"),
    ("uffd_wp", "shared"),
    ("uffd_wp", "lru"),
    ("uffd_wp", "lock"),
    ("uffd_wp", "count"),
    ("null", "count"),
    ("shared", "lock"),
    ("shared", "count"),
    ("shared", "lru"),
    ("lock", "count"),
    ("lock", "lru"),
    ("count", "lru"),
]


def put_both(site: Site, one: str, other: str) -> None:
    """Both on one page; a page is protected before it is swapped out, and locked at last."""
    order = ["shared", "uffd_wp", "null", "swap", "lru", "count", "lock"]
    if "uffd_wp" in (one, other) and "null" in (one, other):
        order = ["null", "uffd_wp"]
    for name in sorted((one, other), key=order.index):
        CAUSES[name].put(site)


@pytest.mark.parametrize(("winner", "loser"), SAME_ENTRY_SCAN)
def test_order_on_one_entry_in_the_scan(
    machine: Machine, process: Process, full: int, winner: str, loser: str
) -> None:
    """Swap limit, uffd-wp, normal page, shared limit, LRU, lock, references."""
    with ExitStack() as stack:
        put_both(Site(machine, process, full, 5, stack), winner, loser)
        assert machine.collapse(process, full) is CAUSES[winner].scan


@pytest.mark.parametrize(("winner", "loser"), SAME_ENTRY_ISOLATE)
def test_order_on_one_entry_at_isolation(
    machine: Machine, process: Process, full: int, winner: str, loser: str
) -> None:
    """Present, uffd-wp, normal page, shared limit, lock, references, LRU last."""
    task = paused(machine, process, full, "prepared")
    with ExitStack() as stack:
        put_both(Site(machine, process, full, 5, stack), winner, loser)
        assert task.finish() is CAUSES[winner].isolate


def test_lru_and_lock_change_places(machine: Machine, process: Process, full: int) -> None:
    """One page, off the LRU and locked: page_not_in_lru to the scan, page_locked to isolation."""
    with ExitStack() as stack:
        task = paused(machine, process, full, "prepared")
        put_both(Site(machine, process, full, 5, stack), "lru", "lock")
        assert machine.collapse(process, full) is S.SCAN_PAGE_LRU
        assert task.finish() is S.SCAN_PAGE_LOCK


def test_swapped_out_page_with_uffd_wp_within_the_limit(
    machine: Machine, process: Process, full: int
) -> None:
    """Within the daemon's limit, and for MADV_COLLAPSE always, the mark on the entry counts."""
    with ExitStack() as stack:
        put_both(Site(machine, process, full, 5, stack), "swap", "uffd_wp")
        assert madv_collapse(process, full) is S.SCAN_PTE_UFFD_WP
        machine.khugepaged_settings.max_ptes_swap = 1
        assert machine.collapse(process, full) is S.SCAN_PTE_UFFD_WP
        assert machine.vmstat()["thp_scan_exceed_swap_pte"] == 0


@pytest.mark.parametrize(
    ("hand_made", "other", "winner"),
    [
        (anon, lock, S.SCAN_PAGE_LOCK),
        (anon, lru, S.SCAN_PAGE_LRU),
        (anon, count, S.SCAN_PAGE_ANON),
    ],
)
def test_page_anon_stands_between_lock_and_references(
    machine: Machine,
    process: Process,
    full: int,
    hand_made: Callable[[Site], None],
    other: Callable[[Site], None],
    winner: ScanResult,
) -> None:
    """The scan asks for PageAnon after the lock and before the references."""
    with ExitStack() as stack:
        site = Site(machine, process, full, 5, stack)
        hand_made(site)
        other(site)
        assert machine.collapse(process, full) is winner


@pytest.mark.parametrize(
    ("cause", "winner"),
    [
        (shared, S.SCAN_EXCEED_SHARED_PTE),
        (lru, S.SCAN_SCAN_ABORT),
        (lock, S.SCAN_SCAN_ABORT),
        (count, S.SCAN_SCAN_ABORT),
    ],
)
def test_scan_abort_stands_between_shared_and_lru(
    make_machine: MakeMachine, cause: Callable[[Site], None], winner: ScanResult
) -> None:
    """A page too far away is noticed behind the shared limit and before the LRU."""
    machine = make_machine("64M", nodes=2, distances=[[10, 40], [40, 10]])
    machine.node_reclaim_mode = 1
    machine.khugepaged_settings.max_ptes_shared = 0
    process = machine.process()
    block = process.mmap(HPAGE)
    process.madvise(block, HPAGE, 14)
    fill(process, block, range(5))
    process.node = 1
    fill(process, block, range(5, NR))
    machine.lru_add_drain_all()
    with ExitStack() as stack:
        cause(Site(machine, process, block, 5, stack))
        assert machine.collapse(process, block) is winner


LIMITS = {
    "none": ("max_ptes_none", none, S.SCAN_EXCEED_NONE_PTE),
    "zero": ("max_ptes_none", zero, S.SCAN_EXCEED_NONE_PTE),
    "swap": ("max_ptes_swap", swap, S.SCAN_EXCEED_SWAP_PTE),
}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("lock_at", [99, 101])
def test_limit_trips_at_the_entry_that_exceeds_it(
    machine: Machine, process: Process, full: int, kind: str, lock_at: int
) -> None:
    """With limit 2 the third entry (100) stops the scan; a locked page wins below, not above."""
    knob, put, result = LIMITS[kind]
    setattr(machine.khugepaged_settings, knob, 2)
    with ExitStack() as stack:
        for page in (10, 50, 100, 200):
            put(Site(machine, process, full, page, stack))
        lock(Site(machine, process, full, lock_at, stack))
        expected = S.SCAN_PAGE_LOCK if lock_at < 100 else result
        assert machine.collapse(process, full) is expected
        event = scans(machine)[-1]
        seen = 2 if lock_at < 100 else 3
        assert (event.none_or_zero, event.unmapped) == ((0, seen) if kind == "swap" else (seen, 0))


@pytest.mark.parametrize("lock_at", [99, 101])
def test_shared_limit_trips_at_the_entry_that_exceeds_it(
    machine: Machine, process: Process, block: int, lock_at: int
) -> None:
    """The same for pages shared with a child: 10 and 50 pass, 100 stops."""
    machine.khugepaged_settings.max_ptes_shared = 2
    fill(process, block, [10, 50, 100, 200])
    process.fork("child")
    fill(process, block, set(range(NR)) - {10, 50, 100, 200})
    machine.lru_add_drain_all()
    with ExitStack() as stack:
        lock(Site(machine, process, block, lock_at, stack))
        expected = S.SCAN_PAGE_LOCK if lock_at < 100 else S.SCAN_EXCEED_SHARED_PTE
        assert machine.collapse(process, block) is expected
        assert scans(machine)[-1].scan_pfn == pfn_of(process, block, min(lock_at, 100))


def test_isolation_counts_with_counters_of_its_own(
    machine: Machine, process: Process, full: int
) -> None:
    """Holes made after the scan are counted from 0 at isolation, with an event of their own."""
    machine.khugepaged_settings.max_ptes_none = 3
    discard(process, full, [1, 2, 3])
    task = paused(machine, process, full, "prepared")
    discard(process, full, [4])
    assert task.finish() is S.SCAN_EXCEED_NONE_PTE
    assert isolates(machine)[-1].none_or_zero == 4
    assert scans(machine)[-1].none_or_zero == 3
    assert machine.vmstat()["thp_scan_exceed_none_pte"] == 1


@pytest.mark.parametrize(
    ("cause", "writable"),
    [(lock, True), (lru, True), (count, True), (null, True), (uffd_wp, False), (none, False)],
)
def test_scan_notes_writable_before_it_looks_at_the_page(
    machine: Machine, process: Process, full: int, cause: Callable[[Site], None], writable: bool
) -> None:
    """A failure at entry 0 leaves writable=1 in the scan's event if the entry could be written."""
    with ExitStack() as stack:
        cause(Site(machine, process, full, 0, stack))
        machine.collapse(process, full)
        (event,) = scans(machine)
        assert event.writable is writable
        assert event.referenced == 0
        if cause in (none, uffd_wp):
            assert event.scan_pfn == -1


@pytest.mark.parametrize("cause", [lock, lru, count, null, uffd_wp, none])
def test_isolation_notes_writable_after_it_has_the_page(
    machine: Machine, process: Process, full: int, cause: Callable[[Site], None]
) -> None:
    """The same failure at isolation leaves writable=0."""
    task = paused(machine, process, full, "prepared")
    with ExitStack() as stack:
        cause(Site(machine, process, full, 0, stack))
        task.finish()
        (event,) = isolates(machine)
        assert event.writable is False
        assert event.referenced == 0


def test_page_ro_wins_over_lack_of_references(
    machine: Machine, process: Process, full: int
) -> None:
    """A block both read-only and unused is no_writable_page."""
    process.mprotect(full, HPAGE, PROT_READ)
    ptes_of(process, full)[:] &= np.uint64(~PAGE_ACCESSED & (1 << 64) - 1)
    assert machine.collapse(process, full) is S.SCAN_PAGE_RO
