"""Faults in mappings of files: what is mapped, how, with which bits, and what it counts as."""

from collections.abc import Callable
from pathlib import Path

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    block_bytes,
    changes,
    counters,
    flags_of,
    page_bytes,
    pfn_of,
    ptes_of,
    rss,
)

from pykhuge import (
    PROT_EXEC,
    PROT_NONE,
    PROT_READ,
    BusError,
    File,
    KernelPanic,
    Machine,
    OutOfMemory,
    Process,
    SegmentationFault,
)
from pykhuge.mm.page import PG_anon, PG_anon_exclusive, PG_dirty
from pykhuge.mm.page_table import PAGE_DIRTY, PAGE_RW
from pykhuge.mm.rmap import pmd_of

BASE = 0x10_0000_0000
NOTHING_MAPPED = {"MM_FILEPAGES": 0, "MM_ANONPAGES": 0, "MM_SWAPENTS": 0, "MM_SHMEMPAGES": 0}


def memfd(process: Process, pages: int) -> File:
    """A memfd of `pages` pages of `page_bytes`."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, block_bytes(0, pages))
    return file


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of the host: a block and a half of `page_bytes`, and 100 bytes."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 768) + b"z" * 100)
    return path


def huge_memfd(machine: Machine, process: Process) -> File:
    """A memfd that is one huge page of `page_bytes`, not mapped."""
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    machine.thp.shmem_enabled = "always"
    process.pwrite(file, 0, block_bytes())
    machine.thp.shmem_enabled = "never"
    return file


def mapped(process: Process, addr: int, pages: int) -> list[int]:
    """Which of `pages` pages from `addr` on are present."""
    return [page for page in range(pages) if process.pfn(addr + page * PAGE) is not None]


def word(process: Process, addr: int, page: int = 0) -> int:
    """The entry that maps a page of the block at `addr`."""
    return int(ptes_of(process, addr)[page])


# Fault-around.


def test_read_fault_maps_what_is_cached_in_the_64_kib_around(
    machine: Machine, process: Process
) -> None:
    """One fault maps an aligned window of 16 pages; they count in nr_mapped once."""
    file = memfd(process, 64)
    addr = process.mmap(HPAGE, file=file, shared=True)
    before = counters(machine, process)
    assert process.read(addr + 20 * PAGE, PAGE) == page_bytes(20)
    assert mapped(process, addr, 64) == list(range(16, 32))
    assert changes(before, counters(machine, process)) == {
        "pgfault": 1,
        "nr_mapped": 16,
        "MM_SHMEMPAGES": 16,
        "nr_page_table_pages": 2,
        "pgtables": 2,
        "nr_free_pages": -2,
    }


@pytest.mark.parametrize(
    ("start", "pages", "touch", "expected"),
    [
        (5, 64, 0, range(16)),  # the window begins with the VMA, and is no shorter for it
        (5, 64, 10, range(16)),
        (5, 64, 11, range(11, 27)),
        (0, 10, 3, range(10)),
        (0, 64, 63, range(48, 64)),
        (506, 64, 0, range(6)),  # a table ends here
        (506, 64, 6, range(6, 22)),
    ],
)
def test_fault_around_stays_inside_vma_and_page_table(
    process: Process, start: int, pages: int, touch: int, expected: range
) -> None:
    """16 pages from the window's start, which no VMA or table boundary lets it cross."""
    file = memfd(process, 64)
    addr = process.mmap(pages * PAGE, addr=BASE + start * PAGE, fixed=True, file=file, shared=True)
    process.read(addr + touch * PAGE, 1)
    assert mapped(process, addr, pages) == list(expected)


def test_fault_around_brings_nothing_in(process: Process) -> None:
    """Holes stay holes, and pages behind the end of the file stay unmapped."""
    file = process.memfd_create("f")
    for page in (1, 3, 4, 9):
        process.pwrite(file, page * PAGE, page_bytes(page))
    process.fallocate(file, 12 * PAGE, PAGE, keep_size=True)
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    process.read(addr + 4 * PAGE, 1)
    assert mapped(process, addr, 16) == [1, 3, 4, 9]
    assert file.f_mapping.nrpages == 5


