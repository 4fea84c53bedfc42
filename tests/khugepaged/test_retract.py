"""Page tables behind a collapsed file: retract_page_tables and collapse_pte_mapped_thp."""

import errno
from collections.abc import Callable

import pytest
from collapse_kit import HPAGE, NR, PAGE, madv_collapse, rss
from file_kit import (
    ALL,
    FileBlock,
    Mapping,
    add_mapper,
    cache_is_huge,
    file_collapses,
    file_scans,
    memfd,
    pte_mapped_thp,
    shmem_block,
)

from pykhuge import Advice, CollapseError, Machine, ScanResult
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Task
from pykhuge.mm.fault import vma_lookup
from pykhuge.mm.new_pages import pte_table
from pykhuge.mm.rmap import pmd_of

S = ScanResult


@pytest.fixture
def block(machine: Machine) -> FileBlock:
    """A memfd's block, all of it mapped by one process."""
    return shmem_block(machine)


def has_table(mapping: Mapping) -> bool:
    """Whether the PMD of a mapping of the block points to a page table."""
    return bool(pmd_of(mapping.process.mem, mapping.process.mm, mapping.addr))


def map_by_ptes(block: FileBlock) -> None:
    """Make the cache huge, and map all of it by PTEs.

    A fault finds an empty page table there, as one does that had to wait when it had made it.
    """
    assert block.collapse() is S.SCAN_SUCCEED
    pte_table(block.machine.mem, block.process.mm, block.addr)
    block.process.read(block.addr, HPAGE)
    assert not block.process.is_huge(block.addr)


# Who is retracted.


def test_the_daemon_retracts_every_mapping_and_maps_none(machine: Machine) -> None:
    """All page tables of the block go; the next access maps the huge page by a PMD."""
    block = shmem_block(machine, others=[range(10), range(500, NR)])
    tables = machine.vmstat()["nr_page_table_pages"]
    assert block.collapse() is S.SCAN_SUCCEED
    assert machine.vmstat()["nr_page_table_pages"] == tables - 3
    for process, addr in block.maps:
        assert not has_table(Mapping(process, addr))
        process.read(addr, 1)
        assert process.is_huge(addr)
    assert machine.vmstat()["thp_file_mapped"] == 3
    assert machine.vmstat()["nr_shmem_pmdmapped"] == 1


def test_madv_collapse_maps_the_target_and_notes_the_others_for_the_daemon(
    machine: Machine,
) -> None:
    """The target has its PMD at once; the other keeps its table until the daemon comes by."""
    block = shmem_block(machine, others=[ALL])
    other = block.maps[1]
    assert madv_collapse(block.process, block.addr) is None
    assert block.process.is_huge(block.addr)
    assert rss(block.process)["MM_SHMEMPAGES"] == NR
    assert machine.mem.pages.refcount[block.slots()[0]] == NR + 1
    assert has_table(other)
    assert pte_mapped_thp(other.process) == [other.addr]
    assert machine.collapse(other.process, other.addr) is S.SCAN_PTE_MAPPED_HUGEPAGE
    assert not has_table(other)
    assert pte_mapped_thp(other.process) == []


def test_a_slot_notes_eight_blocks_and_drops_the_ninth(machine: Machine) -> None:
    """MAX_PTE_MAPPED_THP: what does not fit is forgotten."""
    process, other = machine.process("app"), machine.process("other")
    file = memfd(process, range(0), size=9 * HPAGE)
    other.receive(file)
    addr = process.mmap(9 * HPAGE, file=file, shared=True)
    theirs = other.mmap(9 * HPAGE, file=file, shared=True)
    for number in range(9):
        process.write(addr + number * HPAGE, b"x")
        other.read(theirs + number * HPAGE, 1)
    machine.thp.shmem_enabled = "advise"
    other.madvise(theirs, 9 * HPAGE, Advice.MADV_HUGEPAGE)
    process.madvise(addr, 9 * HPAGE, Advice.MADV_COLLAPSE)
    assert pte_mapped_thp(other) == [theirs + number * HPAGE for number in range(8)]
    machine.audit()


# What a target may meet, with the cache huge by then.

Spoil = Callable[[FileBlock], None]


