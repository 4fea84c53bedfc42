"""Table 3.6 of the behavioural reference: what a collapse moves, by layout and by ending.

n entries are none or map the zero page, u pages are mapped only here, s are shared with another
process; n + u + s = 512. The expected numbers are the table's, in terms of these.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    advised,
    changes,
    collapse_task,
    compound_block,
    counters,
    discard,
    fill,
    flags_of,
    page_bytes,
    pageout,
    paused,
    pfn_of,
    ptes_of,
    snapshot,
    touch,
)

from pykhuge import Machine, Process, ScanResult
from pykhuge.mm.page import PG_anon_exclusive, PG_locked, PG_lru, PG_swapbacked, PG_uptodate


class Layout(NamedTuple):
    """Which page of the block is what; the rest are holes.

    own, shared: base pages. compound_own, compound_shared: subpages of one huge page.
    swapped: among `own`, those that are swapped out.
    """

    zero: Iterable[int] = ()
    own: Iterable[int] = ()
    shared: Iterable[int] = ()
    swapped: Iterable[int] = ()
    compound_own: Iterable[int] = ()
    compound_shared: Iterable[int] = ()

    @property
    def u(self) -> int:
        """Sources mapped only here."""
        return len([*self.own, *self.compound_own])

    @property
    def s(self) -> int:
        """Sources shared elsewhere."""
        return len([*self.shared, *self.compound_shared])

    @property
    def n(self) -> int:
        """None and zero-page entries."""
        return NR - self.u - self.s

    @property
    def isolated(self) -> int:
        """What nr_isolated_anon must peak at: base pages, and 512 for a compound page."""
        compound = [*self.compound_own, *self.compound_shared]
        return len([*self.own, *self.shared]) + NR * bool(compound)


EVEN, ODD = range(0, NR, 2), range(1, NR, 2)
LAYOUTS = {
    "all own": Layout(own=range(NR)),
    "one page": Layout(own=[7]),
    "first and last": Layout(own=[0, 511]),
    "holes between": Layout(own=EVEN),
    "zero pages between": Layout(own=EVEN, zero=ODD),
    "holes and zero pages": Layout(own=range(10, 200), zero=range(300, 400)),
    "half shared": Layout(own=EVEN, shared=ODD),
    "all but one shared": Layout(own=[511], shared=range(511)),
    "shared, holes, zero pages": Layout(
        own=range(100), shared=range(100, 200), zero=range(200, 300)
    ),
    "swapped out": Layout(own=range(NR), swapped=range(60)),
    "swapped out, shared, holes": Layout(
        own=range(300), shared=range(400, 450), swapped=range(1, 61)
    ),
    "compound": Layout(compound_own=range(NR)),
    "compound with holes": Layout(compound_own=range(3, 77)),
    "compound and base pages": Layout(compound_own=EVEN, own=ODD),
    "compound shared": Layout(own=range(50), compound_shared=range(50, NR)),
    "all of it": Layout(
        own=range(90),
        swapped=range(20),
        shared=range(90, 170),
        zero=range(170, 250),
        compound_own=range(250, 330),
        compound_shared=range(330, 410),
    ),
}


class Built(NamedTuple):
    machine: Machine
    process: Process
    child: Process | None
    addr: int
    layout: Layout


def build(machine: Machine, process: Process, layout: Layout) -> Built:
    """Lay the block out by system calls; limits that would stop the daemon are lifted."""
    machine.khugepaged_settings.max_ptes_shared = 511
    machine.khugepaged_settings.max_ptes_swap = 511
    compound = sorted([*layout.compound_own, *layout.compound_shared])
    if compound:
        addr = compound_block(process)
        discard(process, addr, set(range(NR)) - set(compound))
    else:
        addr = advised(process)
    fill(process, addr, layout.shared)
    child = None
    if layout.shared or layout.compound_shared:
        child = process.fork("child")
        discard(child, addr, layout.compound_own)
    fill(process, addr, layout.own)
    touch(process, addr, layout.zero)
    if layout.compound_own and not layout.own:
        process.write(addr + next(iter(layout.compound_own)) * PAGE, b"")
    machine.lru_add_drain_all()
    pageout(process, addr, layout.swapped)
    machine.lru_add_drain_all()
    machine.trace.clear()
    return Built(machine, process, child, addr, layout)


@pytest.fixture(params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def built(request: pytest.FixtureRequest, machine: Machine, process: Process) -> Built:
    return build(machine, process, request.param)


def own_page(layout: Layout) -> int:
    """A page that is there, and not swapped out."""
    candidates = [*layout.own, *layout.compound_own, *layout.shared]
    return max(page for page in candidates if page not in layout.swapped)


def fail_isolation(built: Built) -> ScanResult:
    """Let isolation fail at the block's last present page: somebody takes a reference before."""
    task = paused(built.machine, built.process, built.addr, "prepared")
    held = built.process.get(built.addr + own_page(built.layout) * PAGE, 1)
    result = task.finish()
    held.release()
    assert isinstance(result, ScanResult)
    return result


