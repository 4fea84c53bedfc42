"""Pieces of a huge page of shmem that was cut: what they are, and what may become of them later."""

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    block_bytes,
    changes,
    madv_collapse,
    page_bytes,
)
from file_kit import FileBlock, cache_is_huge, file_collapses, file_scans, shmem_block
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import Advice, KernelVersion, Machine, ScanResult
from pykhuge.mm.page import PG_dirty, PG_head, PG_lru, PG_tail, PG_uptodate
from pykhuge.mm.page_alloc import alloc_compound_page
from pykhuge.mm.swap import put_pages
from pykhuge.procfs.kpage import Kpf

V6_18 = KernelVersion.V6_18
S = ScanResult


@pytest.fixture
def machine(make_machine: MakeMachine) -> Machine:
    """A later machine with swap."""
    return make_machine(kernel=V6_18, swap="16M")


def huge_block(machine: Machine) -> FileBlock:
    """A block of a memfd that is one huge page, mapped by a PMD."""
    block = shmem_block(machine)
    madv_collapse(block.process, block.addr)
    assert cache_is_huge(block.file)
    machine.trace.clear()
    return block


def punch(block: FileBlock, first: int, nr: int) -> None:
    """Take pages [first, first + nr) away."""
    block.process.fallocate(block.file, first * PAGE, nr * PAGE, punch_hole=True, keep_size=True)
    block.held = [page for page in block.held if not first <= page < first + nr]


def pieces(block: FileBlock) -> dict[int, int]:
    """First page and size of each compound page in the cache, as struct pages have it."""
    pages, found = block.machine.mem.pages, {}
    for place, entry in enumerate(block.slots()):
        if entry > 0 and pages.flags[entry] & PG_head and pages.index[entry] == place:
            found[place] = pages.compound_nr(entry)
    return found


def load(block: FileBlock, first: int, nr: int) -> None:
    """Touch pages [first, first + nr)."""
    block.process.read(block.addr + first * PAGE, nr * PAGE)


def test_punch_leaves_the_halves_that_are_not_cut(machine: Machine) -> None:
    """From page 477 on all goes: 256 pages, 128, 64, 16, 8, 4 and a single one stay."""
    block = huge_block(machine)
    head, before = block.pfn(0), machine.vmstat()
    punch(block, 477, 35)
    assert pieces(block) == {0: 256, 256: 128, 384: 64, 448: 16, 464: 8, 472: 4}
    assert [block.pfn(page) for page in range(477)] == list(range(head, head + 477))
    diff = changes(before, machine.vmstat())
    assert (diff["thp_split_page"], diff["thp_split_pmd"], diff["nr_shmem_hugepages"]) == (1, 1, -1)
    assert (diff["nr_shmem"], diff["nr_file_pages"]) == (-35, -35)
    assert block.process.pread(block.file, 0, HPAGE) == block.content()


def test_punch_in_the_middle_cuts_at_both_ends(machine: Machine) -> None:
    """What is left on each side is as large as that side's cut lets it be."""
    block = huge_block(machine)
    punch(block, 100, 50)
    assert pieces(block) == {0: 64, 64: 32, 96: 4, 152: 8, 160: 32, 192: 64, 256: 256}
    assert block.slots()[100:150] == [0] * 50
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_piece_has_what_the_huge_page_had(machine: Machine) -> None:
    """Dirt, age and cgroup, and as many references as pages; tails have nothing of their own."""
    memcg = machine.memcg("16M")
    block = shmem_block(machine)
    block.process.mm.memcg = memcg
    madv_collapse(block.process, block.addr)
    punch(block, 300, 1)
    pages, head = machine.mem.pages, block.pfn(0)
    kept = PG_head | PG_uptodate | PG_dirty | PG_lru
    assert pages.flags[head] & kept == kept
    assert pages.flags[head + 1] == PG_tail
    assert (pages.refcount[head], pages.refcount[head + 255]) == (256, 0)
    assert (pages.memcg[head], pages.memcg[head + 255]) == (memcg.key, 0)
    assert memcg.usage == 511
    assert set(pages.order[head : head + 256].tolist()) == {8}


def test_second_cut_goes_into_one_piece_alone(machine: Machine) -> None:
    """Its split counts nowhere: only huge pages' do."""
    block = huge_block(machine)
    punch(block, 256, 1)
    others = {258: 2, 260: 4, 264: 8, 272: 16, 288: 32, 320: 64, 384: 128}
    assert pieces(block) == {0: 256} | others
    before = machine.vmstat()
    punch(block, 3, 1)
    assert pieces(block) == {0: 2, 6: 2, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128} | others
    assert "thp_split_page" not in changes(before, machine.vmstat())


