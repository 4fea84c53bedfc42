"""Shmem: what a file is charged for, and what fills, empties, swaps and refuses its pages."""

import errno
import os
from contextlib import suppress
from typing import Any

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    block_bytes,
    changes,
    flags_of,
    page_bytes,
    rss,
    small_machine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import (
    Advice,
    BusError,
    CollapseError,
    File,
    KernelPanic,
    KernelVersion,
    Machine,
    OutOfMemory,
    Process,
    WouldBlock,
)
from pykhuge.mm.mm_types import ShmemInode
from pykhuge.mm.page import PG_dirty, PG_uptodate
from pykhuge.mm.vmscan import _reclaim_file_page
from pykhuge.mm.xarray import SWAPIN_ERROR

RDWR = os.O_RDWR | os.O_CREAT


def shmem_of(file: File) -> ShmemInode:
    """The inode of a shmem file."""
    assert isinstance(file.inode, ShmemInode)
    return file.inode


def books(file: File) -> dict[str, int]:
    """All that the file is charged for, in pages."""
    inode = shmem_of(file)
    assert inode.i_blocks % 8 == 0
    return {
        "alloced": inode.alloced,
        "i_blocks": inode.i_blocks // 8,
        "nrpages": inode.i_mapping.nrpages,
        "swapped": inode.swapped,
    }


def even(pages: int, swapped: int = 0) -> dict[str, int]:
    """The books of a file with `pages` pages in memory and `swapped` on swap."""
    return {
        "alloced": pages + swapped,
        "i_blocks": pages + swapped,
        "nrpages": pages,
        "swapped": swapped,
    }


def memfd(process: Process, length: int, *, pages: range | None = None) -> File:
    """A memfd of `length` bytes, `pages` of it written with `page_bytes`."""
    file = process.memfd_create("f")
    process.ftruncate(file, length)
    if pages is not None and len(pages):
        process.pwrite(file, pages[0] * PAGE, block_bytes(pages[0], len(pages)))
    return file


def huge_file(machine: Machine, process: Process, blocks: int = 1) -> tuple[File, int]:
    """A memfd of huge pages, filled, and where it is mapped, by PMDs."""
    file = memfd(process, blocks * HPAGE)
    addr = process.mmap(blocks * HPAGE, file=file, shared=True)
    machine.thp.shmem_enabled = "always"
    process.write(addr, block_bytes(0, blocks * NR))
    machine.thp.shmem_enabled = "never"
    assert all(process.is_huge(addr + number * HPAGE) for number in range(blocks))
    return file, addr


def fail(number: int) -> Any:
    """The block raises an OSError with this errno."""

    class Expect:
        def __enter__(self) -> "Expect":
            return self

        def __exit__(self, _kind: object, error: object, _traceback: object) -> bool:
            assert isinstance(error, OSError), f"{os.strerror(number)} was not raised"
            assert error.errno == number
            return True

    return Expect()


# Charges.


def test_a_file_is_charged_for_the_pages_it_has_not_for_its_size(process: Process) -> None:
    """A sparse file costs nothing; a page costs 8 blocks of 512 bytes."""
    file = memfd(process, 100 * PAGE)
    assert books(file) == even(0)
    process.pwrite(file, 10 * PAGE, b"x")
    process.pwrite(file, 50 * PAGE - 1, b"xy")
    assert books(file) == even(3)
    assert shmem_of(file).i_blocks == 24


def test_each_page_of_a_memfd_is_committed_as_it_comes_and_goes(
    machine: Machine, process: Process
) -> None:
    """VM_NORESERVE objects commit page by page: written, faulted in, preallocated alike."""
    file = memfd(process, 100 * PAGE)
    assert machine.mem.vm_committed_as == 0
    process.pwrite(file, 0, bytes(3 * PAGE))
    addr = process.mmap(100 * PAGE, file=file, shared=True)
    process.write(addr + 10 * PAGE, bytes(2 * PAGE))
    process.read(addr + 30 * PAGE, PAGE)
    process.fallocate(file, 40 * PAGE, 4 * PAGE)
    assert machine.mem.vm_committed_as == 10
    process.ftruncate(file, 2 * PAGE)
    assert machine.mem.vm_committed_as == 2
    assert books(file) == even(2)


def test_shared_anonymous_memory_is_committed_as_a_whole(
    machine: Machine, process: Process
) -> None:
    """mmap(MAP_SHARED | MAP_ANONYMOUS) commits its size at once, and keeps it to the end."""
    addr = process.mmap(100 * PAGE, shared=True)
    assert machine.mem.vm_committed_as == 100
    process.write(addr, bytes(5 * PAGE))
    process.munmap(addr, 50 * PAGE)
    assert machine.mem.vm_committed_as == 100
    process.munmap(addr + 50 * PAGE, 50 * PAGE)
    assert machine.mem.vm_committed_as == 0
    assert machine.vmstat()["nr_shmem"] == 0


def test_shared_anonymous_memory_without_reserve_is_committed_page_by_page(
    machine: Machine, process: Process
) -> None:
    """MAP_NORESERVE makes it like a memfd."""
    addr = process.mmap(100 * PAGE, shared=True, noreserve=True)
    assert machine.mem.vm_committed_as == 0
    process.write(addr, bytes(5 * PAGE))
    assert machine.mem.vm_committed_as == 5


def test_size_beyond_the_commit_limit_is_refused_and_nothing_is_left(
    make_machine: MakeMachine,
) -> None:
    """ENOMEM for a reserved object; exactly the limit fits."""
    machine = make_machine(commit_limit=64 * PAGE)
    process = machine.process("app")
    with fail(errno.ENOMEM):
        process.mmap(65 * PAGE, shared=True)
    assert machine.mem.inodes == []
    process.mmap(64 * PAGE, shared=True)
    with fail(errno.ENOMEM):
        process.mmap(PAGE, shared=True)
    assert machine.mem.vm_committed_as == 64


def test_commit_limit_refuses_single_pages_of_a_memfd(make_machine: MakeMachine) -> None:
    """A write ends short where the limit is, the next one gets ENOSPC, a fault SIGBUS."""
    machine = make_machine(commit_limit=4 * PAGE)
    process = machine.process("app")
    file = memfd(process, 16 * PAGE)
    assert process.pwrite(file, PAGE, block_bytes(0, 6)) == 4 * PAGE
    with fail(errno.ENOSPC):
        process.pwrite(file, 10 * PAGE, b"x")
    addr = process.mmap(16 * PAGE, file=file, shared=True)
    for access in (lambda: process.read(addr + 12 * PAGE, 1), lambda: process.write(addr, b"x")):
        with pytest.raises(BusError, match="BUS_ADRERR"):
            access()
    assert books(file) == even(4)
    assert machine.mem.vm_committed_as == 4


def test_mount_without_size_counts_no_blocks(machine: Machine, process: Process) -> None:
    """Only size= makes the mount count; the file counts its own blocks all the same."""
    unlimited, limited = machine.tmpfs(), machine.tmpfs("1M")
    for mount in (unlimited, limited):
        file = process.open("f", RDWR, tmpfs=mount)
        process.pwrite(file, 0, bytes(7 * PAGE))
        assert books(file) == even(7)
    assert (unlimited.used_blocks, limited.used_blocks) == (0, 7)


