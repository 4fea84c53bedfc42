"""KernelVersion: what each switch changes, and that nothing else does."""

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    changes,
    compound_block,
    discard,
    events,
    faults,
    fill,
    isolates,
    madv_collapse,
    page_bytes,
    pfn_of,
    ptes_of,
    refused,
    scans,
    touch,
)
from file_kit import (
    FileBlock,
    add_mapper,
    cache_is_huge,
    cache_snapshot,
    disk_block,
    file_collapses,
    pte_mapped_thp,
    shmem_block,
)

from pykhuge import (
    PROT_READ,
    Advice,
    BusError,
    File,
    KernelPanic,
    KernelVersion,
    Machine,
    Process,
    ScanResult,
    UserFault,
)
from pykhuge.khugepaged.trace_events import mm_collapse_huge_page_swapin
from pykhuge.mm.errors import EHWPOISON
from pykhuge.mm.mm_types import MMF_DISABLE_THP
from pykhuge.mm.new_pages import pte_table
from pykhuge.mm.page import PG_hwpoison
from pykhuge.mm.page_table import PAGE_PRESENT, PAGE_UFFD_WP
from pykhuge.mm.rmap import pmd_of

S = ScanResult
REF, V6_18 = KernelVersion.REF, KernelVersion.V6_18
Versioned = Callable[[Callable[..., Any]], Callable[..., Any]]


def present(process: Process, addr: int) -> int:
    """How many entries of the block's table map a page."""
    return int(np.count_nonzero(ptes_of(process, addr) & np.uint64(PAGE_PRESENT)))


def only(*switches: str) -> KernelVersion:
    """REF with these switches on."""
    return replace(REF, name="+".join(switches), **dict.fromkeys(switches, True))


def by(switch: str) -> Any:
    """A test by kernel: REF is the old way; REF with that one switch, and 6.18, are the new one."""
    return pytest.mark.parametrize(
        ("kernel", "new"),
        [(REF, False), (only(switch), True), (V6_18, True)],
        ids=["REF", "switch", "6.18"],
    )


# --- the switches themselves


def test_ref_has_every_switch_off_and_6_18_has_every_switch_on() -> None:
    """REF is what a machine has if nothing is said."""
    assert not any(getattr(REF, each) for each in KernelVersion.switches())
    assert all(getattr(V6_18, each) for each in KernelVersion.switches())
    assert Machine("2M").mem.version is REF
    assert replace(V6_18, **dict.fromkeys(KernelVersion.switches(), False), name="REF") == REF


def test_a_version_cannot_be_changed() -> None:
    """It may be shared by machines."""
    with pytest.raises(FrozenInstanceError):
        REF.no_scan_page_ro = True  # type: ignore[misc]


@pytest.mark.parametrize("kernel", ["6.18", None, 6.18, KernelVersion])
def test_a_bad_kernel_is_named(kernel: object) -> None:
    """The message has argument, value and what is allowed."""
    with pytest.raises(TypeError, match=r"kernel=.*: allowed a KernelVersion"):
        Machine("2M", kernel=kernel)  # type: ignore[arg-type]


def test_no_later_kernel_is_without_recovery() -> None:
    """All of them came behind the series."""
    with pytest.raises(ValueError, match=r"recovery=False: allowed with .*REF, not 6.18"):
        Machine("2M", recovery=False, kernel=V6_18)


