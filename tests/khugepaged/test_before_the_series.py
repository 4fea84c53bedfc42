"""Files on a machine without recovery: how collapse_file was before the series, as of Linux 6.2.

It counted the huge page and stored its one entry first, and then copied and freed page by page;
there was no way back, and no way on past a bad line.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from collapse_kit import HPAGE, NR, MakeMachine, changes, flags_of
from file_kit import (
    DISK,
    SHMEM,
    FileBlock,
    cache_is_huge,
    dirty_free_memory,
    disk_block,
    file_collapses,
    file_scans,
    machine_checks,
    shmem_block,
)

from pykhuge import KernelPanic, Machine, ScanResult
from pykhuge.mm.page import PG_frozen, PG_locked, PG_uptodate

S = ScanResult
HALF = range(0, NR, 2)
SORTS = pytest.mark.parametrize("sort", [SHMEM, DISK])
RECOVERY = pytest.mark.parametrize(
    "recovery", [pytest.param(True, id="after"), pytest.param(False, id="before")]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a disk file may be."""
    return tmp_path / "disk"


@pytest.fixture
def old(make_machine: MakeMachine) -> Machine:
    """A machine whose copies have no recovery."""
    return make_machine("16M", recovery=False)


def block_of(sort: str, machine: Machine, path: Path, held: Iterable[int] = HALF) -> FileBlock:
    """A block of shmem with holes, or a full one of a disk file."""
    machine.thp.enabled = "always"
    return shmem_block(machine, held) if sort == SHMEM else disk_block(machine, path)


@SORTS
def test_clean_block_ends_as_it_does_with_recovery(
    make_machine: MakeMachine, path: Path, sort: str
) -> None:
    """The old kernel is wrong only about poison: counters, bytes and trace are the same."""
    seen = []
    for recovery in (True, False):
        machine = make_machine("16M", recovery=recovery)
        block = block_of(sort, machine, path)
        dirty_free_memory(machine)
        before = block.books()
        assert block.collapse() is S.SCAN_SUCCEED
        trace = [event.body() for event in (*file_collapses(machine), *file_scans(machine))]
        seen.append((changes(before, block.books()), trace, block.slots()))
        assert block.process.read(block.addr, HPAGE) == block.content()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("line", [0, 63])
@pytest.mark.parametrize("page", [0, 254, 510])
@SORTS
def test_bad_line_kills_the_host(old: Machine, path: Path, sort: str, page: int, line: int) -> None:
    """Whichever page it is in: the log tells of the machine check, the trace of nothing."""
    block = block_of(sort, old, path)
    pfn = block.poison(page, line)
    with pytest.raises(KernelPanic) as died:
        block.collapse()
    assert died.value.reason == "Fatal local machine check"
    assert str(died.value) in old.log[-1]
    assert "[Hardware Error]" in old.log[-2]
    (mce,) = machine_checks(old)
    assert (mce.pfn, mce.line, mce.recovered) == (pfn, line, False)
    assert file_collapses(old) == []
    assert file_scans(old) == []
    with pytest.raises(KernelPanic):
        block.process.pread(block.file, 0, 1)


@pytest.mark.parametrize(("sort", "is_khugepaged"), [(SHMEM, False), (SHMEM, True), (DISK, False)])
def test_counters_had_moved_before_the_copy(
    old: Machine, path: Path, sort: str, is_khugepaged: bool
) -> None:
    """The dead host counts a huge page, and the pages of its holes, that never came to be."""
    block = block_of(sort, old, path)
    block.poison(0)
    before = old.vmstat()
    with pytest.raises(KernelPanic):
        block.collapse(is_khugepaged=is_khugepaged)
    moved = changes(before, old.vmstat())
    names = ("nr_shmem_hugepages", "nr_file_hugepages", "nr_file_pages", "nr_shmem")
    h = 256
    expected = {SHMEM: [1, 0, h, h], DISK: [0, 1, 0, 0]}[sort]
    assert [moved.get(name, 0) for name in names] == expected
    assert block.file.f_mapping.nr_thps == (sort == DISK)
    assert cache_is_huge(block.file)


