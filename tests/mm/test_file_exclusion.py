"""Calls on one file keep out of each other's way, and others hear of what happens to it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import (
    HPAGE,
    PAGE,
    block_bytes,
    changes,
    counters,
    small_machine,
)

from pykhuge import PROT_READ, Advice, File, Machine, Process, ScanResult, UserFault, WouldBlock
from pykhuge.kernel.sched import Task

OpenFile = Callable[[Machine, Process, Path], File]


def memfd(machine: Machine, process: Process, folder: Path) -> File:
    """A memfd of one block, filled."""
    del machine, folder
    file = process.memfd_create("block")
    process.pwrite(file, 0, block_bytes())
    return file


def disk(machine: Machine, process: Process, folder: Path) -> File:
    """A file of the host of one block, open for writing."""
    del machine
    path = folder / "block"
    path.write_bytes(block_bytes())
    return process.open(str(path), os.O_RDWR)


def run_both(machine: Machine, first: Task[Any], second: Task[Any], held: Any) -> None:
    """Let both come as far as they can while a page is locked, and then to their ends."""
    for task in (first, second):
        while task.step():
            machine.audit()
    assert not first.done
    held.release()
    for task in (second, first, second):
        while task.step():
            machine.audit()
    assert first.done
    assert second.done


@pytest.mark.parametrize("open_file", [memfd, disk])
def test_a_write_is_whole_however_truncation_comes_to_it(
    machine: Machine, process: Process, tmp_path: Path, open_file: OpenFile
) -> None:
    """The inode lock keeps the two apart: what write() says it wrote was there as a whole."""
    file = open_file(machine, process, tmp_path)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    held = process.lock_page(addr + 5 * PAGE)
    write = machine.spawn(process.pwrite.steps(file, 0, b"w" * HPAGE), "writer")
    truncate = machine.spawn(process.ftruncate.steps(file, 0), "cutter")
    run_both(machine, write, truncate, held)
    assert write.result == HPAGE
    assert (file.inode.i_size, file.f_mapping.nrpages) == (0, 0)
    machine.audit()


def test_preallocation_and_truncation_do_not_mix(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """fallocate() first, truncation behind it: neither size nor pages of the one survive."""
    file = memfd(machine, process, tmp_path)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.madvise(addr, HPAGE, Advice.MADV_POPULATE_READ)
    held = process.lock_page(addr + 5 * PAGE)
    allocate = machine.spawn(process.fallocate.steps(file, 0, 2 * HPAGE), "allocator")
    truncate = machine.spawn(process.ftruncate.steps(file, 0), "cutter")
    run_both(machine, allocate, truncate, held)
    assert (file.inode.i_size, file.f_mapping.nrpages) == (0, 0)
    machine.audit()


def test_a_plain_call_on_a_file_that_is_being_changed_is_refused(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """The holder of the inode lock is paused: nobody would ever let it go."""
    file = memfd(machine, process, tmp_path)
    truncate = machine.spawn(process.ftruncate.steps(file, 0), "cutter")
    truncate.run_until("release i_mmap_rwsem")
    with pytest.raises(WouldBlock, match="i_rwsem"):
        process.pwrite(file, 0, b"x")
    truncate.finish()
    machine.audit()


Give = Callable[[Process, int, File], object]
GIVE_UP: dict[str, Give] = {
    "munmap": lambda process, addr, _: process.munmap(addr, HPAGE),
    "mmap over it": lambda process, addr, _: process.mmap(HPAGE, addr=addr, fixed=True),
    "exit": lambda process, *_: process.exit(),
}


@pytest.mark.parametrize("how", GIVE_UP)
def test_giving_up_the_last_reference_while_a_page_is_locked_changes_nothing(
    machine: Machine, process: Process, tmp_path: Path, how: str
) -> None:
    """A file without a name goes with its last user, who would wait for its pages."""
    file = memfd(machine, process, tmp_path)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    process.close(file)
    held = process.lock_page(addr)
    before = counters(machine, process)
    with pytest.raises(WouldBlock):
        GIVE_UP[how](process, addr, file)
    assert counters(machine, process) == before
    machine.audit()
    held.release()
    GIVE_UP[how](process, addr, file)
    assert machine.vmstat()["nr_shmem"] == 0
    machine.audit()


CUT: dict[str, Callable[[Process, File], object]] = {
    "truncate": lambda process, file: process.ftruncate(file, HPAGE + 7),
    "punch a hole": lambda process, file: process.fallocate(file, 7, HPAGE, punch_hole=True),
}


@pytest.mark.parametrize("how", CUT)
def test_a_cut_that_would_wait_for_i_mmap_changes_nothing(
    machine: Machine, process: Process, how: str
) -> None:
    """Neither the size nor a byte of the page it ends in."""
    file = process.memfd_create("two blocks")
    process.pwrite(file, 0, block_bytes() + block_bytes())
    addr = process.mmap(2 * HPAGE, file=file, shared=True)
    process.read(addr, 2 * HPAGE)
    collapse = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False), "agent")
    collapse.run_until("release i_mmap_rwsem")
    before = file.inode.i_size
    with pytest.raises(WouldBlock, match="i_mmap_rwsem"):
        CUT[how](process, file)
    assert file.inode.i_size == before
    collapse.finish()
    assert process.pread(file, 0, 2 * HPAGE) == block_bytes() + block_bytes()
    CUT[how](process, file)
    machine.audit()


def test_a_collapse_that_would_wait_for_i_mmap_changes_nothing(
    machine: Machine, process: Process
) -> None:
    """The page cache is not huge before it is known that its page tables can be seen to."""
    file = process.memfd_create("two blocks")
    process.pwrite(file, 0, block_bytes() + block_bytes())
    addr = process.mmap(2 * HPAGE, file=file, shared=True)
    truncate = machine.spawn(process.ftruncate.steps(file, HPAGE), "cutter")
    truncate.run_until("release i_mmap_rwsem")
    with pytest.raises(WouldBlock, match="i_mmap_rwsem"):
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    assert file.f_mapping.i_pages.order(0) == 0
    machine.audit()
    truncate.finish()
    machine.audit()


@pytest.mark.parametrize("how", ["munmap", "punch a hole"])
def test_the_zero_page_in_a_private_mapping_of_a_file_is_not_the_files(
    machine: Machine, process: Process, how: str
) -> None:
    """UFFDIO_ZEROPAGE put it there; it goes without a count or a reference."""
    file = process.memfd_create("hole")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file)
    fd = process.userfaultfd()
    fd.register(addr, HPAGE)
    fd.zeropage(addr, PAGE)
    before = counters(machine, process)
    if how == "munmap":
        process.munmap(addr, HPAGE)
    else:
        process.fallocate(file, 0, PAGE, punch_hole=True)
    assert changes(before, counters(machine, process)).get("MM_SHMEMPAGES", 0) == 0
    machine.audit()


def test_retract_leaves_a_private_mapping_with_the_zero_page_alone(
    machine: Machine, process: Process
) -> None:
    """UFFDIO_ZEROPAGE gives a private VMA its anon_vma, by which retract knows it."""
    file = process.memfd_create("pages")
    process.pwrite(file, 0, block_bytes(0, 200))
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file)
    fd = process.userfaultfd()
    fd.register(addr, HPAGE)
    fd.zeropage(addr + 300 * PAGE, PAGE)
    assert machine.collapse(process, addr, is_khugepaged=False) is ScanResult.SCAN_FAIL
    assert file.f_mapping.i_pages.order(0) == 9
    machine.audit()


class Listener:
    """A secondary MMU that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def invalidate_range_start(self, start: int, end: int) -> None:
        self.told.append(("start", start, end))

    def invalidate_range_end(self, start: int, end: int) -> None:
        self.told.append(("end", start, end))

    def test_young(self, addr: int) -> bool:
        del addr
        return False