def test_whole_piece_goes_whole(machine: Machine) -> None:
    """A cut between pieces splits none."""
    block = huge_block(machine)
    punch(block, 256, 1)
    free = machine.vmstat()["nr_free_pages"]
    punch(block, 0, 256)
    assert machine.vmstat()["nr_free_pages"] == free + 256
    assert min(pieces(block)) == 258


def test_truncation_frees_what_lies_behind(machine: Machine) -> None:
    """Pieces behind the end leave the cache while the page is split; the byte behind it is zero."""
    block = huge_block(machine)
    block.process.ftruncate(block.file, 300 * PAGE + 5)
    assert pieces(block) == {0: 256, 256: 32, 288: 8, 296: 4}
    assert block.file.f_mapping.nrpages == 301
    block.process.ftruncate(block.file, HPAGE)
    tail = page_bytes(300)[:5] + bytes(HPAGE - 300 * PAGE - 5)
    assert block.process.pread(block.file, 300 * PAGE, HPAGE) == tail
    assert block.file.f_mapping.nrpages == 301


def test_punch_inside_of_a_page_makes_that_page_small(machine: Machine) -> None:
    """It stays, with zeros."""
    block = huge_block(machine)
    block.process.fallocate(block.file, 7 * PAGE + 9, 3, punch_hole=True, keep_size=True)
    assert pieces(block) == {0: 4, 4: 2, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256}
    page = bytearray(page_bytes(7))
    page[9:12] = bytes(3)
    assert block.process.pread(block.file, 7 * PAGE, PAGE) == page


def test_piece_that_somebody_holds_is_zeroed_in_place(machine: Machine) -> None:
    """It cannot be split; nobody counts that."""
    block = huge_block(machine)
    punch(block, 256, 1)
    held = block.process.get(block.addr + 9 * PAGE, PAGE)
    before = machine.vmstat()
    punch(block, 8, 4)
    assert pieces(block)[0] == 256
    assert block.process.pread(block.file, 8 * PAGE, 5 * PAGE) == bytes(4 * PAGE) + page_bytes(12)
    assert "thp_split_page_failed" not in changes(before, machine.vmstat())
    held.release()
    punch(block, 8, 4)
    assert pieces(block)[0] == 8


def test_kpageflags_shows_heads_and_tails(machine: Machine) -> None:
    """Of each piece the first frame is a head."""
    block = huge_block(machine)
    head = block.pfn(0)
    punch(block, 3, 1)
    words = machine.procfs.kpageflags(head, 9).tolist()
    shown = [bool(word & Kpf.KPF_COMPOUND_HEAD) for word in words]
    assert shown == [True, False, False, False, False, False, True, False, True]
    assert words[2] & (Kpf.KPF_COMPOUND_TAIL | Kpf.KPF_THP) == 0
    assert words[7] & Kpf.KPF_COMPOUND_TAIL
    assert words[3] == Kpf.KPF_BUDDY


@pytest.mark.parametrize("is_khugepaged", [False, True])
def test_pieces_collapse(machine: Machine, is_khugepaged: bool) -> None:
    """Into a new huge page; their frames are free again, and holes are filled with zeros."""
    block = huge_block(machine)
    head = block.pfn(0)
    punch(block, 100, 50)
    load(block, 64, 20)
    load(block, 256, 256)
    free = machine.vmstat()["nr_free_pages"]
    result = block.collapse(is_khugepaged=is_khugepaged)
    assert result is (S.SCAN_SUCCEED if is_khugepaged else S.SCAN_PTE_MAPPED_HUGEPAGE)
    assert cache_is_huge(block.file)
    assert block.pfn(0) != head
    # The page table is gone, too.
    assert machine.vmstat()["nr_free_pages"] == free - 50 + 1
    assert not machine.mem.pages.order[head : head + NR].any()
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_scan_counts_the_pages_of_pieces(machine: Machine) -> None:
    """And ends at one that somebody holds, by its head."""
    block = huge_block(machine)
    punch(block, 256, 1)
    held = block.process.get(block.addr + 300 * PAGE, PAGE)
    assert block.collapse() is S.SCAN_PAGE_COUNT
    event = file_scans(machine)[-1]
    assert (event.scan_pfn, event.present) == (block.pfn(288), 256 + 1 + 2 + 4 + 8 + 16)
    held.release()
    assert block.collapse() is S.SCAN_SUCCEED


