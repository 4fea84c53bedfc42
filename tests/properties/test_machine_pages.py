"""The allocator, the LRU batches and swap entries against the plainest models of themselves."""

from __future__ import annotations

import random

import numpy as np
from collapse_kit import small_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge.mm.page import PG_anon, PG_head, PG_lru, PG_swapbacked
from pykhuge.mm.page_alloc import alloc_huge_page, alloc_pages
from pykhuge.mm.page_table import (
    PAGE_PRESENT,
    is_swap_pte,
    is_swap_ptes,
    make_swap_pte,
    swp_offset,
    swp_offsets,
    swp_type,
)
from pykhuge.mm.swap import lru_add_drain, lru_cache_add, lru_pages, put_pages
from pykhuge.mm.vmstat import NR_FREE_PAGES, NR_INACTIVE_ANON

BATCH = 15
NR_BLOCKS = 4  # on each of two nodes


class Bitmap:
    """Two nodes of blocks of 512 frames, a flag each; frame 0 is taken."""

    def __init__(self) -> None:
        self.free = [True] * (2 * NR_BLOCKS * 512)
        self.free[0] = False

    def blocks(self, nid: int) -> list[range]:
        nodes = (nid, 1 - nid)
        return [
            range((node * NR_BLOCKS + block) * 512, (node * NR_BLOCKS + block + 1) * 512)
            for node in nodes
            for block in range(NR_BLOCKS)
        ]

    def alloc(self, nid: int) -> int | None:
        """One frame: of a block already broken into, else of a free one; near node first."""
        for node in (self.blocks(nid)[:NR_BLOCKS], self.blocks(nid)[NR_BLOCKS:]):
            counts = [sum(self.free[pfn] for pfn in block) for block in node]
            broken = [i for i, nr in enumerate(counts) if 0 < nr < 512]
            for index in broken[:1] or [i for i, nr in enumerate(counts) if nr][:1]:
                pfn = next(pfn for pfn in node[index] if self.free[pfn])
                self.free[pfn] = False
                return pfn
        return None

    def alloc_huge(self, nid: int, mask: set[int] | None) -> int | None:
        for block in self.blocks(nid):
            nid_of = block.start // (NR_BLOCKS * 512)
            if (mask is None or nid_of in mask) and all(self.free[pfn] for pfn in block):
                self.free[block.start : block.stop] = [False] * 512
                return block.start
        return None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1 << 16)), min_size=1, max_size=25))
def test_allocator_gives_the_frames_a_bitmap_gives(calls: list[tuple[int, int]]) -> None:
    """The same frames in the same order, fragmentation and all, and the same count of free ones."""
    machine, bitmap = small_machine("16M", nodes=2), Bitmap()
    mem = machine.mem
    base: list[int] = []
    huge: list[int] = []
    for kind, number in calls:
        rng = random.Random(number)
        nid = number % 2
        if kind in (0, 1):
            nr = rng.choice([1, 7, 512, 700])
            got = alloc_pages(mem, nr, nid).tolist()
            expected = [pfn for pfn in (bitmap.alloc(nid) for _ in range(nr)) if pfn is not None]
            assert got == expected
            assert (mem.pages.refcount[got] == 1).all()
            base += got
        elif kind == 2:
            mask = rng.choice([None, {0}, {1}, {0, 1}])
            head = alloc_huge_page(mem, nid, mask)
            assert head == bitmap.alloc_huge(nid, mask)
            huge += [] if head is None else [head]
        elif kind == 3 and base:
            rng.shuffle(base)
            nr = rng.randint(1, len(base))
            gone, base = base[:nr], base[nr:]
            put_pages(mem, np.array(gone))
            for pfn in gone:
                bitmap.free[pfn] = True
        elif huge:
            head = huge.pop(rng.randrange(len(huge)))
            put_pages(mem, np.array([head]))
            bitmap.free[head : head + 512] = [True] * 512
        assert sum(node[NR_FREE_PAGES] for node in mem.vmstat.node) == sum(bitmap.free)


