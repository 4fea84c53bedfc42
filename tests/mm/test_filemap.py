"""The page cache: waiting for locked pages, splitting, dropping, reclaim and its shadows."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    block_bytes,
    changes,
    flags_of,
    page_bytes,
    rss,
)

from pykhuge import (
    PROT_EXEC,
    PROT_READ,
    Advice,
    BusError,
    File,
    Machine,
    Process,
    ScanResult,
    WouldBlock,
)
from pykhuge.kernel.sched import Task
from pykhuge.mm.filemap import split_file_page
from pykhuge.mm.mm_types import ShmemInode
from pykhuge.mm.page import PG_dirty, PG_head, PG_locked
from pykhuge.mm.regular_file import filemap_flush
from pykhuge.mm.xarray import SHADOW

Steps = Callable[[Process, File, int], Any]


def memfd(machine: Machine, process: Process, pages: int = NR) -> tuple[File, int]:
    """A memfd of one block, `pages` of it written, and where it is mapped, the pages mapped."""
    file = process.memfd_create("f")
    process.ftruncate(file, HPAGE)
    process.pwrite(file, 0, block_bytes(0, pages))
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, pages * PAGE)
    machine.lru_add_drain_all()
    return file, addr


def executable(machine: Machine, process: Process, path: Path, blocks: int = 1) -> tuple[File, int]:
    """A file of the host, cached whole, and where it is mapped as programs are."""
    path.write_bytes(block_bytes(0, blocks * NR))
    file = process.open(str(path))
    addr = process.mmap(blocks * HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(addr, blocks * HPAGE)
    machine.lru_add_drain_all()
    return file, addr


def collapsed(machine: Machine, process: Process, addr: int) -> None:
    """Collapse the block at `addr`, as MADV_COLLAPSE would."""
    machine.lru_add_drain_all()
    result = machine.collapse(process, addr, is_khugepaged=False)
    assert result is ScanResult.SCAN_SUCCEED


def collapse_at_copy(machine: Machine, process: Process, addr: int) -> Task[Any]:
    """A collapse that has all its pages, locked, and has not copied them yet."""
    task = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False), "madvise")
    task.run_until("copy")
    return task


def blocked(machine: Machine, steps: Any) -> Task[Any]:
    """A task that has come to where it must wait for a page."""
    task = machine.spawn(steps)
    while task.step():
        machine.audit()
    assert not task.done
    assert "is unlocked" in str(task.pending)
    return task


# Waiting for a collapse.

CALLS: dict[str, tuple[Steps, Callable[[bytearray], object]]] = {
    # What is done, and what it returns, changing the bytes that are then in the file.
    "load": (lambda p, _, addr: p.read.steps(addr, HPAGE), bytes),
    "pread": (lambda p, file, _: p.pread.steps(file, 0, HPAGE), bytes),
    "load one byte": (
        lambda p, _, addr: p.read.steps(addr + 9 * PAGE, 1),
        lambda b: bytes(b[9 * PAGE : 9 * PAGE + 1]),
    ),
    "store": (
        lambda p, _, addr: p.write.steps(addr + 5 * PAGE - 2, b"abcd"),
        lambda b: b.__setitem__(slice(5 * PAGE - 2, 5 * PAGE + 2), b"abcd"),
    ),
    "pwrite": (
        lambda p, file, _: p.pwrite.steps(file, 5 * PAGE - 2, b"abcd"),
        lambda b: b.__setitem__(slice(5 * PAGE - 2, 5 * PAGE + 2), b"abcd") or 4,  # type: ignore[func-returns-value]
    ),
    "truncate": (
        lambda p, file, _: p.ftruncate.steps(file, 100 * PAGE),
        lambda b: b.__delitem__(slice(100 * PAGE, None)),
    ),
    "truncate inside of a page": (
        lambda p, file, _: p.ftruncate.steps(file, 100 * PAGE + 7),
        lambda b: b.__delitem__(slice(100 * PAGE + 7, None)),
    ),
    "truncate to nothing": (lambda p, file, _: p.ftruncate.steps(file, 0), bytearray.clear),
    "punch": (
        lambda p, file, _: p.fallocate.steps(file, 3 * PAGE, 7 * PAGE, punch_hole=True),
        lambda b: b.__setitem__(slice(3 * PAGE, 10 * PAGE), bytes(7 * PAGE)),
    ),
    "punch a few bytes": (
        lambda p, file, _: p.fallocate.steps(file, 3 * PAGE + 5, 10, punch_hole=True),
        lambda b: b.__setitem__(slice(3 * PAGE + 5, 3 * PAGE + 15), bytes(10)),
    ),
    "punch all": (
        lambda p, file, _: p.fallocate.steps(file, 0, HPAGE, punch_hole=True),
        lambda b: b.__setitem__(slice(0, HPAGE), bytes(HPAGE)),
    ),
    "fallocate": (lambda p, file, _: p.fallocate.steps(file, 0, HPAGE), lambda _: None),
    "mlock": (lambda p, _, addr: p.mlock.steps(addr, HPAGE), lambda _: None),
    "populate": (
        lambda p, _, addr: p.madvise.steps(addr, HPAGE, Advice.MADV_POPULATE_WRITE),
        lambda _: None,
    ),
}


@pytest.mark.parametrize("poison", [None, 0, 300, 511])
@pytest.mark.parametrize("call", CALLS)
def test_whoever_wants_a_page_of_a_collapse_waits_and_then_goes_right(
    machine: Machine, process: Process, call: str, poison: int | None
) -> None:
    """It sleeps without a lock while the collapse copies, and meets what came out of it.

    The bad line is healed again before the waiter goes on.
    """
    file, addr = memfd(machine, process)
    if poison is not None:
        process.poison(addr + poison * PAGE)
    collapse = collapse_at_copy(machine, process, addr)
    make, effect = CALLS[call]
    waiter = blocked(machine, make(process, file, addr))
    result = collapse.finish()
    machine.audit()
    assert result is (ScanResult.SCAN_SUCCEED if poison is None else ScanResult.SCAN_COPY_MC)
    if poison is not None:
        pfn = process.cached_pfn(file, poison)
        assert pfn is not None
        machine.mem.poison.unpoison(pfn)
    expected = bytearray(block_bytes())
    assert waiter.finish() == effect(expected)
    machine.audit()
    assert process.pread(file, 0, HPAGE) == expected
    assert isinstance(file.inode, ShmemInode)
    assert file.inode.alloced == file.f_mapping.nrpages


def test_read_that_waited_ends_where_the_file_does_by_then(
    machine: Machine, process: Process
) -> None:
    """The file was cut while the reader slept."""
    file, addr = memfd(machine, process)
    collapse = collapse_at_copy(machine, process, addr)
    reader = blocked(machine, process.pread.steps(file, 0, HPAGE))
    collapse.finish()
    process.ftruncate(file, 10 * PAGE + 3)
    assert reader.finish() == block_bytes()[: 10 * PAGE + 3]


@pytest.mark.parametrize("pages", [3, NR])
def test_page_mapped_again_before_it_is_punched_is_unmapped(
    machine: Machine, process: Process, pages: int
) -> None:
    """Between the unmapping of the hole and its removal a fault may come, of a huge page too."""
    file, addr = memfd(machine, process)
    if pages == NR:
        collapsed(machine, process, addr)
    punch = machine.spawn(process.fallocate.steps(file, 0, pages * PAGE, punch_hole=True))
    punch.run_until("release i_mmap_rwsem")
    assert process.read(addr, PAGE) == page_bytes(0)
    punch.finish()
    assert process.pfn(addr) is None
    machine.audit()
    assert process.read(addr, HPAGE) == bytes(pages * PAGE) + block_bytes()[pages * PAGE :]


@pytest.mark.parametrize("poison", [False, True])
def test_private_store_waits_for_a_collapse(
    machine: Machine, process: Process, poison: bool
) -> None:
    """It copies from the huge page, or from the small one that has come back."""
    file, addr = memfd(machine, process)
    private = process.mmap(HPAGE, file=file)
    if poison:
        process.poison(addr)
    collapse = collapse_at_copy(machine, process, addr)
    waiter = blocked(machine, process.write.steps(private + 70 * PAGE, b"own"))
    collapse.finish()
    waiter.finish()
    assert process.read(private + 70 * PAGE, PAGE) == b"own" + page_bytes(70)[3:]
    assert process.pread(file, 70 * PAGE, PAGE) == page_bytes(70)
    assert rss(process)["MM_ANONPAGES"] == 1


@pytest.mark.parametrize("poison", [False, True])
def test_holes_that_a_collapse_fills_are_waited_for_too(
    machine: Machine, process: Process, poison: bool
) -> None:
    """A load from a hole finds a zeroed page, of the huge page or of its own."""
    file, addr = memfd(machine, process, pages=8)
    if poison:
        process.poison(addr)
    collapse = collapse_at_copy(machine, process, addr)
    assert file.f_mapping.nrpages == NR
    waiter = blocked(machine, process.read.steps(addr + 50 * PAGE, PAGE))
    collapse.finish()
    assert waiter.finish() == bytes(PAGE)
    assert file.f_mapping.nrpages == (9 if poison else NR)
    assert process.is_huge(addr) != poison


def test_poisoned_page_is_met_by_the_load_that_waited(machine: Machine, process: Process) -> None:
    """The collapse is undone; the task that then touches the bad line gets SIGBUS."""
    _, addr = memfd(machine, process)
    process.poison(addr + 4 * PAGE, 9)
    collapse = collapse_at_copy(machine, process, addr)
    waiter = blocked(machine, process.read.steps(addr, HPAGE))
    collapse.finish()
    with pytest.raises(BusError, match="BUS_MCEERR_AR") as raised:
        waiter.finish()
    assert raised.value.address == addr + 4 * PAGE


def test_many_wait_and_all_go_on(machine: Machine) -> None:
    """Each looks anew when the page is unlocked, in whatever order they run."""
    first = machine.process("a")
    file, addr = memfd(machine, first)
    others = [first.fork(f"p{number}") for number in range(3)]
    collapse = collapse_at_copy(machine, first, addr)
    waiters = [blocked(machine, other.read.steps(addr, HPAGE)) for other in others]
    cutter = blocked(machine, first.fallocate.steps(file, 0, PAGE, punch_hole=True))
    collapse.finish()
    cutter.finish()
    for waiter in reversed(waiters):
        assert waiter.finish() == bytes(PAGE) + block_bytes()[PAGE:]


def test_close_of_the_last_descriptor_during_a_collapse(machine: Machine, process: Process) -> None:
    """The collapse keeps the file; it goes when that is over."""
    file, addr = memfd(machine, process)
    collapse = collapse_at_copy(machine, process, addr)
    process.close(file)
    process.munmap(addr, HPAGE)
    assert machine.mem.inodes == [file.inode]
    machine.audit()
    collapse.finish()
    assert machine.mem.inodes == []
    assert machine.mem.vm_committed_as == machine.vmstat()["nr_shmem"] == 0


@pytest.mark.parametrize("call", ["load", "pread", "load one byte"])
@pytest.mark.parametrize("poison", [False, True])
def test_disk_files_are_waited_for_alike(
    machine: Machine, process: Process, tmp_path: Path, call: str, poison: bool
) -> None:
    """The bytes are those of the disk, whatever became of the collapse."""
    file, addr = executable(machine, process, tmp_path / "program")
    if poison:
        process.poison(addr + 99 * PAGE)
    collapse = collapse_at_copy(machine, process, addr)
    make, effect = CALLS[call]
    waiter = blocked(machine, make(process, file, addr))
    collapse.finish()
    if poison:
        pfn = process.cached_pfn(file, 99)
        assert pfn is not None
        machine.mem.poison.unpoison(pfn)
    assert waiter.finish() == effect(bytearray(block_bytes()))
    assert file.f_mapping.nr_thps == (not poison)


@pytest.mark.parametrize("poison", [False, True])
def test_open_for_writing_waits_for_a_collapse_under_way(
    machine: Machine, process: Process, tmp_path: Path, poison: bool
) -> None:
    """It has seen nr_thps, so it empties the cache when the huge page is unlocked, or gone."""
    path = tmp_path / "program"
    file, addr = executable(machine, process, path)
    if poison:
        process.poison(addr)
    collapse = collapse_at_copy(machine, process, addr)
    assert file.f_mapping.nr_thps == 1
    opener = blocked(machine, process.open.steps(str(path), os.O_RDWR))
    collapse.finish()
    for mce in machine.mem.poison.log:
        machine.mem.poison.unpoison(mce.pfn)
    writer = opener.finish()
    assert (file.f_mapping.nr_thps, file.f_mapping.nrpages) == (0, 0)
    process.pwrite(writer, 0, b"new")
    assert process.read(addr, PAGE) == b"new" + page_bytes(0)[3:]


OTHERS: dict[str, tuple[Steps, object]] = {
    "pread": (lambda p, file, _: p.pread.steps(file, 0, PAGE), page_bytes(0)),
    "pwrite": (lambda p, file, _: p.pwrite.steps(file, 0, b"x" * HPAGE), HPAGE),
    "ftruncate": (lambda p, file, _: p.ftruncate.steps(file, PAGE), None),
    "punch": (lambda p, file, _: p.fallocate.steps(file, 0, PAGE, punch_hole=True), None),
    "fallocate": (lambda p, file, _: p.fallocate.steps(file, 0, 2 * HPAGE), None),
}


@pytest.mark.parametrize("call", OTHERS)
def test_file_closed_by_another_thread_stays_for_a_call_under_way(
    machine: Machine, process: Process, call: str
) -> None:
    """The call holds a reference (fdget); with its end the file goes."""
    file, addr = memfd(machine, process)
    collapse = collapse_at_copy(machine, process, addr)
    make, result = OTHERS[call]
    caller = blocked(machine, make(process, file, addr))
    process.munmap(addr, HPAGE)
    process.close(file)
    collapse.finish()
    machine.audit()
    assert machine.mem.inodes == [file.inode]
    assert caller.finish() == result
    machine.lru_add_drain_all()
    machine.audit()
    assert machine.mem.inodes == []
    assert machine.vmstat()["nr_shmem"] == machine.mem.vm_committed_as == 0


def test_file_closed_while_mmap_waits_is_mapped(machine: Machine, process: Process) -> None:
    """The descriptor was looked up before."""
    file, addr = memfd(machine, process)
    mapper = machine.spawn(process.mmap.steps(HPAGE, file=file, shared=True))
    mapper.run_until("acquire mmap_lock for write")
    process.munmap(addr, HPAGE)
    process.close(file)
    where = mapper.finish()
    assert isinstance(where, int)
    assert process.read(where, HPAGE) == block_bytes()


def test_call_that_begins_after_the_close_is_refused(process: Process) -> None:
    """Steps made before the close, and first run after it."""
    file = process.memfd_create("f")
    task = Task[Any](process.mem.sched, "late", 1)
    task.start(process.pwrite.steps(file, 0, b"x"))
    process.close(file)
    with pytest.raises(OSError, match="not open here"):
        task.finish()


def test_drop_caches_passes_over_a_collapse(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Locked pages are left alone."""
    file, addr = executable(machine, process, tmp_path / "program")
    collapse = collapse_at_copy(machine, process, addr)
    machine.drop_caches()
    machine.audit()
    assert file.f_mapping.nrpages == NR
    assert collapse.finish() is ScanResult.SCAN_SUCCEED