def test_poison_in_a_piece_ends_the_collapse_at_that_page(machine: Machine) -> None:
    """All goes back; memory_failure splits the piece and keeps the bad page alone."""
    block = huge_block(machine)
    punch(block, 256, 1)
    bad = block.poison(9)
    assert block.collapse() is S.SCAN_COPY_MC
    assert file_collapses(machine)[-1].index == 9
    assert min(pieces(block)) == 258
    assert machine.mem.hwpoison.refs == {bad}
    assert block.process.pread(block.file, 10 * PAGE, 20 * PAGE) == block_bytes(10, 20)


def test_piece_in_the_range_as_a_whole_goes_to_swap_as_one(machine: Machine) -> None:
    """And comes back as one; others are split."""
    block = huge_block(machine)
    punch(block, 128, 1)
    load(block, 0, 128)
    load(block, 256, 100)
    block.process.madvise(block.addr, 300 * PAGE, Advice.MADV_PAGEOUT)
    i_pages = block.file.f_mapping.i_pages
    assert [i_pages.order(page) for page in (0, 127, 192, 256, 511)] == [7, 7, 6, 0, 0]
    assert i_pages.load(127) < 0 < i_pages.load(256)
    load(block, 77, 1)
    assert pieces(block)[0] == 128
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_part_of_a_swapped_piece_is_punched(machine: Machine) -> None:
    """It comes back for that, and is split."""
    block = huge_block(machine)
    punch(block, 128, 1)
    load(block, 0, 128)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    assert block.shmem.swapped == 128
    punch(block, 32, 32)
    assert pieces(block)[0] == 32
    assert block.shmem.swapped == 0
    assert block.process.pread(block.file, 0, HPAGE) == block.content()


def test_swapped_pieces_count_for_max_ptes_swap(machine: Machine) -> None:
    """By all of their pages, the one that exceeds the limit too."""
    block = huge_block(machine)
    punch(block, 128, 1)
    load(block, 0, 128)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    machine.khugepaged_settings.max_ptes_swap = 127
    assert block.collapse() is S.SCAN_EXCEED_SWAP_PTE
    assert (file_scans(machine)[-1].swap, file_scans(machine)[-1].present) == (128, 0)
    machine.khugepaged_settings.max_ptes_swap = 511
    assert block.collapse() is S.SCAN_SUCCEED
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_fragmented_swap_brings_a_piece_back_page_by_page(machine: Machine) -> None:
    """Where there is no run of frames for it, what is not asked for stays on swap."""
    block = huge_block(machine)
    punch(block, 128, 1)
    load(block, 0, 128)
    block.process.madvise(block.addr, 128 * PAGE, Advice.MADV_PAGEOUT)
    hog = machine.process("hog")
    nr = machine.vmstat()["nr_free_pages"] - 64
    addr = hog.mmap(nr * PAGE)
    hog.write(addr, bytes(nr * PAGE))
    for page in range(0, nr, 64):
        hog.madvise(addr + page * PAGE, PAGE, Advice.MADV_DONTNEED)
    load(block, 77, 1)
    assert block.shmem.swapped == 127
    assert 0 not in pieces(block)


def test_page_of_a_piece_is_taken_out_of_use(machine: Machine) -> None:
    """The piece is split for it, all of it, and the page goes elsewhere; its neighbours stay."""
    block = huge_block(machine)
    punch(block, 256, 1)
    bad = block.pfn(9)
    block.process.madvise(block.addr + 9 * PAGE, PAGE, Advice.MADV_SOFT_OFFLINE)
    assert machine.mem.hwpoison.refs == {bad}
    assert block.pfn(9) != bad
    assert block.pfn(8) == bad - 1
    assert min(pieces(block)) == 258
    assert block.process.read(block.addr, HPAGE) == block.content()
    assert block.collapse() is S.SCAN_SUCCEED


@pytest.mark.parametrize("locked", [range(256), range(100)])
def test_piece_goes_with_its_mappings(machine: Machine, locked: range) -> None:
    """mlock, fork, munlock, mremap and munmap of a piece that is mapped by PTEs."""
    block = huge_block(machine)
    punch(block, 256, 1)
    process, head = block.process, block.pfn(0)
    load(block, 0, 256)
    process.mlock(block.addr, len(locked) * PAGE)
    child = process.fork()
    child.read(block.addr, 256 * PAGE)
    machine.audit()
    assert machine.mem.pages.total_mapcount(head) == 512
    process.munlock(block.addr, len(locked) * PAGE)
    other = process.mmap(HPAGE)
    process.mremap(block.addr, 64 * PAGE, other)
    assert process.pfn(other + 63 * PAGE) == head + 63
    machine.audit()
    child.exit()
    process.munmap(other, HPAGE)
    process.munmap(block.addr, HPAGE)
    assert machine.mem.pages.total_mapcount(head) == 0
    assert pieces(block)[0] == 256