def watch_for_writes(block: FileBlock) -> None:
    """Register the block with a userfaultfd for write protection."""
    block.process.userfaultfd().register(block.addr, HPAGE, missing=False, wp=True)


def map_anew(block: FileBlock) -> None:
    """Map the block again at its place, where nothing has been touched then."""
    block.process.munmap(block.addr, HPAGE)
    block.process.mmap(HPAGE, addr=block.addr, fixed=True, file=block.file, shared=True)


SPOILED: dict[str, tuple[Spoil, ScanResult]] = {
    "watched for writes": (watch_for_writes, S.SCAN_PTE_UFFD_WP),
    "upper level absent": (map_anew, S.SCAN_PMD_NULL),
}


@pytest.mark.parametrize("how", SPOILED)
def test_the_cache_is_huge_though_the_result_is_retracts(block: FileBlock, how: str) -> None:
    """What became of the target's page table is the result, not what became of the pages."""
    spoil, expected = SPOILED[how]
    spoil(block)
    assert block.collapse(is_khugepaged=False) is expected
    assert cache_is_huge(block.file)
    assert [event.result for event in file_collapses(block.machine)] == [expected]
    assert block.machine.khugepaged_settings.pages_collapsed == 0
    assert block.process.read(block.addr, HPAGE) == block.content()
    block.machine.audit()


def test_an_empty_pmd_gives_pmd_none(machine: Machine) -> None:
    """The neighbour's upper level is there, the block's own PMD is none."""
    process = machine.process("app")
    file = memfd(process, size=2 * HPAGE)
    addr = process.mmap(2 * HPAGE, file=file, shared=True)
    process.read(addr + HPAGE, 1)
    assert machine.collapse(process, addr, is_khugepaged=False) is S.SCAN_PMD_NONE
    assert cache_is_huge(file)
    machine.audit()


@pytest.mark.parametrize("touched", ["in the block", "behind it"])
def test_a_target_with_private_copies_yields_fail(machine: Machine, touched: str) -> None:
    """The anon_vma is looked at before the target is known: SCAN_FAIL, not SCAN_PAGE_ANON."""
    process = machine.process("app")
    file = memfd(process, size=2 * HPAGE)
    addr = process.mmap(2 * HPAGE, file=file)
    process.read(addr, HPAGE)
    process.write(addr + (5 * PAGE if touched == "in the block" else HPAGE), b"mine")
    assert machine.collapse(process, addr, is_khugepaged=False) is S.SCAN_FAIL
    assert cache_is_huge(file)
    assert process.read(addr + PAGE, PAGE) == process.pread(file, PAGE, PAGE)
    machine.audit()


def test_a_mapping_out_of_step_or_too_short_is_passed_over(block: FileBlock) -> None:
    """They keep their tables, and nobody notes them."""
    whole = add_mapper(block, range(3))
    process = block.machine.process("odd")
    process.receive(block.file)
    odd = process.mmap(HPAGE, addr=0x40001000, fixed=True, file=block.file, shared=True)
    short = process.mmap(HPAGE - PAGE, addr=0x60000000, fixed=True, file=block.file, shared=True)
    process.read(odd, 1)
    process.read(short, 1)
    assert block.collapse() is S.SCAN_SUCCEED
    assert not has_table(whole)
    assert has_table(Mapping(process, odd))
    assert has_table(Mapping(process, short))
    assert pte_mapped_thp(process) == []
    assert process.read(odd, HPAGE) == block.content()
    block.machine.audit()


# Trylocks.


def hold(machine: Machine, mapping: Mapping, lock: str) -> Callable[[], None]:
    """Let another task have a lock of the mapping's; the function returned gives it back."""
    task: Task[None] = Task(machine.mem.sched, "holder", 99)
    task.start(iter(()))  # type: ignore[arg-type]
    vma = vma_lookup(mapping.process.mm, mapping.addr)
    assert vma is not None
    rwsem = mapping.process.mm.mmap_lock if lock == "mmap_lock" else vma.vm_lock
    assert rwsem.trylock(task, READ)
    return lambda: rwsem.unlock(task)