def test_madvise_pageout_passes_over_a_collapse(machine: Machine, process: Process) -> None:
    """The pages are not mapped while they are copied."""
    file, addr = memfd(machine, process)
    collapse = collapse_at_copy(machine, process, addr)
    process.madvise(addr, HPAGE, Advice.MADV_PAGEOUT)
    machine.audit()
    collapse.finish()
    assert process.pread(file, 0, HPAGE) == block_bytes()


def test_plain_calls_that_would_wait_change_nothing(machine: Machine, process: Process) -> None:
    """WouldBlock, because nobody would ever run the collapse; the file is as it was."""
    file, addr = memfd(machine, process)
    collapse = collapse_at_copy(machine, process, addr)
    calls: list[Callable[[], object]] = [
        lambda: process.read(addr, PAGE),
        lambda: process.write(addr, b"x"),
        lambda: process.pread(file, 0, PAGE),
        lambda: process.pwrite(file, 0, b"x"),
        lambda: process.fallocate(file, 0, PAGE),
        lambda: process.fallocate(file, 0, PAGE, punch_hole=True),
        lambda: process.fallocate(file, 5, 6, punch_hole=True),
        lambda: process.ftruncate(file, 5),
        lambda: process.ftruncate(file, PAGE),
        lambda: process.madvise(addr, PAGE, Advice.MADV_REMOVE),
    ]
    for call in calls:
        with pytest.raises(WouldBlock):
            call()
        machine.audit()
    assert file.inode.i_size == HPAGE
    assert collapse.finish() is ScanResult.SCAN_SUCCEED
    assert process.pread(file, 0, HPAGE) == block_bytes()