def poisoned_collapse(built: Built) -> ScanResult:
    built.process.poison(built.addr + own_page(built.layout) * PAGE, 5)
    return built.machine.collapse(built.process, built.addr)


Ending = Callable[[Built], ScanResult]
ENDINGS = [
    pytest.param(fail_isolation, id="isolate"),
    pytest.param(poisoned_collapse, id="copy_mc"),
]


def table_changes(built: Built, before: dict[str, int], names: Iterable[str]) -> dict[str, int]:
    found = changes(before, counters(built.machine, built.process))
    return {name: found.get(name, 0) for name in names}


CELLS = (
    "MM_ANONPAGES",
    "MM_SWAPENTS",
    "nr_anon_pages",
    "nr_anon_transparent_hugepages",
    "nr_isolated_anon",
    "nr_isolated_file",
    "pgtables",
    "nr_page_table_pages",
    "thp_collapse_alloc",
    "thp_collapse_alloc_failed",
)


def test_success_moves_the_counters_of_the_table(built: Built) -> None:
    """MM_ANONPAGES +n, nr_anon_pages +512-u, one huge page more, and nothing else."""
    before = counters(built.machine, built.process)
    assert built.machine.collapse(built.process, built.addr) is ScanResult.SCAN_SUCCEED
    swapped = len(list(built.layout.swapped))
    assert table_changes(built, before, CELLS) == {
        "MM_ANONPAGES": built.layout.n + swapped,
        "MM_SWAPENTS": -swapped,
        "nr_anon_pages": NR - built.layout.u + swapped,
        "nr_anon_transparent_hugepages": 1,
        "nr_isolated_anon": 0,
        "nr_isolated_file": 0,
        "pgtables": 0,
        "nr_page_table_pages": 0,
        "thp_collapse_alloc": 1,
        "thp_collapse_alloc_failed": 0,
    }
    assert built.process.is_huge(built.addr)


@pytest.mark.parametrize("ending", ENDINGS)
def test_failure_moves_nothing_but_the_allocation_and_swapped_in_pages(
    built: Built, ending: Ending
) -> None:
    """After a failed isolation or a poisoned copy every counter is back; swapped-in pages stay."""
    before = counters(built.machine, built.process)
    result = ending(built)
    assert result is not ScanResult.SCAN_SUCCEED
    swapped = len(list(built.layout.swapped))
    assert table_changes(built, before, CELLS) == {
        "MM_ANONPAGES": swapped,
        "MM_SWAPENTS": -swapped,
        "nr_anon_pages": swapped,
        "nr_anon_transparent_hugepages": 0,
        "nr_isolated_anon": 0,
        "nr_isolated_file": 0,
        "pgtables": 0,
        "nr_page_table_pages": 0,
        "thp_collapse_alloc": 1,
        "thp_collapse_alloc_failed": 0,
    }
    assert not built.process.is_huge(built.addr)
    built.machine.lru_add_drain_all()
    free = built.machine.vmstat()["nr_free_pages"] - before["nr_free_pages"]
    assert free == -swapped  # the huge page is free again