def test_secondary_mmus_hear_of_pages_unmapped_by_a_collapse_that_fails(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """The entries are gone after COPY_MC too: whoever mirrors them must let go."""
    file = memfd(machine, process, tmp_path)
    other = machine.process("other")
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    listener, silent = Listener(), Listener()
    process.register_mmu_notifier(listener)
    other.register_mmu_notifier(silent)
    pfn = process.poison(addr + 500 * PAGE)
    assert machine.collapse(process, addr, is_khugepaged=False) is ScanResult.SCAN_COPY_MC
    assert process.pfn(addr) is None
    assert listener.told == [("start", addr, addr + HPAGE), ("end", addr, addr + HPAGE)]
    assert silent.told == []
    machine.mem.poison.unpoison(pfn)
    machine.audit()


def test_uffdio_copy_maps_read_only_where_the_vma_is(machine: Machine, process: Process) -> None:
    """The page is the file's and dirty, the entry is not writable."""
    file = process.memfd_create("copy")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True, prot=PROT_READ)
    fd = process.userfaultfd()
    fd.register(addr, HPAGE)
    fd.copy(addr, b"a" * PAGE)
    assert process.read(addr, 2) == b"aa"
    machine.audit()


def test_a_private_write_meets_the_marker_of_write_protection(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Unmapped or not, a protected page is not written without its userfaultfd."""
    file = memfd(machine, process, tmp_path)
    addr = process.mmap(HPAGE, file=file)
    fd = process.userfaultfd()
    fd.register(addr, HPAGE, missing=False, wp=True)
    process.read(addr, HPAGE)
    fd.writeprotect(addr, HPAGE)
    process.madvise(addr, HPAGE, Advice.MADV_DONTNEED)
    with pytest.raises(UserFault):
        process.write(addr, b"x")
    fd.writeprotect(addr, HPAGE, protect=False)
    process.write(addr, b"x")
    assert process.read(addr, 1) == b"x"
    machine.audit()


def test_fsync_waits_for_a_locked_page(machine: Machine, process: Process, tmp_path: Path) -> None:
    """What is dirty gets to the disk, whoever has it locked for now."""
    file = disk(machine, process, tmp_path)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, b"new data")
    held = process.lock_page(addr)
    with pytest.raises(WouldBlock):
        process.fsync(file)
    sync = machine.spawn(process.fsync.steps(file), "sync")
    while sync.step():
        pass
    assert (tmp_path / "block").read_bytes()[:8] != b"new data"
    held.release()
    sync.finish()
    assert (tmp_path / "block").read_bytes()[:8] == b"new data"
    machine.audit()


def test_fsync_does_not_wait_for_clean_pages(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Nor for a collapse of another block, whose pages are locked and clean."""
    file = disk(machine, process, tmp_path)
    process.pwrite(file, HPAGE, b"dirty")
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, PAGE)
    held = process.lock_page(addr)
    process.fsync(file)
    assert (tmp_path / "block").read_bytes()[HPAGE:] == b"dirty"
    held.release()
    machine.audit()