# Splitting.


def test_split_makes_small_pages_that_nobody_maps(machine: Machine, process: Process) -> None:
    """Same frames, same bytes, one reference each; dirt stays, and the next faults map them."""
    file, addr = memfd(machine, process)
    collapsed(machine, process, addr)
    head = process.cached_pfn(file, 0)
    assert head is not None
    before = machine.vmstat()
    assert split_file_page(machine.mem, file.f_mapping, head)
    machine.audit()
    assert [process.cached_pfn(file, page) for page in range(NR)] == list(range(head, head + NR))
    diff = changes(before, machine.vmstat())
    assert diff == {
        "nr_mapped": -NR,
        "nr_shmem_hugepages": -1,
        "nr_shmem_pmdmapped": -1,
        "thp_split_page": 1,
        "thp_split_pmd": 1,
    }
    assert flags_of(process, head + 77) & (PG_dirty | PG_head | PG_locked) == PG_dirty
    assert machine.mem.pages.refcount[head + 77] == 1
    assert process.read(addr, HPAGE) == block_bytes()


def test_split_takes_pages_out_of_page_tables_too(machine: Machine, process: Process) -> None:
    """A mapping by PTEs is undone like one by a PMD, and its stores are not lost."""
    file, addr = memfd(machine, process)
    collapsed(machine, process, addr)
    some = process.mmap(10 * PAGE, file=file, shared=True)
    process.write(some + 3 * PAGE, b"by a PTE")
    process.write(addr + 3 * PAGE + 8, b"by a PMD")
    process.fallocate(file, 300 * PAGE, 1, punch_hole=True)
    assert process.pfn(some + 3 * PAGE) is process.pfn(addr) is None
    assert rss(process)["MM_SHMEMPAGES"] == machine.vmstat()["nr_mapped"] == 0
    machine.audit()
    assert process.read(some + 3 * PAGE, 16) == b"by a PTEby a PMD"