def test_full_mount_cuts_a_write_short_and_refuses_the_next(
    machine: Machine, process: Process
) -> None:
    """What fits is written, the size grows by that; then ENOSPC, until another file shrinks."""
    mount = machine.tmpfs(8 * PAGE)
    first, second = (process.open(name, RDWR, tmpfs=mount) for name in "ab")
    process.pwrite(first, 0, bytes(5 * PAGE))
    assert process.pwrite(second, 100, block_bytes(0, 5)) == 3 * PAGE - 100
    assert second.inode.i_size == 3 * PAGE
    assert process.pread(second, 0, 5 * PAGE) == bytes(100) + block_bytes(0, 3)[:-100]
    with fail(errno.ENOSPC):
        process.pwrite(second, 3 * PAGE, b"x")
    process.pwrite(second, 2 * PAGE, b"y" * PAGE)
    process.ftruncate(first, PAGE)
    assert mount.used_blocks == 4
    assert process.pwrite(second, 3 * PAGE, block_bytes(0, 2)) == 2 * PAGE


def test_fault_on_a_full_mount_is_a_bus_error(machine: Machine, process: Process) -> None:
    """ENOSPC reaches a program that only touches memory as SIGBUS, at the address it touched."""
    mount = machine.tmpfs(4 * PAGE)
    file = process.open("f", RDWR, tmpfs=mount)
    process.ftruncate(file, 8 * PAGE)
    addr = process.mmap(8 * PAGE, file=file, shared=True)
    with pytest.raises(BusError) as raised:
        process.write(addr, block_bytes(0, 8))
    assert (raised.value.address, raised.value.code) == (addr + 4 * PAGE, 2)
    assert process.read(addr, 4 * PAGE) == block_bytes(0, 4)
    assert books(file) == even(4)


def test_reading_a_hole_of_a_full_mount_by_pread_costs_nothing(
    machine: Machine, process: Process
) -> None:
    """read(2) of a hole needs no page; a load from a mapping does."""
    mount = machine.tmpfs(PAGE)
    file = process.open("f", RDWR, tmpfs=mount)
    process.pwrite(file, 3 * PAGE, b"end")
    assert process.pread(file, 0, 4 * PAGE) == bytes(3 * PAGE) + b"end"
    assert books(file) == even(1)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    with pytest.raises(BusError):
        process.read(addr, 1)


def test_machine_out_of_memory_gives_every_charge_back(make_machine: MakeMachine) -> None:
    """The pages that are not there are not paid for; those that came in stay."""
    machine = make_machine("4M")
    process = machine.process("app")
    mount = machine.tmpfs("8M")
    file = process.open("f", RDWR, tmpfs=mount)
    written = process.pwrite(file, 0, bytes(6 << 20))
    assert 0 < written < 4 << 20
    with pytest.raises(OutOfMemory):
        process.pwrite(file, written, b"x")
    assert books(file) == even(written // PAGE)
    assert mount.used_blocks == machine.mem.vm_committed_as == written // PAGE
    process.ftruncate(file, 0)
    assert mount.used_blocks == machine.mem.vm_committed_as == 0


def test_cgroup_limit_stops_a_write(machine: Machine) -> None:
    """Pages are charged to the cgroup of whoever brings them in."""
    group = machine.memcg(6 * PAGE)
    process = machine.process("app", memcg=group)
    file = process.memfd_create("f")
    assert process.pwrite(file, 0, bytes(10 * PAGE)) == 6 * PAGE
    assert group.usage == 6
    with pytest.raises(OutOfMemory):
        process.pwrite(file, 6 * PAGE, b"x")
    process.ftruncate(file, 0)
    machine.lru_add_drain_all()
    assert group.usage == 0


# Contents.


def test_holes_read_as_zeros_in_between_and_up_to_the_end(process: Process) -> None:
    """Nothing but what was written is there; a read ends where the file does."""
    file = memfd(process, 5 * PAGE + 10)
    process.pwrite(file, PAGE + 5, b"abc")
    expected = bytearray(5 * PAGE + 10)
    expected[PAGE + 5 : PAGE + 8] = b"abc"
    assert process.pread(file, 0, 1 << 20) == bytes(expected)
    assert process.pread(file, 5 * PAGE, 100) == bytes(10)
    assert process.pread(file, 5 * PAGE + 10, 1) == b""
    assert process.pread(file, 1 << 40, 1) == b""


def test_write_in_the_middle_changes_nothing_around_it(process: Process) -> None:
    """Pages that are there keep their other bytes; the size stays."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    data = bytearray(block_bytes(0, 4))
    data[PAGE - 3 : 2 * PAGE + 3] = b"m" * (PAGE + 6)
    assert process.pwrite(file, PAGE - 3, b"m" * (PAGE + 6)) == PAGE + 6
    assert process.pread(file, 0, 4 * PAGE) == bytes(data)
    assert file.inode.i_size == 4 * PAGE


def test_new_pages_are_zeroed_whatever_they_held(machine: Machine, process: Process) -> None:
    """A frame that held somebody's bytes does not show them, written to in part or faulted in."""
    old = memfd(process, 8 * PAGE, pages=range(8))
    process.ftruncate(old, 0)
    machine.lru_add_drain_all()
    file = memfd(process, 8 * PAGE)
    process.pwrite(file, 2, b"x")
    process.fallocate(file, PAGE, PAGE)
    addr = process.mmap(8 * PAGE, file=file, shared=True)
    assert process.read(addr, 8 * PAGE) == b"\0\0x" + bytes(8 * PAGE - 3)


def test_all_mappings_and_descriptors_see_one_content(machine: Machine) -> None:
    """A store in one process is what the other reads, by whichever way."""
    writer, reader = machine.process("w"), machine.process("r")
    mount = machine.tmpfs()
    file = writer.open("f", RDWR, tmpfs=mount)
    writer.ftruncate(file, 2 * PAGE)
    other = reader.open("f", tmpfs=mount)
    here = writer.mmap(2 * PAGE, file=file, shared=True)
    there = reader.mmap(2 * PAGE, prot=1, file=other, shared=True)
    assert reader.read(there, PAGE) == bytes(PAGE)
    writer.write(here + 7, b"store")
    assert reader.read(there + 7, 5) == b"store"
    writer.pwrite(file, PAGE - 1, b"pw")
    assert reader.read(there + PAGE - 1, 2) == b"pw"
    assert reader.pread(other, 7, 5) == b"store"


def test_poison_met_by_pread_kills_the_host(process: Process) -> None:
    """copy_page_to_iter is not machine-check safe; bytes beside the bad line are read as ever."""
    file = memfd(process, PAGE, pages=range(1))
    addr = process.mmap(PAGE, file=file, shared=True)
    process.read(addr, 1)
    process.poison(addr, 5)
    assert process.pread(file, 0, 5 * 64) == page_bytes(0)[: 5 * 64]
    assert process.pread(file, 6 * 64, 64) == page_bytes(0)[6 * 64 : 7 * 64]
    with pytest.raises(KernelPanic):
        process.pread(file, 5 * 64 + 63, 1)
    with pytest.raises(KernelPanic):
        process.pread(file, 0, 1)


# Truncation.


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 77, 4 * PAGE])
def test_truncation_cuts_bytes_and_they_do_not_come_back(process: Process, size: int) -> None:
    """Growing again shows zeros, also in the page that the old end was in."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 4 * PAGE)
    process.ftruncate(file, size)
    assert books(file) == even(-(-size // PAGE))
    assert process.pread(file, 0, 4 * PAGE) == block_bytes(0, 4)[:size]
    for page in range(4):
        if page * PAGE >= size:
            with pytest.raises(BusError, match="BUS_ADRERR"):
                process.read(addr + page * PAGE, 1)
    process.ftruncate(file, 4 * PAGE)
    expected = block_bytes(0, 4)[:size] + bytes(4 * PAGE - size)
    assert process.read(addr, 4 * PAGE) == expected
    assert process.pread(file, 0, 4 * PAGE) == expected


def test_truncation_takes_private_copies_behind_the_end_too(process: Process) -> None:
    """What a private mapping wrote behind the new end is gone; what lies before it stays."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file)
    process.write(addr, b"p" * 4 * PAGE)
    assert rss(process)["MM_ANONPAGES"] == 4
    process.ftruncate(file, PAGE + 1)
    assert rss(process)["MM_ANONPAGES"] == 2
    assert process.read(addr, 2 * PAGE) == b"p" * 2 * PAGE
    with pytest.raises(BusError):
        process.read(addr + 2 * PAGE, 1)