def test_read_fault_on_a_hole_maps_its_neighbours_too(process: Process) -> None:
    """What is cached around comes first, then the page itself is made."""
    file = memfd(process, 2)
    process.ftruncate(file, 16 * PAGE)
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    assert process.read(addr + 7 * PAGE, PAGE) == bytes(PAGE)
    assert mapped(process, addr, 16) == [0, 1, 7]
    assert file.f_mapping.nrpages == 3


def test_fault_around_leaves_private_copies_alone(process: Process) -> None:
    """Entries that are there are not replaced by the file's pages."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file)
    process.write(addr + 3 * PAGE, b"own")
    process.read(addr, 1)
    assert process.read(addr + 3 * PAGE, PAGE) == b"own" + page_bytes(3)[3:]
    assert rss(process) | {"pgtables": 0} == NOTHING_MAPPED | {
        "MM_ANONPAGES": 1,
        "MM_SHMEMPAGES": 15,
        "pgtables": 0,
    }


def test_write_faults_map_one_page_each(machine: Machine, process: Process) -> None:
    """Only reads fault around; a store over four pages is four faults."""
    file = memfd(process, 64)
    addr = process.mmap(64 * PAGE, file=file, shared=True)
    before = machine.vmstat()
    process.write(addr + 20 * PAGE, bytes(4 * PAGE))
    assert mapped(process, addr, 64) == [20, 21, 22, 23]
    assert changes(before, machine.vmstat())["pgfault"] == 4


# Shared mappings.


def test_shared_shmem_is_mapped_writable_by_a_read(machine: Machine, process: Process) -> None:
    """Shmem need not hear of writes: a store after a load takes no fault, and dirties the entry."""
    file = process.memfd_create("f")
    process.ftruncate(file, PAGE)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.read(addr, 1)
    assert word(process, addr) & (PAGE_RW | PAGE_DIRTY) == PAGE_RW
    before = machine.vmstat()
    process.write(addr, b"x")
    assert changes(before, machine.vmstat()) == {}
    assert word(process, addr) & PAGE_DIRTY
    assert not flags_of(process, pfn_of(process, addr, 0)) & PG_dirty
    process.munmap(addr, PAGE)
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    assert flags_of(process, pfn) & PG_dirty


def test_write_fault_makes_page_and_entry_dirty(process: Process) -> None:
    """A page first touched by a store is dirty from the fault on."""
    file = process.memfd_create("f")
    process.ftruncate(file, PAGE)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.write(addr, b"x")
    assert word(process, addr) & (PAGE_RW | PAGE_DIRTY) == PAGE_RW | PAGE_DIRTY
    assert flags_of(process, pfn_of(process, addr, 0)) & PG_dirty


def test_file_page_mapped_twice_counts_once_in_nr_mapped(machine: Machine) -> None:
    """Each process has it in its own MM_SHMEMPAGES; the last unmap takes it out."""
    first = machine.process("a")
    file = memfd(first, 4)
    addr = first.mmap(4 * PAGE, file=file, shared=True)
    first.read(addr, 4 * PAGE)
    second = first.fork("b")
    assert rss(second)["MM_SHMEMPAGES"] == 0
    second.read(addr, 1)
    assert machine.vmstat()["nr_mapped"] == 4
    assert rss(second)["MM_SHMEMPAGES"] == rss(first)["MM_SHMEMPAGES"] == 4
    first.munmap(addr, 4 * PAGE)
    assert machine.vmstat()["nr_mapped"] == 4
    second.munmap(addr, 3 * PAGE)
    assert machine.vmstat()["nr_mapped"] == 1


@pytest.mark.parametrize("prot", [PROT_READ, PROT_READ | PROT_EXEC])
def test_stores_into_a_read_only_file_mapping_fault(process: Process, prot: int) -> None:
    """SIGSEGV, whether the page is mapped or not."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file, shared=True, prot=prot)
    for _ in range(2):
        with pytest.raises(SegmentationFault):
            process.write(addr, b"x")
        assert process.read(addr, PAGE) == page_bytes(0)
    nothing = process.mmap(PAGE, file=file, prot=PROT_NONE)
    with pytest.raises(SegmentationFault):
        process.read(nothing, 1)


