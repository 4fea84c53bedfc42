"""Every scan result a file's block can end in, by each path that can produce it.

Two blocks of a file are collapsed by one MADV_COLLAPSE, and the first has something the matter:
what it fails with, whether the call goes on to the second, and that nothing but what the reference
tells is left behind. The daemon's limits and the events of the trace stand below.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, advised, block_bytes, fill, paused
from file_kit import FileBlock, books, cache_is_huge, file_collapses, file_scans, shmem_block

from pykhuge import PROT_EXEC, PROT_READ, Advice, CollapseError, File, Machine, Process, ScanResult
from pykhuge.mm.gup import LockedPage
from pykhuge.mm.page_writeback import set_page_dirty, start_page_writeback
from pykhuge.mm.swap import isolate_lru_pages, putback_lru_pages

S = ScanResult
Undo = Callable[[], object]


class Blocks(NamedTuple):
    """Two blocks of a file, all mapped by one process."""

    machine: Machine
    process: Process
    file: File
    addr: int

    def pfn(self, page: int) -> int:
        """The frame that caches a page."""
        found = self.process.cached_pfn(self.file, page)
        assert found is not None
        return found


def shmem(machine: Machine, folder: Path) -> Blocks:
    """A memfd."""
    del folder
    process = machine.process("app")
    file = process.memfd_create("blocks")
    process.pwrite(file, 0, block_bytes(0, 2 * NR))
    addr = process.mmap(2 * HPAGE, file=file, shared=True)
    process.read(addr, 2 * HPAGE)
    machine.lru_add_drain_all()
    return Blocks(machine, process, file, addr)


def disk(machine: Machine, folder: Path) -> Blocks:
    """A file of the host, that had a writer once."""
    process = machine.process("app")
    path = folder / "blocks"
    path.write_bytes(block_bytes(0, 2 * NR))
    process.close(process.open(str(path), os.O_RDWR))
    file = process.open(str(path))
    addr = process.mmap(2 * HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(addr, 2 * HPAGE)
    machine.lru_add_drain_all()
    return Blocks(machine, process, file, addr)


def pinned(b: Blocks) -> Undo:
    """Somebody has a reference to page 9."""
    return b.process.get(b.addr + 9 * PAGE, PAGE).release


def isolated(b: Blocks) -> Undo:
    """Page 9 is off its LRU list."""
    one = np.array([b.pfn(9)])
    isolate_lru_pages(b.machine.mem, one)
    return lambda: putback_lru_pages(b.machine.mem, one)


def swapped(b: Blocks) -> Undo:
    """Page 9 is on swap."""
    b.process.madvise(b.addr + 9 * PAGE, PAGE, Advice.MADV_PAGEOUT)
    return b.machine.lru_add_drain_all


def lost_by_swap(b: Blocks) -> Undo:
    """Page 9 is on swap, and the device cannot read it."""
    swapped(b)
    b.machine.mem.swap.bad.add(-b.file.f_mapping.i_pages.load(9))
    return b.machine.lru_add_drain_all


def preallocated_behind_end(b: Blocks) -> Undo:
    """The file ends at page 10, and has a page not yet written to behind that."""
    b.process.ftruncate(b.file, 10 * PAGE)
    b.process.fallocate(b.file, 20 * PAGE, PAGE, keep_size=True)
    b.machine.lru_add_drain_all()
    return b.machine.lru_add_drain_all


def punched_out(b: Blocks) -> Undo:
    """Nothing is left of the block."""
    b.process.fallocate(b.file, 0, HPAGE, punch_hole=True)
    return b.machine.lru_add_drain_all


def hole_beyond_means(b: Blocks) -> Undo:
    """Page 9 is a hole, and not one page more can be committed."""
    b.process.fallocate(b.file, 9 * PAGE, PAGE, punch_hole=True)
    b.machine.mem.commit_limit = b.machine.mem.vm_committed_as
    return b.machine.lru_add_drain_all


def store_fails(b: Blocks) -> Undo:
    """Page 9 is a hole that the xarray has no memory for."""
    b.process.fallocate(b.file, 9 * PAGE, PAGE, punch_hole=True)
    b.file.f_mapping.fail_stores.add(9)
    return b.machine.lru_add_drain_all


def no_nodes(b: Blocks) -> Undo:
    """The xarray has no memory for the slots."""
    b.file.f_mapping.fail_create_range = True
    return b.machine.lru_add_drain_all


def poisoned(b: Blocks) -> Undo:
    """A line of page 9 is bad."""
    pfn = b.pfn(9)
    b.machine.mem.poison.poison(pfn, 5)
    return lambda: b.machine.mem.poison.unpoison(pfn)


def dirty(b: Blocks) -> Undo:
    """Page 9 is dirty: its writer has gone without a word."""
    set_page_dirty(b.machine.mem, np.array([b.pfn(9)]))
    return b.machine.finish_io


def under_writeback(b: Blocks) -> Undo:
    """Page 9 is on its way to the disk."""
    dirty(b)
    start_page_writeback(b.machine.mem, np.array([b.pfn(9)]))
    return b.machine.finish_io


def journalled(b: Blocks) -> Undo:
    """The file system does not let go of what it keeps with page 9."""
    b.process.attach_private(b.file, 9, releasable=False)
    return b.machine.lru_add_drain_all


def watched(b: Blocks) -> Undo:
    """A userfaultfd write-protects both blocks: the cache becomes huge, the tables stay."""
    b.process.userfaultfd().register(b.addr, 2 * HPAGE, missing=False, wp=True)
    return b.machine.lru_add_drain_all


class Case(NamedTuple):
    """A cause, its result, and whether MADV_COLLAPSE goes on; traced: collapse_file was reached."""

    make: Callable[[Machine, Path], Blocks]
    spoil: Callable[[Blocks], Undo]
    result: ScanResult
    goes_on: bool
    traced: bool = True
    index: int = 9


CASES = [
    Case(shmem, pinned, S.SCAN_PAGE_COUNT, True, traced=False),
    Case(shmem, isolated, S.SCAN_PAGE_LRU, True, traced=False),
    Case(shmem, swapped, S.SCAN_DEL_PAGE_LRU, True),
    Case(shmem, lost_by_swap, S.SCAN_FAIL, False),
    Case(shmem, preallocated_behind_end, S.SCAN_FAIL, False, index=20),
    Case(shmem, punched_out, S.SCAN_TRUNCATED, False, index=0),
    Case(shmem, hole_beyond_means, S.SCAN_FAIL, False),
    Case(shmem, store_fails, S.SCAN_STORE_FAILED, False),
    Case(shmem, no_nodes, S.SCAN_FAIL, False, index=0),
    Case(shmem, poisoned, S.SCAN_COPY_MC, False),
    Case(shmem, watched, S.SCAN_PTE_UFFD_WP, True, index=NR),
    Case(disk, pinned, S.SCAN_PAGE_COUNT, True, traced=False),
    Case(disk, isolated, S.SCAN_PAGE_LRU, True, traced=False),
    Case(disk, dirty, S.SCAN_FAIL, False),
    Case(disk, under_writeback, S.SCAN_FAIL, False),
    Case(disk, journalled, S.SCAN_PAGE_HAS_PRIVATE, False),
    Case(disk, no_nodes, S.SCAN_FAIL, False, index=0),
    Case(disk, poisoned, S.SCAN_COPY_MC, False),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.make.__name__}, {case.spoil.__name__}"
)
def test_a_block_with_something_the_matter(machine: Machine, tmp_path: Path, case: Case) -> None:
    """Result, errno, trace, the second block, and the accounts and bytes of the file."""
    blocks = case.make(machine, tmp_path)
    undo = case.spoil(blocks)
    machine.trace.clear()
    before = books(machine, blocks.file)
    content = [blocks.file.f_mapping.i_pages.load(page) for page in range(NR)]
    with pytest.raises(CollapseError) as raised:
        blocks.process.madvise(blocks.addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
    assert (raised.value.scan_result, raised.value.errno) == (case.result, case.result.errno)
    assert cache_is_huge(blocks.file, NR) == case.goes_on
    assert file_scans(machine)[0].result is case.result
    if case.traced:
        first = file_collapses(machine)[0]
        assert (first.result, first.index) == (case.result, case.index)
        assert first.nr == (0 if case.spoil is no_nodes else NR)
    undo()
    if case.spoil is not watched:
        after = books(machine, blocks.file)
        moved = {name for name in ACCOUNTS & set(before) if after[name] != before[name]}
        second_is_huge = {"nr_thps"} if case.make is disk and case.goes_on else set()
        assert moved == LEFT.get(case.spoil, set()) | second_is_huge
        now = [blocks.file.f_mapping.i_pages.load(page) for page in range(NR)]
        changed = [page for page in range(NR) if now[page] != content[page]]
        assert changed == ([9] if case.spoil in LEFT else [])
    machine.audit()


ACCOUNTS = {"alloced", "i_blocks", "vm_committed_as", "nr_thps", "nrpages", "nr_shmem"}
# What a failure leaves moved: a page swapped in stays in, one that the device has lost is gone.
LEFT: dict[Callable[[Blocks], Undo], set[str]] = {
    swapped: {"nrpages", "nr_shmem"},
    lost_by_swap: {"alloced", "i_blocks", "vm_committed_as"},
}


def test_a_huge_page_that_cannot_be_had_is_enomem(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    """No free block: SCAN_ALLOC_HUGE_PAGE_FAIL, nothing in the trace but the result."""
    machine = make_machine("8M")
    blocks = shmem(machine, tmp_path)
    machine.process("filler").mmap(HPAGE)
    hog = machine.process("hog")
    room = machine.vmstat()["nr_free_pages"] - 8
    where = hog.mmap(room * PAGE)
    hog.write(where, bytes(room * PAGE))
    with pytest.raises(CollapseError) as raised:
        blocks.process.madvise(blocks.addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
    assert raised.value.scan_result is S.SCAN_ALLOC_HUGE_PAGE_FAIL
    (event,) = file_collapses(machine)
    assert (event.hpage_pfn, event.index, event.nr) == (-1, 0, 0)
    assert machine.vmstat()["thp_collapse_alloc_failed"] == 1


def test_a_charge_that_is_refused_is_ebusy(machine: Machine) -> None:
    """SCAN_CGROUP_CHARGE_FAIL: the allocation is counted and given back."""
    process = machine.process("app", memcg=machine.memcg((NR + 100) * PAGE))
    file = process.memfd_create("block")
    process.pwrite(file, 0, block_bytes())
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    with pytest.raises(CollapseError) as raised:
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    assert raised.value.scan_result is S.SCAN_CGROUP_CHARGE_FAIL
    (event,) = file_collapses(machine)
    assert (event.hpage_pfn, event.index, event.nr) == (-1, 0, 0)
    assert machine.vmstat()["thp_collapse_alloc"] == 1
    machine.audit()


def test_a_page_locked_behind_the_scan_is_page_lock(machine: Machine, tmp_path: Path) -> None:
    """The scan does not look at locks; collapse_file tries each and goes no further."""
    blocks = shmem(machine, tmp_path)
    task = machine.spawn(blocks.process.madvise.steps(blocks.addr, HPAGE, Advice.MADV_COLLAPSE))
    task.run_until("scanned")
    machine.mem.pages.refcount[blocks.pfn(9)] += 1
    held = LockedPage(machine.mem, blocks.pfn(9))
    with pytest.raises(CollapseError) as raised:
        task.finish()
    held.release()
    assert raised.value.scan_result is S.SCAN_PAGE_LOCK
    assert blocks.process.pfn(blocks.addr + 8 * PAGE) is None
    assert blocks.process.pfn(blocks.addr + 9 * PAGE) is not None
    machine.audit()


def test_a_disk_file_that_ends_in_the_block_is_fail(machine: Machine, tmp_path: Path) -> None:
    """There is nothing to read behind the end: the index says where."""
    process = machine.process("app")
    path = tmp_path / "short"
    path.write_bytes(block_bytes()[: 300 * PAGE])
    file = process.open(str(path))
    addr = process.mmap(HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(addr, 100 * PAGE)
    with pytest.raises(CollapseError) as raised:
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    assert raised.value.scan_result is S.SCAN_FAIL
    assert [(each.index, each.nr) for each in file_collapses(machine)] == [(300, NR)]
    assert file.f_mapping.nrpages == 300
    machine.audit()


def test_pages_swapped_in_stay_in_and_the_next_attempt_succeeds(
    machine: Machine, tmp_path: Path
) -> None:
    """SCAN_DEL_PAGE_LRU while they wait in the batch; the next call drains it first."""
    blocks = shmem(machine, tmp_path)
    blocks.process.madvise(blocks.addr + 9 * PAGE, 2 * PAGE, Advice.MADV_PAGEOUT)
    results = []
    for _ in range(3):
        try:
            blocks.process.madvise(blocks.addr, HPAGE, Advice.MADV_COLLAPSE)
        except CollapseError as error:
            results.append(error.scan_result)
    assert results == [S.SCAN_DEL_PAGE_LRU, S.SCAN_DEL_PAGE_LRU]
    assert cache_is_huge(blocks.file)
    assert blocks.process.read(blocks.addr, HPAGE) == block_bytes()
    machine.audit()


def test_pages_too_far_apart_are_scan_abort(make_machine: MakeMachine) -> None:
    """Node reclaim on, and nodes beyond RECLAIM_DISTANCE: the block is left as it is."""
    machine = make_machine(nodes=2, distances=[[10, 40], [40, 10]])
    machine.node_reclaim_mode = 1
    process = machine.process("app")
    file = process.memfd_create("block")
    process.pwrite(file, 0, block_bytes(0, 300))
    process.node = 1
    process.pwrite(file, 300 * PAGE, block_bytes(300, 212))
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.read(addr, HPAGE)
    with pytest.raises(CollapseError) as raised:
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    assert raised.value.scan_result is S.SCAN_SCAN_ABORT
    (event,) = file_scans(machine)
    assert (event.scan_pfn, event.present) == (process.cached_pfn(file, 300), 300)
    machine.audit()


@pytest.mark.parametrize("written", [False, True])
def test_an_anonymous_block_that_has_become_a_files_is_page_anon(
    machine: Machine, process: Process, written: bool
) -> None:
    """While mmap_lock was dropped to allocate; private copies do not make it anonymous again."""
    addr = advised(process)
    fill(process, addr)
    task = paused(machine, process, addr)
    file = process.memfd_create("instead")
    process.pwrite(file, 0, block_bytes())
    process.mmap(HPAGE, addr=addr, fixed=True, file=file)
    machine.thp.shmem_enabled = "advise"
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    if written:
        process.write(addr, b"mine")
    assert task.finish() is S.SCAN_PAGE_ANON
    machine.audit()


# The daemon's own.


@pytest.mark.parametrize(
    ("limit", "result"), [(211, S.SCAN_EXCEED_NONE_PTE), (212, S.SCAN_SUCCEED)]
)
def test_the_daemon_leaves_blocks_with_too_few_pages(
    machine: Machine, limit: int, result: ScanResult
) -> None:
    """max_ptes_none counts what is not there; MADV_COLLAPSE does not ask."""
    block = shmem_block(machine, held=range(300))
    machine.khugepaged_settings.max_ptes_none = limit
    assert block.collapse() is result
    assert machine.vmstat()["thp_scan_exceed_none_pte"] == (result is not S.SCAN_SUCCEED)
    machine.audit()


@pytest.mark.parametrize(
    ("limit", "result"), [(2, S.SCAN_EXCEED_SWAP_PTE), (3, S.SCAN_DEL_PAGE_LRU)]
)
def test_the_daemon_leaves_blocks_with_too_many_pages_on_swap(
    machine: Machine, limit: int, result: ScanResult
) -> None:
    """max_ptes_swap, inclusive; what is on swap is not present either."""
    block = shmem_block(machine)
    block.process.madvise(block.addr + 100 * PAGE, 3 * PAGE, Advice.MADV_PAGEOUT)
    machine.khugepaged_settings.max_ptes_swap = limit
    assert block.collapse() is result
    (event,) = file_scans(machine)
    assert (event.swap, event.result) == (3, result)
    assert event.present == (100 if result is S.SCAN_EXCEED_SWAP_PTE else NR - 3)
    machine.audit()


@pytest.mark.parametrize(
    ("policy", "advised", "may"),
    [
        ("never", True, False),
        ("deny", True, False),
        ("advise", False, False),
        ("advise", True, True),
        ("always", False, True),
        ("within_size", False, True),
        ("force", False, True),
    ],
)
def test_shmem_enabled_says_what_the_daemon_may_do(
    machine: Machine, policy: str, advised: bool, may: bool
) -> None:
    """And deny alone binds MADV_COLLAPSE."""
    block = shmem_block(machine)
    if not advised:
        block.process.munmap(block.addr, HPAGE)
        block.process.mmap(HPAGE, addr=block.addr, fixed=True, file=block.file, shared=True)
        block.process.read(block.addr, HPAGE)
    machine.thp.shmem_enabled = policy
    assert block.collapse() is (S.SCAN_SUCCEED if may else S.SCAN_VMA_CHECK)
    if not may:
        refused = block.collapse(is_khugepaged=False) is S.SCAN_VMA_CHECK
        assert refused == (policy == "deny")
    machine.audit()


@pytest.mark.parametrize(
    "why", ["no exec", "somebody may write", "misaligned", "enabled is never", "no huge pages"]
)
def test_a_disk_file_the_daemon_may_not_touch(machine: Machine, tmp_path: Path, why: str) -> None:
    """hugepage_vma_check() of a regular file."""
    process = machine.process("app")
    path = tmp_path / "block"
    path.write_bytes(block_bytes(0, NR + 1))
    file = process.open(str(path))
    prot = PROT_READ if why == "no exec" else PROT_READ | PROT_EXEC
    offset = PAGE if why == "misaligned" else 0
    addr = process.mmap(HPAGE, addr=0x40000000, fixed=True, file=file, prot=prot, offset=offset)
    process.read(addr, HPAGE)
    if why != "no huge pages":
        process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    if why == "somebody may write":
        process.open(str(path), os.O_RDWR)
    machine.thp.enabled = "never" if why == "enabled is never" else "madvise"
    expected = S.SCAN_ADDRESS_RANGE if why == "misaligned" else S.SCAN_VMA_CHECK
    assert machine.collapse(process, addr) is expected
    machine.audit()


# The trace.


def test_the_events_of_a_file_are_printed_as_the_kernel_prints_them(machine: Machine) -> None:
    """Field by field: the collapse first, then the scan that led to it."""
    block: FileBlock = shmem_block(machine, held=range(300))
    poisoned_pfn = block.poison(77, 3)
    assert block.collapse() is S.SCAN_COPY_MC
    collapse, scan = file_collapses(machine)[0], file_scans(machine)[0]
    mm = f"{block.process.mm.hashed_ptr:016x}"
    assert [str(record).partition(": ")[2] for record in machine.trace] == [
        f"mm_khugepaged_collapse_file: mm={mm}, hpage_pfn={collapse.hpage_pfn:#x}, index=77,"
        f" addr={block.addr}, is_shmem=1, filename=memfd:block, nr=512, result=copy_poisoned_page",
        f"mm_khugepaged_scan_file: mm={mm}, scan_pfn=0xffffffffffffffff, filename=memfd:block,"
        " present=300, swap=0, result=copy_poisoned_page",
    ]
    machine.mem.poison.unpoison(poisoned_pfn)
    machine.trace.clear()
    assert block.collapse() is S.SCAN_SUCCEED
    (done,) = file_collapses(machine)
    assert (done.hpage_pfn, done.index, done.nr) == (-1, NR, NR)
    assert scan.present == 300
    machine.audit()
