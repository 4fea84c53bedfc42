"""Address spaces that map files: fork, mremap, mprotect, munmap, mlock, madvise, userfaultfd."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

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
    PROT_WRITE,
    Advice,
    BusError,
    File,
    KernelVersion,
    Machine,
    Process,
    SegmentationFault,
    UserFault,
)
from pykhuge.mm.page import PG_dirty, PG_mlocked, PG_unevictable
from pykhuge.mm.page_table import PAGE_RW, PAGE_UFFD_WP

BASE = 0x20_0000_0000
RW = PROT_READ | PROT_WRITE


def memfd(process: Process, pages: int) -> File:
    """A memfd of `pages` pages of `page_bytes`."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, block_bytes(0, pages))
    return file


def huge_file(machine: Machine, process: Process, blocks: int = 1) -> File:
    """A memfd of huge pages of `page_bytes`."""
    machine.thp.shmem_enabled = "always"
    file = memfd(process, blocks * NR)
    machine.thp.shmem_enabled = "never"
    assert machine.vmstat()["nr_shmem_hugepages"] == blocks
    return file


def read_only(machine: Machine, process: Process, pages: int) -> File:
    """A tmpfs file of `page_bytes`, open for reading alone."""
    mount = machine.tmpfs()
    writer = process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=mount)
    process.pwrite(writer, 0, block_bytes(0, pages))
    process.close(writer)
    return process.open("f", tmpfs=mount)


def word(process: Process, addr: int, page: int = 0) -> int:
    """The entry that maps a page of the block at `addr`."""
    return int(ptes_of(process, addr)[page])


def expect(number: int) -> Any:
    """The block raises an OSError, whose words are those of this errno."""
    return pytest.raises(OSError, match=os.strerror(number))


# mmap.


def test_mapping_needs_the_right_to_do_what_it_allows(machine: Machine, process: Process) -> None:
    """A shared writable mapping needs a file open for writing, every mapping one for reading."""
    mount = machine.tmpfs()
    both = process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=mount)
    reader, writer = (process.open("f", flag, tmpfs=mount) for flag in (os.O_RDONLY, os.O_WRONLY))
    for kwargs in ({}, {"shared": True}, {"prot": PROT_READ}):
        with expect(errno.EACCES):
            process.mmap(PAGE, file=writer, **kwargs)  # type: ignore[arg-type]
    with expect(errno.EACCES):
        process.mmap(PAGE, file=reader, shared=True)
    process.mmap(PAGE, file=reader)
    process.mmap(PAGE, file=reader, shared=True, prot=PROT_READ | PROT_EXEC)
    process.mmap(PAGE, file=both, shared=True)
    assert reader.f_count == 3
    assert writer.f_count == 1


@pytest.mark.parametrize("offset", [1, -PAGE, PAGE + 8])
def test_offset_must_be_that_of_a_page(process: Process, offset: int) -> None:
    """EINVAL; and nothing is mapped."""
    file = memfd(process, 2)
    with expect(errno.EINVAL):
        process.mmap(PAGE, file=file, offset=offset)
    with expect(errno.EINVAL):
        process.mmap(PAGE, offset=PAGE)
    assert process.mm.vmas == []


def test_mapping_of_a_closed_file_is_refused(machine: Machine, process: Process) -> None:
    """EBADF, for a file that was closed and for one that another process has open."""
    file = memfd(process, 1)
    with expect(errno.EBADF):
        machine.process("b").mmap(PAGE, file=file)
    process.close(file)
    with expect(errno.EBADF):
        process.mmap(PAGE, file=file)