# Private mappings.


def test_private_read_shares_the_files_own_page(process: Process) -> None:
    """It is mapped read-only even where the mapping may be written."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file)
    process.read(addr, 1)
    assert process.pfn(addr) == process.cached_pfn(file, 0)
    assert not word(process, addr) & PAGE_RW
    assert not flags_of(process, pfn_of(process, addr, 0)) & PG_anon
    process.pwrite(file, 0, b"seen")
    assert process.read(addr, 4) == b"seen"


@pytest.mark.parametrize("read_first", [False, True])
def test_private_write_makes_a_copy_that_is_anonymous(
    machine: Machine, process: Process, read_first: bool
) -> None:
    """The file keeps its page; the copy is this mm's alone, and no longer follows the file."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file)
    if read_first:
        process.read(addr, 1)
    before = counters(machine, process)
    process.write(addr + 10, b"own")
    assert process.pread(file, 0, PAGE) == page_bytes(0)
    assert process.read(addr, PAGE) == page_bytes(0)[:10] + b"own" + page_bytes(0)[13:]
    assert flags_of(process, pfn_of(process, addr, 0)) & (PG_anon | PG_anon_exclusive) == (
        PG_anon | PG_anon_exclusive
    )
    assert word(process, addr) & (PAGE_RW | PAGE_DIRTY) == PAGE_RW | PAGE_DIRTY
    diff = changes(before, counters(machine, process))
    assert (diff["MM_ANONPAGES"], diff["nr_anon_pages"], diff["pgfault"]) == (1, 1, 1)
    assert diff.get("MM_SHMEMPAGES", 0) == diff.get("nr_mapped", 0) == -read_first
    process.pwrite(file, 0, b"not seen")
    assert process.read(addr, 10) == page_bytes(0)[:10]


def test_private_write_to_a_hole_fills_the_hole_too(process: Process) -> None:
    """The page to copy is brought in first: a hole of shmem becomes a page of zeros."""
    file = process.memfd_create("f")
    process.ftruncate(file, PAGE)
    addr = process.mmap(PAGE, file=file)
    process.write(addr, b"x")
    assert process.read(addr, PAGE) == b"x" + bytes(PAGE - 1)
    assert file.f_mapping.nrpages == 1
    assert process.pread(file, 0, PAGE) == bytes(PAGE)


def test_private_copy_of_a_file_is_swapped_as_anonymous_memory(
    machine: Machine, process: Process
) -> None:
    """It goes to a slot of its own, and comes back; the file is not charged for it."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file)
    process.write(addr, b"own")
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, 21)
    assert rss(process)["MM_SWAPENTS"] == 1
    assert process.read(addr, PAGE) == b"own" + page_bytes(0)[3:]
    assert file.f_mapping.nrpages == 1


def test_no_page_for_a_copy_leaves_the_mapping_as_it_was(make_machine: MakeMachine) -> None:
    """The cgroup is full (two tables, one page): the store fails, loads go on as before."""
    machine = make_machine()
    owner, guest = machine.process("o"), machine.process("g", memcg=machine.memcg(3 * PAGE))
    mount = machine.tmpfs()
    file = owner.open("f", 0o102, tmpfs=mount)
    owner.pwrite(file, 0, block_bytes(0, 2))
    addr = guest.mmap(2 * PAGE, file=guest.open("f", tmpfs=mount))
    guest.write(addr, b"1")
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            guest.write(addr + PAGE, b"2")
        assert guest.read(addr + PAGE, PAGE) == page_bytes(1)


# Poison.


def test_poison_under_a_first_private_store_kills_the_host(process: Process) -> None:
    """do_cow_fault copies with copy_user_highpage, which no machine check may meet."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file)
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    process.mem.poison.poison(pfn, 17)
    with pytest.raises(KernelPanic):
        process.write(addr, b"x")