def test_truncation_frees_swap_slots(machine: Machine, process: Process) -> None:
    """Pages that were swapped out are given up with their slots, unread."""
    file = memfd(process, 8 * PAGE, pages=range(8))
    addr = swap_out(process, file, 0, 8)
    before = machine.vmstat()
    process.ftruncate(file, 2 * PAGE)
    assert books(file) == even(0, 2)
    assert len(machine.mem.swap.swap_map) == 2
    assert machine.vmstat()["pswpin"] == before["pswpin"]
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)


def test_truncation_into_a_swapped_page_reads_it_back_for_its_rest(
    machine: Machine, process: Process
) -> None:
    """The page that the new end lies in must be zeroed behind it, so it comes in."""
    file = memfd(process, 2 * PAGE, pages=range(2))
    swap_out(process, file, 0, 2)
    process.ftruncate(file, PAGE + 100)
    assert books(file) == even(1, 1)
    process.ftruncate(file, 2 * PAGE)
    assert process.pread(file, 0, 2 * PAGE) == block_bytes(0, 2)[: PAGE + 100] + bytes(PAGE - 100)
    assert machine.vmstat()["pswpin"] == 2


def test_truncation_into_a_page_that_swap_has_lost_succeeds(
    machine: Machine, process: Process
) -> None:
    """The lost page cannot be zeroed in part; the file has its new size all the same."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    swap_out(process, file, 0, 4)
    fail_swap(machine, file, 1)
    process.ftruncate(file, PAGE + 100)
    assert file.inode.i_size == PAGE + 100
    assert books(file) == even(0, 1)
    with fail(errno.EIO):
        process.pread(file, PAGE, 1)


def test_truncating_a_huge_page_splits_it(machine: Machine, process: Process) -> None:
    """The pages before the end stay as small ones, mapped by nobody until the next fault."""
    file, addr = huge_file(machine, process)
    before = machine.vmstat()
    process.ftruncate(file, 100 * PAGE + 5)
    machine.lru_add_drain_all()
    assert not process.is_huge(addr)
    assert books(file) == even(101)
    diff = changes(before, machine.vmstat())
    assert diff["nr_shmem_hugepages"] == diff["nr_shmem_pmdmapped"] == -1
    assert diff["nr_shmem"] == diff["nr_file_pages"] == 101 - NR
    assert diff["nr_mapped"] == -NR
    assert diff["thp_split_page"] == 1
    assert process.read(addr, 101 * PAGE) == block_bytes(0, 101)[: 100 * PAGE + 5] + bytes(PAGE - 5)


def test_truncating_between_huge_pages_splits_none(machine: Machine, process: Process) -> None:
    """Whole huge pages go whole."""
    file, addr = huge_file(machine, process, 2)
    process.ftruncate(file, HPAGE)
    assert process.is_huge(addr)
    assert books(file) == even(NR)
    assert machine.vmstat()["thp_split_page"] == 0
    assert process.read(addr, HPAGE) == block_bytes()


def test_truncating_a_huge_page_somebody_holds_zeroes_what_it_cannot_free(
    machine: Machine, process: Process
) -> None:
    """A pinned huge page cannot be split: it stays whole and charged, its tail reads as zeros."""
    file, addr = huge_file(machine, process)
    pin = process.pin(addr, PAGE)
    process.ftruncate(file, 10 * PAGE)
    assert books(file) == even(NR)
    assert machine.vmstat()["thp_split_page_failed"] >= 1
    process.ftruncate(file, HPAGE)
    assert process.pread(file, 0, HPAGE) == block_bytes(0, 10) + bytes(HPAGE - 10 * PAGE)
    pin.release()


# Holes.


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 4 * PAGE),
        (PAGE, 2 * PAGE),
        (10, 20),
        (PAGE - 1, PAGE + 1),
        (PAGE + 1, 3 * PAGE - 1),
        (5, PAGE),
        (2 * PAGE, 2 * PAGE + 9),
        (3 * PAGE, 9 * PAGE),
        (3 * PAGE + 1, 1 << 40),
    ],
)
def test_punched_bytes_are_zero_and_whole_pages_are_freed(
    process: Process, start: int, end: int
) -> None:
    """Pages covered in part are zeroed there; the size is kept; mappings see it at once."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 4 * PAGE)
    process.fallocate(file, start, end - start, punch_hole=True, keep_size=True)
    expected = bytearray(block_bytes(0, 4))
    expected[start:end] = bytes(max(0, min(end, 4 * PAGE) - start))
    freed = max(0, min(end // PAGE, 4) - -(-start // PAGE))
    assert books(file) == even(4 - freed)
    assert process.pread(file, 0, 8 * PAGE) == bytes(expected)
    assert process.read(addr, 4 * PAGE) == bytes(expected)
    assert file.inode.i_size == 4 * PAGE


def test_punching_spares_private_copies(process: Process) -> None:
    """A private mapping keeps what it wrote; its clean pages follow the file."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file)
    process.write(addr + PAGE, b"p" * PAGE)
    process.read(addr, 4 * PAGE)
    process.fallocate(file, 0, 4 * PAGE, punch_hole=True, keep_size=True)
    assert process.read(addr, 4 * PAGE) == bytes(PAGE) + b"p" * PAGE + bytes(2 * PAGE)


@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (5, 7), (511, 512), (0, 511), (1, 512), (500, 600)]
)
def test_punching_whole_pages_out_of_a_huge_page_splits_it(
    machine: Machine, process: Process, first: int, last: int
) -> None:
    """Only the pages of the hole are freed, of each huge page that it touches."""
    file, addr = huge_file(machine, process, 2)
    process.fallocate(file, first * PAGE, (last - first) * PAGE, punch_hole=True, keep_size=True)
    assert not process.is_huge(addr)
    assert process.is_huge(addr + HPAGE) == (last <= NR)
    assert books(file) == even(2 * NR - (last - first))
    expected = bytearray(block_bytes(0, 2 * NR))
    expected[first * PAGE : last * PAGE] = bytes((last - first) * PAGE)
    assert process.read(addr, 2 * HPAGE) == bytes(expected)


def test_punching_a_whole_huge_page_frees_it_whole(machine: Machine, process: Process) -> None:
    """Its 512 pages are given back; the neighbour is not touched."""
    file, addr = huge_file(machine, process, 2)
    process.fallocate(file, 0, HPAGE, punch_hole=True, keep_size=True)
    assert books(file) == even(NR)
    assert machine.vmstat()["thp_split_page"] == 0
    assert process.is_huge(addr + HPAGE)
    assert machine.vmstat()["nr_shmem_hugepages"] == 1


def test_punching_a_few_bytes_of_a_huge_page_splits_it(machine: Machine, process: Process) -> None:
    """truncate_inode_partial_folio zeroes, then splits whatever is large."""
    file, addr = huge_file(machine, process)
    process.fallocate(file, 3 * PAGE + 10, 20, punch_hole=True, keep_size=True)
    expected = bytearray(block_bytes())
    expected[3 * PAGE + 10 : 3 * PAGE + 30] = bytes(20)
    assert process.pread(file, 0, HPAGE) == bytes(expected)
    assert books(file) == even(NR)
    assert machine.vmstat()["nr_shmem_hugepages"] == 0
    assert not process.is_huge(addr)


def test_madvise_remove_punches_what_is_mapped(process: Process) -> None:
    """MADV_REMOVE frees the file's pages, by the file's offsets."""
    file = memfd(process, 8 * PAGE, pages=range(8))
    addr = process.mmap(4 * PAGE, file=file, offset=2 * PAGE, shared=True)
    process.madvise(addr + PAGE, 2 * PAGE, Advice.MADV_REMOVE)
    expected = block_bytes(0, 3) + bytes(2 * PAGE) + block_bytes(5, 3)
    assert process.pread(file, 0, 8 * PAGE) == expected
    assert books(file) == even(6)


# Preallocation.


def test_fallocate_charges_pages_that_are_not_up_to_date(process: Process) -> None:
    """They are paid for and dirty, read as zeros, and their bytes are cleared when asked for."""
    file = process.memfd_create("f")
    process.fallocate(file, 0, 4 * PAGE)
    assert file.inode.i_size == 4 * PAGE
    assert books(file) == even(4)
    pfn = process.cached_pfn(file, 1)
    assert pfn is not None
    assert flags_of(process, pfn) & (PG_uptodate | PG_dirty) == PG_dirty
    assert process.pread(file, 0, 4 * PAGE) == bytes(4 * PAGE)
    assert not flags_of(process, pfn) & PG_uptodate
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    assert process.read(addr + PAGE, PAGE) == bytes(PAGE)
    assert flags_of(process, pfn) & PG_uptodate
    assert process.pfn(addr + PAGE) == pfn
    assert process.pfn(addr + 2 * PAGE) is None, "fault-around passes over what is not up to date"


def test_fallocate_keeps_what_is_there(process: Process) -> None:
    """Written pages keep their bytes, swapped-out ones too; only holes are filled."""
    file = memfd(process, 4 * PAGE, pages=range(1, 3))
    swap_out(process, file, 2, 1)
    process.fallocate(file, 0, 4 * PAGE)
    assert process.pread(file, 0, 4 * PAGE) == bytes(PAGE) + block_bytes(1, 2) + bytes(PAGE)
    assert books(file) == even(4)


@pytest.mark.parametrize("size", [0, 100, PAGE])
def test_truncation_to_the_size_it_has_frees_what_is_behind(process: Process, size: int) -> None:
    """Preallocated pages behind the end go, though the size stays; growth keeps them."""
    file = memfd(process, size)
    process.fallocate(file, 0, 4 * PAGE, keep_size=True)
    process.ftruncate(file, size)
    assert books(file) == even(-(-size // PAGE))
    process.fallocate(file, 0, 4 * PAGE, keep_size=True)
    process.ftruncate(file, size + PAGE)
    assert books(file) == even(4)


def test_truncation_forgets_what_was_preallocated_behind(process: Process) -> None:
    """A hole in the middle does not; the end of the preallocation is that of the file then."""
    file = memfd(process, PAGE)
    process.fallocate(file, 0, 30 * PAGE, keep_size=True)
    process.fallocate(file, 5 * PAGE, 5 * PAGE, punch_hole=True)
    assert shmem_of(file).fallocend == 30
    process.fallocate(file, 20 * PAGE, 1 << 30, punch_hole=True)
    assert shmem_of(file).fallocend == 20
    process.ftruncate(file, 100)
    assert shmem_of(file).fallocend == 1
    assert books(file) == even(1)


def test_fallocate_with_keep_size_reaches_behind_the_end(process: Process) -> None:
    """The pages are there for later; a smaller size gives them back."""
    file = memfd(process, PAGE)
    process.fallocate(file, 0, 4 * PAGE, keep_size=True)
    assert file.inode.i_size == PAGE
    assert books(file) == even(4)
    assert process.pread(file, 0, 4 * PAGE) == bytes(PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    with pytest.raises(BusError):
        process.write(addr + PAGE, b"x")
    process.ftruncate(file, 100)
    assert books(file) == even(1)


@pytest.mark.parametrize("asked", [9, 7])
def test_fallocate_is_all_or_nothing(machine: Machine, process: Process, asked: int) -> None:
    """ENOSPC on the way takes away what was added; what was there before stays."""
    mount = machine.tmpfs(8 * PAGE)
    file, other = (process.open(name, RDWR, tmpfs=mount) for name in "ab")
    process.pwrite(other, 0, bytes(3 * PAGE))
    process.pwrite(file, PAGE, page_bytes(1))
    with fail(errno.ENOSPC):
        process.fallocate(file, 0, asked * PAGE)
    assert file.inode.i_size == 2 * PAGE
    assert books(file) == even(1)
    assert mount.used_blocks == 4
    assert process.pread(file, 0, 3 * PAGE) == bytes(PAGE) + page_bytes(1)
    process.fallocate(file, 0, 5 * PAGE)
    assert books(file) == even(5)


def test_failed_fallocate_keeps_no_memory_of_its_end(machine: Machine, process: Process) -> None:
    """A later split drops huge-page tails behind the end of the file as if it had not been."""
    mount = machine.tmpfs(5 * HPAGE // 2, huge="always")
    file, other = (process.open(name, RDWR, tmpfs=mount) for name in "ab")
    process.pwrite(other, 0, b"x")
    process.pwrite(file, 0, b"x" * 100 * PAGE)
    assert books(file) == even(NR)
    with fail(errno.ENOSPC):
        process.fallocate(file, 0, 2 * HPAGE, keep_size=True)
    assert books(file) == even(NR)
    process.fallocate(file, 5 * PAGE, PAGE, punch_hole=True, keep_size=True)
    assert books(file) == even(99)


def test_failed_fallocate_takes_its_huge_pages_back(machine: Machine, process: Process) -> None:
    """Huge pages added by a preallocation that fails go with it; those from before stay."""
    mount = machine.tmpfs(2 * HPAGE, huge="always")
    file, other = (process.open(name, RDWR, tmpfs=mount) for name in "ab")
    process.pwrite(other, 0, b"x")
    with fail(errno.ENOSPC):
        process.fallocate(file, 0, 2 * HPAGE)
    assert books(file) == even(0)
    assert mount.used_blocks == NR


def test_preallocated_huge_page_reads_as_zeros_and_is_kept(
    machine: Machine, process: Process
) -> None:
    """Preallocation on a huge=always mount takes huge pages, whatever the frames held."""
    mount = machine.tmpfs(huge="always")
    old = process.open("old", RDWR, tmpfs=mount)
    process.pwrite(old, 0, block_bytes())
    process.ftruncate(old, 0)
    file = process.open("f", RDWR, tmpfs=mount)
    process.fallocate(file, 0, HPAGE)
    assert machine.vmstat()["nr_shmem_hugepages"] == 1
    assert process.pread(file, 0, HPAGE) == bytes(HPAGE)
    process.pwrite(file, 7, b"x")
    addr = process.mmap(HPAGE, file=file, shared=True)
    assert process.read(addr, HPAGE) == bytes(7) + b"x" + bytes(HPAGE - 8)
    assert process.is_huge(addr)


# The end of a file.


def test_memfd_lives_as_long_as_a_descriptor_or_mapping(machine: Machine) -> None:
    """The last close or munmap takes all pages and slots; until then nothing is lost."""
    first = machine.process("a")
    file = memfd(first, 8 * PAGE, pages=range(8))
    addr = first.mmap(8 * PAGE, file=file, shared=True)
    first.read(addr, 8 * PAGE)
    first.madvise(addr, 3 * PAGE, Advice.MADV_PAGEOUT)
    child = first.fork("child")
    first.close(file)
    first.munmap(addr, 8 * PAGE)
    assert child.pread(file, 0, 8 * PAGE) == block_bytes(0, 8)
    child.close(file)
    assert child.read(addr, 8 * PAGE) == block_bytes(0, 8)
    child.munmap(addr, 4 * PAGE)
    child.munmap(addr + 4 * PAGE, 4 * PAGE)
    assert machine.mem.inodes == []
    assert machine.mem.swap.swap_map == {}
    assert machine.vmstat()["nr_shmem"] == machine.mem.vm_committed_as == 0


def test_end_of_a_file_that_would_have_to_wait_does_not_come(
    machine: Machine, process: Process
) -> None:
    """A plain close or unlink while somebody has a page locked changes nothing."""
    mount = machine.tmpfs()
    named, memory = process.open("f", RDWR, tmpfs=mount), process.memfd_create("m")
    locks = []
    for file in (named, memory):
        process.pwrite(file, 0, block_bytes(0, 2))
        addr = process.mmap(2 * PAGE, file=file, shared=True)
        process.read(addr, 1)
        locks.append(process.lock_page(addr))
        process.munmap(addr, 2 * PAGE)
    process.close(named)
    for end in (lambda: process.close(memory), lambda: process.unlink("f", tmpfs=mount)):
        with pytest.raises(WouldBlock):
            end()
        machine.audit()
    assert process.pread(memory, PAGE, PAGE) == page_bytes(1)
    for lock in locks:
        lock.release()
    process.close(memory)
    process.unlink("f", tmpfs=mount)
    assert machine.mem.inodes == []
    assert machine.vmstat()["nr_shmem"] == 0


def test_exit_closes_what_is_open(machine: Machine) -> None:
    """A process that ends without closing leaves no file behind."""
    process = machine.process("a")
    file = memfd(process, 8 * PAGE, pages=range(8))
    process.mmap(8 * PAGE, file=file, shared=True)
    process.exit()
    assert machine.mem.inodes == []
    assert machine.vmstat()["nr_file_pages"] == 0


def test_tmpfs_file_outlives_its_descriptors_until_it_is_unlinked(machine: Machine) -> None:
    """The name keeps it; another process opens it by that name."""
    first, second = machine.process("a"), machine.process("b")
    mount = machine.tmpfs("1M")
    file = first.open("f", RDWR, tmpfs=mount)
    first.pwrite(file, 0, b"kept")
    first.exit()
    again = second.open("f", tmpfs=mount)
    assert second.pread(again, 0, 10) == b"kept"
    second.close(again)
    second.unlink("f", tmpfs=mount)
    assert mount.used_blocks == 0
    assert machine.mem.inodes == []
    with fail(errno.ENOENT):
        second.open("f", tmpfs=mount)
    with fail(errno.ENOENT):
        second.unlink("f", tmpfs=mount)


def test_unlinked_tmpfs_file_stays_for_those_who_have_it(machine: Machine) -> None:
    """Open or mapped, it keeps its content, while a new file takes the name."""
    process = machine.process("a")
    mount = machine.tmpfs("1M")
    file = process.open("f", RDWR, tmpfs=mount)
    process.pwrite(file, 0, b"old")
    addr = process.mmap(PAGE, file=file, shared=True)
    process.unlink("f", tmpfs=mount)
    new = process.open("f", RDWR, tmpfs=mount)
    process.pwrite(new, 0, b"new")
    assert process.pread(file, 0, 3) == process.read(addr, 3) == b"old"
    process.close(file)
    assert (mount.used_blocks, process.read(addr, 3)) == (2, b"old")
    process.munmap(addr, PAGE)
    assert (mount.used_blocks, process.pread(new, 0, 3)) == (1, b"new")


# Swap.


def swap_out(process: Process, file: File, first: int, nr: int) -> int:
    """Move `nr` pages of the file to swap, by way of a mapping; returns where page 0 lies."""
    length = -(-file.inode.i_size // PAGE) * PAGE
    addr = process.mmap(length, file=file, shared=True)
    process.madvise(addr, length, Advice.MADV_NOHUGEPAGE)
    process.read(addr + first * PAGE, nr * PAGE)
    process.madvise(addr + first * PAGE, nr * PAGE, Advice.MADV_PAGEOUT)
    return addr


def fail_swap(machine: Machine, file: File, index: int) -> None:
    """Let the swap device fail to read page `index`, which is swapped out."""
    machine.mem.swap.bad.add(-file.f_mapping.i_pages.load(index))


def test_pageout_swaps_dirty_shmem_pages(machine: Machine, process: Process) -> None:
    """They leave memory, cache and page tables; the file stays charged for them."""
    file = memfd(process, 8 * PAGE, pages=range(8))
    addr = process.mmap(8 * PAGE, file=file, shared=True)
    process.read(addr, 8 * PAGE)
    machine.lru_add_drain_all()
    before = machine.vmstat()
    process.madvise(addr + 2 * PAGE, 4 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert changes(before, machine.vmstat()) == {
        "nr_free_pages": 4,
        "nr_inactive_anon": -4,
        "nr_mapped": -4,
        "nr_file_pages": -4,
        "nr_shmem": -4,
        "pswpout": 4,
    }
    assert books(file) == even(4, 4)
    assert rss(process) == {
        "MM_FILEPAGES": 0,
        "MM_ANONPAGES": 0,
        "MM_SWAPENTS": 0,
        "MM_SHMEMPAGES": 4,
        "pgtables": 2,
    }
    assert process.cached_pfn(file, 2) is None
    assert machine.mem.vm_committed_as == 8


@pytest.mark.parametrize("way", ["read", "write", "pread", "pwrite", "private"])
def test_swapped_pages_come_back_as_they_were(machine: Machine, process: Process, way: str) -> None:
    """Whatever asks first frees the slot; only a fault counts as major."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = swap_out(process, file, 1, 1)
    assert books(file) == even(3, 1)
    expected = bytearray(block_bytes(0, 4))
    before = machine.vmstat()
    if way == "read":
        assert process.read(addr + PAGE, PAGE) == page_bytes(1)
    elif way == "write":
        process.write(addr + PAGE, b"new")
        expected[PAGE : PAGE + 3] = b"new"
    elif way == "pread":
        assert process.pread(file, PAGE, PAGE) == page_bytes(1)
    elif way == "pwrite":
        process.pwrite(file, PAGE, b"new")
        expected[PAGE : PAGE + 3] = b"new"
    else:
        private = process.mmap(4 * PAGE, file=file)
        process.write(private + PAGE, b"own")
        assert process.read(private + PAGE, PAGE) == b"own" + page_bytes(1)[3:]
    diff = changes(before, machine.vmstat())
    assert diff["pswpin"] == 1
    assert diff.get("pgmajfault", 0) == (way in ("read", "write", "private"))
    assert books(file) == even(4)
    assert machine.mem.swap.swap_map == {}
    assert process.pread(file, 0, 4 * PAGE) == bytes(expected)


def test_swapped_in_page_can_be_swapped_out_again(machine: Machine, process: Process) -> None:
    """It comes back dirty, because its slot is gone: it is written anew, not dropped."""
    file = memfd(process, 2 * PAGE, pages=range(2))
    addr = swap_out(process, file, 0, 2)
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)
    machine.lru_add_drain_all()
    process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert books(file) == even(0, 2)
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)


