"""mmap, munmap, mprotect, mremap, mlock, fork: VMAs, page tables and what they count."""

import errno
from collections.abc import Callable

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    discard,
    faults,
    fill,
    flags_of,
    page_bytes,
    pageout,
    pfn_of,
    ptes_of,
    refused,
    rss,
)

from pykhuge import (
    PROT_READ,
    PROT_WRITE,
    Advice,
    KernelPanic,
    KernelVersion,
    Machine,
    Process,
    ScanResult,
    SegmentationFault,
)
from pykhuge.mm.mm_types import VM_LOCKED
from pykhuge.mm.page import PG_anon_exclusive, PG_head, PG_mlocked
from pykhuge.mm.rmap import pmd_of

RW = PROT_READ | PROT_WRITE


def ranges(process: Process) -> list[tuple[int, int]]:
    return [(vma.vm_start, vma.vm_end) for vma in process.mm.vmas]


# mmap and munmap.


def test_mmap_finds_room_and_aligns_large_mappings(process: Process) -> None:
    """Mappings do not overlap; from 2 MiB on they are 2 MiB aligned."""
    small = process.mmap(PAGE)
    large = process.mmap(HPAGE)
    assert large % HPAGE == 0
    again = process.mmap(1)
    assert len({small, large, again}) == 3
    assert again % PAGE == 0