def test_page_that_somebody_holds_is_not_split(machine: Machine, process: Process) -> None:
    """A pin, or a reference from outside, is more than its mappings explain."""
    file, addr = memfd(machine, process)
    collapsed(machine, process, addr)
    head = process.cached_pfn(file, 0)
    assert head is not None
    for hold in (process.pin, process.get):
        held = hold(addr, PAGE)
        assert not split_file_page(machine.mem, file.f_mapping, head)
        held.release()
    assert machine.vmstat()["thp_split_page_failed"] == 2
    assert process.is_huge(addr)
    assert split_file_page(machine.mem, file.f_mapping, head)


def test_split_drops_pages_behind_the_end(machine: Machine, process: Process) -> None:
    """The part of a huge page behind i_size was never asked for; fallocate'd pages were."""
    machine.thp.shmem_enabled = "always"
    files = [process.memfd_create(name) for name in "ab"]
    for file in files:
        process.pwrite(file, 0, block_bytes(0, 10))
    process.fallocate(files[1], 0, 30 * PAGE, keep_size=True)
    for file in files:
        head = process.cached_pfn(file, 0)
        assert head is not None
        assert split_file_page(machine.mem, file.f_mapping, head)
        process.ftruncate(file, 11 * PAGE)
        process.fallocate(file, 400 * PAGE, PAGE, punch_hole=True)
    machine.lru_add_drain_all()
    assert [file.f_mapping.nrpages for file in files] == [10, 30]
    assert process.pread(files[0], 0, HPAGE) == block_bytes(0, 10) + bytes(PAGE)