@pytest.mark.parametrize("lock", ["mmap_lock", "vm_lock"])
def test_a_target_whose_lock_is_lost_is_pte_mapped(block: FileBlock, lock: str) -> None:
    """SCAN_PTE_MAPPED_HUGEPAGE: the daemon notes it, and counts it, and sees to it next time."""
    task = block.task()
    task.run_until("copied")
    let_go = hold(block.machine, block.maps[0], lock)
    assert task.finish() is S.SCAN_PTE_MAPPED_HUGEPAGE
    let_go()
    assert cache_is_huge(block.file)
    assert has_table(block.maps[0])
    assert pte_mapped_thp(block.process) == [block.addr]
    assert block.machine.khugepaged_settings.pages_collapsed == 1
    block.collapse()
    assert not has_table(block.maps[0])
    block.machine.audit()


@pytest.mark.parametrize(("lock", "noted"), [("mmap_lock", True), ("vm_lock", False)])
def test_of_another_mapping_a_lost_mmap_lock_is_noted_and_a_lost_vm_lock_is_not(
    machine: Machine, lock: str, noted: bool
) -> None:
    """The result is the target's, whatever became of the other."""
    block = shmem_block(machine, others=[ALL])
    other = block.maps[1]
    task = block.task()
    task.run_until("copied")
    let_go = hold(machine, other, lock)
    assert task.finish() is S.SCAN_SUCCEED
    let_go()
    assert has_table(other)
    assert pte_mapped_thp(other.process) == [other.addr] * noted
    machine.audit()


def test_madv_collapse_takes_a_lost_trylock_up_again(block: FileBlock) -> None:
    """It waits for mmap_lock then, and maps the huge page: success all the same."""
    task = block.machine.spawn(
        block.process.madvise.steps(block.addr, HPAGE, Advice.MADV_COLLAPSE), "app"
    )
    task.run_until("copied")
    let_go = hold(block.machine, block.maps[0], "mmap_lock")
    while task.step():
        pass
    assert str(task.pending) == "acquire mmap_lock for write"
    let_go()
    task.finish()
    assert block.process.is_huge(block.addr)
    assert [event.result for event in file_collapses(block.machine)] == [S.SCAN_PTE_MAPPED_HUGEPAGE]
    block.machine.audit()


# A huge page that is cached already.


def test_madv_collapse_maps_what_is_huge_already(block: FileBlock) -> None:
    """The scan meets it at its first entry; the PMD is installed, and nothing is allocated."""
    block.collapse()
    block.machine.trace.clear()
    allocated = block.machine.vmstat()["thp_collapse_alloc"]
    assert madv_collapse(block.process, block.addr) is None
    assert block.process.is_huge(block.addr)
    assert [(event.result, event.present) for event in file_scans(block.machine)] == [
        (S.SCAN_PTE_MAPPED_HUGEPAGE, 0)
    ]
    assert file_collapses(block.machine) == []
    assert block.machine.vmstat()["thp_collapse_alloc"] == allocated
    assert madv_collapse(block.process, block.addr) is None
    block.machine.audit()


def test_ptes_of_the_huge_page_are_dropped_with_their_counts(block: FileBlock) -> None:
    """512 PTEs become one PMD: rmap, references and mm counter stay what one mapping is."""
    map_by_ptes(block)
    head = block.slots()[0]
    assert block.machine.mem.pages.refcount[head] == 2 * NR
    assert madv_collapse(block.process, block.addr) is None
    assert block.process.is_huge(block.addr)
    assert block.machine.mem.pages.refcount[head] == NR + 1
    assert rss(block.process)["MM_SHMEMPAGES"] == NR
    assert block.machine.vmstat()["nr_mapped"] == NR
    block.machine.audit()


def test_a_foreign_page_among_the_ptes_is_fail(machine: Machine) -> None:
    """A private copy in the block: the table stays, with the copy."""
    process = machine.process("app")
    file = memfd(process)
    shared = process.mmap(HPAGE, file=file, shared=True)
    process.read(shared, 1)
    process.madvise(shared, HPAGE, Advice.MADV_COLLAPSE)
    addr = process.mmap(HPAGE, file=file)
    process.write(addr + 7 * PAGE, b"mine")
    with pytest.raises(CollapseError) as raised:
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    assert (raised.value.scan_result, raised.value.errno) == (S.SCAN_FAIL, errno.EINVAL)
    assert process.read(addr + 7 * PAGE, 4) == b"mine"
    machine.audit()


