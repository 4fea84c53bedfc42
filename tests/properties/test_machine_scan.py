"""The scan and the isolation of 512 entries at once, against loops that look at them one by one.

The loops are written from the kernel's order of tests, without numpy and without the model's code.
"""

# ruff: noqa: C901, PLR0912, PLR0915  the kernel's loops, as long as they are there

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from collapse_kit import small_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge.khugepaged import anon, scan
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.mm_types import Mm, Vma
from pykhuge.mm.page import (
    PG_anon,
    PG_head,
    PG_isolated,
    PG_locked,
    PG_lru,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_tail,
    PG_uptodate,
    PG_young,
    PG_zone_device,
)

BASE = 0x7F00_0000_0000
RW, WRITE_PROTECTED, YOUNG, SPECIAL = 1 << 1, 1 << 10, 1 << 5, 1 << 9
PRESENT, USER = 1, 1 << 2
SWAP_UFFD_WP = 1 << 2
GOOD = PG_anon | PG_lru | PG_swapbacked | PG_uptodate
NR_BASE = 1024  # frames for base pages, on two nodes; compound ones stand behind
S = ScanResult


@dataclass
class Entry:
    """One PTE as a test sees it: a kind, and what is behind it."""

    kind: str  # none, zero, swap, hwpoison, migration, marker, marker_wp, page
    bits: int = 0
    pfn: int = -1


@dataclass
class Page:
    """One page: `head` is itself unless it is a subpage."""

    pfn: int
    head: int
    node: int
    flags: int = GOOD
    mapcount: int = 1
    entire: int = 0
    extra_references: int = 0
    compound: bool = False


@dataclass
class Layout:
    """512 entries, the pages behind them, and who asks."""

    entries: list[Entry]
    pages: dict[int, Page]
    is_khugepaged: bool
    armed: bool
    limits: dict[str, int]
    node_reclaim: bool
    far: bool
    young_for_notifier: set[int] = field(default_factory=set)
    expected: dict[int, int] = field(default_factory=dict)  # by head: mappings and swap cache
    references: dict[int, int] = field(default_factory=dict)  # by head: those, and others

    def __post_init__(self) -> None:
        for page in self.pages.values():
            alone = page.entire + (page.flags & PG_swapcache != 0) * (512 if page.compound else 1)
            self.expected[page.head] = self.expected.get(page.head, alone) + page.mapcount
        for page in self.pages.values():
            self.references[page.head] = self.expected[page.head] + page.extra_references