def test_writeback_clears_what_was_stored_behind_the_end(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """A longer file later reads zeros there, cached or read anew."""
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.write(addr + 200, b"junk")
    process.fsync(file)
    process.ftruncate(file, PAGE)
    assert process.pread(file, 200, 4) == bytes(4)
    machine.audit()


def test_a_file_that_denies_writing_is_not_opened_for_it(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """i_writecount below 0: ETXTBSY, and nothing is counted."""
    file = disk(machine, process, tmp_path)
    process.close(file)
    file.inode.i_writecount = -1
    with pytest.raises(OSError, match="denied") as raised:
        process.open(str(tmp_path / "block"), os.O_RDWR)
    assert raised.value.errno == errno.ETXTBSY
    assert (file.inode.i_writecount, file.inode.i_count) == (-1, 0)
    file.inode.i_writecount = 0
    machine.audit()


def test_the_ledger_hears_of_cached_and_swapped_pages() -> None:
    """Cached and swapped pages of a file are postings, as the counters of nodes are."""
    machine = small_machine("16M", swap="1M")
    process = machine.process("app")
    file = process.memfd_create("pages")
    with machine.ledger() as ledger:
        process.pwrite(file, 0, b"x" * PAGE)
        addr = process.mmap(PAGE, file=file, shared=True)
        process.read(addr, 1)
        machine.lru_add_drain_all()
        process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    name = file.inode.name
    assert ledger.balance()[name, "swapped"] == 1
    assert (name, "nrpages") not in ledger.balance()
    assert [each.delta for each in ledger if each.counter == "nrpages"] == [1, -1]
    machine.audit()