def test_a_swapped_private_copy_among_the_ptes_is_pte_non_present(machine: Machine) -> None:
    """The first entry that is neither none nor the huge page's decides."""
    process = machine.process("app")
    file = memfd(process)
    shared = process.mmap(HPAGE, file=file, shared=True)
    process.read(shared, 1)
    process.madvise(shared, HPAGE, Advice.MADV_COLLAPSE)
    addr = process.mmap(HPAGE, file=file)
    process.write(addr + 7 * PAGE, b"mine")
    machine.lru_add_drain_all()
    process.madvise(addr + 7 * PAGE, PAGE, Advice.MADV_PAGEOUT)
    assert madv_collapse(process, addr) is S.SCAN_PTE_NON_PRESENT
    machine.audit()


def test_a_watched_vma_keeps_its_ptes(block: FileBlock) -> None:
    """Markers may be among them."""
    map_by_ptes(block)
    watch_for_writes(block)
    assert madv_collapse(block.process, block.addr) is S.SCAN_PTE_UFFD_WP
    assert not block.process.is_huge(block.addr)
    block.machine.audit()


def test_a_vma_that_is_gone_when_madv_collapse_comes_back_is_vma_check(block: FileBlock) -> None:
    """It had dropped mmap_lock to look at the page cache."""
    block.collapse()
    task = block.machine.spawn(
        block.process.madvise.steps(block.addr, HPAGE, Advice.MADV_COLLAPSE), "app"
    )
    task.run_until("acquire mmap_lock for write")
    block.process.munmap(block.addr, HPAGE)
    with pytest.raises(CollapseError) as raised:
        task.finish()
    assert raised.value.scan_result is S.SCAN_VMA_CHECK
    block.machine.audit()


def test_a_cache_that_is_gone_when_madv_collapse_comes_back_is_page_null(block: FileBlock) -> None:
    """The huge page was punched out meanwhile."""
    block.collapse()
    block.process.read(block.addr, 1)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_DONTNEED)
    task = block.machine.spawn(
        block.process.madvise.steps(block.addr, HPAGE, Advice.MADV_COLLAPSE), "app"
    )
    task.run_until("acquire mmap_lock for write")
    block.process.fallocate(block.file, 0, HPAGE, punch_hole=True)
    with pytest.raises(CollapseError) as raised:
        task.finish()
    assert raised.value.scan_result is S.SCAN_PAGE_NULL
    block.machine.audit()


def test_a_cache_of_small_pages_when_madv_collapse_comes_back_is_fail(block: FileBlock) -> None:
    """The huge page was split meanwhile: what is found is no head."""
    block.collapse()
    task = block.machine.spawn(
        block.process.madvise.steps(block.addr, HPAGE, Advice.MADV_COLLAPSE), "app"
    )
    task.run_until("acquire mmap_lock for write")
    block.process.fallocate(block.file, 9 * PAGE, PAGE, punch_hole=True)
    with pytest.raises(CollapseError) as raised:
        task.finish()
    assert raised.value.scan_result is S.SCAN_FAIL
    block.machine.audit()


def test_the_mm_that_exits_meanwhile_is_passed_over(machine: Machine) -> None:
    """A mapper on its way out has no users; its page table is its own affair."""
    block = shmem_block(machine, others=[ALL])
    other = block.maps[1]
    task = block.task()
    task.run_until("copied")
    leaving = machine.spawn(other.process.exit.steps(), "other")
    leaving.run_until("acquire mmap_lock for write")
    assert task.finish() is S.SCAN_SUCCEED
    assert has_table(other)
    leaving.finish()
    machine.audit()


def test_secondary_mmus_hear_of_the_table_that_goes(block: FileBlock) -> None:
    """Once for the pages unmapped, once for the page table."""
    told: list[tuple[int, int]] = []

    class Listener:
        def invalidate_range_start(self, start: int, end: int) -> None:
            told.append((start, end))

        def invalidate_range_end(self, start: int, end: int) -> None:
            assert told[-1] == (start, end)

        def test_young(self, addr: int) -> bool:
            del addr
            return False

    block.process.register_mmu_notifier(Listener())
    assert block.collapse() is S.SCAN_SUCCEED
    assert told == [(block.addr, block.addr + HPAGE)] * 2
    block.machine.audit()