def test_fixed_mmap_replaces_and_a_hint_does_not(process: Process) -> None:
    """MAP_FIXED drops what was there; an occupied hint is moved away."""
    addr = process.mmap(4 * PAGE)
    process.write(addr, b"old!" * PAGE)
    assert process.mmap(PAGE, addr=addr + PAGE) != addr + PAGE
    assert process.mmap(2 * PAGE, addr=addr + PAGE, fixed=True) == addr + PAGE
    assert process.read(addr, 4 * PAGE) == (
        b"old!" * (PAGE // 4) + bytes(2 * PAGE) + b"old!" * (PAGE // 4)
    )
    assert rss(process)["MM_ANONPAGES"] == 2


def test_neighbours_that_are_alike_become_one_vma(process: Process) -> None:
    """Mapping the gap between two merges all three; other protection keeps them apart."""
    addr = process.mmap(3 * PAGE)
    process.munmap(addr + PAGE, PAGE)
    assert ranges(process) == [(addr, addr + PAGE), (addr + 2 * PAGE, addr + 3 * PAGE)]
    process.mmap(PAGE, addr=addr + PAGE, fixed=True)
    assert ranges(process) == [(addr, addr + 3 * PAGE)]
    process.munmap(addr + PAGE, PAGE)
    process.mmap(PAGE, addr=addr + PAGE, fixed=True, prot=PROT_READ)
    assert len(ranges(process)) == 3


def test_munmap_cuts_a_mapping_in_two(machine: Machine, process: Process) -> None:
    """Pages in the hole go, the rest keeps its bytes; unmapping nothing is no error."""
    addr = process.mmap(8 * PAGE)
    process.write(addr, block_bytes(0, 8))
    process.munmap(addr + 3 * PAGE, 2 * PAGE)
    process.munmap(addr + 3 * PAGE, 2 * PAGE)
    assert ranges(process) == [(addr, addr + 3 * PAGE), (addr + 5 * PAGE, addr + 8 * PAGE)]
    with pytest.raises(SegmentationFault):
        process.read(addr + 3 * PAGE, 1)
    assert process.read(addr, 3 * PAGE) == block_bytes(0, 3)
    assert process.read(addr + 5 * PAGE, 3 * PAGE) == block_bytes(5, 3)
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_anon_pages"] == 6


def test_page_tables_are_freed_with_the_last_mapping_in_their_reach(process: Process) -> None:
    """A table stays while any VMA is in its 2 MiB, a PMD table while any is in its GiB."""
    addr = process.mmap(2 * HPAGE)
    with faults(process, "never"):
        process.write(addr, b"x")
        process.write(addr + HPAGE, b"x")
    assert rss(process)["pgtables"] == 3
    process.munmap(addr, HPAGE - PAGE)
    assert rss(process)["pgtables"] == 3
    process.munmap(addr + HPAGE - PAGE, PAGE)
    assert rss(process)["pgtables"] == 2
    process.munmap(addr + HPAGE, HPAGE)
    assert rss(process)["pgtables"] == 0


def test_unmapping_part_of_a_huge_page_splits_it(machine: Machine, process: Process) -> None:
    """511 pages stay mapped by PTEs of the deposited table; the compound page stays whole."""
    addr = advised(process)
    process.write(addr, block_bytes())
    head = pfn_of(process, addr, 0)
    process.munmap(addr + 100 * PAGE, PAGE)
    assert not process.is_huge(addr)
    assert rss(process)["MM_ANONPAGES"] == NR - 1
    assert rss(process)["pgtables"] == 2
    assert flags_of(process, head) & PG_head
    assert machine.mem.pages.refcount[head] == NR - 1
    assert machine.vmstat()["thp_split_pmd"] == 1
    assert machine.vmstat()["nr_anon_transparent_hugepages"] == 0
    assert process.read(addr, 100 * PAGE) == block_bytes(0, 100)
    process.munmap(addr, HPAGE)
    assert machine.vmstat()["nr_anon_pages"] == 0


def test_unmapping_a_whole_huge_page_frees_page_and_deposit(
    machine: Machine, process: Process
) -> None:
    """Nothing of it is left."""
    addr = advised(process)
    free = machine.vmstat()["nr_free_pages"]
    process.write(addr, b"x")
    process.munmap(addr, HPAGE)
    assert machine.vmstat()["nr_free_pages"] == free
    assert machine.vmstat()["thp_split_pmd"] == 0


@pytest.mark.parametrize("page", [0, 1, 511])
def test_dontneed_of_one_page_reads_as_zero(process: Process, page: int) -> None:
    """MADV_DONTNEED empties the page and leaves its neighbours, in small and in huge blocks."""
    with faults(process, "always"):
        addr = process.mmap(HPAGE)
        process.write(addr, block_bytes())
    discard(process, addr, [page])
    with faults(process, "never"):
        content = process.read(addr, HPAGE)
    expected = bytearray(block_bytes())
    expected[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    assert content == expected


# mprotect.


def test_mprotect_splits_and_merges(process: Process) -> None:
    """Three VMAs while the middle differs, one when it is like the rest again."""
    addr = process.mmap(3 * PAGE)
    process.write(addr, b"x" * 3 * PAGE)
    process.mprotect(addr + PAGE, PAGE, PROT_READ)
    assert len(ranges(process)) == 3
    with pytest.raises(SegmentationFault):
        process.write(addr + PAGE, b"y")
    process.mprotect(addr + PAGE, PAGE, RW)
    assert ranges(process) == [(addr, addr + 3 * PAGE)]
    process.write(addr + PAGE, b"y")
    assert process.read(addr, 3 * PAGE) == b"x" * PAGE + b"y" + b"x" * (2 * PAGE - 1)


def test_mprotect_that_reaches_into_what_is_so_already_leaves_one_mapping(
    process: Process,
) -> None:
    """What would be cut off there is the same as what comes before it."""
    addr = process.mmap(512 * PAGE)
    process.mprotect(addr + 30 * PAGE, 257 * PAGE, PROT_READ)
    process.mprotect(addr, 65 * PAGE, PROT_READ)
    ends = [vma.vm_end for vma in process.mm.vmas]
    assert ends == [addr + 287 * PAGE, addr + 512 * PAGE]


@pytest.mark.parametrize("call", ["mprotect", "madvise", "mlock", "munlock", "register"])
def test_what_is_so_already_is_neither_cut_nor_split(process: Process, call: str) -> None:
    """A call on part of a mapping that already is what it asks for changes nothing at all."""
    addr = advised(process)
    process.write(addr, block_bytes())
    uffd = process.userfaultfd()
    calls: dict[str, Callable[[int, int], None]] = {
        "mprotect": lambda at, length: process.mprotect(at, length, RW),
        "madvise": lambda at, length: process.madvise(at, length, Advice.MADV_HUGEPAGE),
        "mlock": process.mlock,
        "munlock": process.munlock,
        "register": lambda at, length: uffd.register(at, length, missing=True, wp=at == addr),
    }
    calls[call](addr, HPAGE)
    flags = [vma.vm_flags for vma in process.mm.vmas]
    calls[call](addr + 35 * PAGE, 65 * PAGE)
    assert ranges(process) == [(addr, addr + HPAGE)]
    assert [vma.vm_flags for vma in process.mm.vmas] == flags
    assert process.is_huge(addr)


def test_mprotect_of_a_whole_huge_page_keeps_it(process: Process) -> None:
    """The huge PMD becomes read-only; a part of it splits the PMD."""
    addr = advised(process, 2 * HPAGE)
    process.write(addr, bytes(2 * HPAGE))
    process.mprotect(addr, HPAGE, PROT_READ)
    assert process.is_huge(addr)
    process.mprotect(addr + HPAGE, PAGE, PROT_READ)
    assert not process.is_huge(addr + HPAGE)
    with pytest.raises(SegmentationFault):
        process.write(addr, b"x")
    process.write(addr + HPAGE + PAGE, b"x")


def test_mprotect_of_a_gap_is_enomem(process: Process) -> None:
    """ENOMEM where nothing is mapped."""
    addr = process.mmap(PAGE)
    with pytest.raises(OSError, match="nothing is mapped") as failed:
        process.mprotect(addr, 2 * PAGE, PROT_READ)
    assert failed.value.errno == errno.ENOMEM


# mremap.


def test_mremap_moves_bytes(process: Process) -> None:
    """The old place is gone, the new one has the pages themselves."""
    addr = process.mmap(4 * PAGE)
    process.write(addr, block_bytes(0, 4))
    pfns = [process.pfn(addr + page * PAGE) for page in range(4)]
    new = process.mmap(4 * PAGE)
    assert process.mremap(addr, 4 * PAGE, new) == new
    assert [process.pfn(new + page * PAGE) for page in range(4)] == pfns
    assert process.read(new, 4 * PAGE) == block_bytes(0, 4)
    with pytest.raises(SegmentationFault):
        process.read(addr, 1)


def test_mremap_makes_a_table_for_what_has_one_even_if_it_is_empty(process: Process) -> None:
    """So that a collapse finds a table without entries, not an empty PMD."""
    addr = advised(process, 3 * HPAGE)
    fill(process, addr + HPAGE, [0])
    process.mremap(addr + HPAGE + 55 * PAGE, NR * PAGE, addr)
    assert pmd_of(process.mem, process.mm, addr)
    assert not ptes_of(process, addr).any()


def test_mremap_of_aligned_blocks_moves_huge_pages(machine: Machine, process: Process) -> None:
    """Both ends 2 MiB aligned: the PMD moves, with its deposited table."""
    addr = advised(process)
    process.write(addr, block_bytes())
    new = process.mmap(HPAGE)
    process.mremap(addr, HPAGE, new)
    assert process.is_huge(new)
    assert machine.vmstat()["thp_split_pmd"] == 0
    assert process.read(new, HPAGE) == block_bytes()


@pytest.mark.parametrize("shift", [1, 256, 511])
def test_subpages_in_foreign_page_tables_collapse(
    machine: Machine, process: Process, shift: int
) -> None:
    """Two huge pages moved by less than a block share one page table, and collapse into one."""
    addr = advised(process, 2 * HPAGE)
    process.write(addr, block_bytes(0, 2 * NR))
    new = process.mmap(4 * HPAGE) + shift * PAGE
    process.mremap(addr, 2 * HPAGE, new)
    assert machine.vmstat()["thp_split_pmd"] == 2
    block = new + HPAGE - 1 & -HPAGE
    heads = {machine.mem.pages.head_of(pfn_of(process, block, page)) for page in range(NR)}
    assert len(heads) == 2
    machine.audit()
    with machine.ledger():
        assert machine.collapse(process, block) is ScanResult.SCAN_SUCCEED
    assert process.read(new, 2 * HPAGE) == block_bytes(0, 2 * NR)
    assert process.is_huge(block)


def extreme(process: Process, nr: int) -> int:
    """Kselftest's compound_extreme: `nr` entries, each the first page of another huge page."""
    base = process.mmap(HPAGE, addr=1 << 32)
    for number in range(nr):
        process.madvise(base, HPAGE, Advice.MADV_HUGEPAGE)
        process.write(base, page_bytes(number))
        assert process.is_huge(base)
        process.madvise(base, HPAGE, Advice.MADV_NOHUGEPAGE)
        start, length = base - number * PAGE, (number + 1) * PAGE
        process.mremap(start, number * PAGE + HPAGE, base + 2 * HPAGE, length)
        process.mremap(base + 2 * HPAGE, length, start - PAGE, length + HPAGE)
    process.munmap(base, HPAGE)
    return base - nr * PAGE


@pytest.mark.parametrize("poisoned", [None, 200])
def test_512_compound_pages_in_one_table(make_machine: MakeMachine, poisoned: int | None) -> None:
    """Kselftest collapse_compound_extreme, and its rollback: 512 huge pages isolated, put back."""
    machine = make_machine("1100M")
    process = machine.process()
    block = extreme(process, NR)
    process.madvise(block, HPAGE, Advice.MADV_HUGEPAGE)
    heads = [machine.mem.pages.head_of(pfn_of(process, block, page)) for page in range(NR)]
    assert len(set(heads)) == NR
    machine.lru_add_drain_all()
    lru = machine.vmstat()["nr_inactive_anon"]
    assert lru == NR * NR
    if poisoned is not None:
        process.poison(block + poisoned * PAGE, 63)
    task = machine.spawn(machine.collapse.steps(process, block))
    task.run_until("copied")
    assert machine.vmstat()["nr_isolated_anon"] == NR * NR
    if poisoned is None:
        assert task.finish() is ScanResult.SCAN_SUCCEED
        assert process.read(block, HPAGE) == block_bytes()
        assert machine.vmstat()["nr_anon_pages"] == NR
        return
    assert task.finish() is ScanResult.SCAN_COPY_MC
    assert machine.vmstat()["nr_inactive_anon"] == lru
    assert machine.vmstat()["nr_anon_pages"] == NR
    page = (poisoned + 1) % NR
    assert process.read(block + page * PAGE, PAGE) == page_bytes(page)


@pytest.mark.parametrize(("length", "new_length"), [(4, 2), (2, 4)])
def test_mremap_cuts_and_grows(process: Process, length: int, new_length: int) -> None:
    """What is cut off is unmapped, what is added reads as zero."""
    addr = process.mmap(length * PAGE)
    process.write(addr, block_bytes(0, length))
    new = process.mmap(HPAGE)
    process.mremap(addr, length * PAGE, new, new_length * PAGE)
    kept = min(length, new_length)
    added = new_length - kept
    assert process.read(new, new_length * PAGE) == block_bytes(0, kept) + bytes(added * PAGE)
    assert rss(process)["MM_ANONPAGES"] == kept
    with pytest.raises(SegmentationFault):
        process.read(addr, 1)


def test_mremap_of_what_is_not_one_mapping(process: Process) -> None:
    """EFAULT across a gap, EINVAL onto itself."""
    addr = process.mmap(2 * PAGE)
    with pytest.raises(OSError, match="not inside one mapping") as failed:
        process.mremap(addr, 3 * PAGE, addr + HPAGE)
    assert failed.value.errno == errno.EFAULT
    with pytest.raises(OSError, match="overlap") as failed:
        process.mremap(addr, 2 * PAGE, addr + PAGE)
    assert failed.value.errno == errno.EINVAL


EARLY, LATE = KernelVersion.at(6, 16), KernelVersion.at(6, 17)
AT, TO = 0x10_0000_0000, 0x20_0000_0000
END = (1 << 47) - PAGE


def eight_pages(make_machine: MakeMachine, kernel: KernelVersion) -> Process:
    """A process with eight pages at AT, and sixteen, which can be read only, at TO."""
    process = make_machine(kernel=kernel).process()
    process.mmap(8 * PAGE, addr=AT, fixed=True)
    fill(process, AT, range(8))
    process.mmap(16 * PAGE, addr=TO, fixed=True, prot=PROT_READ)
    return process


@pytest.mark.parametrize("kernel", [EARLY, LATE], ids=["6.16", "6.17"])
@pytest.mark.parametrize(
    ("length", "new_length"), [(9, 10), (16, 12), (9, 9)], ids=["grown", "cut", "moved"]
)
def test_mremap_of_what_leaves_its_mapping(
    make_machine: MakeMachine, kernel: KernelVersion, length: int, new_length: int
) -> None:
    """EFAULT, before anything is unmapped since 6.17; what is only moved moves as far as it goes.

    Before, the target and what is cut off are gone by then.
    """
    process = eight_pages(make_machine, kernel)
    behind = process.mmap(4 * PAGE, addr=AT + 12 * PAGE, fixed=True)
    moves = kernel is LATE and length == new_length
    call = lambda: process.mremap(AT, length * PAGE, TO, new_length * PAGE)  # noqa: E731
    assert refused(call) == (None if moves else errno.EFAULT)
    assert process.read(TO if moves else AT, 8 * PAGE) == block_bytes(0, 8)
    if moves:
        return
    tail, rest = (behind, behind + 4 * PAGE), (TO + new_length * PAGE, TO + 16 * PAGE)
    kept = [tail] if kernel is LATE or length < 12 else []
    there = (TO, TO + 16 * PAGE) if kernel is LATE else rest
    assert ranges(process) == [(AT, AT + 8 * PAGE), *kept, there]


@pytest.mark.parametrize("kernel", [EARLY, LATE], ids=["6.16", "6.17"])
def test_mremap_may_cut_what_leaves_its_mapping(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """The cut comes first: over a gap, and over other mappings, which go with it."""
    process = eight_pages(make_machine, kernel)
    process.mmap(4 * PAGE, addr=AT + 12 * PAGE, fixed=True, shared=True)
    process.mremap(AT, 16 * PAGE, TO, 4 * PAGE)
    assert ranges(process) == [(TO, TO + 4 * PAGE), (TO + 4 * PAGE, TO + 16 * PAGE)]
    assert process.read(TO, 4 * PAGE) == block_bytes(0, 4)
    assert rss(process)["MM_ANONPAGES"] == 4


@pytest.mark.parametrize("kernel", [EARLY, LATE], ids=["6.16", "6.17"])
def test_mremap_cannot_cut_beyond_user_space(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """EINVAL, when the target is gone already."""
    process = eight_pages(make_machine, kernel)
    to = AT - 16 * PAGE
    process.mmap(16 * PAGE, addr=to, fixed=True, prot=PROT_READ)
    call = lambda: process.mremap(AT, END + PAGE - AT, to, PAGE)  # noqa: E731
    assert refused(call) == errno.EINVAL
    assert ranges(process)[0] == (to + PAGE, to + 16 * PAGE)
    assert process.read(AT, 8 * PAGE) == block_bytes(0, 8)


@pytest.mark.parametrize("kernel", [EARLY, LATE], ids=["6.16", "6.17"])
@pytest.mark.parametrize(
    ("old", "nr", "new", "number"),
    [
        (AT, 1, AT, errno.EINVAL),
        (AT, 8, AT + 7 * PAGE, errno.EINVAL),
        (AT, 1, TO + 1, errno.EINVAL),
        (AT + 1, 1, TO, errno.EINVAL),
        (AT, 0, TO, errno.EINVAL),
        (AT, 1, END, errno.EINVAL),
        (AT, 2, END - PAGE, errno.EINVAL),
        (AT, 1, 1 << 47, errno.EINVAL),
        (END, 1, TO, errno.EFAULT),
        (1 << 47, 1, TO, errno.EFAULT),
        ((1 << 64) - PAGE, 1, TO, errno.EFAULT),
        (AT - PAGE, 2, TO, errno.EFAULT),
    ],
)
def test_mremap_refuses_without_a_trace(
    make_machine: MakeMachine, kernel: KernelVersion, old: int, nr: int, new: int, number: int
) -> None:
    """Places that cannot be are EINVAL, a source where nothing begins is EFAULT."""
    process = eight_pages(make_machine, kernel)
    before = ranges(process)
    assert refused(lambda: process.mremap(old, nr * PAGE, new)) == number
    assert ranges(process) == before


@pytest.mark.parametrize("kernel", [EARLY, LATE], ids=["6.16", "6.17"])
def test_mremap_looks_at_the_places_first_since_6_17(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """What overlaps and is not mapped is EINVAL, not EFAULT; many mappings are looked at whole."""
    process = eight_pages(make_machine, kernel)
    number = errno.EINVAL if kernel is LATE else errno.EFAULT
    assert refused(lambda: process.mremap(AT - PAGE, PAGE, AT - PAGE)) == number
    process.munmap(AT + 2 * PAGE, 4 * PAGE)
    before = ranges(process)
    assert refused(lambda: process.mremap(AT, 8 * PAGE, AT + 3 * PAGE)) == errno.EINVAL
    assert ranges(process) == before


# The end of user space.


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (END, PAGE),
        (END, 1),
        (END - PAGE, 2 * PAGE),
        (1 << 47, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (AT, 1 << 63),
    ],
)
def test_what_ends_beyond_user_space(process: Process, addr: int, length: int) -> None:
    """MAP_FIXED is ENOMEM, munmap EINVAL, both before anything is unmapped."""
    process.mmap(PAGE, addr=AT, fixed=True)
    process.mmap(PAGE, addr=END - PAGE, fixed=True)
    assert refused(lambda: process.mmap(length, addr=addr, fixed=True)) == errno.ENOMEM
    assert refused(lambda: process.munmap(addr, length)) == errno.EINVAL
    assert ranges(process) == [(AT, AT + PAGE), (END - PAGE, END)]
    for call in (process.mlock, process.munlock):
        wraps = addr + length >= 1 << 64
        assert refused(lambda call=call: call(addr, length)) == (
            errno.EINVAL if wraps else errno.ENOMEM
        )
    assert refused(lambda: process.mprotect(addr, length, PROT_READ)) == errno.ENOMEM


def test_the_last_page_of_user_space_is_as_any_other(process: Process) -> None:
    """It can be mapped, written, moved away and back, and unmapped."""
    last = process.mmap(PAGE, addr=END - PAGE)
    assert last == END - PAGE
    process.write(last, page_bytes(3))
    process.mremap(last, PAGE, AT)
    process.mremap(AT, PAGE, last)
    assert process.read(last, PAGE) == page_bytes(3)
    process.munmap(last, PAGE)


def test_mprotect_and_mlock_hold_up_to_the_first_gap(process: Process) -> None:
    """ENOMEM there, also if the range ends where nothing can be mapped."""
    process.mmap(2 * PAGE, addr=AT, fixed=True)
    assert refused(lambda: process.mprotect(AT, END + PAGE - AT, PROT_READ)) == errno.ENOMEM
    assert refused(lambda: process.mlock(AT, (1 << 64) - PAGE - AT)) == errno.ENOMEM
    (vma,) = process.mm.vmas
    assert vma.vm_flags & (VM_LOCKED | RW) == VM_LOCKED | PROT_READ


@pytest.mark.parametrize("addr", [0, 1, PAGE - 1, END, END + 1, 1 << 47, (1 << 64) - 1])
def test_a_hint_that_cannot_be_is_passed_over(process: Process, addr: int) -> None:
    """It is as if there were none."""
    without = process.mmap(PAGE)
    assert process.mmap(PAGE, addr=addr) == without + PAGE


@pytest.mark.parametrize("addr", [AT, AT + 1, AT + PAGE - 1])
def test_a_hint_is_rounded_down_to_a_page(process: Process, addr: int) -> None:
    """Only MAP_FIXED must be aligned."""
    assert process.mmap(PAGE, addr=addr) == AT
    if addr > AT:
        assert refused(lambda: process.mmap(PAGE, addr=addr, fixed=True)) == errno.EINVAL


# mlock.


def test_mlock_faults_in_and_counts(machine: Machine, process: Process) -> None:
    """nr_mlock and the unevictable list, back to 0 after munlock."""
    addr = process.mmap(8 * PAGE)
    process.mlock(addr, 8 * PAGE)
    machine.lru_add_drain_all()
    assert rss(process)["MM_ANONPAGES"] == 8
    assert machine.vmstat()["nr_mlock"] == 8
    assert machine.vmstat()["nr_unevictable"] == 8
    process.munlock(addr, 4 * PAGE)
    assert machine.vmstat()["nr_mlock"] == 4
    process.munmap(addr, 8 * PAGE)
    assert machine.vmstat()["nr_mlock"] == 0


def test_mlocked_block_collapses_into_an_mlocked_huge_page(
    machine: Machine, process: Process, block: int
) -> None:
    """512 mlocked pages become one huge page that counts 512."""
    fill(process, block)
    with faults(machine, "never"):
        process.mlock(block, HPAGE)
    assert machine.vmstat()["nr_mlock"] == NR
    assert machine.collapse(process, block) is ScanResult.SCAN_SUCCEED
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_mlock"] == NR
    assert machine.vmstat()["nr_unevictable"] == NR
    assert flags_of(process, pfn_of(process, block, 0)) & PG_mlocked
    process.munlock(block, HPAGE)
    assert machine.vmstat()["nr_mlock"] == 0
    assert machine.vmstat()["nr_unevictable"] == 0


def test_mlocked_block_rolls_back_mlocked(machine: Machine, process: Process, block: int) -> None:
    """A poisoned page among mlocked ones leaves nr_mlock and the unevictable list as they were."""
    fill(process, block)
    with faults(machine, "never"):
        process.mlock(block, HPAGE)
    process.poison(block)
    assert machine.collapse(process, block) is ScanResult.SCAN_COPY_MC
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_mlock"] == NR
    assert machine.vmstat()["nr_unevictable"] == NR


def test_page_locked_by_two_stays_until_both_let_go(machine: Machine, process: Process) -> None:
    """A page that parent and child mlock is unevictable until the second munlock."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    child = process.fork()
    process.mlock(addr, PAGE)
    child.mlock(addr, PAGE)
    # Both write faults of mlock have copied: two pages, each locked once.
    locked = machine.vmstat()["nr_mlock"]
    process.munlock(addr, PAGE)
    assert machine.vmstat()["nr_mlock"] == locked - 1
    child.exit()
    assert machine.vmstat()["nr_mlock"] == 0


# fork.


def test_fork_shares_everything_and_copies_nothing(machine: Machine, process: Process) -> None:
    """The same frames in both, mapped twice, exclusive no more."""
    addr = process.mmap(16 * PAGE)
    process.write(addr, block_bytes(0, 16))
    free = machine.vmstat()["nr_free_pages"]
    child = process.fork("child")
    assert machine.vmstat()["nr_free_pages"] == free - 2  # page tables
    assert rss(child)["MM_ANONPAGES"] == 16
    for page in range(16):
        pfn = pfn_of(process, addr, page)
        assert child.pfn(addr + page * PAGE) == pfn
        assert machine.mem.pages.mapcount[pfn] == 2
        assert not flags_of(process, pfn) & PG_anon_exclusive
    assert child.read(addr, 16 * PAGE) == block_bytes(0, 16)


def test_fork_copies_pinned_pages(process: Process) -> None:
    """A page pinned for DMA stays the parent's; the child gets a copy of its bytes."""
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    pinned = process.pin(addr, 1)
    child = process.fork()
    assert child.pfn(addr) != process.pfn(addr)
    assert child.pfn(addr + PAGE) == process.pfn(addr + PAGE)
    assert flags_of(process, pfn_of(process, addr, 0)) & PG_anon_exclusive
    assert child.read(addr, 2 * PAGE) == block_bytes(0, 2)
    process.write(addr, b"in place")
    assert pinned.pfns.tolist() == [process.pfn(addr)]
    pinned.release()


def test_fork_of_a_pinned_poisoned_page_panics(machine: Machine, process: Process) -> None:
    """copy_present_page has no recovery, with the series or without."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    process.pin(addr, 1)
    process.poison(addr)
    with pytest.raises(KernelPanic):
        process.fork()
    with pytest.raises(KernelPanic):
        machine.check_alive()
    assert machine.mem.poison.log[0].consumer == "copy_present_page"


def test_fork_splits_a_pinned_huge_page(machine: Machine, process: Process) -> None:
    """The parent's PMD is split, and the child gets copies of what may be pinned."""
    addr = advised(process)
    process.write(addr, block_bytes())
    pinned = process.pin(addr + 9 * PAGE, PAGE)
    child = process.fork()
    assert not process.is_huge(addr)
    assert child.pfn(addr + 9 * PAGE) != process.pfn(addr + 9 * PAGE)
    assert child.read(addr, HPAGE) == block_bytes()
    pinned.release()
    assert machine.vmstat()["thp_split_pmd"] == 1


@pytest.mark.parametrize(
    ("advice", "undo"),
    [
        (Advice.MADV_DONTFORK, Advice.MADV_DOFORK),
        (Advice.MADV_WIPEONFORK, Advice.MADV_KEEPONFORK),
    ],
)
def test_advice_on_fork(process: Process, advice: Advice, undo: Advice) -> None:
    """DONTFORK leaves the mapping out, WIPEONFORK its contents; both can be undone."""
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    process.madvise(addr, PAGE, advice)
    child = process.fork()
    if advice is Advice.MADV_DONTFORK:
        with pytest.raises(SegmentationFault):
            child.read(addr, 1)
    else:
        assert child.read(addr, 1) == b"\0"
    process.madvise(addr, PAGE, undo)
    assert process.fork().read(addr, 1) == b"x"


def test_fork_duplicates_swap_entries(machine: Machine, process: Process) -> None:
    """Both read the swapped-out bytes; the slot is freed with its last user."""
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    machine.lru_add_drain_all()
    pageout(process, addr, [0, 1])
    child = process.fork()
    assert rss(child)["MM_SWAPENTS"] == 2
    assert child.read(addr, 2 * PAGE) == block_bytes(0, 2)
    child.write(addr, page_bytes(9))
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)
    process.exit()
    child.exit()
    machine.lru_add_drain_all()
    assert machine.mem.swap.swap_map == {}


def test_child_alone_collapses_what_it_shares(machine: Machine, process: Process) -> None:
    """Kselftest collapse_fork: parent touches page 0, child page 1 and collapses."""
    addr = advised(process)
    fill(process, addr, [0])
    child = process.fork("child")
    fill(child, addr, [1])
    assert machine.collapse(child, addr) is ScanResult.SCAN_SUCCEED
    assert child.is_huge(addr)
    assert not process.is_huge(addr)
    assert child.read(addr, 2 * PAGE) == block_bytes(0, 2)
    assert process.read(addr, PAGE) == page_bytes(0)


def test_child_collapses_its_split_half_of_a_huge_page(machine: Machine, process: Process) -> None:
    """Kselftest collapse_fork_compound: the child's block becomes huge, the parent's stays."""
    addr = advised(process)
    process.write(addr, block_bytes())
    child = process.fork("child")
    child.madvise(addr, HPAGE, Advice.MADV_NOHUGEPAGE)
    child.write(addr, b"child")
    child.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    machine.khugepaged_settings.max_ptes_shared = 510
    assert machine.collapse(child, addr) is ScanResult.SCAN_EXCEED_SHARED_PTE
    machine.khugepaged_settings.max_ptes_shared = 511
    assert machine.collapse(child, addr) is ScanResult.SCAN_SUCCEED
    assert child.is_huge(addr)
    assert process.is_huge(addr)
    assert child.read(addr, HPAGE) == b"child" + block_bytes()[5:]
    assert process.read(addr, HPAGE) == block_bytes()