def test_poison_under_a_store_to_a_mapped_page_kills_the_task_alone(process: Process) -> None:
    """wp_page_copy is machine-check safe: SIGBUS, and the file's page is taken away."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file)
    process.read(addr, 1)
    process.poison(addr, 17)
    with pytest.raises(BusError, match="BUS_MCEERR_AR") as raised:
        process.write(addr + 99, b"x")
    assert (raised.value.address, raised.value.lsb) == (addr + 99, 12)
    assert not any(process.mm.rss_stat)
    with pytest.raises(BusError, match="BUS_MCEERR_AR"):
        process.read(addr, 1)


def test_poison_in_a_shared_page_kills_whoever_loads_it(process: Process) -> None:
    """The whole page is lost: shmem keeps it in its cache, as the proof."""
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.read(addr, 1)
    process.poison(addr, 3)
    with pytest.raises(BusError, match="BUS_MCEERR_AR"):
        process.read(addr, PAGE)
    for touch in (lambda: process.read(addr + 4 * 64, 64), lambda: process.write(addr, b"x")):
        with pytest.raises(BusError, match="BUS_MCEERR_AR"):
            touch()
    assert file.f_mapping.nrpages == 1
    with pytest.raises(OSError, match="page 0 of memfd:f is lost"):
        process.pread(file, 0, 1)


# The end of the file.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_touching_what_lies_behind_the_end_is_sigbus(
    process: Process, shared: bool, write: bool
) -> None:
    """Up to the end of the last page all is well; the address is the very one touched."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, b"tail")
    addr = process.mmap(8 * PAGE, file=file, shared=shared)
    assert process.read(addr, PAGE) == b"tail" + bytes(PAGE - 4)
    process.write(addr + PAGE - 1, b"x")
    for at in (addr + PAGE, addr + 3 * PAGE + 77):
        with pytest.raises(BusError) as raised:
            process.write(at, b"x") if write else process.read(at, 1)
        assert (raised.value.address, raised.value.code, raised.value.lsb) == (at, 2, 0)
    with pytest.raises(BusError) as raised:
        process.write(addr, bytes(2 * PAGE)) if write else process.read(addr, 2 * PAGE)
    assert raised.value.address == addr + PAGE
    assert file.inode.i_size == 4


def test_store_across_the_end_fills_no_hole_behind_it(process: Process) -> None:
    """What lies before the end is written, page by page, up to it."""
    file = process.memfd_create("f")
    process.ftruncate(file, 2 * PAGE)
    addr = process.mmap(8 * PAGE, file=file, shared=True)
    with pytest.raises(BusError) as raised:
        process.write(addr, block_bytes(0, 5))
    assert raised.value.address == addr + 2 * PAGE
    assert file.f_mapping.nrpages == 2
    assert process.pread(file, 0, 8 * PAGE) == block_bytes(0, 2)


def test_growing_the_file_makes_the_mapping_usable(process: Process) -> None:
    """The VMA need not be mapped anew."""
    file = process.memfd_create("f")
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    with pytest.raises(BusError):
        process.read(addr, 1)
    process.ftruncate(file, PAGE)
    process.write(addr, b"now")
    assert process.pread(file, 0, 9 * PAGE) == b"now" + bytes(PAGE - 3)


def test_end_of_a_disk_file_is_sigbus_too(process: Process, disk: Path) -> None:
    """The last page is zero behind the end of the file."""
    file = process.open(str(disk))
    addr = process.mmap(4 * PAGE, prot=PROT_READ, file=file, offset=766 * PAGE)
    assert process.read(addr, 3 * PAGE) == block_bytes(766, 2) + b"z" * 100 + bytes(PAGE - 100)
    with pytest.raises(BusError, match="BUS_ADRERR"):
        process.read(addr + 3 * PAGE, 1)


# Huge pages.