def test_clean_pages_of_zeros_are_dropped_not_swapped(machine: Machine, process: Process) -> None:
    """What was only read holds nothing; reclaim makes it a hole again.

    The file pays for it until the next recalculation, as in the kernel.
    """
    file = memfd(process, 4 * PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 4 * PAGE)
    machine.lru_add_drain_all()
    process.madvise(addr, 4 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert machine.vmstat()["pswpout"] == 0
    assert (file.f_mapping.nrpages, shmem_of(file).alloced) == (0, 4)
    process.fallocate(file, 100 * PAGE, PAGE, punch_hole=True, keep_size=True)
    assert books(file) == even(0)
    assert machine.mem.vm_committed_as == 0


def test_page_dirtied_by_a_store_alone_is_swapped(machine: Machine, process: Process) -> None:
    """The dirty bit of the entry moves to the page when it is unmapped."""
    file = memfd(process, PAGE)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.read(addr, 1)
    process.write(addr, b"stored")
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert books(file) == even(0, 1)
    assert process.pread(file, 0, 6) == b"stored"


def test_preallocated_page_is_cleared_on_its_way_to_swap(
    machine: Machine, process: Process
) -> None:
    """Nobody has looked at it yet: what the frame held before must not come back from swap."""
    old = memfd(process, PAGE, pages=range(1))
    used = process.cached_pfn(old, 0)
    process.ftruncate(old, 0)
    machine.lru_add_drain_all()
    file = process.memfd_create("f")
    process.fallocate(file, 0, PAGE)
    machine.lru_add_drain_all()
    pfn = process.cached_pfn(file, 0)
    assert pfn == used
    assert machine.mem.ram.pages[pfn].tobytes() == page_bytes(0)
    _reclaim_file_page(machine.mem, pfn)
    machine.lru_add_drain_all()
    assert books(file) == even(0, 1)
    assert process.pread(file, 0, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("huge", ["never", "always"])
def test_preallocated_pages_are_swapped_not_dropped(
    machine: Machine, process: Process, huge: str
) -> None:
    """They were paid for, so that a store can rely on them; small and huge alike."""
    mount = machine.tmpfs(huge=huge)
    file = process.open("f", RDWR, tmpfs=mount)
    process.fallocate(file, 0, HPAGE)
    machine.lru_add_drain_all()
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    process.madvise(addr, HPAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert books(file) == even(0, NR)
    assert process.read(addr, HPAGE) == bytes(HPAGE)


def test_page_punched_in_part_is_dirty(machine: Machine, process: Process) -> None:
    """It is swapped, not dropped, even if it was all zeros before."""
    file = memfd(process, PAGE)
    process.read(process.mmap(PAGE, file=file, shared=True), 1)
    process.fallocate(file, 10, 10, punch_hole=True)
    process.munmap(process.mm.vmas[0].vm_start, PAGE)
    machine.lru_add_drain_all()
    swap_out(process, file, 0, 1)
    assert books(file) == even(0, 1)


def test_pages_others_map_too_are_not_paged_out(machine: Machine, process: Process) -> None:
    """MADV_PAGEOUT leaves alone what a second mapping has."""
    file = memfd(process, 2 * PAGE, pages=range(2))
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.read(addr, 2 * PAGE)
    child = process.fork()
    child.read(addr, 1)
    machine.lru_add_drain_all()
    process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    assert books(file) == even(2)
    child.exit()
    process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    assert books(file) == even(0, 2)


def test_pageout_of_a_huge_page_splits_it_first(machine: Machine, process: Process) -> None:
    """Nothing maps its pages then: those of the range go to swap when they are mapped again."""
    file, addr = huge_file(machine, process)
    process.madvise(addr + 8 * PAGE, 4 * PAGE, Advice.MADV_PAGEOUT)
    assert books(file) == even(NR)
    assert machine.vmstat()["nr_shmem_hugepages"] == 0
    process.read(addr, HPAGE)
    machine.lru_add_drain_all()
    process.madvise(addr + 8 * PAGE, 4 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert books(file) == even(NR - 4, 4)
    assert process.read(addr, HPAGE) == block_bytes()
    assert books(file) == even(NR)


def test_pageout_of_a_huge_page_gives_up_what_lies_behind_the_end(
    machine: Machine, process: Process
) -> None:
    """The split drops those pages; they are not charged for any longer."""
    file = process.memfd_create("f")
    machine.thp.shmem_enabled = "always"
    process.pwrite(file, 0, block_bytes(0, 100))
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, 1)
    assert books(file) == even(NR)
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert books(file) == even(100)
    assert machine.mem.vm_committed_as == 100
    assert process.pread(file, 0, HPAGE) == block_bytes(0, 100)


def test_private_copies_on_swap_go_with_a_truncation(machine: Machine, process: Process) -> None:
    """Their slots are freed, but for those before the new end."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file)
    process.write(addr, b"p" * 4 * PAGE)
    machine.lru_add_drain_all()
    process.madvise(addr, 4 * PAGE, Advice.MADV_PAGEOUT)
    assert rss(process)["MM_SWAPENTS"] == 4
    process.ftruncate(file, PAGE)
    machine.lru_add_drain_all()
    assert rss(process)["MM_SWAPENTS"] == len(machine.mem.swap.swap_map) == 1
    assert process.read(addr, PAGE) == b"p" * PAGE


def test_held_pages_outlive_their_truncation(machine: Machine, process: Process) -> None:
    """Pinned or referenced from outside they are nobody's, and go with the last who has them."""
    file = memfd(process, 4 * PAGE, pages=range(4))
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    held = [process.pin(addr, 4 * PAGE), process.get(addr, PAGE)]
    machine.lru_add_drain_all()
    process.ftruncate(file, 0)
    assert books(file) == even(0)
    for each in held:
        machine.audit()
        each.release()
    process.munmap(addr, 4 * PAGE)
    assert machine.vmstat()["nr_free_pages"] == machine.mem.nr_pages - 1


def test_preallocation_that_would_wait_is_given_up_whole(
    machine: Machine, process: Process
) -> None:
    """Pages added before the one that a collapse holds go again."""
    file = memfd(process, 2 * HPAGE, pages=range(NR, 2 * NR))
    addr = process.mmap(2 * HPAGE, file=file, shared=True)
    process.read(addr + HPAGE, HPAGE)
    machine.lru_add_drain_all()
    task = machine.spawn(machine.collapse.steps(process, addr + HPAGE, is_khugepaged=False))
    task.run_until("copy")
    with pytest.raises(WouldBlock):
        process.fallocate(file, 0, 3 * HPAGE)
    assert (books(file), file.inode.i_size) == (even(NR), 2 * HPAGE)
    assert shmem_of(file).fallocend == 0
    task.finish()


def test_full_swap_keeps_pages_in_memory(make_machine: MakeMachine) -> None:
    """What has no slot stays, dirty and found by the next fault."""
    machine = make_machine(swap=3 * PAGE)
    process = machine.process("a")
    file = memfd(process, 8 * PAGE, pages=range(8))
    addr = swap_out(process, file, 0, 8)
    machine.lru_add_drain_all()
    swapped = shmem_of(file).swapped
    assert 0 < swapped <= 3
    assert books(file) == even(8 - swapped, swapped)
    assert process.read(addr, 8 * PAGE) == block_bytes(0, 8)


def test_lost_swap_page_is_eio_and_sigbus_until_it_is_truncated(
    machine: Machine, process: Process
) -> None:
    """The error stays with the file, not charged for; the rest of it can be read."""
    file = memfd(process, 3 * PAGE, pages=range(3))
    addr = swap_out(process, file, 0, 3)
    fail_swap(machine, file, 1)
    with pytest.raises(BusError, match="BUS_ADRERR"):
        process.read(addr + PAGE, 1)
    assert file.f_mapping.i_pages.load(1) == SWAPIN_ERROR
    assert books(file) == even(0, 2)
    assert machine.mem.vm_committed_as == 2
    assert process.pread(file, 0, 3 * PAGE) == page_bytes(0)
    for call in (lambda: process.pread(file, PAGE, 1), lambda: process.pwrite(file, PAGE, b"x")):
        with fail(errno.EIO):
            call()
    with pytest.raises(BusError):
        process.write(addr + PAGE, b"x")
    assert process.pread(file, 2 * PAGE, PAGE) == page_bytes(2)
    process.fallocate(file, PAGE, PAGE, punch_hole=True, keep_size=True)
    assert process.pread(file, 0, 3 * PAGE) == page_bytes(0) + bytes(PAGE) + page_bytes(2)


def test_poisoned_page_is_not_written_to_swap(machine: Machine, process: Process) -> None:
    """The device's read fails; the page stays in the swap cache and can be had again."""
    file = memfd(process, PAGE, pages=range(1))
    addr = process.mmap(PAGE, file=file, shared=True)
    process.read(addr, 1)
    process.poison(addr, 63)
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    machine.audit()
    assert machine.vmstat()["nr_swapcached"] == 1
    assert process.read(addr, 100) == page_bytes(0)[:100]
    assert books(file) == even(1)
    with pytest.raises(BusError, match="BUS_MCEERR_AR"):
        process.read(addr, PAGE)


# Huge pages by policy.


POLICIES = [
    # shmem_enabled, VM_HUGEPAGE, size in blocks and a half: huge by a fault, huge by a write
    ("never", True, 2, False, False),
    ("advise", False, 2, False, False),
    ("advise", True, 2, True, False),
    ("within_size", False, 2, True, True),
    ("within_size", False, 1, False, False),
    ("within_size", True, 1, True, False),
    ("always", False, 1, True, True),
    ("force", False, 1, True, True),
    ("deny", True, 2, False, False),
]


@pytest.mark.parametrize(("policy", "advice", "halves", "by_fault", "by_write"), POLICIES)
def test_shmem_enabled_decides_over_huge_pages(
    machine: Machine,
    process: Process,
    policy: str,
    advice: bool,
    halves: int,
    by_fault: bool,
    by_write: bool,
) -> None:
    """A system call knows no VM_HUGEPAGE; within_size asks whether the block lies in the file."""
    machine.thp.shmem_enabled = policy
    size = halves * HPAGE // 2
    faulted, written = memfd(process, size), memfd(process, size)
    addr = process.mmap(HPAGE, file=faulted, shared=True)
    if advice:
        process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.write(addr + 5 * PAGE, b"x")
    process.pwrite(written, 5 * PAGE, b"x")
    assert books(faulted) == even(NR if by_fault else 1)
    assert books(written) == even(NR if by_write else 1)
    assert process.is_huge(addr) == by_fault
    assert machine.vmstat()["thp_file_alloc"] == by_fault + by_write


@pytest.mark.parametrize(
    ("huge", "shmem_enabled", "expected"),
    [
        ("never", "always", False),
        ("never", "force", True),
        ("always", "never", True),
        ("always", "deny", False),
        ("advise", "always", False),
        ("within_size", "never", True),
    ],
)
def test_mount_option_decides_on_a_mount(
    machine: Machine, process: Process, huge: str, shmem_enabled: str, expected: bool
) -> None:
    """shmem_enabled reaches other mounts only as force and deny."""
    machine.thp.shmem_enabled = shmem_enabled
    mount = machine.tmpfs(huge=huge)
    file = process.open("f", RDWR, tmpfs=mount)
    process.ftruncate(file, HPAGE)
    process.pwrite(file, 0, b"x")
    assert books(file) == even(NR if expected else 1)


def test_force_and_deny_leave_the_mounts_policy_behind(machine: Machine, process: Process) -> None:
    """They overrule it for a while; what was set before holds again through `shm_mnt_huge`."""
    machine.thp.shmem_enabled = "always"
    machine.thp.shmem_enabled = "deny"
    assert machine.thp.shm_mnt_huge == "always"
    file = memfd(process, HPAGE)
    process.pwrite(file, 0, b"x")
    assert books(file) == even(1)


def test_nohugepage_vma_faults_small_pages(machine: Machine, process: Process) -> None:
    """VM_NOHUGEPAGE wins over always and force."""
    machine.thp.shmem_enabled = "force"
    file = memfd(process, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.madvise(addr, HPAGE, Advice.MADV_NOHUGEPAGE)
    process.write(addr, b"x")
    assert books(file) == even(1)


def test_block_with_a_page_gets_no_huge_page(machine: Machine, process: Process) -> None:
    """A huge page needs all 512 places; swapped-out pages count as taken."""
    file = memfd(process, 2 * HPAGE, pages=range(1))
    swap_out(process, file, 0, 1)
    machine.thp.shmem_enabled = "always"
    process.pwrite(file, 9 * PAGE, b"x")
    assert books(file) == even(1, 1)
    process.pwrite(file, HPAGE, b"x")
    assert books(file) == even(1 + NR, 1)


def test_no_room_for_a_huge_page_falls_back_to_a_small_one(
    machine: Machine, process: Process
) -> None:
    """ENOSPC for 512 pages is no reason to refuse one."""
    mount = machine.tmpfs(100 * PAGE, huge="always")
    file = process.open("f", RDWR, tmpfs=mount)
    process.pwrite(file, 0, b"x")
    assert books(file) == even(1)
    assert mount.used_blocks == 1


def test_cgroup_without_room_for_a_huge_page_falls_back(machine: Machine) -> None:
    """The failure is counted as one of charging, and every charge given back."""
    group = machine.memcg(100 * PAGE)
    process = machine.process("a", memcg=group)
    machine.thp.shmem_enabled = "always"
    file = process.memfd_create("f")
    process.pwrite(file, 0, b"x")
    assert books(file) == even(1)
    assert group.usage == machine.mem.vm_committed_as == 1
    counts = machine.vmstat()
    assert (counts["thp_file_fallback"], counts["thp_file_fallback_charge"]) == (1, 1)


def test_fragmented_memory_falls_back_to_small_pages(make_machine: MakeMachine) -> None:
    """No free block of 2 MiB: thp_file_fallback, without the charge."""
    machine = make_machine("2M")
    process = machine.process("a")
    machine.thp.shmem_enabled = "always"
    file = process.memfd_create("f")
    process.pwrite(file, 0, b"x")
    assert books(file) == even(1)
    counts = machine.vmstat()
    assert (counts["thp_file_fallback"], counts["thp_file_fallback_charge"]) == (1, 0)


# Against a bytearray.


SIZE = 3 * HPAGE
offsets = st.one_of(
    st.integers(0, 12 * PAGE), st.integers(HPAGE - 3 * PAGE, HPAGE + 3 * PAGE), st.integers(0, SIZE)
)
lengths = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, HPAGE))
operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["pwrite", "punch", "fallocate", "store"]), offsets, lengths),
        st.tuples(st.just("load"), offsets, lengths),
        st.tuples(st.just("pageout"), offsets, lengths),
        st.tuples(st.just("truncate"), offsets, st.just(0)),
        st.tuples(
            st.just("policy"), st.sampled_from(["never", "always", "within_size"]), st.just(0)
        ),
        st.tuples(st.just("collapse"), st.sampled_from([0, 0, 1]), st.just(0)),
    ),
    min_size=3,
    max_size=16,
)