# Dropping and reclaim of disk files.


def test_drop_caches_takes_what_nobody_uses(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Clean unmapped pages go, and are read from the disk again; mapped and dirty ones stay."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 16))
    file = process.open(str(path), os.O_RDWR)
    process.pread(file, 0, 16 * PAGE)
    process.pwrite(file, 3 * PAGE, b"dirty")
    addr = process.mmap(2 * PAGE, file=file, offset=7 * PAGE, shared=True)
    process.read(addr, 2 * PAGE)
    path.write_bytes(b"!" * 16 * PAGE)
    machine.drop_caches()
    cached = [page for page in range(16) if process.cached_pfn(file, page) is not None]
    assert cached == [3, 7, 8]
    assert machine.vmstat()["nr_file_pages"] == 3
    assert process.pread(file, 0, PAGE) == b"!" * PAGE
    assert process.pread(file, 3 * PAGE, PAGE) == b"dirty" + page_bytes(3)[5:]
    assert process.pread(file, 7 * PAGE, PAGE) == page_bytes(7)


def test_drop_caches_takes_of_shmem_what_was_only_read(machine: Machine, process: Process) -> None:
    """Written pages have nowhere to be read from, those on swap are not in the way."""
    file = process.memfd_create("holes")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    process.write(addr + 3 * PAGE, b"x")
    process.write(addr + 5 * PAGE, b"y")
    process.madvise(addr + 5 * PAGE, PAGE, Advice.MADV_PAGEOUT)
    process.munmap(addr, HPAGE)
    machine.drop_caches()
    assert file.f_mapping.nrpages == 1
    assert machine.vmstat()["nr_shmem"] == 1
    expected = bytearray(HPAGE)
    expected[3 * PAGE], expected[5 * PAGE] = b"xy"
    assert process.pread(file, 0, HPAGE) == bytes(expected)


def test_drop_caches_takes_a_huge_page_of_shmem_that_was_only_read(
    machine: Machine, process: Process
) -> None:
    """A byte written to it keeps all of it."""
    machine.thp.shmem_enabled = "force"
    for nr, written in ((0, False), (1, True)):
        file = process.memfd_create("huge")
        process.ftruncate(file, HPAGE)
        addr = process.mmap(2 * HPAGE, file=file, shared=True)
        process.write(addr, b"x") if written else process.read(addr, 1)
        assert machine.vmstat()["nr_shmem_hugepages"] == 1
        process.munmap(addr, 2 * HPAGE)
        machine.drop_caches()
        assert machine.vmstat()["nr_shmem_hugepages"] == nr
        assert machine.vmstat()["nr_shmem"] == file.f_mapping.nrpages == nr * NR


def test_drop_caches_takes_idle_huge_pages_whole(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """As long as a PMD maps one it stays."""
    file, addr = executable(machine, process, tmp_path / "program", 2)
    for block in (addr, addr + HPAGE):
        collapsed(machine, process, block)
    process.munmap(addr, HPAGE)
    machine.drop_caches()
    assert (file.f_mapping.nr_thps, file.f_mapping.nrpages) == (1, NR)
    assert machine.vmstat()["nr_file_hugepages"] == 1
    assert process.pread(file, 0, 2 * HPAGE) == block_bytes(0, 2 * NR)


def test_pages_that_the_file_system_still_needs_stay(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """What filemap_release_folio gives up may go; what a journal holds may not."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    file = process.open(str(path))
    addr = process.mmap(4 * PAGE, prot=PROT_READ, file=file)
    process.read(addr, 4 * PAGE)
    process.attach_private(file, 1)
    process.attach_private(file, 2, releasable=False)
    machine.lru_add_drain_all()
    process.madvise(addr, 4 * PAGE, Advice.MADV_PAGEOUT)
    machine.audit()
    assert [process.cached_pfn(file, page) is not None for page in range(4)] == [0, 0, 1, 0]
    process.attach_private(file, 2, releasable=False)
    process.madvise(addr, 4 * PAGE, Advice.MADV_DONTNEED)
    process.pread(file, 0, 4 * PAGE)
    process.attach_private(file, 3)
    machine.drop_caches()
    assert [process.cached_pfn(file, page) is not None for page in range(4)] == [0, 0, 1, 0]


def test_reclaim_of_a_clean_disk_page_leaves_a_shadow(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """It stands for the page that was there; the next access reads the disk, over it."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 8))
    file = process.open(str(path))
    addr = process.mmap(8 * PAGE, prot=PROT_READ, file=file)
    process.read(addr, 8 * PAGE)
    machine.lru_add_drain_all()
    before = machine.vmstat()
    process.madvise(addr + 2 * PAGE, 3 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    entries = [file.f_mapping.i_pages.load(page) for page in range(8)]
    assert [entry == SHADOW for entry in entries] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert changes(before, machine.vmstat()) == {
        "nr_free_pages": 3,
        "nr_inactive_file": -3,
        "nr_mapped": -3,
        "nr_file_pages": -3,
    }
    assert file.f_mapping.nrpages == rss(process)["MM_FILEPAGES"] == 5
    assert process.read(addr, 8 * PAGE) == block_bytes(0, 8)
    assert file.f_mapping.nrpages == 8
    assert machine.vmstat()["pswpin"] == machine.vmstat()["pswpout"] == 0


def test_drop_caches_and_truncation_take_shadows(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Nothing is left of them in the tree."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(4 * PAGE, prot=PROT_READ, file=file)
    for clear in (machine.drop_caches, lambda: process.ftruncate(file, 0)):
        process.read(addr, 4 * PAGE)
        machine.lru_add_drain_all()
        process.madvise(addr, 4 * PAGE, Advice.MADV_PAGEOUT)
        assert file.f_mapping.i_pages.nodes
        clear()
        assert file.f_mapping.i_pages.nodes == {}


def test_dirty_disk_pages_are_not_reclaimed(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """They are only unmapped; nothing is lost, and once written they can go."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 2))
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.write(addr, b"dirty")
    machine.lru_add_drain_all()
    process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    assert process.cached_pfn(file, 0) is not None
    assert machine.vmstat()["nr_dirty"] == 1
    assert process.read(addr, 5) == b"dirty"
    filemap_flush(machine.mem, file.f_mapping)
    machine.lru_add_drain_all()
    process.madvise(addr, 2 * PAGE, Advice.MADV_PAGEOUT)
    assert process.cached_pfn(file, 0) is not None, "still on its way to the disk"
    machine.finish_io()
    process.read(addr, 1)
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    assert process.cached_pfn(file, 0) is None
    assert process.read(addr, 5) == b"dirty"


def test_reclaim_of_a_huge_disk_page_splits_it(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """nr_thps goes down, and the PMD with it: the second call finds pages to drop."""
    file, addr = executable(machine, process, tmp_path / "program")
    collapsed(machine, process, addr)
    process.madvise(addr + 4 * PAGE, 2 * PAGE, Advice.MADV_PAGEOUT)
    assert (file.f_mapping.nr_thps, file.f_mapping.nrpages) == (0, NR)
    process.read(addr, HPAGE)
    machine.lru_add_drain_all()
    process.madvise(addr + 4 * PAGE, 2 * PAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert (file.f_mapping.nr_thps, file.f_mapping.nrpages) == (0, NR - 2)
    assert machine.vmstat()["nr_file_hugepages"] == machine.vmstat()["nr_file_pmdmapped"] == 0
    assert process.read(addr, HPAGE) == block_bytes()


def test_truncation_waits_for_the_disk(machine: Machine, process: Process, tmp_path: Path) -> None:
    """A page on its way to the disk is not freed under it."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 2))
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, block_bytes(5, 2))
    filemap_flush(machine.mem, file.f_mapping)
    assert machine.vmstat()["nr_writeback"] == 2
    process.ftruncate(file, PAGE)
    assert machine.vmstat()["nr_writeback"] == 0
    assert path.read_bytes() == page_bytes(5)