@pytest.mark.parametrize("offset", [0, PAGE, HPAGE, 5 * HPAGE // 2])
def test_large_mappings_lie_in_step_with_the_files_blocks(process: Process, offset: int) -> None:
    """thp_get_unmapped_area: 2 MiB of the file can be one huge PMD."""
    file = process.memfd_create("f")
    addr = process.mmap(2 * HPAGE, file=file, offset=offset, shared=True)
    assert (addr - offset) % HPAGE == 0


def test_adjacent_mappings_of_one_file_become_one(process: Process) -> None:
    """If the offsets go on; the file is then referred to once."""
    file = memfd(process, 8)
    for page in (0, 1, 2):
        process.mmap(
            PAGE, addr=BASE + page * PAGE, fixed=True, file=file, offset=page * PAGE, shared=True
        )
    assert (len(process.mm.vmas), file.f_count) == (1, 2)
    process.mmap(PAGE, addr=BASE + 3 * PAGE, fixed=True, file=file, offset=7 * PAGE, shared=True)
    process.mmap(PAGE, addr=BASE + 4 * PAGE, fixed=True, file=file, offset=4 * PAGE)
    assert (len(process.mm.vmas), file.f_count) == (3, 4)
    assert process.read(BASE, 5 * PAGE) == (block_bytes(0, 3) + page_bytes(7) + page_bytes(4))


def test_fixed_mapping_over_a_file_lets_it_go(machine: Machine, process: Process) -> None:
    """What is replaced was the last that kept the file."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.close(file)
    process.read(addr, 2 * PAGE)
    process.mmap(2 * PAGE, addr=addr, fixed=True)
    assert machine.mem.inodes == []
    assert process.read(addr, 2 * PAGE) == bytes(2 * PAGE)


# fork.


def test_fork_does_not_copy_entries_of_shared_files(machine: Machine, process: Process) -> None:
    """The child finds the pages by its own faults; it has no page table before."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    process.write(addr, b"parent")
    child = process.fork()
    assert rss(child) == dict.fromkeys(rss(child), 0)
    child.write(addr + 100, b"child")
    assert process.read(addr, 6) == child.read(addr, 6) == b"parent"
    assert process.read(addr + 100, 5) == b"child"
    assert machine.mem.pages.mapcount[pfn_of(process, addr, 0)] == 2


def test_fork_does_not_copy_private_mappings_without_copies(process: Process) -> None:
    """As long as nothing was written there is nothing that a fault would not find."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file)
    process.read(addr, 16 * PAGE)
    child = process.fork()
    assert rss(child) == dict.fromkeys(rss(child), 0)
    assert child.read(addr, 16 * PAGE) == block_bytes(0, 16)


def test_fork_shares_private_copies_until_one_writes(process: Process) -> None:
    """Parent and child see the copy, and each its own afterwards; the file sees neither."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file)
    process.write(addr + PAGE, b"before")
    process.read(addr, 1)
    child = process.fork()
    assert (rss(child)["MM_ANONPAGES"], rss(child)["MM_SHMEMPAGES"]) == (1, 15)
    assert child.read(addr + PAGE, 6) == b"before"
    process.write(addr + PAGE, b"parent")
    child.write(addr + 2 * PAGE, b"child")
    assert child.read(addr + PAGE, 6) == b"before"
    assert process.read(addr + 2 * PAGE, PAGE) == page_bytes(2)
    assert process.pread(file, 0, 16 * PAGE) == block_bytes(0, 16)
    process.exit()
    assert child.read(addr + PAGE, 6) == b"before"


def test_fork_hands_swapped_private_copies_on(machine: Machine, process: Process) -> None:
    """The slot is shared; both read it back."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file)
    process.write(addr, b"own")
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    child = process.fork()
    assert rss(child)["MM_SWAPENTS"] == 1
    assert child.read(addr, 3) == process.read(addr, 3) == b"own"


def test_fork_with_a_huge_file_pmd(machine: Machine, process: Process) -> None:
    """Not copied either; the child maps it by a fault, and the page counts once."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, 1)
    child = process.fork()
    assert not child.is_huge(addr)
    assert child.read(addr, HPAGE) == block_bytes()
    assert child.is_huge(addr)
    assert machine.vmstat()["nr_mapped"] == NR
    assert machine.vmstat()["nr_shmem_pmdmapped"] == 1


def test_fork_with_a_huge_file_pmd_beside_private_copies(
    machine: Machine, process: Process
) -> None:
    """The copies are handed on; the file's PMD is left to a fault (copy_huge_pmd)."""
    file = huge_file(machine, process, 2)
    addr = process.mmap(2 * HPAGE, file=file)
    process.read(addr, 1)
    process.write(addr + HPAGE, b"own")
    child = process.fork()
    assert (rss(child)["MM_SHMEMPAGES"], rss(child)["MM_ANONPAGES"]) == (0, 1)
    assert not child.is_huge(addr)
    machine.audit()
    assert child.read(addr, 2 * HPAGE) == process.read(addr, 2 * HPAGE)
    assert child.is_huge(addr)


def test_descriptors_are_shared_with_the_child(machine: Machine, process: Process) -> None:
    """The child may use and close them; the file goes with the last one."""
    file = memfd(process, 1)
    child = process.fork()
    process.close(file)
    assert child.pread(file, 0, PAGE) == page_bytes(0)
    with expect(errno.EBADF):
        process.pread(file, 0, 1)
    child.close(file)
    assert machine.mem.inodes == []


# mremap.


@pytest.mark.parametrize("shared", [False, True])
def test_mremap_moves_entries_and_offset(process: Process, shared: bool) -> None:
    """The pages are found at the new place without a fault, and by the right offset after one."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file, shared=shared)
    process.read(addr, 8 * PAGE)
    process.write(addr + 3 * PAGE, b"three")
    before = rss(process)
    new = process.mremap(addr + 2 * PAGE, 10 * PAGE, BASE + 5 * PAGE)
    assert {**rss(process), "pgtables": 0} == {**before, "pgtables": 0}
    assert process.read(new + PAGE, 5) == b"three"
    assert process.read(new + 9 * PAGE, PAGE) == page_bytes(11)
    assert process.read(addr + 12 * PAGE, PAGE) == page_bytes(12)
    with pytest.raises(SegmentationFault):
        process.read(addr + 2 * PAGE, 1)
    process.ftruncate(file, 3 * PAGE)
    with pytest.raises(BusError):
        process.read(new + PAGE, 1)
    assert process.read(new, PAGE) == page_bytes(2)


def test_mremap_moves_a_huge_pmd_whole(machine: Machine, process: Process) -> None:
    """Both ends aligned: the PMD word moves, and nothing is split."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, 1)
    new = process.mremap(addr, HPAGE, BASE)
    assert process.is_huge(new)
    assert machine.vmstat()["thp_split_pmd"] == 0
    assert process.read(new, HPAGE) == block_bytes()


def test_mremap_out_of_step_clears_a_huge_pmd(machine: Machine, process: Process) -> None:
    """The page stays huge, and is found page by page at the new place."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, b"first")
    new = process.mremap(addr, HPAGE, BASE + PAGE)
    assert process.read(new, HPAGE) == b"first" + block_bytes()[5:]
    assert not process.is_huge(new)
    counts = machine.vmstat()
    assert (counts["nr_shmem_hugepages"], counts["thp_split_page"]) == (1, 0)


def test_mremap_grows_into_more_of_the_file(process: Process) -> None:
    """The added pages are those behind the old end."""
    file = memfd(process, 16)
    addr = process.mmap(4 * PAGE, file=file, offset=2 * PAGE, shared=True)
    new = process.mremap(addr, 4 * PAGE, BASE, 8 * PAGE)
    assert process.read(new, 8 * PAGE) == block_bytes(2, 8)


# mprotect.


def test_mprotect_cannot_make_a_read_only_file_writable(machine: Machine, process: Process) -> None:
    """EACCES for a shared mapping; a private one may be written, that never reaches the file."""
    file = read_only(machine, process, 4)
    shared = process.mmap(4 * PAGE, file=file, shared=True, prot=PROT_READ)
    with expect(errno.EACCES):
        process.mprotect(shared, PAGE, RW)
    process.mprotect(shared, PAGE, PROT_READ | PROT_EXEC)
    private = process.mmap(4 * PAGE, file=file, prot=PROT_READ)
    process.mprotect(private, PAGE, RW)
    process.write(private, b"own")
    assert process.read(shared, PAGE) == page_bytes(0)


def test_mprotect_changes_what_lies_below_a_refusal(machine: Machine, process: Process) -> None:
    """As in the kernel: the VMAs up to the one that may not be written have changed."""
    below = process.mmap(PAGE, addr=BASE, fixed=True, prot=PROT_READ)
    file = read_only(machine, process, 1)
    process.mmap(PAGE, addr=BASE + PAGE, fixed=True, file=file, shared=True, prot=PROT_READ)
    with expect(errno.EACCES):
        process.mprotect(below, 2 * PAGE, RW)
    process.write(below, b"x")
    with pytest.raises(SegmentationFault):
        process.write(below + PAGE, b"x")


def test_shared_shmem_becomes_writable_at_once(machine: Machine, process: Process) -> None:
    """No fault is needed for the first store, and the entry's dirty bit tells of it later."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file, shared=True, prot=PROT_READ)
    process.read(addr, 4 * PAGE)
    assert not word(process, addr) & PAGE_RW
    process.mprotect(addr, 4 * PAGE, RW)
    before = machine.vmstat()
    process.write(addr, bytes(4 * PAGE))
    assert changes(before, machine.vmstat()) == {}
    process.mprotect(addr, 4 * PAGE, PROT_READ)
    with pytest.raises(SegmentationFault):
        process.write(addr, b"x")
    process.munmap(addr, 4 * PAGE)
    assert process.pread(file, 0, 4 * PAGE) == bytes(4 * PAGE)


def test_private_file_pages_do_not_become_writable(process: Process) -> None:
    """Only the mm's own copies do; the file's page is copied by the fault it takes."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file)
    process.write(addr + PAGE, b"own")
    process.read(addr, 2 * PAGE)
    process.mprotect(addr, 2 * PAGE, PROT_READ)
    process.mprotect(addr, 2 * PAGE, RW)
    assert not word(process, addr) & PAGE_RW
    assert word(process, addr, 1) & PAGE_RW
    process.write(addr, b"too")
    assert process.pread(file, 0, 3) == page_bytes(0)[:3]


def test_clean_disk_pages_do_not_become_writable(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Their file system must hear of the first store; a dirty page's entry has had it."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.write(addr + PAGE, b"dirty")
    process.read(addr, 4 * PAGE)
    process.mprotect(addr, 4 * PAGE, PROT_READ)
    process.mprotect(addr, 4 * PAGE, RW)
    assert [bool(word(process, addr, page) & PAGE_RW) for page in range(4)] == [
        False,
        True,
        False,
        False,
    ]
    process.write(addr, b"x")
    assert machine.vmstat()["nr_dirty"] == 2


def test_mprotect_of_part_of_a_huge_file_page_clears_the_pmd(
    machine: Machine, process: Process
) -> None:
    """The VMA is cut inside of the block, which no PMD can map any more."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, 1)
    process.mprotect(addr + PAGE, PAGE, PROT_READ)
    assert not process.is_huge(addr)
    assert process.read(addr, HPAGE) == block_bytes()
    assert not process.is_huge(addr)
    process.mprotect(addr + PAGE, PAGE, RW)
    assert len(process.mm.vmas) == 1
    assert machine.vmstat()["nr_shmem_hugepages"] == 1


def test_mprotect_of_a_whole_huge_file_page_keeps_the_pmd(
    machine: Machine, process: Process
) -> None:
    """Read-only and writable again, without a fault."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, b"x")
    process.mprotect(addr, HPAGE, PROT_READ)
    with pytest.raises(SegmentationFault):
        process.write(addr, b"y")
    process.mprotect(addr, HPAGE, RW)
    before = machine.vmstat()
    process.write(addr, b"z")
    assert process.is_huge(addr)
    assert changes(before, machine.vmstat()) == {}


def test_prot_none_hides_file_pages(process: Process) -> None:
    """Nothing can be read; the entries are there again afterwards."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.write(addr, b"x")
    process.mprotect(addr, 2 * PAGE, PROT_NONE)
    with pytest.raises(SegmentationFault):
        process.read(addr, 1)
    process.mprotect(addr, 2 * PAGE, RW)
    assert process.read(addr, 1) == b"x"


# munmap.


def test_munmap_in_pieces_takes_exactly_those_pages(machine: Machine, process: Process) -> None:
    """The rest stays mapped; the file is referred to by each piece, and by none at the end."""
    file = memfd(process, 16)
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    process.read(addr, 16 * PAGE)
    process.munmap(addr + 4 * PAGE, 2 * PAGE)
    process.munmap(addr + 10 * PAGE, PAGE)
    assert file.f_count == 4
    assert rss(process)["MM_SHMEMPAGES"] == machine.vmstat()["nr_mapped"] == 13
    assert process.read(addr + 11 * PAGE, 5 * PAGE) == block_bytes(11, 5)
    with pytest.raises(SegmentationFault):
        process.read(addr + 5 * PAGE, 1)
    process.munmap(addr, 16 * PAGE)
    assert (file.f_count, file.f_mapping.i_mmap) == (1, [])
    assert rss(process) == dict.fromkeys(rss(process), 0)


def test_munmap_of_part_of_a_huge_page_leaves_the_page_huge(
    machine: Machine, process: Process
) -> None:
    """Only the PMD goes; the remaining pages are mapped by PTEs from then on."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr + 9 * PAGE, b"nine")
    process.munmap(addr + 10 * PAGE, PAGE)
    assert machine.vmstat()["nr_shmem_hugepages"] == 1
    assert machine.vmstat()["nr_shmem_pmdmapped"] == 0
    assert process.read(addr + 9 * PAGE, 4) == b"nine"
    assert not process.is_huge(addr)
    head = process.cached_pfn(file, 0)
    assert head is not None
    assert flags_of(process, head) & PG_dirty


# mlock.


def test_mlock_makes_cached_pages_unevictable(machine: Machine, process: Process) -> None:
    """They are faulted in, counted, and refused to reclaim; munlock undoes all of it."""
    file = memfd(process, 8)
    addr = process.mmap(8 * PAGE, file=file, shared=True)
    machine.lru_add_drain_all()
    before = machine.vmstat()
    process.mlock(addr, 4 * PAGE)
    machine.lru_add_drain_all()
    diff = changes(before, machine.vmstat())
    assert diff["nr_mlock"] == diff["nr_unevictable"] == 4
    flags = flags_of(process, pfn_of(process, addr, 0))
    assert flags & (PG_mlocked | PG_unevictable) == PG_mlocked | PG_unevictable
    with expect(errno.EINVAL):
        process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    with expect(errno.EINVAL):
        process.madvise(addr, PAGE, Advice.MADV_REMOVE)
    process.munlock(addr, 4 * PAGE)
    assert machine.vmstat()["nr_mlock"] == before["nr_mlock"]
    assert machine.vmstat()["nr_unevictable"] == 0


def test_mlocked_page_stays_so_while_another_process_holds_it(machine: Machine) -> None:
    """Whoever unlocks last makes it evictable again; munmap unlocks."""
    first = machine.process("a")
    file = memfd(first, 1)
    addr = first.mmap(PAGE, file=file, shared=True)
    second = first.fork("b")
    for each in (first, second):
        each.mlock(addr, PAGE)
    first.munlock(addr, PAGE)
    assert machine.vmstat()["nr_mlock"] == 1
    second.munmap(addr, PAGE)
    assert machine.vmstat()["nr_mlock"] == 0


def test_mlock_of_a_huge_file_page_counts_all_of_it(machine: Machine, process: Process) -> None:
    """By a PMD alone: pages mapped by PTEs of a compound page are not marked."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.mlock(addr, HPAGE)
    assert machine.vmstat()["nr_mlock"] == machine.vmstat()["nr_unevictable"] == NR
    process.munmap(addr + PAGE, PAGE)
    assert machine.vmstat()["nr_mlock"] == 0


def test_mlock_of_a_private_writable_mapping_copies(machine: Machine, process: Process) -> None:
    """It is faulted in for writing, so that no store will need memory later."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file)
    process.mlock(addr, 2 * PAGE)
    assert rss(process)["MM_ANONPAGES"] == 2
    assert machine.vmstat()["nr_mlock"] == 2
    process.ftruncate(file, PAGE)
    assert machine.vmstat()["nr_mlock"] == 1


def test_truncation_takes_mlocked_pages(machine: Machine, process: Process) -> None:
    """Mlock keeps a page in memory, not in the file."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.mlock(addr, 4 * PAGE)
    process.ftruncate(file, PAGE)
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_mlock"] == machine.vmstat()["nr_unevictable"] == 1
    assert file.f_mapping.nrpages == 1


# madvise.


def test_dontneed_of_a_shared_mapping_loses_nothing(machine: Machine, process: Process) -> None:
    """The pages stay in the cache, with what was stored in them."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.write(addr, b"kept")
    process.madvise(addr, 4 * PAGE, Advice.MADV_DONTNEED)
    assert rss(process)["MM_SHMEMPAGES"] == machine.vmstat()["nr_mapped"] == 0
    assert process.read(addr, 4) == b"kept"


def test_dontneed_of_a_private_mapping_shows_the_file_again(
    machine: Machine, process: Process
) -> None:
    """Copies are dropped, also those on swap."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file)
    process.write(addr, bytes(4 * PAGE))
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    process.madvise(addr, 4 * PAGE, Advice.MADV_DONTNEED)
    assert rss(process)["MM_ANONPAGES"] == rss(process)["MM_SWAPENTS"] == 0
    assert machine.mem.swap.swap_map == {}
    assert process.read(addr, 4 * PAGE) == block_bytes(0, 4)


def test_dontneed_of_part_of_a_huge_page_clears_the_pmd(machine: Machine, process: Process) -> None:
    """The file's page stays as it is; the rest of the block refaults by PTEs: a table is there."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, block_bytes())
    process.madvise(addr + PAGE, PAGE, Advice.MADV_DONTNEED)
    assert not process.is_huge(addr)
    assert process.read(addr, HPAGE) == block_bytes()
    assert machine.vmstat()["nr_shmem_hugepages"] == 1


@pytest.mark.parametrize("advice", [Advice.MADV_FREE, Advice.MADV_WIPEONFORK])
def test_advice_for_anonymous_memory_is_refused_for_files(process: Process, advice: Advice) -> None:
    """EINVAL, of shared and private mappings."""
    file = memfd(process, 1)
    for shared in (False, True):
        addr = process.mmap(PAGE, file=file, shared=shared)
        with expect(errno.EINVAL):
            process.madvise(addr, PAGE, advice)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_RDWR])
@pytest.mark.parametrize("locked", [False, True])
def test_remove_of_a_disk_file_asks_what_the_mapping_is_first(
    process: Process, tmp_path: Path, shared: bool, mode: int, locked: bool
) -> None:
    """EINVAL if mlocked, EACCES unless shared and writable, and only then EOPNOTSUPP."""
    path = tmp_path / "disk"
    path.write_bytes(page_bytes(0))
    file, writable = process.open(str(path), mode), mode == os.O_RDWR and shared
    addr = process.mmap(PAGE, file=file, shared=shared, prot=RW if writable else PROT_READ)
    if locked:
        process.mlock(addr, PAGE)
    number = errno.EINVAL if locked else errno.EOPNOTSUPP if writable else errno.EACCES
    with expect(number):
        process.madvise(addr, PAGE, Advice.MADV_REMOVE)
    assert process.read(addr, PAGE) == page_bytes(0)


@pytest.mark.parametrize("version", [(6, 6), (6, 7)])
def test_remove_asks_whether_the_mapping_may_be_written_since_6_7(
    make_machine: MakeMachine, version: tuple[int, int]
) -> None:
    """Before, it had to be writable; a file that is not open for writing is EACCES anyway."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process()
    addr = process.mmap(PAGE, file=read_only(machine, process, 1), shared=True, prot=PROT_READ)
    with expect(errno.EACCES):
        process.madvise(addr, PAGE, Advice.MADV_REMOVE)
    file = memfd(process, 1)
    addr = process.mmap(PAGE, file=file, shared=True, prot=PROT_READ)
    with expect(errno.EACCES) if version == (6, 6) else contextlib.nullcontext():
        process.madvise(addr, PAGE, Advice.MADV_REMOVE)
    assert file.f_mapping.nrpages == (1 if version == (6, 6) else 0)


def test_remove_needs_a_shared_writable_shmem_mapping(process: Process) -> None:
    """EACCES, EINVAL or ENOMEM otherwise; the file is left alone."""
    file = memfd(process, 1)
    for kwargs in ({"shared": False}, {"shared": True, "prot": PROT_READ}):
        addr = process.mmap(PAGE, file=file, **kwargs)  # type: ignore[arg-type]
        with expect(errno.EACCES):
            process.madvise(addr, PAGE, Advice.MADV_REMOVE)
    with expect(errno.EINVAL):
        process.madvise(process.mmap(PAGE), PAGE, Advice.MADV_REMOVE)
    with expect(errno.ENOMEM):
        process.madvise(BASE, PAGE, Advice.MADV_REMOVE)
    assert process.pread(file, 0, PAGE) == page_bytes(0)


@pytest.mark.parametrize("advice", [Advice.MADV_POPULATE_READ, Advice.MADV_POPULATE_WRITE])
def test_populate_behind_the_end_is_efault(process: Process, advice: Advice) -> None:
    """No signal: the call returns, and what lies before the end is there."""
    addr = process.mmap(4 * PAGE, file=memfd(process, 2), shared=True)
    with expect(errno.EFAULT):
        process.madvise(addr, 4 * PAGE, advice)
    assert rss(process)["MM_SHMEMPAGES"] == 2


def test_populate_that_meets_poison_is_ehwpoison(process: Process) -> None:
    """The copy that a private store would need; the host and the task live."""
    addr = process.mmap(PAGE, file=memfd(process, 1))
    process.read(addr, 1)
    process.poison(addr)
    with expect(133):
        process.madvise(addr, PAGE, Advice.MADV_POPULATE_WRITE)
    with expect(errno.ENOMEM):
        process.mlock(addr, PAGE)


def test_mlock_behind_the_end_is_enomem(machine: Machine, process: Process) -> None:
    """The range is mlocked all the same, as far as the file goes."""
    addr = process.mmap(4 * PAGE, file=memfd(process, 2), shared=True)
    with expect(errno.ENOMEM):
        process.mlock(addr, 4 * PAGE)
    assert machine.vmstat()["nr_mlock"] == 2


def test_populate_reads_and_writes_ahead(process: Process) -> None:
    """MADV_POPULATE_READ maps without dirtying, _WRITE copies in private mappings."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file)
    process.madvise(addr, 4 * PAGE, Advice.MADV_POPULATE_READ)
    assert (rss(process)["MM_SHMEMPAGES"], rss(process)["MM_ANONPAGES"]) == (4, 0)
    process.madvise(addr, 2 * PAGE, Advice.MADV_POPULATE_WRITE)
    assert (rss(process)["MM_SHMEMPAGES"], rss(process)["MM_ANONPAGES"]) == (2, 2)
    assert process.read(addr, 4 * PAGE) == block_bytes(0, 4)


# userfaultfd.


def test_missing_page_of_shmem_is_answered_by_userfaultfd(process: Process) -> None:
    """A hole asks; a page that is cached or swapped out does not."""
    file = memfd(process, 2)
    process.ftruncate(file, 4 * PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    uffd = process.userfaultfd()
    uffd.register(addr, 4 * PAGE)
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)
    for access in (
        lambda: process.read(addr + 3 * PAGE, 1),
        lambda: process.write(addr + 3 * PAGE, b"x"),
    ):
        with pytest.raises(UserFault) as raised:
            access()
        assert (raised.value.address, raised.value.kind) == (addr + 3 * PAGE, "missing")
    uffd.copy(addr + 2 * PAGE, block_bytes(12, 2))
    assert process.read(addr, 4 * PAGE) == block_bytes(0, 2) + block_bytes(12, 2)
    assert process.pread(file, 2 * PAGE, 2 * PAGE) == block_bytes(12, 2)


@pytest.mark.parametrize("write", [False, True])
def test_missing_block_asks_before_a_huge_page_is_made(
    machine: Machine, process: Process, write: bool
) -> None:
    """The policy allows huge pages; userfaultfd comes first."""
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.userfaultfd().register(addr, HPAGE)
    machine.thp.shmem_enabled = "always"
    with pytest.raises(UserFault, match="missing"):
        process.write(addr, b"x") if write else process.read(addr, 1)
    assert file.f_mapping.nrpages == 0


def test_private_mapping_of_a_hole_asks_too(process: Process) -> None:
    """What userfaultfd gives it is its own, and the file keeps its hole."""
    file = process.memfd_create("f")
    process.ftruncate(file, PAGE)
    addr = process.mmap(PAGE, file=file)
    uffd = process.userfaultfd()
    uffd.register(addr, PAGE)
    with pytest.raises(UserFault, match="missing"):
        process.write(addr, b"x")
    uffd.copy(addr, page_bytes(3))
    assert process.read(addr, PAGE) == page_bytes(3)
    assert rss(process)["MM_ANONPAGES"] == 1
    assert file.f_mapping.nrpages == 0


def test_system_calls_do_not_ask_userfaultfd(process: Process) -> None:
    """Only faults of the registered mapping do; then the page is there for it too."""
    file = process.memfd_create("f")
    process.ftruncate(file, 2 * PAGE)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.userfaultfd().register(addr, 2 * PAGE)
    process.pwrite(file, 0, b"written")
    assert process.read(addr, 7) == b"written"
    other = process.mmap(2 * PAGE, file=file, shared=True)
    assert process.read(other + PAGE, 1) == b"\0"
    assert process.read(addr + PAGE, 1) == b"\0"


def test_uffd_copy_refuses_what_is_there_and_what_is_not_the_files(process: Process) -> None:
    """EEXIST for a cached page, mapped or not; EFAULT behind the end of the file."""
    file = memfd(process, 1)
    process.ftruncate(file, 2 * PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    uffd = process.userfaultfd()
    uffd.register(addr, 4 * PAGE)
    for _ in range(2):
        with expect(errno.EEXIST):
            uffd.copy(addr, bytes(PAGE))
        process.read(addr, 1)
    with expect(errno.EFAULT):
        uffd.copy(addr + 2 * PAGE, bytes(PAGE))
    uffd.zeropage(addr + PAGE, PAGE)
    assert process.read(addr, 2 * PAGE) == page_bytes(0) + bytes(PAGE)
    assert file.f_mapping.nrpages == 2


def test_write_protected_shmem_page_faults_until_it_is_lifted(process: Process) -> None:
    """The page may be read; also one mapped only later was protected by its marker."""
    file = memfd(process, 4)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 1)
    uffd = process.userfaultfd()
    uffd.register(addr, 4 * PAGE, missing=False, wp=True)
    uffd.writeprotect(addr, 2 * PAGE)
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    for page in range(2):
        with pytest.raises(UserFault) as raised:
            process.write(addr + page * PAGE, b"x")
        assert raised.value.kind == "wp"
        assert process.read(addr + page * PAGE, PAGE) == page_bytes(page)
    process.write(addr + 2 * PAGE, b"free")
    uffd.writeprotect(addr, 2 * PAGE, protect=False)
    process.write(addr, b"now")
    assert process.pread(file, 0, 3) == b"now"


@pytest.mark.parametrize("away", ["pageout", "punch", "truncate"])
def test_write_protection_outlives_the_page(machine: Machine, process: Process, away: str) -> None:
    """Swapped out, or gone from the file: a marker keeps it; munmap forgets it."""
    file = memfd(process, 2)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * PAGE, missing=False, wp=True)
    process.read(addr, 2 * PAGE)
    uffd.writeprotect(addr, 2 * PAGE)
    machine.lru_add_drain_all()
    if away == "pageout":
        process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    elif away == "punch":
        process.fallocate(file, 0, 2 * PAGE, punch_hole=True)
    else:
        process.ftruncate(file, 0)
        process.ftruncate(file, 2 * PAGE)
    assert rss(process)["MM_SHMEMPAGES"] == 0
    with pytest.raises(UserFault):
        process.write(addr, b"x")
    expected = block_bytes(0, 2) if away == "pageout" else bytes(2 * PAGE)
    assert process.read(addr, 2 * PAGE) == expected
    assert word(process, addr, 1) & PAGE_UFFD_WP
    process.mmap(2 * PAGE, addr=addr, fixed=True, file=file, shared=True)
    process.write(addr, b"x")


def test_munmap_forgets_write_protection(process: Process) -> None:
    """Also where the page table stays, because another mapping has its pages there."""
    file = memfd(process, 2)
    process.mmap(PAGE, addr=BASE, fixed=True)
    process.write(BASE, b"keeps the table")
    addr = process.mmap(2 * PAGE, addr=BASE + PAGE, fixed=True, file=file, shared=True)
    process.read(addr, PAGE)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * PAGE, missing=False, wp=True)
    uffd.writeprotect(addr, 2 * PAGE)
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    assert word(process, BASE, 1)
    assert word(process, BASE, 2)
    process.munmap(addr, 2 * PAGE)
    assert word(process, BASE, 1) == word(process, BASE, 2) == 0


def test_protecting_a_huge_file_page_splits_its_pmd(machine: Machine, process: Process) -> None:
    """File mappings are protected entry by entry; the page itself stays huge."""
    file = huge_file(machine, process)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, b"x")
    uffd = process.userfaultfd()
    uffd.register(addr, HPAGE, missing=False, wp=True)
    uffd.writeprotect(addr, HPAGE)
    assert not process.is_huge(addr)
    with pytest.raises(UserFault):
        process.write(addr + 100 * PAGE, b"x")
    assert process.read(addr + PAGE, HPAGE - PAGE) == block_bytes()[PAGE:]
    uffd.unregister(addr, HPAGE)
    process.write(addr + 100 * PAGE, b"x")
    assert machine.vmstat()["nr_shmem_hugepages"] == 1


def test_userfaultfd_takes_no_disk_files(process: Process, tmp_path: Path) -> None:
    """EINVAL: only memory that the kernel can fill by itself."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE))
    addr = process.mmap(PAGE, file=process.open(str(path)))
    with expect(errno.EINVAL):
        process.userfaultfd().register(addr, PAGE)


def test_exit_of_a_process_with_everything_mapped(machine: Machine, process: Process) -> None:
    """Shared, private, huge, protected, locked, swapped: all is given back."""
    file, huge = memfd(process, 16), huge_file(machine, process)
    shared, private = (process.mmap(16 * PAGE, file=file, shared=flag) for flag in (True, False))
    process.read(shared, 16 * PAGE)
    process.write(private, bytes(4 * PAGE))
    machine.lru_add_drain_all()
    process.madvise(private, PAGE, Advice.MADV_PAGEOUT)
    process.madvise(shared + 8 * PAGE, 4 * PAGE, Advice.MADV_PAGEOUT)
    process.mlock(process.mmap(HPAGE, file=huge, shared=True), HPAGE)
    uffd = process.userfaultfd()
    uffd.register(shared, 16 * PAGE, wp=True)
    uffd.writeprotect(shared, 16 * PAGE)
    before = counters(machine, process)
    assert before["nr_mapped"] > NR
    process.exit()
    machine.lru_add_drain_all()
    counts = machine.vmstat()
    for name in ("nr_mapped", "nr_shmem", "nr_file_pages", "nr_mlock", "nr_page_table_pages"):
        assert counts[name] == 0
    assert machine.mem.swap.swap_map == {}
    assert counts["nr_free_pages"] == machine.mem.nr_pages - 1