@pytest.mark.parametrize("write", [False, True])
def test_fault_maps_a_cached_huge_page_by_a_pmd(
    machine: Machine, process: Process, write: bool
) -> None:
    """One fault for 2 MiB: no page table below the PMD's, nothing deposited."""
    file = huge_memfd(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    before = counters(machine, process)
    if write:
        process.write(addr + 5 * PAGE, page_bytes(5))
    else:
        process.read(addr + 5 * PAGE, 1)
    assert process.is_huge(addr)
    assert changes(before, counters(machine, process)) == {
        "pgfault": 1,
        "nr_mapped": NR,
        "nr_shmem_pmdmapped": 1,
        "MM_SHMEMPAGES": NR,
        "thp_file_mapped": 1,
        "nr_page_table_pages": 1,
        "pgtables": 1,
        "nr_free_pages": -1,
    }
    assert process.read(addr, HPAGE) == block_bytes()
    assert machine.vmstat()["pgfault"] == before["pgfault"] + 1
    process.munmap(addr, HPAGE)
    machine.audit()
    assert rss(process) == NOTHING_MAPPED | {"pgtables": 0}
    assert machine.vmstat()["nr_mapped"] == machine.vmstat()["nr_shmem_pmdmapped"] == 0


def test_write_fault_makes_a_huge_page_dirty(machine: Machine, process: Process) -> None:
    """One that only reads had brought in is clean until then."""
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    machine.thp.shmem_enabled = "always"
    process.read(addr, 1)
    head = process.cached_pfn(file, 0)
    assert head is not None
    assert not flags_of(process, head) & PG_dirty
    process.madvise(addr, HPAGE, 4)
    process.write(addr, b"x")
    assert process.is_huge(addr)
    assert flags_of(process, head) & PG_dirty


UNMAPS: dict[str, Callable[[Process, int], object]] = {
    "munmap": lambda process, addr: process.munmap(addr, HPAGE),
    "munmap of a part": lambda process, addr: process.munmap(addr + 9 * PAGE, PAGE),
    "MADV_DONTNEED": lambda process, addr: process.madvise(addr, HPAGE, 4),
    "mprotect of a part": lambda process, addr: process.mprotect(addr, PAGE, PROT_READ),
    "exit": lambda process, _: process.exit(),
}


@pytest.mark.parametrize("how", UNMAPS)
def test_dirty_pmd_makes_its_page_dirty_when_it_goes(machine: Machine, how: str) -> None:
    """A store through it took no fault, so that only the PMD knew of it."""
    process = machine.process("a")
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    keeper = process.fork()
    machine.thp.shmem_enabled = "always"
    process.read(addr, 1)
    process.write(addr + 30 * PAGE, b"stored")
    head = process.cached_pfn(file, 0)
    assert head is not None
    assert not flags_of(process, head) & PG_dirty
    UNMAPS[how](process, addr)
    assert flags_of(process, head) & PG_dirty
    assert keeper.pread(file, 30 * PAGE, 6) == b"stored"


def test_pmd_reaches_beyond_the_end_of_the_file(machine: Machine, process: Process) -> None:
    """A fault behind the end is SIGBUS; where a PMD is mapped already there is no fault."""
    machine.thp.shmem_enabled = "always"
    file = process.memfd_create("f")
    process.pwrite(file, 0, block_bytes(0, 100))
    addr = process.mmap(HPAGE, file=file, shared=True)
    for access in (
        lambda: process.read(addr + 200 * PAGE, 1),
        lambda: process.write(addr + 200 * PAGE, b"x"),
    ):
        with pytest.raises(BusError, match="BUS_ADRERR"):
            access()
    process.read(addr, 1)
    assert process.is_huge(addr)
    assert process.read(addr + 200 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(("offset", "pages"), [(1, 511), (0, 511), (0, 16)])
def test_vma_that_does_not_hold_the_whole_block_maps_by_ptes(
    machine: Machine, process: Process, offset: int, pages: int
) -> None:
    """The subpages are mapped one by one, 16 around a read; nr_shmem_pmdmapped does not move."""
    file = huge_memfd(machine, process)
    addr = process.mmap(pages * PAGE, file=file, offset=offset * PAGE, shared=True)
    expected = block_bytes()[offset * PAGE :][: pages * PAGE]
    assert process.read(addr, pages * PAGE) == expected
    assert not process.is_huge(addr)
    assert rss(process)["MM_SHMEMPAGES"] == pages
    counts = machine.vmstat()
    assert (counts["nr_mapped"], counts["nr_shmem_pmdmapped"]) == (pages, 0)


def test_vma_out_of_step_with_the_block_maps_by_ptes(machine: Machine, process: Process) -> None:
    """Address and offset must agree modulo 2 MiB."""
    file = huge_memfd(machine, process)
    addr = process.mmap(HPAGE, addr=BASE + 7 * PAGE, fixed=True, file=file, shared=True)
    assert process.read(addr, HPAGE) == block_bytes()
    process.write(addr + HPAGE - PAGE, b"end")
    assert not process.is_huge(addr)
    assert process.pread(file, HPAGE - PAGE, 3) == b"end"


def test_private_store_into_a_huge_page_clears_the_pmd(machine: Machine, process: Process) -> None:
    """The file's PMD is not split into 512 entries: only the copy is mapped, the rest refaults."""
    file = huge_memfd(machine, process)
    addr = process.mmap(HPAGE, file=file)
    process.read(addr, 1)
    assert process.is_huge(addr)
    assert rss(process)["pgtables"] == 1
    before = counters(machine, process)
    process.write(addr + 20 * PAGE, b"own")
    assert mapped(process, addr, NR) == [20]
    diff = changes(before, counters(machine, process))
    assert diff["thp_split_pmd"] == diff["MM_ANONPAGES"] == diff["pgtables"] == 1
    assert diff["MM_SHMEMPAGES"] == diff["nr_mapped"] == -NR
    assert diff["nr_shmem_pmdmapped"] == -1
    assert "thp_split_page" not in diff
    expected = bytearray(block_bytes())
    expected[20 * PAGE : 20 * PAGE + 3] = b"own"
    assert process.read(addr, HPAGE) == expected
    assert not process.is_huge(addr)
    assert process.pread(file, 0, HPAGE) == block_bytes()


def test_first_private_store_does_not_map_the_huge_page(machine: Machine, process: Process) -> None:
    """It copies one page out of it, straight away."""
    file = huge_memfd(machine, process)
    addr = process.mmap(HPAGE, file=file)
    process.write(addr + 9 * PAGE, b"own")
    assert mapped(process, addr, NR) == [9]
    assert machine.vmstat()["thp_file_mapped"] == 0
    assert process.read(addr + 9 * PAGE, PAGE) == b"own" + page_bytes(9)[3:]


def test_huge_page_mapped_by_pmd_and_by_ptes_counts_once(
    machine: Machine, process: Process
) -> None:
    """nr_mapped is 512 as long as anything maps all of it, and what is left afterwards."""
    file = huge_memfd(machine, process)
    by_pmd = process.mmap(HPAGE, file=file, shared=True)
    by_ptes = process.mmap(10 * PAGE, file=file, shared=True)
    process.read(by_ptes, 10 * PAGE)
    assert machine.vmstat()["nr_mapped"] == 10
    process.read(by_pmd, 1)
    assert machine.vmstat()["nr_mapped"] == NR
    process.munmap(by_pmd, HPAGE)
    assert machine.vmstat()["nr_mapped"] == 10
    process.munmap(by_ptes, 10 * PAGE)
    assert machine.vmstat()["nr_mapped"] == 0


def test_store_through_a_pmd_mapped_for_reading_keeps_it_huge(
    machine: Machine, process: Process
) -> None:
    """Shared shmem is writable at once, by a PMD too, and the store makes the PMD dirty."""
    file = huge_memfd(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, 1)
    before = machine.vmstat()
    process.write(addr + 5, b"x")
    assert changes(before, machine.vmstat()) == {}
    pmd = pmd_of(process.mem, process.mm, addr)
    assert pmd is not None
    assert pmd & (PAGE_RW | PAGE_DIRTY) == PAGE_RW | PAGE_DIRTY


# Disk files.


def test_disk_pages_count_as_file_pages(machine: Machine, process: Process, disk: Path) -> None:
    """MM_FILEPAGES and the file lists; the first touch is a major fault, the next is not."""
    file = process.open(str(disk))
    addr = process.mmap(64 * PAGE, prot=PROT_READ, file=file)
    before = counters(machine, process)
    process.read(addr, 1)
    diff = changes(before, counters(machine, process))
    assert (diff["pgfault"], diff["pgmajfault"]) == (1, 1)
    assert diff["nr_mapped"] == diff["MM_FILEPAGES"]
    assert diff["nr_file_pages"] == file.f_mapping.nrpages
    assert "nr_shmem" not in diff
    process.read(addr, 16 * PAGE)
    assert machine.vmstat()["pgmajfault"] == before["pgmajfault"] + 1
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_inactive_file"] == file.f_mapping.nrpages


@pytest.mark.parametrize(
    ("touch", "expected"),
    [
        (0, range(32)),
        (15, range(32)),
        (16, range(32)),
        (100, range(84, 116)),
        (768, range(752, 769)),
    ],
)
def test_fault_reads_a_window_around_it(
    process: Process, disk: Path, touch: int, expected: range
) -> None:
    """do_sync_mmap_readahead: 32 pages, half of them before the fault, inside of the file."""
    file = process.open(str(disk))
    addr = process.mmap(HPAGE * 2, prot=PROT_READ, file=file)
    process.read(addr + touch * PAGE, 1)
    cached = [page for page in range(800) if process.cached_pfn(file, page) is not None]
    assert cached == list(expected)


def test_fault_under_madv_hugepage_reads_two_blocks(process: Process, disk: Path) -> None:
    """The window is the block, aligned, and the one behind it, as far as the file goes."""
    file = process.open(str(disk))
    addr = process.mmap(HPAGE * 2, prot=PROT_READ, file=file)
    process.madvise(addr, 2 * HPAGE, 14)
    process.read(addr + 300 * PAGE, 1)
    assert file.f_mapping.nrpages == 769


def test_shared_disk_page_takes_a_fault_for_its_first_store(
    machine: Machine, process: Process, disk: Path
) -> None:
    """The file system must hear of it: read maps it read-only, the store makes the page dirty."""
    file = process.open(str(disk), 2)
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    process.read(addr, 1)
    assert not word(process, addr) & PAGE_RW
    before = machine.vmstat()
    process.write(addr, b"x")
    assert changes(before, machine.vmstat()) == {"pgfault": 1, "nr_dirty": 1}
    assert word(process, addr) & (PAGE_RW | PAGE_DIRTY) == PAGE_RW | PAGE_DIRTY
    process.write(addr + 1, b"y")
    assert machine.vmstat()["pgfault"] == before["pgfault"] + 1


def test_private_store_never_reaches_the_disk(process: Process, disk: Path) -> None:
    """Not even when the file is synced."""
    file = process.open(str(disk), 2)
    addr = process.mmap(PAGE, file=file)
    process.write(addr, b"own")
    process.fsync(file)
    assert disk.read_bytes()[:PAGE] == page_bytes(0)
    assert process.pread(file, 0, PAGE) == page_bytes(0)


def test_two_mappings_of_a_private_file_do_not_see_each_other(process: Process) -> None:
    """Each has its own copy, also where one was read before the other wrote."""
    file = memfd(process, 2)
    first, second = (process.mmap(2 * PAGE, file=file) for _ in range(2))
    process.read(second, 2 * PAGE)
    process.write(first, b"first")
    process.write(second + PAGE, b"second")
    assert process.read(first, 2 * PAGE) == b"first" + block_bytes(0, 2)[5:]
    assert process.read(second, PAGE + 6) == page_bytes(0) + b"second"