class Batches:
    """LRU lists fed one page at a time: a batch is flushed when it has 15, or a compound page."""

    def __init__(self) -> None:
        self.waiting: list[list[int]] = [[], []]
        self.lru: list[int] = []
        self.references: dict[int, int] = {}

    def add(self, cpu: int, pfn: int, *, compound: bool) -> None:
        self.waiting[cpu].append(pfn)
        if compound or len(self.waiting[cpu]) == BATCH:
            self.drain(cpu)

    def waits(self, pfn: int) -> bool:
        return any(pfn in batch for batch in self.waiting)

    def drain(self, cpu: int) -> None:
        for pfn in self.waiting[cpu]:
            self.references[pfn] -= 1
            if self.references[pfn]:
                self.lru.append(pfn)
        self.waiting[cpu] = []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 1 << 16)),
        min_size=1,
        max_size=20,
    )
)
def test_lru_batches_flush_as_if_pages_came_one_by_one(  # noqa: C901
    calls: list[tuple[int, int, int]],
) -> None:
    """Lists, their order, batches and references are those of a batch of 15 fed page by page."""
    machine, slow = small_machine("32M", cpus=2), Batches()
    mem = machine.mem
    for cpu, kind, number in calls:
        rng = random.Random(number)
        mem.sched.current.cpu = cpu
        if kind == 0:
            lru_add_drain(mem)
            slow.drain(cpu)
        elif kind == 1 and slow.references:
            # Somebody lets go of pages that wait, or lie on the list.
            nr = rng.randint(1, len(slow.references))
            drop = rng.sample(sorted(slow.references), nr)
            drop = [pfn for pfn in drop if slow.references[pfn] == 1 + slow.waits(pfn)]
            if drop:
                put_pages(mem, np.array(drop))
            for pfn in drop:
                slow.references[pfn] -= 1
                if not slow.references[pfn]:
                    slow.lru.remove(pfn)
        else:
            pfns = alloc_pages(mem, rng.choice([1, 2, 14, 15, 16, 47])).tolist()
            for _ in range(rng.choice([0, 0, 1, 2])):
                head = alloc_huge_page(mem)
                if head is not None:
                    pfns.insert(rng.randint(0, len(pfns)), head)
            compound = [bool(mem.pages.flags[pfn] & PG_head) for pfn in pfns]
            mem.pages.flags[pfns] |= np.uint32(PG_anon | PG_swapbacked)
            mem.pages.refcount[pfns] += 1
            lru_cache_add(mem, np.array(pfns))
            for pfn, is_compound in zip(pfns, compound, strict=True):
                slow.references[pfn] = 2
                slow.add(cpu, pfn, compound=is_compound)
        slow.references = {pfn: nr for pfn, nr in slow.references.items() if nr}
        assert mem.lru_batches == slow.waiting
        assert lru_pages(mem, NR_INACTIVE_ANON).tolist() == slow.lru
        for pfn, references in slow.references.items():
            assert mem.pages.refcount[pfn] == references
            assert bool(mem.pages.flags[pfn] & PG_lru) == (pfn in slow.lru)


@given(
    kind=st.integers(0, 31),
    offset=st.integers(0, (1 << 50) - 2),
    exclusive=st.booleans(),
    uffd_wp=st.booleans(),
)
def test_swap_entries_come_back_as_they_were_encoded(
    kind: int, offset: int, exclusive: bool, uffd_wp: bool
) -> None:
    """Type, offset and bits survive; the word is neither none nor present, and x86-64's own."""
    word = make_swap_pte(kind, offset, exclusive=exclusive, uffd_wp=uffd_wp)
    # arch/x86: bits 59..63 type, 9..58 the offset inverted, 3 exclusive, 2 uffd-wp.
    inverted = (1 << 50) - 1 - offset
    assert word == kind << 59 | inverted << 9 | exclusive << 3 | uffd_wp << 2
    assert word < 1 << 64
    assert not word & PAGE_PRESENT
    assert is_swap_pte(word)
    words = np.array([word, 0, 0x25, word], np.uint64)
    assert is_swap_ptes(words).tolist() == [True, False, False, True]
    assert (swp_type(word), swp_offset(word)) == (kind, offset)
    assert swp_offsets(words)[[0, 3]].tolist() == [offset, offset]