def test_bad_fields_are_named() -> None:
    """A switch is a bool, the name a string."""
    with pytest.raises(TypeError, match="no_scan_page_ro=1: allowed False and True"):
        KernelVersion("x", no_scan_page_ro=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name=6: allowed a string"):
        KernelVersion(6)  # type: ignore[arg-type]


def test_numbers_above_the_value_that_went_are_one_less() -> None:
    """COPY_MC is 30, and 29 in 6.18."""
    assert [REF.number(each) for each in S] == [each.value for each in S]
    assert V6_18.number(S.SCAN_PTE_MAPPED_HUGEPAGE) == 10
    assert V6_18.number(S.SCAN_LACK_REFERENCED_PAGE) == 11
    assert V6_18.number(S.SCAN_COPY_MC) == 29
    assert V6_18.number(S.SCAN_PAGE_FILLED) == 30
    with pytest.raises(ValueError, match=r"SCAN_PAGE_RO.*6.18 has no such value"):
        V6_18.number(S.SCAN_PAGE_RO)


def test_a_kernel_by_number_has_the_switches_of_its_time() -> None:
    """What no one has looked at is as the newest before it."""
    assert KernelVersion.at(6, 3) == replace(REF, name="6.3", collapse_recovers=False)
    assert KernelVersion.at(6, 18) == V6_18
    later = KernelVersion.at(6, 12)
    assert later.collapse_file_addr_in_hex
    assert not later.huge_zero_page_gives_huge


@pytest.mark.parametrize(("minor", "panics"), [(1, True), (2, True), (3, True), (4, False)])
def test_poison_in_a_collapse_is_a_panic_before_the_series(
    make_machine: MakeMachine, minor: int, panics: bool
) -> None:
    """The series is in 6.4; who has it earlier says recovery=True."""
    kernel = KernelVersion.at(6, minor)
    for recovery in (None, True):
        machine = make_machine(kernel=kernel, recovery=recovery)
        process = machine.process()
        addr = advised(process)
        fill(process, addr)
        process.poison(addr + 7 * PAGE, 3)
        with pytest.raises(KernelPanic) if panics and recovery is None else nullcontext():
            assert machine.collapse(process, addr) is S.SCAN_COPY_MC


@pytest.mark.parametrize(("minor", "panics"), [(1, True), (2, False), (3, False), (4, False)])
def test_poison_in_copy_on_write_is_a_panic_before_6_2(
    make_machine: MakeMachine, minor: int, panics: bool
) -> None:
    """Later the task is killed."""
    process = make_machine(kernel=KernelVersion.at(6, minor)).process()
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    child = process.fork()
    process.poison(addr, 40)
    with pytest.raises(KernelPanic if panics else BusError):
        child.write(addr, b"y")


@pytest.mark.parametrize("kernel", [REF, only("pgfault_without_retries")], ids=["REF", "switch"])
def test_a_fault_that_is_to_be_tried_again_counts_only_at_first(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """One that ends in a signal counts in every kernel."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = process.mmap(2 * PAGE)
    process.userfaultfd().register(addr, PAGE)
    before = machine.vmstat()
    with pytest.raises(UserFault):
        process.read(addr, 1)
    assert changes(before, machine.vmstat()).get("pgfault", 0) == (kernel is REF)
    process.write(addr + PAGE, b"x")
    process.madvise(addr + PAGE, PAGE, Advice.MADV_HWPOISON)
    before = machine.vmstat()
    with pytest.raises(BusError):
        process.read(addr + PAGE, 1)
    assert changes(before, machine.vmstat()) == {"pgfault": 1}


def test_a_kernel_before_madv_collapse_is_none() -> None:
    """The oldest is 6.1; what came behind the newest is not known, and is as that."""
    oldest = replace(REF, name="6.1", collapse_recovers=False, cow_recovers=False)
    assert KernelVersion.at(*KernelVersion.OLDEST) == oldest
    with pytest.raises(ValueError, match=r"Linux 5.19: allowed 6.1 and later"):
        KernelVersion.at(5, 19)
    assert KernelVersion.at(7, 0) == replace(V6_18, name="7.0")


def test_a_flipped_switch_is_the_only_one() -> None:
    """On the wrong side, whichever that is."""
    assert V6_18.flipped("no_scan_page_ro") == replace(
        V6_18, name="6.18, no_scan_page_ro wrong", no_scan_page_ro=False
    )
    assert REF.flipped("no_scan_page_ro").no_scan_page_ro


# --- anonymous memory


@by("exceed_none_is_ebusy")
def test_holes_under_userfaultfd_are_busy(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """SCAN_EXCEED_NONE_PTE is EINVAL, later EBUSY."""
    process = make_machine(kernel=kernel).process()
    addr = advised(process)
    fill(process, addr, range(NR - 1))
    process.userfaultfd().register(addr, HPAGE)
    collapse = lambda: process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)  # noqa: E731
    assert refused(collapse) == (errno.EBUSY if new else errno.EINVAL)
    assert madv_collapse(process, addr) is S.SCAN_EXCEED_NONE_PTE


@by("no_scan_page_ro")
def test_a_read_only_block_collapses(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Without SCAN_PAGE_RO no entry must be writable; the trace has no such field."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process)
    fill(process, addr)
    process.mprotect(addr, HPAGE, PROT_READ)
    assert madv_collapse(process, addr) is (None if new else S.SCAN_PAGE_RO)
    assert process.is_huge(addr) is new
    assert process.read(addr, HPAGE) == block_bytes()
    assert all(("writable" in each.body()) is not new for each in scans(machine))
    assert all(("writable" in each.body()) is not new for each in isolates(machine))


@by("no_scan_page_ro")
def test_zero_pages_alone_collapse(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """MADV_COLLAPSE takes them; the daemon asks for a page that was used."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process)
    fill(process, addr, [0])
    discard(process, addr, [0])
    touch(process, addr, range(NR - 1))
    fill(process, addr, [NR - 1])
    discard(process, addr, [NR - 1])
    machine.khugepaged_settings.max_ptes_none = NR - 1
    assert machine.collapse(process, addr) is S.SCAN_EXCEED_NONE_PTE
    assert madv_collapse(process, addr) is (None if new else S.SCAN_PAGE_RO)
    assert process.read(addr, HPAGE) == bytes(HPAGE)


def test_the_daemon_still_wants_a_page_that_was_used(make_machine: MakeMachine) -> None:
    """Where REF says SCAN_PAGE_RO, the next test of the chain decides."""
    machine = make_machine(kernel=V6_18)
    process = machine.process()
    addr = advised(process)
    fill(process, addr)
    process.mprotect(addr, HPAGE, PROT_READ)
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED


@by("swapin_ret_is_scan_result")
def test_swapin_prints_the_scan_result(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Ret was whether all came in; a locked page is told from a failure later."""
    machine = make_machine(kernel=kernel, swap="16M")
    process = machine.process()
    addr = advised(process)
    fill(process, addr)
    machine.lru_add_drain_all()
    process.madvise(addr + 5 * PAGE, PAGE, Advice.MADV_PAGEOUT)
    child = process.fork()
    fill(process, addr, [0])
    # The swap cache has the page, and somebody has locked it.
    child.read(addr + 5 * PAGE, 1)
    lock = child.lock_page(addr + 5 * PAGE)
    assert madv_collapse(process, addr) is S.SCAN_PAGE_LOCK
    (event,) = [each for each in events(machine) if isinstance(each, mm_collapse_huge_page_swapin)]
    assert event.ret == (kernel.number(S.SCAN_PAGE_LOCK) if new else 0)
    lock.release()


@by("copy_queues_memory_failure")
def test_the_page_that_stopped_a_copy_is_taken_away(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Later kernels meet the poison once: afterwards an entry says that the page is lost."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process)
    fill(process, addr)
    pfn = pfn_of(process, addr, 7)
    machine.mem.poison.poison(pfn, 3)
    assert madv_collapse(process, addr) is S.SCAN_COPY_MC
    assert bool(machine.mem.pages.flags[pfn] & PG_hwpoison) is new
    machine.audit()
    assert madv_collapse(process, addr) is (S.SCAN_FAIL if new else S.SCAN_COPY_MC)


@by("dontneed_frees_page_table")
@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_dontneed_of_a_block_frees_its_table(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool, kind: str
) -> None:
    """Only of a whole block: half of it, twice, leaves the table."""
    machine = make_machine(kernel=kernel)
    if kind == "anon":
        process = machine.process()
        addr = advised(process)
        fill(process, addr)
    else:
        block = shmem_block(machine)
        process, addr = block.process, block.addr
    discard(process, addr, range(1, NR))
    discard(process, addr, range(1))
    assert pmd_of(machine.mem, process.mm, addr)
    process.madvise(addr, HPAGE, Advice.MADV_DONTNEED)
    assert (pmd_of(machine.mem, process.mm, addr) == 0) is new
    machine.audit()
    if kind == "anon":
        expected = S.SCAN_PMD_NONE if new else S.SCAN_EXCEED_NONE_PTE
        assert machine.collapse(process, addr) is expected
        fill(process, addr)
        assert process.read(addr, HPAGE) == block_bytes()


@by("disable_thp_is_exit")
def test_a_process_without_huge_pages_is_passed_over(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """MMF_DISABLE_THP counts as having ended; the daemon does not even count the VMAs."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process)
    fill(process, addr)
    process.mm.flags |= MMF_DISABLE_THP
    expected = S.SCAN_ANY_PROCESS if new else S.SCAN_VMA_CHECK
    assert machine.collapse(process, addr) is expected
    machine.khugepaged.step()
    assert process.pfn(addr) is not None
    assert not process.is_huge(addr)


@by("large_folios")
@pytest.mark.parametrize("paused", [False, True], ids=["scan", "isolate"])
def test_one_part_mapped_elsewhere_makes_all_parts_shared(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool, paused: bool
) -> None:
    """A child that keeps one subpage: 1 shared entry, later 512."""
    machine = make_machine(kernel=kernel)
    process = machine.process("app")
    addr = compound_block(process)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    machine.khugepaged_settings.max_ptes_shared = 3
    if not paused:
        child = process.fork()
        discard(child, addr, range(2, NR))
    task = machine.spawn(machine.collapse.steps(process, addr), "khugepaged")
    if paused:
        task.run_until("acquire mmap_lock for read")
        task.run_until("acquire mmap_lock for read")
        child = process.fork()
        discard(child, addr, range(2, NR))
    result = task.finish()
    assert (result is S.SCAN_EXCEED_SHARED_PTE) is new
    machine.audit()
    child.exit()


# --- files


@by("file_thp_without_exec")
def test_files_need_not_be_executable(
    make_machine: MakeMachine, tmp_path: Path, kernel: KernelVersion, new: bool
) -> None:
    """A file that is only read may collapse as well."""
    machine = make_machine(kernel=kernel)
    block = disk_block(machine, tmp_path / "file")
    block.process.mprotect(block.addr, HPAGE, PROT_READ)
    assert block.collapse() is (S.SCAN_SUCCEED if new else S.SCAN_VMA_CHECK)
    assert cache_is_huge(block.file) is new


@by("collapse_file_addr_in_hex")
def test_the_address_is_printed_in_hex(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Without 0x in front."""
    block = shmem_block(make_machine(kernel=kernel))
    block.collapse()
    (event,) = file_collapses(block.machine)
    expected = f"{block.addr:x}" if new else f"{block.addr}"
    assert f" addr={expected}, " in event.body()


@by("collapse_file_drains_shmem")
def test_a_shmem_page_that_was_swapped_out_can_be_isolated(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """It comes in by way of the LRU batch, which must be drained."""
    block = shmem_block(make_machine(kernel=kernel, swap="16M"))
    block.process.madvise(block.addr, PAGE, Advice.MADV_PAGEOUT)
    expected = S.SCAN_SUCCEED if new else S.SCAN_DEL_PAGE_LRU
    assert block.collapse() is expected


def test_a_file_collapses_with_its_pages_kept(make_machine: MakeMachine) -> None:
    """Bytes, books and trace after a success; the huge page's frame stays in the trace."""
    machine = make_machine(kernel=only("collapse_file_keeps_pages"))
    block = shmem_block(machine, range(100, NR))
    assert block.collapse() is S.SCAN_SUCCEED
    assert cache_is_huge(block.file)
    (event,) = file_collapses(machine)
    assert (event.hpage_pfn, event.index, event.nr) == (block.slots()[0], NR, NR)
    assert block.process.read(block.addr, HPAGE) == block.content()


def test_a_disk_file_collapses_with_its_pages_kept(
    make_machine: MakeMachine, tmp_path: Path
) -> None:
    """nr_thps counts it."""
    machine = make_machine(kernel=V6_18)
    block = disk_block(machine, tmp_path / "file", cached=range(NR // 2))
    assert block.collapse() is S.SCAN_SUCCEED
    assert block.file.f_mapping.nr_thps == 1
    assert block.process.read(block.addr, HPAGE) == block_bytes()


@by("collapse_file_keeps_pages")
def test_a_collapse_under_way_leaves_the_cache_alone(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """The old pages are still cached when all are copied; the audit agrees at each step."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine, range(NR - 2))
    before = block.slots()
    task = block.task()
    task.run_until("copied")
    assert (block.slots() == before) is new
    machine.audit()
    task.finish()
    assert cache_is_huge(block.file)


def test_a_collapse_is_sound_at_each_of_its_steps(make_machine: MakeMachine) -> None:
    """Stopped anywhere, everything adds up."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine, range(3, NR), others=[range(NR)])
    task = block.task()
    while not task.done:
        task.step()
        machine.audit()
    assert task.result is S.SCAN_SUCCEED


@by("collapse_file_keeps_pages")
def test_a_hole_filled_meanwhile_ends_the_collapse(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """In REF who writes to a hole waits for the huge page; later the collapse gives way."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine, range(NR - 1))
    task = block.task()
    task.run_until("copied")
    writer = machine.spawn(block.process.write.steps(block.addr + HPAGE - PAGE, page_bytes(NR - 1)))
    if new:
        writer.finish()
    else:
        while writer.step():
            pass
        assert not writer.done
    result = task.finish()
    writer.finish()
    assert result is (S.SCAN_PAGE_FILLED if new else S.SCAN_SUCCEED)
    assert block.process.read(block.addr, HPAGE) == block_bytes()


@pytest.mark.parametrize("poisoned", [False, True], ids=["good", "poisoned"])
def test_a_writer_may_come_between_any_two_steps(
    make_machine: MakeMachine, *, poisoned: bool
) -> None:
    """Whatever comes of the collapse, nothing written is lost, and the books are right."""
    outcomes, nr_steps, done = set(), 0, False
    while not done:
        machine = make_machine(kernel=V6_18)
        # What is written fills two LRU batches, so none of it is still in one.
        block = shmem_block(machine, range(62, NR), others=[range(62, NR)])
        if poisoned:
            block.poison(100)
        task = block.task()
        for _ in range(nr_steps):
            task.step()
        done = task.done
        writer = machine.spawn(block.process.pwrite.steps(block.file, 0, block_bytes(0, 70)))
        while not (task.done and writer.done):
            writer.step()
            task.step()
            machine.audit()
        assert task.result is not None
        outcomes.add(task.result)
        assert block.process.pread(block.file, 0, 70 * PAGE) == block_bytes(0, 70)
        nr_steps += 1
    expected = {S.SCAN_COPY_MC} if poisoned else {S.SCAN_SUCCEED, S.SCAN_PAGE_FILLED}
    assert outcomes == expected


def test_who_wants_an_old_page_waits_for_it(make_machine: MakeMachine) -> None:
    """It is locked; afterwards the huge page is found in its place."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine)
    task = block.task()
    task.run_until("copy")
    reader = machine.spawn(block.process.read.steps(block.addr, PAGE))
    while reader.step():
        pass
    assert not reader.done
    assert task.finish() is S.SCAN_SUCCEED
    assert reader.finish() == page_bytes(0)


@by("collapse_file_keeps_pages")
def test_holes_that_a_userfaultfd_watches_stay(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Filled, their faults would never be told; without holes nobody is robbed."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine, range(NR - 1))
    other = add_mapper(block)
    other.process.userfaultfd().register(other.addr, HPAGE)
    before = machine.vmstat()["thp_scan_exceed_none_pte"]
    result = block.collapse(is_khugepaged=False)
    assert (result is S.SCAN_EXCEED_NONE_PTE) is new
    assert machine.vmstat()["thp_scan_exceed_none_pte"] == before
    assert cache_is_huge(block.file) is not new


def test_poison_leaves_a_file_as_it_was(make_machine: MakeMachine) -> None:
    """Entries, references and bytes; the trace has the huge page's frame all the same."""
    machine = make_machine(kernel=only("collapse_file_keeps_pages"))
    block = shmem_block(machine, range(10, NR))
    books = block.books()
    before = cache_snapshot(block.file, machine)
    pfn = block.poison(20)
    assert block.collapse() is S.SCAN_COPY_MC
    machine.lru_add_drain_all()
    after = cache_snapshot(block.file, machine)
    assert (after.slots, after.order, after.content) == (before.slots, 0, before.content)
    assert block.books()["alloced"] == books["alloced"]
    assert block.books()["nrpages"] == books["nrpages"]
    (event,) = file_collapses(machine)
    assert (event.index, event.nr) == (20, NR)
    assert event.hpage_pfn >= 0
    assert block.pfn(20) == pfn


@by("copy_queues_memory_failure")
def test_the_cached_page_that_stopped_a_copy_is_taken_away(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """A bad page of shmem stays in the cache, off the LRU list."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    block.poison(20)
    assert madv_collapse(block.process, block.addr) is S.SCAN_COPY_MC
    assert madv_collapse(block.process, block.addr) is (S.SCAN_PAGE_LRU if new else S.SCAN_COPY_MC)


def test_a_full_file_system_ends_it_before_the_copy(make_machine: MakeMachine) -> None:
    """All holes are paid for at once, behind the scan."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine, range(1, NR), tmpfs=machine.tmpfs(HPAGE - PAGE))
    assert block.collapse() is S.SCAN_FAIL
    (event,) = file_collapses(machine)
    assert event.index == NR


def test_a_node_that_cannot_be_stored_ends_it(make_machine: MakeMachine) -> None:
    """SCAN_STORE_FAILED comes when the holes are looked at."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine, range(1, NR))
    block.file.f_mapping.fail_stores.add(0)
    assert block.collapse() is S.SCAN_STORE_FAILED


# --- page tables


@by("retract_without_mmap_lock")
def test_madv_collapse_maps_what_has_no_table_yet(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """REF leaves the cache huge and reports a failure; later the upper tables are made."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    reader = add_mapper(block, range(0))
    result = madv_collapse(reader.process, reader.addr)
    assert (result is None) is new
    assert reader.process.is_huge(reader.addr) is new
    assert cache_is_huge(block.file)


@by("retract_without_mmap_lock")
def test_madv_collapse_is_told_to_map_by_the_trace(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """The collapse's own result is forced."""
    block = shmem_block(make_machine(kernel=kernel))
    assert madv_collapse(block.process, block.addr) is None
    (event,) = file_collapses(block.machine)
    assert event.result is (S.SCAN_PTE_MAPPED_HUGEPAGE if new else S.SCAN_SUCCEED)
    assert block.process.is_huge(block.addr)


@by("retract_without_mmap_lock")
def test_tables_go_whoever_holds_mmap_lock(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Nothing is noted for later."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine, others=[range(NR)])
    other = block.maps[1]
    assert madv_collapse(block.process, block.addr) is None
    assert (pmd_of(machine.mem, other.process.mm, other.addr) == 0) is new
    assert (pte_mapped_thp(other.process) == []) is new
    assert other.process.read(other.addr, HPAGE) == block_bytes()


@by("retract_without_mmap_lock")
def test_a_private_mapping_without_copies_collapses(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """anon_vma keeps its table at first; MADV_COLLAPSE looks at the table itself."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    process = block.process
    addr = process.mmap(2 * HPAGE, file=block.file, shared=False)
    process.read(addr, HPAGE)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    vma = next(each for each in process.mm.vmas if each.vm_start <= addr < each.vm_end)
    process.write(addr, b"x")
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    assert vma.anon_vma is not None
    assert (madv_collapse(process, addr) is None) is new


def map_by_ptes(block: FileBlock) -> None:
    """Make the cache huge, and map it by entries of a table that a fault has found."""
    assert block.collapse() is S.SCAN_SUCCEED
    pte_table(block.machine.mem, block.process.mm, block.addr)
    block.process.read(block.addr, HPAGE)
    assert not block.process.is_huge(block.addr)


@by("retract_without_mmap_lock")
def test_the_daemon_counts_a_mapped_block_when_it_has_collapsed(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """A huge page mapped by PTEs: noted and counted in REF, dealt with at once later."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    map_by_ptes(block)
    before = machine.khugepaged_settings.pages_collapsed
    result = block.collapse()
    assert result is (S.SCAN_SUCCEED if new else S.SCAN_PTE_MAPPED_HUGEPAGE)
    assert machine.khugepaged_settings.pages_collapsed == before + 1
    assert (pmd_of(machine.mem, block.process.mm, block.addr) == 0) is new
    assert (pte_mapped_thp(block.process) == []) is new


def test_the_rest_of_6_18_is_sound(make_machine: MakeMachine) -> None:
    """The daemon works through anonymous memory and shmem with all switches on."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine, range(5, NR), others=[range(NR)])
    addr = advised(block.process)
    fill(block.process, addr, range(NR // 2))
    machine.khugepaged.run(until=60)
    assert block.process.is_huge(addr)
    assert cache_is_huge(block.file)
    assert block.process.read(block.addr, HPAGE) == block.content()


# --- memory around khugepaged


@by("split_maps_zero_page")
def test_a_split_gives_up_subpages_that_are_zero(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """They are read as zero still, from the zero page."""
    machine = make_machine(kernel=kernel, swap="16M")
    process = machine.process()
    addr = advised(process)
    process.write(addr, page_bytes(1))
    assert process.is_huge(addr)
    machine.lru_add_drain_all()
    process.madvise(addr + PAGE, PAGE, Advice.MADV_PAGEOUT)
    assert (pfn_of(process, addr, 9) == machine.mem.zero_pfn) is new
    assert process.read(addr, HPAGE) == page_bytes(1) + bytes(HPAGE - PAGE)


@by("huge_zero_page_gives_huge")
def test_a_write_to_the_huge_zero_page(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """One small page in REF, a huge one later."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process)
    process.read(addr, 1)
    process.write(addr + PAGE, page_bytes(1))
    assert process.is_huge(addr) is new
    assert process.read(addr, HPAGE) == bytes(PAGE) + page_bytes(1) + bytes(HPAGE - 2 * PAGE)


@by("mremap_moves_many")
def test_mremap_of_several_mappings(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """EFAULT in REF; later each moves, and what is in a gap's new place stays."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    fill(process, addr, range(9))
    process.munmap(addr + 5 * PAGE, PAGE)
    to = addr + HPAGE
    assert refused(lambda: process.mremap(addr, 9 * PAGE, to)) == (None if new else errno.EFAULT)
    if new:
        assert process.read(to, 5 * PAGE) == block_bytes(0, 5)
        assert process.read(to + 6 * PAGE, 3 * PAGE) == block_bytes(6, 3)
        assert process.read(to + 5 * PAGE, PAGE) == bytes(PAGE)


def test_mremap_of_several_ends_at_one_that_is_watched(make_machine: MakeMachine) -> None:
    """What lies below it has moved."""
    machine = make_machine(kernel=V6_18)
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    fill(process, addr, range(9))
    process.userfaultfd().register(addr + 5 * PAGE, PAGE)
    to = addr + HPAGE
    assert refused(lambda: process.mremap(addr, 9 * PAGE, to)) == errno.EFAULT
    assert process.read(to, 5 * PAGE) == block_bytes(0, 5)
    assert process.read(addr + 5 * PAGE, 4 * PAGE) == block_bytes(5, 4)


@by("mremap_lifts_uffd_wp")
@pytest.mark.parametrize("nr", [9, NR])
def test_mremap_and_the_write_protection_of_a_userfaultfd(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool, nr: int
) -> None:
    """It went with the pages, and nobody could lift it; whole tables are no exception."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    with faults(machine, "never"):
        fill(process, addr, range(nr))
    uffd = process.userfaultfd()
    uffd.register(addr, nr * PAGE, missing=False, wp=True)
    uffd.writeprotect(addr, nr * PAGE)
    process.mremap(addr, nr * PAGE, addr + HPAGE)
    assert bool(ptes_of(process, addr + HPAGE)[0] & PAGE_UFFD_WP) is not new


@by("shmem_heeds_past_advice")
def test_the_first_advice_to_shmem(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """It does not make the process known to the daemon later; the second does."""
    machine = make_machine(kernel=kernel)
    machine.thp.shmem_enabled = "advise"
    process = machine.process()
    addr = process.mmap(HPAGE, shared=True)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    assert machine.khugepaged.has_work() is not new
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    assert machine.khugepaged.has_work()


@by("shmem_swaps_huge")
def test_a_huge_page_of_shmem_comes_back_from_swap(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Page by page in REF, as one later, if all of it went."""
    machine = make_machine(kernel=kernel, swap="16M")
    block = shmem_block(machine)
    madv_collapse(block.process, block.addr)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    machine.lru_add_drain_all()
    assert block.file.inode.swapped == NR
    block.process.read(block.addr + 3 * PAGE, 1)
    assert block.process.is_huge(block.addr) is new
    assert block.file.inode.swapped == (0 if new else NR - 1)
    assert block.process.read(block.addr, HPAGE) == block_bytes()


@by("split_leaves_pieces")
@pytest.mark.parametrize("cut", ["punch", "truncate", "bytes"])
def test_a_huge_page_of_shmem_is_cut(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool, cut: str
) -> None:
    """Into 512 small pages in REF, into halves of halves around the cut later."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    madv_collapse(block.process, block.addr)
    if cut == "punch":
        block.process.fallocate(block.file, 384 * PAGE, 128 * PAGE, punch_hole=True, keep_size=True)
    elif cut == "truncate":
        block.process.ftruncate(block.file, 384 * PAGE)
    else:
        block.process.fallocate(block.file, 384 * PAGE, 8, punch_hole=True, keep_size=True)
    i_pages = block.file.f_mapping.i_pages
    orders = [i_pages.order(page) for page in (0, 255, 256, 383)]
    assert orders == ([8, 8, 7, 7] if new else [0, 0, 0, 0])
    assert i_pages.order(448) == (6 if new and cut == "bytes" else 0)
    assert block.process.pread(block.file, 0, 384 * PAGE) == block_bytes(0, 384)


@pytest.mark.parametrize("why", ["watched", "no memory", "no charge"])
def test_a_block_on_swap_comes_back_page_by_page_if_it_must(
    make_machine: MakeMachine, why: str
) -> None:
    """And is never tried as one again; what is not near the page asked for comes in pieces."""
    machine = make_machine(kernel=V6_18, swap="16M")
    block = shmem_block(machine)
    madv_collapse(block.process, block.addr)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    if why == "watched":
        block.process.userfaultfd().register(block.addr, HPAGE)
    elif why == "no memory":
        room = (machine.vmstat()["nr_free_pages"] - 100) * PAGE
        hog = machine.process("hog")
        hog.write(hog.mmap(room), bytes(room))
    else:
        block.process.mm.memcg = machine.memcg("1M")
    block.process.read(block.addr + 3 * PAGE, 1)
    assert not block.process.is_huge(block.addr)
    assert block.file.inode.swapped == NR - 1
    i_pages = block.file.f_mapping.i_pages
    assert [i_pages.order(page) for page in (0, 3, 31, 32, 63, 64, 511)] == [0, 0, 0, 5, 5, 6, 6]


def test_part_of_a_block_on_swap_is_punched(make_machine: MakeMachine) -> None:
    """The block comes back and is split for it."""
    machine = make_machine(kernel=V6_18, swap="16M")
    block = shmem_block(machine)
    madv_collapse(block.process, block.addr)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    block.process.fallocate(block.file, 5 * PAGE, 2 * PAGE, punch_hole=True, keep_size=True)
    assert block.file.inode.swapped == 0
    assert not cache_is_huge(block.file)
    expected = block_bytes(0, 5) + bytes(2 * PAGE) + block_bytes(7, NR - 7)
    assert block.process.read(block.addr, HPAGE) == expected


def cached_huge_page(machine: Machine) -> tuple[Process, int, File]:
    """A huge page of a memfd that a process has mapped, by a table that maps nothing."""
    block = shmem_block(machine)
    assert madv_collapse(block.process, block.addr) is None
    block.process.madvise(block.addr, HPAGE, Advice.MADV_DONTNEED)
    pte_table(machine.mem, block.process.mm, block.addr)
    return block.process, block.addr, block.file


@by("finish_fault_maps_folios")
def test_a_write_to_a_cached_huge_page_mapped_by_a_table(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """One entry, or all 512; what is taken already, or would not fit, leaves it at one."""
    process, addr, file = cached_huge_page(make_machine(kernel=kernel))
    process.write(addr + 5 * PAGE, page_bytes(5))
    assert present(process, addr) == (NR if new else 1)
    process.madvise(addr, 7 * PAGE, Advice.MADV_DONTNEED)
    before = present(process, addr)
    process.write(addr + 5 * PAGE, page_bytes(5))
    assert present(process, addr) == before + 1
    short = process.mmap(HPAGE - PAGE, file=file, shared=True)
    process.write(short, page_bytes(0))
    assert present(process, short) == 1
    assert process.read(addr, HPAGE) == block_bytes()


def test_a_watched_mapping_gets_one_entry_a_fault(make_machine: MakeMachine) -> None:
    """Whoever watches it is to hear of each page."""
    process, addr, _ = cached_huge_page(make_machine(kernel=V6_18))
    process.userfaultfd().register(addr, HPAGE)
    process.write(addr + 5 * PAGE, page_bytes(5))
    assert present(process, addr) == 1


@by("fault_around_maps_folios")
def test_a_read_of_a_cached_huge_page_mapped_by_a_table(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """The 16 pages around, or all 512; out of step with the file it is the 16 always."""
    process, addr, file = cached_huge_page(make_machine(kernel=kernel))
    process.read(addr + 5 * PAGE, 1)
    assert present(process, addr) == (NR if new else 16)
    aside = process.mmap(HPAGE - PAGE, file=file, offset=PAGE, shared=True)
    process.read(aside, 1)
    assert present(process, aside) == 16


def test_a_read_leaves_alone_what_is_mapped_around(make_machine: MakeMachine) -> None:
    """Private copies stay in their places among the pages of the file."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine)
    assert madv_collapse(block.process, block.addr) is None
    addr = block.process.mmap(HPAGE, file=block.file)
    block.process.write(addr + 9 * PAGE, page_bytes(3))
    block.process.read(addr, 1)
    assert present(block.process, addr) == NR
    assert block.process.read(addr + 9 * PAGE, PAGE) == page_bytes(3)
    assert block.process.read(addr + 10 * PAGE, PAGE) == page_bytes(10)


@by("set_pmd_heeds_nohugepage")
def test_a_cached_huge_page_where_none_is_wanted(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """MADV_NOHUGEPAGE does not stop a PMD in REF."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    assert madv_collapse(block.process, block.addr) is None
    block.process.madvise(block.addr, HPAGE, Advice.MADV_NOHUGEPAGE)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_DONTNEED)
    block.process.read(block.addr, 1)
    assert block.process.is_huge(block.addr) is not new
    assert cache_is_huge(block.file)


@by("shmem_allocates_what_fits")
@pytest.mark.parametrize("write", [False, True])
def test_a_fault_in_shmem_that_no_pmd_could_answer(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool, write: bool
) -> None:
    """A huge page in REF, of which one page is mapped; a small one later."""
    machine = make_machine(kernel=kernel)
    machine.thp.shmem_enabled = "advise"
    process = machine.process()
    file = process.memfd_create("block")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE - PAGE, file=file, shared=True)
    process.madvise(addr, HPAGE - PAGE, Advice.MADV_HUGEPAGE)
    if write:
        process.write(addr + 5 * PAGE, page_bytes(5))
    else:
        process.read(addr + 5 * PAGE, 1)
    assert cache_is_huge(file) is not new
    assert present(process, addr) == 1


def test_fault_around_leaves_out_what_is_known_to_be_bad(make_machine: MakeMachine) -> None:
    """A page of a huge one that could not be split when it was found to be bad."""
    machine = make_machine(kernel=V6_18)
    block = shmem_block(machine)
    assert madv_collapse(block.process, block.addr) is None
    pfn = block.pfn(20)
    held = block.process.get(block.addr + 20 * PAGE, PAGE)
    assert refused(lambda: machine.memory_failure(pfn)) == EHWPOISON
    block.process.madvise(block.addr, HPAGE, Advice.MADV_DONTNEED)
    block.process.read(block.addr + 30 * PAGE, 1)
    assert present(block.process, block.addr) == NR - 1
    assert block.process.pfn(block.addr + 20 * PAGE) is None
    held.release()


@pytest.mark.parametrize("kernel", [REF, V6_18], ids=["REF", "6.18"])
def test_a_mapping_out_of_step_maps_what_is_cached_around_a_hole(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """Fault-around comes first, and looks at two blocks of the file there."""
    machine = make_machine(kernel=kernel)
    machine.thp.shmem_enabled = "advise"
    block = shmem_block(machine, range(504, NR))
    block.process.ftruncate(block.file, 2 * HPAGE)
    aside = block.process.mmap(
        HPAGE, addr=1 << 40, fixed=True, file=block.file, offset=504 * PAGE, shared=True
    )
    block.process.madvise(aside, HPAGE, Advice.MADV_HUGEPAGE)
    assert block.process.read(aside + 8 * PAGE, PAGE) == bytes(PAGE)
    assert cache_is_huge(block.file, NR) is (kernel is REF)
    assert present(block.process, aside) == 9


@pytest.mark.parametrize("kernel", [REF, V6_18], ids=["REF", "6.18"])
def test_all_of_an_access_is_mapped_where_a_huge_page_comes_that_does_not_fit(
    make_machine: MakeMachine, kernel: KernelVersion
) -> None:
    """Its first page within the fault that brings it, the others by faults of their own."""
    machine = make_machine(kernel=kernel, swap="16M")
    block = shmem_block(machine)
    assert madv_collapse(block.process, block.addr) is None
    block.process.madvise(block.addr, HPAGE, Advice.MADV_PAGEOUT)
    part = block.process.mmap(2 * PAGE, file=block.file, offset=242 * PAGE, shared=True)
    assert block.process.read(part, 2 * PAGE) == block_bytes(242, 2)
    assert block.process.pfn(part) is not None
    assert block.process.pfn(part + PAGE) is not None


# --- knobs


SIZES = "hugepages-2048kB/"


@pytest.mark.parametrize("name", ["enabled", "shmem_enabled"])
@by("per_size_enabled")
def test_the_folder_of_the_size(kernel: KernelVersion, new: bool, name: str) -> None:
    """It holds `inherit` at first, and the same words as on a host; REF has none."""
    machine = Machine("1G", kernel=replace(kernel, per_size_shmem_enabled=new))
    if not new:
        assert refused(lambda: machine.sysfs[SIZES + name]) == errno.ENOENT
        return
    assert "[inherit]" in machine.sysfs[SIZES + name]
    machine.sysfs[SIZES + name] = "never\n"
    assert machine.sysfs[SIZES + name].endswith("[never]\n")
    assert refused(lambda: machine.sysfs.__setitem__(SIZES + name, "deny")) == errno.EINVAL


@pytest.mark.parametrize("name", ["size_enabled", "size_shmem_enabled"])
def test_ref_has_no_knobs_of_a_size(name: str) -> None:
    """Not as attributes either."""
    machine = Machine("1G")
    with pytest.raises(ValueError, match=f"{name}='never': allowed inherit"):
        setattr(machine.thp, name, "never")


@pytest.mark.parametrize(
    ("enabled", "size", "advice", "huge"),
    [
        ("never", "always", False, True),
        ("never", "madvise", False, False),
        ("never", "madvise", True, True),
        ("always", "never", True, False),
        ("always", "inherit", False, True),
        ("madvise", "inherit", False, False),
    ],
)
def test_the_knob_of_the_size_decides_for_anonymous_memory(
    make_machine: MakeMachine, enabled: str, size: str, advice: bool, huge: bool
) -> None:
    """Of faults and of khugepaged; `enabled` is asked by `inherit` alone."""
    machine = make_machine(kernel=V6_18)
    machine.thp.enabled, machine.thp.size_enabled = enabled, size
    process = machine.process()
    addr = process.mmap(HPAGE)
    if advice:
        process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.write(addr, block_bytes())
    assert process.is_huge(addr) is huge
    machine.khugepaged.run(until=30)
    assert process.is_huge(addr) is huge
    assert madv_collapse(process, addr) is None


@pytest.mark.parametrize(
    ("top", "size", "forced", "huge"),
    [
        ("never", "always", False, True),
        ("never", "advise", False, True),
        ("advise", "never", False, False),
        ("advise", "never", True, False),
        ("never", "within_size", False, True),
        ("never", "inherit", True, True),
        ("never", "inherit", False, False),
        ("deny", "always", True, False),
        ("force", "inherit", False, True),
        ("force", "always", False, False),
    ],
)
def test_the_knob_of_the_size_decides_for_anonymous_shmem(
    make_machine: MakeMachine, top: str, size: str, forced: bool, huge: bool
) -> None:
    """For MADV_COLLAPSE, too."""
    machine = make_machine(kernel=V6_18)
    machine.thp.shmem_enabled, machine.thp.size_shmem_enabled = top, size
    process = machine.process()
    addr = process.mmap(HPAGE, shared=True)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.write(addr, b"x")
    if forced:
        assert (madv_collapse(process, addr) is None) is huge
    assert process.is_huge(addr) is huge


@pytest.mark.parametrize(("size", "huge"), [("within_size", False), ("advise", True)])
def test_within_size_of_the_size_is_not_advice_too(
    make_machine: MakeMachine, size: str, huge: bool
) -> None:
    """As within_size of a mount is: a file that ends before the block gets small pages."""
    machine = make_machine(kernel=V6_18)
    machine.thp.size_shmem_enabled = size
    process = machine.process()
    file = process.memfd_create("short")
    process.ftruncate(file, 100 * PAGE)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.write(addr, b"x")
    assert process.is_huge(addr) is huge


def test_a_version_of_the_knobs_cannot_be_changed(make_machine: MakeMachine) -> None:
    """It is the machine's."""
    thp = make_machine(kernel=V6_18).thp
    with pytest.raises(AttributeError, match=r"version=.*: read only, it is 6.18"):
        thp.version = REF


@pytest.mark.parametrize(("size", "mounted"), [("never", "always"), ("always", "never")])
def test_files_of_a_mounted_tmpfs_go_by_their_mount(
    make_machine: MakeMachine, size: str, mounted: str
) -> None:
    """Neither knob is asked, except by what is anonymous."""
    machine = make_machine(kernel=V6_18)
    machine.thp.size_shmem_enabled = size
    process = machine.process()
    file = process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=machine.tmpfs(huge=mounted))
    process.ftruncate(file, HPAGE)
    addrs = process.mmap(HPAGE, file=file, shared=True), process.mmap(HPAGE, shared=True)
    for addr in addrs:
        process.write(addr, b"x")
    huge = [process.is_huge(addr) for addr in addrs]
    assert huge == [mounted == "always", size == "always"]


def test_what_was_mapped_by_its_name_is_not_anonymous_once_the_name_is_gone(
    make_machine: MakeMachine,
) -> None:
    """It keeps to its mount, in all its parts; a mapping made later goes by the knob."""
    machine = make_machine(kernel=V6_18)
    machine.thp.size_shmem_enabled = "never"
    process, tmpfs = machine.process(), machine.tmpfs(huge="always")
    file = process.open("f", os.O_RDWR | os.O_CREAT, tmpfs=tmpfs)
    process.ftruncate(file, 3 * HPAGE)
    named = process.mmap(3 * HPAGE, file=file, shared=True)
    process.unlink("f", tmpfs=tmpfs)
    process.mprotect(named + HPAGE, HPAGE, PROT_READ)
    moved = named + 16 * HPAGE
    process.mremap(named + 2 * HPAGE, HPAGE, moved)
    for addr in (named, moved):
        process.write(addr, b"x")
        assert process.is_huge(addr)
    process.fork().read(named + HPAGE, 1)
    late = process.mmap(HPAGE, file=file, offset=HPAGE, shared=True)
    assert file.f_mapping.i_pages.order(NR) == 9
    process.fallocate(file, HPAGE, HPAGE, keep_size=True, punch_hole=True)
    process.write(late, b"x")
    assert file.f_mapping.i_pages.order(NR) == 0


def test_force_wants_the_size_to_inherit(make_machine: MakeMachine) -> None:
    """EINVAL, and nothing has changed; the other way round it can be."""
    machine = make_machine(kernel=V6_18)
    machine.sysfs[SIZES + "shmem_enabled"] = "never"
    assert refused(lambda: machine.sysfs.__setitem__("shmem_enabled", "force")) == errno.EINVAL
    assert machine.thp.shmem_enabled == "never"
    machine.sysfs[SIZES + "shmem_enabled"] = "inherit"
    machine.sysfs["shmem_enabled"] = "force"
    machine.sysfs[SIZES + "shmem_enabled"] = "never"
    assert (machine.thp.shmem_enabled, machine.thp.size_shmem_enabled) == ("force", "never")


@by("khugepaged_runs_for_shmem")
def test_the_daemon_for_shmem_alone(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """`enabled` never stops it in REF, whatever shmem may have."""
    machine = make_machine(kernel=kernel)
    block = shmem_block(machine)
    machine.thp.enabled, machine.thp.shmem_enabled = "never", "advise"
    for _ in range(2):
        block.process.madvise(block.addr, HPAGE, Advice.MADV_HUGEPAGE)
    machine.khugepaged.run(until=60)
    assert cache_is_huge(block.file) is new
    machine.thp.shmem_enabled = "never"
    assert not machine.thp.pmd_enabled()


@by("thp_disable_except_advised")
def test_a_process_that_wants_huge_pages_where_advised_alone(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """PR_THP_DISABLE_EXCEPT_ADVISED, which children inherit; REF does not know it."""
    machine = make_machine(kernel=kernel)
    machine.thp.enabled = "always"
    process = machine.process()
    if not new:
        with pytest.raises(ValueError, match="thp_disable='except_advised': allowed no, complete"):
            process.thp_disable = "except_advised"
        return
    process.thp_disable = "except_advised"
    child = process.fork()
    assert child.thp_disable == "except_advised"
    plain, asked = child.mmap(HPAGE), advised(child)
    for addr in (plain, asked):
        child.write(addr, block_bytes())
    assert [child.is_huge(addr) for addr in (plain, asked)] == [False, True]
    assert madv_collapse(child, plain) is None
    child.thp_disable = "completely"
    other = advised(child)
    child.write(other, block_bytes())
    assert not child.is_huge(other)
    assert madv_collapse(child, other) is S.SCAN_VMA_CHECK
    child.thp_disable = "no"
    assert madv_collapse(child, other) is None


@by("lru_batch_of_31")
def test_new_pages_reach_the_lru_list_by_batches(
    make_machine: MakeMachine, kernel: KernelVersion, new: bool
) -> None:
    """Of 15, or of 31."""
    machine = make_machine(kernel=kernel)
    process = machine.process()
    addr = process.mmap(HPAGE)
    fill(process, addr, range(40))
    assert len(machine.mem.lru_batches[0]) == 40 % (31 if new else 15)