NOT_PAGES = ("none", "zero", "swap", "swap_wp", "hwpoison", "migration", "marker", "marker_wp")
FLAGS = {"locked": PG_locked, "referenced": PG_referenced, "young": PG_young}
ODDITIES = (
    *NOT_PAGES,
    *FLAGS,
    *("off_lru", "not_anon", "extra", "shared", "zone_device", "swapcache", "uffd_wp", "subpage"),
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Mostly good pages, with a few kinds of oddities, rare or frequent, strewn over the block."""
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    chosen = draw(st.lists(st.sampled_from(ODDITIES), max_size=4, unique=True))
    rates = {odd: draw(st.sampled_from([1 / 512, 1 / 64, 1 / 4, 0.7])) for odd in chosen}
    writable = draw(st.sampled_from([0, 1 / 256, 0.9]))
    young = draw(st.sampled_from([0, 1 / 256, 0.45, 1]))
    compounds = [2048 + 512 * i for i in range(3)]
    spares = {head: list(range(head, head + 512)) for head in compounds}
    for spare in spares.values():
        rng.shuffle(spare)
    frames = list(range(1, NR_BASE))
    rng.shuffle(frames)
    two_nodes = draw(st.booleans())
    pages: dict[int, Page] = {}
    entries: list[Entry] = []
    heads: dict[int, dict[str, int]] = {
        head: {"flags": GOOD | PG_head, "extra": 0, "entire": int(rng.random() < 0.2)}
        for head in compounds
    }
    for _ in range(512):
        odd = {name for name in chosen if rng.random() < rates[name]}
        kind = next((name for name in NOT_PAGES if name in odd), "page")
        if kind != "page":
            entries.append(Entry(kind))
            continue
        bits = RW * (rng.random() < writable) | YOUNG * (rng.random() < young)
        bits |= WRITE_PROTECTED * ("uffd_wp" in odd)
        if "subpage" in odd:
            head = rng.choice(compounds)
            pfn = spares[head].pop()
            state = heads[head]
        else:
            pfn = frames.pop() if two_nodes else min(frames)
            if not two_nodes:
                frames.remove(pfn)
            head, state = pfn, {"flags": GOOD, "extra": 0, "entire": 0}
        for name, bit in (
            ("locked", PG_locked),
            ("referenced", PG_referenced),
            ("young", PG_young),
        ):
            state["flags"] |= bit * (name in odd)
        state["flags"] |= PG_swapcache * ("swapcache" in odd)
        state["flags"] &= ~(PG_lru * ("off_lru" in odd))
        state["flags"] &= ~(PG_anon * ("not_anon" in odd))
        state["flags"] |= PG_zone_device * ("zone_device" in odd and head == pfn)
        state["extra"] += "extra" in odd
        mapcount = 1 + ("shared" in odd)
        pages[pfn] = Page(pfn, head, 0, mapcount=mapcount, compound=head != pfn or pfn in heads)
        pages[pfn].flags, pages[pfn].extra_references = state["flags"], state["extra"]
        entries.append(Entry("page", bits, pfn))
    for page in pages.values():
        page.compound = page.head in heads
        if page.compound:
            state = heads[page.head]
            page.flags, page.extra_references = state["flags"], state["extra"]
            page.entire = state["entire"]
        page.node = int(page.head >= 512 and page.head < 1024) if not page.compound else 1
    return Layout(
        entries,
        pages,
        is_khugepaged=draw(st.booleans()),
        armed=draw(st.sampled_from([False, False, True])),
        limits={
            name: draw(st.sampled_from([0, 1, 8, 64, 256, 511]))
            for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")
        },
        node_reclaim=draw(st.booleans()),
        far=draw(st.booleans()),
        young_for_notifier={rng.randrange(512)} if draw(st.booleans()) else set(),
    )


def swap_word(kind: int, offset: int, bits: int = 0) -> int:
    """Type in bits 59..63, the offset inverted in bits 9..58."""
    return kind << 59 | ((1 << 50) - 1 ^ offset) << 9 | bits


def word(entry: Entry) -> int:
    if entry.kind == "page":
        return entry.pfn << 12 | PRESENT | USER | entry.bits
    return {
        "none": 0,
        "zero": PRESENT | USER | SPECIAL,
        "swap": swap_word(0, 77),
        "swap_wp": swap_word(0, 78, SWAP_UFFD_WP),
        "hwpoison": swap_word(23, 79),
        "migration": swap_word(24, 80),
        "marker": swap_word(31, 2),
        "marker_wp": swap_word(31, 1),
    }[entry.kind]


class Notifier:
    """A secondary MMU that has used a few addresses."""

    def __init__(self, places: set[int]) -> None:
        self.young = {BASE + place * 4096 for place in places}

    def test_young(self, addr: int) -> bool:
        return addr in self.young

    def invalidate_range_start(self, start: int, end: int) -> None: ...

    def invalidate_range_end(self, start: int, end: int) -> None: ...


def build(layout: Layout) -> tuple[Machine, Any, Vma, CollapseControl]:
    """The same as a page table and struct pages of a machine."""
    distance = 40 if layout.far else 20
    machine = small_machine(nodes=["2M", "14M"], distances=[[10, distance], [distance, 10]], seed=1)
    mem = machine.mem
    mem.node_reclaim_mode = int(layout.node_reclaim)
    for name, value in layout.limits.items():
        setattr(machine.khugepaged_settings, name, value)
    pages = mem.pages
    for page in layout.pages.values():
        if page.compound:
            pages.flags[page.head] = page.flags
            tails = np.arange(page.head + 1, page.head + 512)
            pages.flags[tails] = PG_tail
            pages.order[page.head : page.head + 512] = 9
            pages.entire_mapcount[page.head] = page.entire
        else:
            pages.flags[page.pfn] = page.flags
        pages.mapcount[page.pfn] = page.mapcount
    for head, references in layout.references.items():
        pages.refcount[head] = references
    table = np.array([word(entry) for entry in layout.entries], np.uint64)
    mm = Mm("mm:1", 1, mem.memcgs[0])
    if layout.young_for_notifier:
        mm.mmu_notifiers.append(Notifier(layout.young_for_notifier))
    flags = 0x3 | (0x200 if layout.armed else 0)
    vma = Vma(mm, BASE, BASE + (2 << 20), flags, BASE >> 12)
    cc = CollapseControl(is_khugepaged=layout.is_khugepaged, settings=machine.khugepaged_settings)
    return machine, table, vma, cc


def young(layout: Layout, page: Page, bits: int, notified: int) -> bool:
    return bool(
        bits & YOUNG
        or page.flags & (PG_referenced | PG_young)
        or notified in layout.young_for_notifier
    )


def slow_scan(layout: Layout) -> dict[str, Any]:
    """hpage_collapse_scan_pmd's loop, one entry at a time."""
    daemon, limits = layout.is_khugepaged, layout.limits
    none = unmapped = shared = referenced = 0
    writable, page_pfn, load = False, -1, {}  # type: ignore[var-annotated]
    result = S.SCAN_SUCCEED
    for entry in layout.entries:
        if entry.kind in ("swap", "swap_wp", "hwpoison", "migration", "marker", "marker_wp"):
            unmapped += 1
            if daemon and unmapped > limits["max_ptes_swap"]:
                result = S.SCAN_EXCEED_SWAP_PTE
                break
            if entry.kind in ("swap_wp", "marker_wp"):
                result = S.SCAN_PTE_UFFD_WP
                break
            continue
        if entry.kind in ("none", "zero"):
            none += 1
            if not layout.armed and (not daemon or none <= limits["max_ptes_none"]):
                continue
            result = S.SCAN_EXCEED_NONE_PTE
            break
        if entry.bits & WRITE_PROTECTED:
            result = S.SCAN_PTE_UFFD_WP
            break
        writable = writable or bool(entry.bits & RW)
        page = layout.pages[entry.pfn]
        page_pfn = page.pfn
        if page.flags & PG_zone_device:
            result = S.SCAN_PAGE_NULL
            break
        if page.mapcount + page.entire > 1:
            shared += 1
            if daemon and shared > limits["max_ptes_shared"]:
                result = S.SCAN_EXCEED_SHARED_PTE
                break
        page_pfn = page.head
        if layout.node_reclaim and page.node not in load and load and layout.far:
            result = S.SCAN_SCAN_ABORT
            break
        load[page.node] = load.get(page.node, 0) + 1
        if not page.flags & PG_lru:
            result = S.SCAN_PAGE_LRU
            break
        if page.flags & PG_locked:
            result = S.SCAN_PAGE_LOCK
            break
        if not page.flags & PG_anon:
            result = S.SCAN_PAGE_ANON
            break
        if unexpected_references(layout, page):
            result = S.SCAN_PAGE_COUNT
            break
        # The kernel asks the notifier about the start of the block here.
        referenced += daemon and young(layout, page, entry.bits, 0)
    if result is S.SCAN_SUCCEED:
        if not writable:
            result = S.SCAN_PAGE_RO
        elif daemon and (referenced == 0 or (unmapped and referenced < 256)):
            result = S.SCAN_LACK_REFERENCED_PAGE
    return {
        "result": result,
        "page": page_pfn,
        "writable": writable,
        "referenced": referenced,
        "none_or_zero": none,
        "unmapped": unmapped,
        "node_load": load,
    }


def unexpected_references(layout: Layout, page: Page) -> bool:
    return layout.references[page.head] != layout.expected[page.head]


def slow_isolate(layout: Layout) -> dict[str, Any]:
    """__collapse_huge_page_isolate's loop, one entry at a time."""
    daemon, limits = layout.is_khugepaged, layout.limits
    none = shared = referenced = 0
    writable, page_pfn = False, -1
    accepted: list[int] = []
    result = S.SCAN_SUCCEED
    for place, entry in enumerate(layout.entries):
        if entry.kind in ("none", "zero"):
            none += 1
            if not layout.armed and (not daemon or none <= limits["max_ptes_none"]):
                continue
            result = S.SCAN_EXCEED_NONE_PTE
            break
        if entry.kind != "page":
            result = S.SCAN_PTE_NON_PRESENT
            break
        if entry.bits & WRITE_PROTECTED:
            result = S.SCAN_PTE_UFFD_WP
            break
        page = layout.pages[entry.pfn]
        page_pfn = page.pfn
        if page.flags & PG_zone_device:
            result = S.SCAN_PAGE_NULL
            break
        if page.mapcount + page.entire > 1:
            shared += 1
            if daemon and shared > limits["max_ptes_shared"]:
                result = S.SCAN_EXCEED_SHARED_PTE
                break
        page_pfn = page.head
        if not (page.compound and page.head in accepted):
            if page.flags & PG_locked:
                result = S.SCAN_PAGE_LOCK
                break
            if unexpected_references(layout, page):
                result = S.SCAN_PAGE_COUNT
                break
            if not page.flags & PG_lru:
                result = S.SCAN_DEL_PAGE_LRU
                break
            accepted.append(page.head)
        referenced += daemon and young(layout, page, entry.bits, place)
        writable = writable or bool(entry.bits & RW)
    if result is S.SCAN_SUCCEED:
        if not writable:
            result = S.SCAN_PAGE_RO
        elif daemon and not referenced:
            result = S.SCAN_LACK_REFERENCED_PAGE
    return {
        "result": result,
        "page": page_pfn,
        "writable": writable,
        "referenced": referenced,
        "none_or_zero": none,
        "accepted": accepted,
    }


EVENTS = {
    S.SCAN_EXCEED_NONE_PTE: "thp_scan_exceed_none_pte",
    S.SCAN_EXCEED_SWAP_PTE: "thp_scan_exceed_swap_pte",
    S.SCAN_EXCEED_SHARED_PTE: "thp_scan_exceed_share_pte",
}


def events(machine: Machine) -> dict[str, int]:
    return {name: count for name, count in machine.vmstat().items() if name in EVENTS.values()}


def expected_events(result: ScanResult) -> dict[str, int]:
    return {name: int(EVENTS.get(result) == name) for name in EVENTS.values()}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layouts())