def test_smaller_compound_pages_come_from_broken_blocks(machine: Machine) -> None:
    """In line with their size; a whole block is broken only if there is no other way."""
    mem = machine.mem
    used = machine.process("a")
    used.write(used.mmap(3 * PAGE), bytes(3 * PAGE))
    blocks = mem.nodes[0].high
    heads = [alloc_compound_page(mem, order) for order in (6, 1, 8)]
    assert mem.nodes[0].high == blocks
    heads.append(alloc_compound_page(mem, 8))
    assert all(head % (1 << order) == 0 for head, order in zip(heads, (6, 1, 8, 8), strict=True))
    assert mem.nodes[0].high == blocks + 1
    assert mem.pages.order[heads].tolist() == [6, 1, 8, 8]
    put_pages(mem, np.array(heads))
    assert alloc_compound_page(mem, 9) is not None
    put_pages(mem, np.flatnonzero(mem.pages.order == 9)[:1])


class Shadowed:
    """Two blocks of a memfd, mapped shared, beside the bytes that must be in them."""

    def __init__(self, machine: Machine) -> None:
        machine.thp.shmem_enabled = "advise"
        self.machine, self.process = machine, machine.process("app")
        self.file = self.process.memfd_create("f")
        self.addr = self.process.mmap(2 * HPAGE, file=self.file, shared=True)
        self.expected = bytearray(2 * HPAGE)
        self.stores = 0
        self.store(0, 2 * HPAGE)
        self.collapse(0, 0)

    def store(self, low: int, length: int) -> None:
        self.stores += 1
        self.expected[low : low + length] = block_bytes(self.stores * 7919, length // PAGE)
        self.process.ftruncate(self.file, 2 * HPAGE)
        self.process.write(self.addr + low, bytes(self.expected[low : low + length]))

    def load(self, low: int, length: int) -> None:
        found = self.process.read(self.addr + low, length)
        assert found == self.expected[low : low + length]

    def punch(self, low: int, length: int) -> None:
        self.process.fallocate(self.file, low, length, punch_hole=True, keep_size=True)
        self.expected[low : low + length] = bytes(length)

    def truncate(self, low: int, _length: int) -> None:
        self.process.ftruncate(self.file, low)
        self.process.ftruncate(self.file, 2 * HPAGE)
        self.expected[low:] = bytes(2 * HPAGE - low)

    def pageout(self, low: int, length: int) -> None:
        self.process.madvise(self.addr + low, length, Advice.MADV_PAGEOUT)

    def drop(self, low: int, length: int) -> None:
        self.process.madvise(self.addr + low, length, Advice.MADV_DONTNEED)

    def offline(self, low: int, _length: int) -> None:
        self.process.madvise(self.addr + low, PAGE, Advice.MADV_SOFT_OFFLINE)

    def fork(self, low: int, length: int) -> None:
        self.process.fork().read(self.addr + low, length)

    def collapse(self, low: int, _length: int) -> None:
        self.machine.lru_add_drain_all()
        self.machine.collapse(self.process, self.addr + (low & -HPAGE), is_khugepaged=False)


NAMES = ["punch", "punch", "truncate", "store", "load", "pageout", "drop", "offline", "fork"]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*NAMES, "collapse"]),
            st.integers(0, 2 * NR - 1),
            st.one_of(st.integers(1, 9), st.integers(1, NR)),
        ),
        min_size=2,
        max_size=14,
    )
)
def test_pieces_are_in_line_disjoint_and_known_to_the_cache(
    steps: list[tuple[str, int, int]],
) -> None:
    """After any cuts, stores, swapping and collapses: entry, head and order say the same."""
    machine = Machine("64M", kernel=V6_18, swap="16M")
    shadowed = Shadowed(machine)
    for name, first, nr in steps:
        getattr(shadowed, name)(first * PAGE, min(nr, 2 * NR - first) * PAGE)
        machine.audit()
    process, file = shadowed.process, shadowed.file
    assert process.pread(file, 0, 2 * HPAGE) == shadowed.expected
    pages, i_pages = machine.mem.pages, file.f_mapping.i_pages
    for indexes, entries in i_pages.entries(0, 2 * NR):
        for index, entry in zip(indexes.tolist(), entries.tolist(), strict=True):
            order, whole = i_pages.order(index), int(i_pages.span(index)[0])
            assert entry < 0 or entry % (1 << order) == 0
            assert entry < 0 or (pages.order[entry], pages.index[entry]) == (order, whole)
    compound = pages.flags & np.uint32(PG_head | PG_tail) != 0
    assert np.array_equal(pages.order > 0, compound)