class Shadowed:
    """A memfd, mapped shared, beside the bytearray that says what must be in it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.process = machine, machine.process("a")
        self.file = self.process.memfd_create("f")
        self.addr = self.process.mmap(SIZE, file=self.file, shared=True)
        self.expected = bytearray()
        self.filler = 0

    def data(self, length: int) -> bytes:
        self.filler += 1
        return block_bytes(self.filler * 7919, -(-length // PAGE))[:length]

    def apply(self, name: str, where: Any, length: int) -> None:
        """Do one operation to both. Stores and loads stay below the end of the file."""
        process, size = self.process, len(self.expected)
        if name == "pwrite":
            data = self.data(length)
            process.pwrite(self.file, where, data)
            self.expected.extend(bytes(max(0, where - size)))
            self.expected[where : where + length] = data
        elif name == "punch":
            process.fallocate(self.file, where, length, punch_hole=True, keep_size=True)
            self.expected[where : where + length] = bytes(max(0, min(size, where + length) - where))
        elif name == "fallocate":
            process.fallocate(self.file, where, length)
            self.expected.extend(bytes(max(0, where + length - size)))
        elif name == "truncate":
            process.ftruncate(self.file, where)
            del self.expected[where:]
            self.expected.extend(bytes(max(0, where - size)))
        elif name == "policy":
            self.machine.thp.shmem_enabled = where
        elif name == "collapse":
            self.collapse(self.addr + where * HPAGE, size - where * HPAGE)
        elif name == "pageout":
            low = where & -PAGE
            self.machine.lru_add_drain_all()
            process.madvise(self.addr + low, min(length, SIZE - low) or PAGE, Advice.MADV_PAGEOUT)
        elif (end := min(where + length, size, SIZE)) > where:
            if name == "store":
                data = self.data(end - where)
                process.write(self.addr + where, data)
                self.expected[where:end] = data
            else:
                assert process.read(self.addr + where, end - where) == self.expected[where:end]

    def collapse(self, addr: int, size: int) -> None:
        """Make a block huge, if it has a page; each page on swap makes for one try more."""
        tries = 0
        while size > 0 and not self.process.is_huge(addr):
            self.process.read(addr, 1)
            self.machine.lru_add_drain_all()
            with suppress(CollapseError):
                self.process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
            tries += 1
            assert tries <= NR


@pytest.mark.parametrize("kernel", [KernelVersion.REF, KernelVersion.V6_18])
@settings(max_examples=40, deadline=None)
@given(steps=operations)
def test_random_use_of_a_file_is_that_of_a_bytearray(
    kernel: KernelVersion, steps: list[tuple[str, Any, int]]
) -> None:
    """Whatever writes, cuts, swaps and collapses it, its bytes are those that were written."""
    machine = small_machine("64M", swap="16M", kernel=kernel)
    shadowed = Shadowed(machine)
    for name, where, length in steps:
        if name == "pageout" and where >= SIZE:
            continue
        shadowed.apply(name, where, length)
        machine.audit()
    process, file = shadowed.process, shadowed.file
    assert process.pread(file, 0, 2 * SIZE) == shadowed.expected
    process.close(file)
    process.exit()
    machine.audit()
    assert machine.mem.vm_committed_as == 0
    assert machine.vmstat()["nr_shmem"] == 0
    assert machine.mem.swap.swap_map == machine.mem.mappings == {}


def test_plain_call_that_would_wait_gives_everything_back(machine: Machine) -> None:
    """A pread of a page that a paused collapse holds is given up, and leaves nothing behind."""
    process = machine.process("a")
    file = memfd(process, HPAGE, pages=range(NR))
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    machine.lru_add_drain_all()
    task = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False))
    task.run_until("copy")
    with pytest.raises(WouldBlock):
        process.pread(file, 0, 1)
    with pytest.raises(WouldBlock):
        process.read(addr, 1)
    machine.audit()
    task.finish()
    assert process.pread(file, 0, HPAGE) == block_bytes()