def test_pages_are_isolated_all_at_once_at_the_peak(built: Built) -> None:
    """While the copy runs nr_isolated_anon is u + s, compound pages counted whole."""
    task = paused(built.machine, built.process, built.addr, "copied")
    assert built.machine.vmstat()["nr_isolated_anon"] == built.layout.isolated
    built.machine.audit()
    assert task.finish() is ScanResult.SCAN_SUCCEED
    assert built.machine.vmstat()["nr_isolated_anon"] == 0


def test_copied_bytes_are_those_of_the_small_pages(built: Built) -> None:
    """The huge page reads as the block did: pages where there were pages, zeros elsewhere."""
    layout = built.layout
    there = [*layout.own, *layout.shared, *layout.compound_own, *layout.compound_shared]
    expected = bytearray(HPAGE)
    for page in there:
        expected[page * PAGE : (page + 1) * PAGE] = page_bytes(page)
    assert built.machine.collapse(built.process, built.addr) is ScanResult.SCAN_SUCCEED
    assert built.process.read(built.addr, HPAGE) == expected
    if built.child is not None:
        for page in [*layout.shared, *layout.compound_shared]:
            assert built.child.read(built.addr + page * PAGE, PAGE) == page_bytes(page)


def test_success_gives_sources_up(machine: Machine, process: Process) -> None:
    """An exclusive source is freed, a shared one loses a reference and a mapping, unlocked."""
    built = build(machine, process, LAYOUTS["half shared"])
    own, shared = pfn_of(process, built.addr, 0), pfn_of(process, built.addr, 1)
    pages = machine.mem.pages
    assert (pages.refcount[shared], pages.mapcount[shared]) == (2, 2)
    assert machine.collapse(process, built.addr) is ScanResult.SCAN_SUCCEED
    machine.lru_add_drain_all()
    assert pages.refcount[own] == 0
    assert flags_of(process, own) == 0
    assert (pages.refcount[shared], pages.mapcount[shared]) == (1, 1)
    assert flags_of(process, shared) & (PG_locked | PG_lru) == PG_lru


def test_success_leaves_a_huge_page_as_a_new_one_is(machine: Machine, process: Process) -> None:
    """The huge page has one reference, and is uptodate, swap-backed, exclusive and on the LRU."""
    built = build(machine, process, LAYOUTS["holes and zero pages"])
    assert machine.collapse(process, built.addr) is ScanResult.SCAN_SUCCEED
    head = pfn_of(process, built.addr, 0)
    assert head % NR == 0
    assert machine.mem.pages.refcount[head] == 1
    assert machine.mem.pages.entire_mapcount[head] == 1
    wanted = PG_uptodate | PG_swapbacked | PG_anon_exclusive | PG_lru
    assert flags_of(process, head) & (wanted | PG_locked) == wanted


@pytest.mark.parametrize("ending", ENDINGS)
def test_failure_leaves_sources_locked_by_nobody_and_back_on_the_lru(
    built: Built, ending: Ending
) -> None:
    """Reference and map counts are what they were once the batch is drained."""
    task = paused(built.machine, built.process, built.addr, "prepared")
    pages = built.machine.mem.pages
    words = ptes_of(built.process, built.addr)
    pfns = [int(word) >> 12 & (1 << 40) - 1 for word in words if int(word) & 1 and int(word) >> 12]
    pfns = [pfn for pfn in pfns if pfn != built.machine.mem.zero_pfn]
    before = [(int(pages.refcount[pfn]), int(pages.mapcount[pfn])) for pfn in pfns]
    built.process.poison(built.addr + own_page(built.layout) * PAGE)
    held = None
    if ending is fail_isolation:
        held = built.process.get(built.addr + own_page(built.layout) * PAGE, 1)
    assert task.finish() in (ScanResult.SCAN_PAGE_COUNT, ScanResult.SCAN_COPY_MC)
    if held is not None:
        held.release()
    built.machine.lru_add_drain_all()
    assert [(int(pages.refcount[pfn]), int(pages.mapcount[pfn])) for pfn in pfns] == before
    flags = np.array([flags_of(built.process, int(pages.head_of(pfn))) for pfn in pfns])
    assert not (flags & PG_locked).any()
    assert (flags & PG_lru).all()