@SORTS
def test_pages_were_freed_one_by_one_behind_their_copies(
    old: Machine, path: Path, sort: str
) -> None:
    """At the bad line those in front are gone, it and those behind stand frozen and locked."""
    block = block_of(sort, old, path)
    held = [page for page, entry in enumerate(block.slots()) if entry]
    pfns = [block.pfn(page) for page in held]
    block.poison(held[100])
    with pytest.raises(KernelPanic):
        block.collapse()
    flags = [flags_of(block.process, pfn) for pfn in pfns]
    assert flags[:100] == [0] * 100
    left = PG_frozen | PG_locked | PG_uptodate
    assert [each & left for each in flags[100:]] == [left] * (len(pfns) - 100)
    hpage = block.pfn(0)
    assert not flags_of(block.process, hpage) & PG_uptodate


@RECOVERY
def test_huge_page_is_counted_before_or_after_the_copy(
    make_machine: MakeMachine, path: Path, recovery: bool
) -> None:
    """Where the first old page is freed, NR_SHMEM_THPS has moved before the series, not since.

    Both free every page before the collapse ends, so that the ledger alone can tell.
    """
    machine = make_machine("16M", recovery=recovery)
    block = block_of(SHMEM, machine, path)
    with machine.ledger() as ledger:
        assert block.collapse() is S.SCAN_SUCCEED
    order = [(posting.counter, posting.delta) for posting in ledger]
    freed = next(
        number for number, each in enumerate(order) if each[0] == "nr_free_pages" and each[1] > 0
    )
    counted = order.index(("nr_shmem_hugepages", NR))
    assert (counted < freed) is not recovery


@RECOVERY
def test_write_open_race_had_to_count_the_huge_page_back(
    make_machine: MakeMachine, path: Path, recovery: bool
) -> None:
    """NR_FILE_THPS moved with nr_thps, and had to come back with it; since then it stays put."""
    machine = make_machine("16M", recovery=recovery)
    block = block_of(DISK, machine, path)
    task = block.task(is_khugepaged=False)
    task.run_until("scanned")
    machine.process("writer").open(str(path), os.O_RDWR)
    with machine.ledger() as ledger:
        assert task.finish() is S.SCAN_FAIL
    posted = {
        counter: [each.delta for each in ledger if each.counter == counter]
        for counter in ("nr_thps", "nr_file_hugepages")
    }
    assert posted == {"nr_thps": [1, -1], "nr_file_hugepages": [] if recovery else [NR, -NR]}
    assert block.file.f_mapping.nrpages == NR
    assert not cache_is_huge(block.file)


@RECOVERY
def test_scan_failure_is_undone_either_way(
    make_machine: MakeMachine, path: Path, recovery: bool
) -> None:
    """Up to the copy the old kernel had a way back as well: holes are holes again."""
    machine = make_machine("16M", recovery=recovery)
    block = block_of(SHMEM, machine, path)
    block.file.f_mapping.fail_stores.add(301)
    slots, before = block.slots(), block.books()
    assert block.collapse() is S.SCAN_STORE_FAILED
    assert block.slots() == slots
    moved = changes(before, block.books())
    for counter in ("nrpages", "alloced", "i_blocks", "vm_committed_as", "nr_shmem_hugepages"):
        assert counter not in moved
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_dead_host_leaves_other_collapses_where_they_are(old: Machine) -> None:
    """A collapse of another file, paused in the copy's midst, does not go on."""
    block, other = shmem_block(old, HALF), shmem_block(old, HALF)
    task = other.task()
    task.run_until("copy")
    block.poison(10)
    with pytest.raises(KernelPanic):
        block.collapse()
    with pytest.raises(KernelPanic):
        task.finish()