def test_scan_finds_what_a_loop_over_the_entries_finds(layout: Layout) -> None:
    """Result, page, counts, events and node load are those of the kernel's loop, for any block."""
    machine, table, vma, cc = build(layout)
    frame = machine.mem.nr_pages - 1
    machine.mem.ram.words[frame] = table
    found = scan._scan_ptes(machine.mem, frame, vma, BASE, cc)
    slow = slow_scan(layout)
    load = slow.pop("node_load")
    assert found._asdict() == slow
    assert events(machine) == expected_events(slow["result"])
    if found.result is S.SCAN_SUCCEED:
        assert cc.node_load == load


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layouts())
def test_isolation_takes_what_a_loop_over_the_entries_takes(layout: Layout) -> None:
    """Result, trace fields, events and the pages taken are those of the kernel's loop."""
    machine, table, vma, cc = build(layout)
    mem = machine.mem
    before = mem.pages.refcount.copy()
    isolated = anon._collapse_huge_page_isolate(mem, table, vma, BASE, cc)
    slow = slow_isolate(layout)
    event = list(machine.trace)[-1].event
    assert event.name == "mm_collapse_huge_page_isolate"
    traced = {
        "result": event.status,  # type: ignore[attr-defined]
        "page": event.scan_pfn,  # type: ignore[attr-defined]
        "writable": event.writable,  # type: ignore[attr-defined]
        "referenced": event.referenced,  # type: ignore[attr-defined]
        "none_or_zero": event.none_or_zero,  # type: ignore[attr-defined]
        "accepted": isolated.pages.tolist(),
    }
    heads = {page.head for page in layout.pages.values() if page.compound}
    base = [pfn for pfn in slow["accepted"] if pfn not in heads]
    compound = [pfn for pfn in slow["accepted"] if pfn in heads]
    assert traced == slow | {"accepted": base + compound}
    assert events(machine) == expected_events(slow["result"])
    taken = np.array(slow["accepted"], np.int64)
    if isolated.result is S.SCAN_SUCCEED:
        assert (mem.pages.flags[taken] & PG_locked).all()
        assert (mem.pages.flags[taken] & PG_isolated).all()
        assert (mem.pages.refcount[taken] == before[taken] + 1).all()
    else:
        waiting = {pfn for batch in mem.lru_batches for pfn in batch}
        for pfn in taken.tolist():
            assert not mem.pages.flags[pfn] & (PG_locked | PG_isolated)
            assert bool(mem.pages.flags[pfn] & PG_lru) != (pfn in waiting)
            assert mem.pages.refcount[pfn] == before[pfn] + (pfn in waiting)
    others = np.setdiff1d(np.arange(mem.pages.nr_pages), taken)
    assert (mem.pages.refcount[others] == before[others]).all()


def test_layouts_reach_every_result() -> None:
    """The random blocks of this file stop for every reason that the loops know."""
    scanned: set[ScanResult] = set()
    isolated: set[ScanResult] = set()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(layouts())
    def collect(layout: Layout) -> None:
        scanned.add(slow_scan(layout)["result"])
        isolated.add(slow_isolate(layout)["result"])

    collect()
    common = {S.SCAN_SUCCEED, S.SCAN_EXCEED_NONE_PTE, S.SCAN_EXCEED_SHARED_PTE, S.SCAN_PTE_UFFD_WP}
    common |= {S.SCAN_PAGE_NULL, S.SCAN_PAGE_LOCK, S.SCAN_PAGE_COUNT, S.SCAN_PAGE_RO}
    common |= {S.SCAN_LACK_REFERENCED_PAGE}
    here = {S.SCAN_EXCEED_SWAP_PTE, S.SCAN_SCAN_ABORT, S.SCAN_PAGE_LRU, S.SCAN_PAGE_ANON}
    assert scanned == common | here
    assert isolated == common | {S.SCAN_PTE_NON_PRESENT, S.SCAN_DEL_PAGE_LRU}