@pytest.mark.parametrize("ending", ENDINGS)
def test_failure_leaves_page_tables_bit_identical(built: Built, ending: Ending) -> None:
    """PMD, every PTE (zero-page, young and dirty bits) and every byte are what they were."""
    task = collapse_task(built.machine, built.process, built.addr)
    task.run_until("acquire mmap_lock for write")  # swapped-in pages stay in
    before = snapshot(built.process, built.addr)
    held = None
    if ending is fail_isolation:
        held = built.process.get(built.addr + own_page(built.layout) * PAGE, 1)
    else:
        built.process.poison(built.addr + own_page(built.layout) * PAGE)
    assert task.finish() is not ScanResult.SCAN_SUCCEED
    assert snapshot(built.process, built.addr) == before
    if held is not None:
        held.release()


def test_charge_follows_the_huge_page(machine: Machine) -> None:
    """Success keeps 512 pages charged instead of the sources; COPY_MC returns them.

    Two page tables are charged besides: the PMD's stays, the PTEs' is deposited.
    """
    group = machine.memcg("8M")
    process = machine.process(memcg=group)
    addr = advised(process)
    fill(process, addr, range(100))
    process.poison(addr + 99 * PAGE)
    assert machine.collapse(process, addr) is ScanResult.SCAN_COPY_MC
    assert group.usage == 100 + 2
    machine.mem.poison.unpoison(pfn_of(process, addr, 99))
    assert machine.collapse(process, addr) is ScanResult.SCAN_SUCCEED
    machine.lru_add_drain_all()
    assert group.usage == NR + 2


def test_only_the_daemon_counts_what_it_collapsed(machine: Machine, process: Process) -> None:
    """pages_collapsed is +1 for a huge page of the daemon's, and 0 for any failure."""
    addr = advised(process)
    fill(process, addr)
    process.poison(addr)
    assert machine.collapse(process, addr) is ScanResult.SCAN_COPY_MC
    assert machine.khugepaged_settings.pages_collapsed == 0
    machine.mem.poison.unpoison(pfn_of(process, addr, 0))
    assert machine.collapse(process, addr) is ScanResult.SCAN_SUCCEED
    assert machine.khugepaged_settings.pages_collapsed == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_postings_of_a_rollback_cancel(machine: Machine, process: Process, ending: Ending) -> None:
    """The ledger of a failed collapse balances, but for the event of the allocation."""
    built = build(machine, process, LAYOUTS["compound and base pages"])
    with machine.ledger() as ledger:
        ending(built)
        machine.lru_add_drain_all()
    assert ledger.postings
    assert ledger.balance() == {("event", "thp_collapse_alloc"): 1}
    ledger.assert_cancels(except_for=["thp_collapse_alloc"])


def test_secondary_mmus_and_tlbs_are_told_whatever_the_result(built: Built) -> None:
    """The notifier hears start and end of the block once, on success as on failure."""
    heard: list[tuple[str, int, int]] = []

    class Notifier:
        def invalidate_range_start(self, start: int, end: int) -> None:
            heard.append(("start", start, end))

        def invalidate_range_end(self, start: int, end: int) -> None:
            heard.append(("end", start, end))

        def test_young(self, addr: int) -> bool:  # noqa: ARG002
            return False

    built.process.register_mmu_notifier(Notifier())
    block = (built.addr, built.addr + HPAGE)
    flushes = built.process.mm.tlb_gen
    assert poisoned_collapse(built) is ScanResult.SCAN_COPY_MC
    assert heard == [("start", *block), ("end", *block)]
    assert built.process.mm.tlb_gen == flushes + 1
