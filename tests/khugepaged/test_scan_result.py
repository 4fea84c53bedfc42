"""Each anonymous row of enum scan_result, reached by what a user of the library can do.

Every row gives the result, its text in the trace, the errno of MADV_COLLAPSE, and whether the call
goes on to the next block. Rows with no entry here belong to files (section 2 of the reference), or
cannot be reached in anonymous memory; these are named at the end.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    READ_LOCK,
    MakeMachine,
    advised,
    block_bytes,
    collapses,
    discard,
    faults,
    fill,
    flags_of,
    isolates,
    madv_collapse,
    pageout,
    paused,
    pfn_of,
    ptes_of,
    scans,
    swapins,
    touch,
)

from pykhuge import (
    PROT_READ,
    Advice,
    CollapseError,
    Machine,
    Process,
    ScanResult,
    WouldBlock,
)
from pykhuge.khugepaged.scan_result import ScanResult as Enum
from pykhuge.mm.page import PG_anon, PG_lru, PG_referenced, PG_young
from pykhuge.mm.page_table import SWP_HWPOISON, make_swap_pte
from pykhuge.mm.vmstat import NR_INACTIVE_ANON

S = ScanResult
EINVAL, EAGAIN, ENOMEM, EBUSY = errno.EINVAL, errno.EAGAIN, errno.ENOMEM, errno.EBUSY
GIB = 1 << 30


# The table of the reference, section 2: number, name, trace string, errno.
TABLE = """\
0 FAIL failed EINVAL
1 SUCCEED succeeded 0
2 PMD_NULL pmd_null EINVAL
3 PMD_NONE pmd_none EINVAL
4 PMD_MAPPED page_pmd_mapped 0
5 EXCEED_NONE_PTE exceed_none_pte EINVAL
6 EXCEED_SWAP_PTE exceed_swap_pte EINVAL
7 EXCEED_SHARED_PTE exceed_shared_pte EINVAL
8 PTE_NON_PRESENT pte_non_present EINVAL
9 PTE_UFFD_WP pte_uffd_wp EINVAL
10 PTE_MAPPED_HUGEPAGE pte_mapped_hugepage EINVAL
11 PAGE_RO no_writable_page EINVAL
12 LACK_REFERENCED_PAGE lack_referenced_page EINVAL
13 PAGE_NULL page_null EINVAL
14 SCAN_ABORT scan_aborted EINVAL
15 PAGE_COUNT not_suitable_page_count EAGAIN
16 PAGE_LRU page_not_in_lru EAGAIN
17 PAGE_LOCK page_locked EAGAIN
18 PAGE_ANON page_not_anon EINVAL
19 PAGE_COMPOUND page_compound EINVAL
20 ANY_PROCESS no_process_for_page EINVAL
21 VMA_NULL vma_null EINVAL
22 VMA_CHECK vma_check_failed EINVAL
23 ADDRESS_RANGE not_suitable_address_range EINVAL
24 DEL_PAGE_LRU could_not_delete_page_from_lru EAGAIN
25 ALLOC_HUGE_PAGE_FAIL alloc_huge_page_failed ENOMEM
26 CGROUP_CHARGE_FAIL ccgroup_charge_failed EBUSY
27 TRUNCATED truncated EINVAL
28 PAGE_HAS_PRIVATE page_has_private EINVAL
29 STORE_FAILED store_failed EINVAL
30 COPY_MC copy_poisoned_page EINVAL
31 PAGE_FILLED page_filled EAGAIN
"""


def test_enum_is_the_kernels() -> None:
    """Numbers, names, trace strings (typo included) and errno are the kernel's; 31 is 6.4's."""
    rows = [
        f"{each.value} {each.name[5:]} {each.text} {errno.errorcode.get(each.errno, 0)}\n"
        for each in Enum
    ]
    assert "".join(rows) == TABLE


class Case(NamedTuple):
    """A block in a state that MADV_COLLAPSE refuses with `result`."""

    result: ScanResult
    errno: int
    goes_on: bool
    prepare: Callable[[Machine, Process, int], object]


def poison(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    fill(process, addr)
    return process.poison(addr + 100 * PAGE, 3)


def pmd_none(machine: Machine, process: Process, addr: int) -> None:
    """The VMA has pages, in the next block."""


def armed_hole(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    fill(process, addr, range(511))
    uffd = process.userfaultfd()
    uffd.register(addr, HPAGE, missing=True)
    return uffd


def uffd_wp(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    fill(process, addr)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * HPAGE, missing=False, wp=True)
    uffd.writeprotect(addr + 9 * PAGE, PAGE)
    return uffd


def read_only(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    fill(process, addr)
    process.fork().exit()
    fill(process, addr + HPAGE)  # only the first block stays as the fork has left it


def only_zero_pages(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    touch(process, addr, range(4))


def device_page(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    fill(process, addr)
    process.migrate_to_device(addr + 40 * PAGE)


def pinned(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    fill(process, addr)
    return process.pin(addr + 511 * PAGE, 1)


def held(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    fill(process, addr)
    return process.get(addr, 1)


def locked(machine: Machine, process: Process, addr: int) -> object:
    fill(process, addr)
    machine.lru_add_drain_all()
    return process.lock_page(addr + 17 * PAGE)


def isolated_by_another(machine: Machine, process: Process, addr: int) -> object:
    """A child's collapse of the same, shared, pages is in the middle of its copy."""
    fill(process, addr, range(1, NR))
    child = process.fork("child")
    fill(child, addr, [0])
    fill(process, addr, [0])
    fill(process, addr + HPAGE)
    machine.khugepaged_settings.max_ptes_shared = 511
    return paused(machine, child, addr, "copied")


def unreadable_swap(machine: Machine, process: Process, addr: int) -> None:
    fill(process, addr)
    machine.lru_add_drain_all()
    pageout(process, addr, [5, 6, 7])
    process.fail_swap_reads(addr + 6 * PAGE)


CASES = {
    "pmd_none": Case(S.SCAN_PMD_NONE, EINVAL, False, pmd_none),
    "armed hole": Case(S.SCAN_EXCEED_NONE_PTE, EINVAL, False, armed_hole),
    "uffd-wp": Case(S.SCAN_PTE_UFFD_WP, EINVAL, True, uffd_wp),
    "no writable PTE": Case(S.SCAN_PAGE_RO, EINVAL, True, read_only),
    "zero pages only": Case(S.SCAN_PAGE_RO, EINVAL, True, only_zero_pages),
    "device page": Case(S.SCAN_PAGE_NULL, EINVAL, True, device_page),
    "pinned": Case(S.SCAN_PAGE_COUNT, EAGAIN, True, pinned),
    "held": Case(S.SCAN_PAGE_COUNT, EAGAIN, True, held),
    "locked": Case(S.SCAN_PAGE_LOCK, EAGAIN, True, locked),
    "isolated": Case(S.SCAN_PAGE_LRU, EAGAIN, True, isolated_by_another),
    "swap-in fails": Case(S.SCAN_FAIL, EINVAL, False, unreadable_swap),
    "poison": Case(S.SCAN_COPY_MC, EINVAL, False, poison),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_madv_collapse_answers_with_the_rows_errno_and_goes_on_or_stops(
    machine: Machine, process: Process, case: Case
) -> None:
    """The first of two blocks fails: errno, result, trace text, and what becomes of the second."""
    addr = advised(process, 2 * HPAGE)
    fill(process, addr + HPAGE)
    keep = case.prepare(machine, process, addr)
    machine.trace.clear()
    with pytest.raises(CollapseError) as failed:
        process.madvise(addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
    assert failed.value.scan_result is case.result
    assert failed.value.errno == case.errno
    assert f"status={case.result.text}," in machine.trace.text()
    assert process.is_huge(addr + HPAGE) is case.goes_on
    assert len(scans(machine)) == 1 + case.goes_on
    assert not process.is_huge(addr)
    machine.audit()
    if hasattr(keep, "finish"):
        keep.finish()
    if hasattr(keep, "release"):
        keep.release()


def test_last_failure_decides_the_errno(machine: Machine, process: Process) -> None:
    """Of two failures the later one names the errno."""
    addr = advised(process, 2 * HPAGE)
    fill(process, addr + HPAGE)
    pages = pinned(machine, process, addr)
    fill(process, addr + HPAGE)
    process.poison(addr + HPAGE)
    assert madv_collapse(process, addr, 2 * HPAGE) is S.SCAN_COPY_MC
    pages.release()  # type: ignore[attr-defined]


def test_pmd_null_goes_on_to_the_next_block(machine: Machine, process: Process) -> None:
    """A block without a PMD table is passed over, and the one behind it collapsed."""
    addr = advised(process, 2 * HPAGE, addr=5 * GIB - HPAGE)
    fill(process, addr + HPAGE)
    machine.trace.clear()
    assert madv_collapse(process, addr, 2 * HPAGE) is S.SCAN_PMD_NULL
    assert process.is_huge(addr + HPAGE)
    assert [event.status for event in scans(machine)] == [S.SCAN_PMD_NULL, S.SCAN_SUCCEED]


def test_huge_block_counts_as_collapsed(machine: Machine, process: Process, block: int) -> None:
    """MADV_COLLAPSE of what is huge already returns 0; the scan says page_pmd_mapped."""
    fill(process, block)
    assert madv_collapse(process, block) is None
    machine.trace.clear()
    assert madv_collapse(process, block) is None
    assert [event.status for event in scans(machine)] == [S.SCAN_PMD_MAPPED]
    assert machine.collapse(process, block) is S.SCAN_PMD_MAPPED


def test_alloc_huge_page_fail_stops_with_enomem(make_machine: MakeMachine) -> None:
    """Without a free 2 MiB block MADV_COLLAPSE stops, though most of memory is free."""
    machine = make_machine("8M")
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    fill(process, addr)
    fill(process, addr + HPAGE)
    fragment(machine, process)
    free = machine.vmstat()["nr_free_pages"]
    machine.trace.clear()
    with pytest.raises(CollapseError) as failed:
        process.madvise(addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
    assert failed.value.scan_result is S.SCAN_ALLOC_HUGE_PAGE_FAIL
    assert failed.value.errno == ENOMEM
    assert len(scans(machine)) == 1
    assert free > NR
    assert machine.vmstat()["thp_collapse_alloc_failed"] == 1
    assert machine.vmstat()["thp_collapse_alloc"] == 0
    assert "status=alloc_huge_page_failed" in machine.trace.text()


def fragment(machine: Machine, process: Process) -> None:
    """Leave one page in use in every block of memory, the rest free."""
    nr = machine.vmstat()["nr_free_pages"] - 16
    with faults(process, "never"):
        filler = process.mmap(nr * PAGE)
        process.write(filler, bytes(nr * PAGE))
    machine.lru_add_drain_all()
    kept: set[int] = set()
    drop = []
    for page in range(nr):
        frame_block = pfn_of(process, filler, page) // NR
        if frame_block in kept:
            drop.append(page)
        kept.add(frame_block)
    discard(process, filler, drop)
    machine.lru_add_drain_all()


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_cgroup_charge_fail_keeps_the_allocation_event(
    machine: Machine, is_khugepaged: bool
) -> None:
    """A cgroup at its limit: EBUSY, stop, huge page freed, thp_collapse_alloc stays counted."""
    process = machine.process(memcg=machine.memcg(1100 * PAGE))
    addr = advised(process, 2 * HPAGE)
    fill(process, addr)
    fill(process, addr + HPAGE)
    free = machine.vmstat()["nr_free_pages"]
    machine.trace.clear()
    if is_khugepaged:
        assert machine.collapse(process, addr) is S.SCAN_CGROUP_CHARGE_FAIL
    else:
        with pytest.raises(CollapseError) as failed:
            process.madvise(addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
        assert (failed.value.scan_result, failed.value.errno) == (S.SCAN_CGROUP_CHARGE_FAIL, EBUSY)
    assert machine.vmstat()["thp_collapse_alloc"] == 1
    assert machine.vmstat()["thp_collapse_alloc_failed"] == 0
    assert machine.vmstat()["nr_free_pages"] == free
    assert len(scans(machine)) == 1
    assert machine.trace.text().count("status=ccgroup_charge_failed") == 2


def test_vma_check_comes_before_any_block(machine: Machine, process: Process) -> None:
    """MADV_NOHUGEPAGE, or no page ever: EINVAL with no scan at all."""
    addr = advised(process)
    assert madv_collapse(process, addr) is S.SCAN_VMA_CHECK  # no anon_vma yet
    fill(process, addr, [0])
    process.madvise(addr, HPAGE, Advice.MADV_NOHUGEPAGE)
    machine.trace.clear()
    assert madv_collapse(process, addr) is S.SCAN_VMA_CHECK
    assert len(machine.trace) == 0
    assert machine.collapse(process, addr) is S.SCAN_VMA_CHECK


def test_only_the_daemon_heeds_enabled(machine: Machine, process: Process) -> None:
    """With enabled=never the daemon refuses the VMA; MADV_COLLAPSE does not ask."""
    addr = advised(process)
    fill(process, addr)
    machine.thp.enabled = "never"
    assert machine.collapse(process, addr) is S.SCAN_VMA_CHECK
    assert madv_collapse(process, addr) is None
    assert process.is_huge(addr)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, HPAGE - PAGE, None),
        (PAGE, PAGE, S.SCAN_FAIL),
        (PAGE, HPAGE - PAGE, None),
        (PAGE, HPAGE, None),
    ],
)
def test_ranges_without_a_whole_block(
    process: Process, start: int, length: int, expected: ScanResult | None
) -> None:
    """No whole block in the range is success, unless it touches no boundary at all: EINVAL."""
    addr = advised(process, 2 * HPAGE)
    fill(process, addr)
    assert madv_collapse(process, addr + start, length) is expected
    assert not process.is_huge(addr)


def test_gap_in_the_range_is_enomem_after_the_rest_is_done(process: Process) -> None:
    """madvise() works on what is mapped and reports the hole at the end."""
    addr = advised(process, 3 * HPAGE)
    for block in range(3):
        fill(process, addr + block * HPAGE)
    process.munmap(addr + HPAGE, HPAGE)
    with pytest.raises(OSError, match="nothing is mapped") as failed:
        process.madvise(addr, 3 * HPAGE, Advice.MADV_COLLAPSE)
    assert failed.value.errno == ENOMEM
    assert process.is_huge(addr)
    assert process.is_huge(addr + 2 * HPAGE)


def test_blocks_that_go_meanwhile_are_not_asked_for(machine: Machine, process: Process) -> None:
    """The VMA shrinks while the first block is collapsed: success is counted by what is left."""
    addr = advised(process, 3 * HPAGE)
    for number in range(3):
        fill(process, addr + number * HPAGE)
    task = machine.spawn(process.madvise.steps(addr, 3 * HPAGE, Advice.MADV_COLLAPSE))
    task.run_until("acquire mmap_lock for write")
    process.munmap(addr + 2 * HPAGE, HPAGE)
    task.finish()
    assert process.is_huge(addr)
    assert process.is_huge(addr + HPAGE)


# Rows of the daemon alone.


@pytest.mark.parametrize(
    ("result", "event", "knob", "limit"),
    [
        (S.SCAN_EXCEED_NONE_PTE, "thp_scan_exceed_none_pte", "max_ptes_none", 100),
        (S.SCAN_EXCEED_SWAP_PTE, "thp_scan_exceed_swap_pte", "max_ptes_swap", 64),
        (S.SCAN_EXCEED_SHARED_PTE, "thp_scan_exceed_share_pte", "max_ptes_shared", 256),
        (S.SCAN_EXCEED_NONE_PTE, "thp_scan_exceed_none_pte", "max_ptes_none", 0),
        (S.SCAN_EXCEED_SWAP_PTE, "thp_scan_exceed_swap_pte", "max_ptes_swap", 0),
        (S.SCAN_EXCEED_SHARED_PTE, "thp_scan_exceed_share_pte", "max_ptes_shared", 0),
    ],
)
def test_limits_are_inclusive_and_bind_the_daemon_alone(
    machine: Machine, process: Process, result: ScanResult, event: str, knob: str, limit: int
) -> None:
    """One PTE over the limit is refused and counted; exactly the limit passes; MADV never asks."""
    setattr(machine.khugepaged_settings, knob, limit)
    over, exactly = advised(process), advised(process)
    for addr, nr in ((over, limit + 1), (exactly, limit)):
        chosen = range(3, 3 + nr)
        if result is S.SCAN_EXCEED_NONE_PTE:
            fill(process, addr, set(range(NR)) - set(chosen))
        else:
            fill(process, addr, chosen)
    if result is S.SCAN_EXCEED_SHARED_PTE:
        process.fork("child")
    for addr, nr in ((over, limit + 1), (exactly, limit)):
        if result is not S.SCAN_EXCEED_NONE_PTE:
            fill(process, addr, set(range(NR)) - set(range(3, 3 + nr)))
    machine.lru_add_drain_all()
    if result is S.SCAN_EXCEED_SWAP_PTE:
        pageout(process, over, range(3, 3 + limit + 1))
        pageout(process, exactly, range(3, 3 + limit))
    assert machine.collapse(process, over) is result
    assert machine.vmstat()[event] == 1
    assert machine.collapse(process, exactly) is S.SCAN_SUCCEED
    assert machine.vmstat()[event] == 1
    assert madv_collapse(process, over) is None
    assert machine.vmstat()[event] == 1


@pytest.mark.parametrize("zero", [0, 1, 4])
def test_zero_pages_count_as_none(machine: Machine, process: Process, zero: int) -> None:
    """Holes and zero-page entries fill one limit together."""
    machine.khugepaged_settings.max_ptes_none = 4
    addr = advised(process)
    fill(process, addr, range(NR - 5))
    touch(process, addr, range(NR - 5, NR - 5 + zero))
    assert machine.collapse(process, addr) is S.SCAN_EXCEED_NONE_PTE
    assert scans(machine)[0].none_or_zero == 5
    fill(process, addr, [NR - 5])
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_armed_userfaultfd_allows_no_hole_in_either_context(
    machine: Machine, process: Process, block: int, is_khugepaged: bool
) -> None:
    """One hole in a range that a userfaultfd watches: exceed_none_pte, with its event."""
    armed_hole(machine, process, block)
    assert machine.collapse(process, block, is_khugepaged=is_khugepaged) is S.SCAN_EXCEED_NONE_PTE
    assert machine.vmstat()["thp_scan_exceed_none_pte"] == 1


def test_armed_userfaultfd_without_a_hole_is_no_obstacle(process: Process, block: int) -> None:
    """A full block collapses though a userfaultfd watches it."""
    fill(process, block)
    process.userfaultfd().register(block, HPAGE, missing=True)
    assert madv_collapse(process, block) is None


def forget_use(process: Process, addr: int, pages: list[int]) -> None:
    """Clear accessed bits by hand, as the aging of an LRU list would."""
    words = ptes_of(process, addr)
    words[pages] &= np.uint64(~(1 << 5) & (1 << 64) - 1)


def test_daemon_leaves_blocks_alone_that_nobody_uses(
    machine: Machine, process: Process, block: int
) -> None:
    """No page used lately: lack_referenced_page for the daemon, no matter to MADV_COLLAPSE."""
    fill(process, block)
    forget_use(process, block, list(range(NR)))
    assert machine.collapse(process, block) is S.SCAN_LACK_REFERENCED_PAGE
    assert scans(machine)[-1].referenced == 0
    assert madv_collapse(process, block) is None


def test_one_page_used_lately_is_enough_without_swap(
    machine: Machine, process: Process, block: int
) -> None:
    """A single young entry makes the daemon collapse."""
    fill(process, block)
    forget_use(process, block, list(range(NR)))
    process.read(block + 300 * PAGE, 1)
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert isolates(machine)[-1].referenced == 1


@pytest.mark.parametrize("bit", [PG_referenced, PG_young])
def test_marked_page_counts_as_use(
    machine: Machine, process: Process, block: int, bit: int
) -> None:
    """PG_referenced and the idle tracker's PG_young do as well as a young entry."""
    fill(process, block)
    forget_use(process, block, list(range(NR)))
    machine.mem.pages.flags[pfn_of(process, block, 44)] |= np.uint32(bit)
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert scans(machine)[-1].referenced == 1
    assert isolates(machine)[-1].referenced == 1


@pytest.mark.parametrize(
    ("referenced", "expected"), [(255, S.SCAN_LACK_REFERENCED_PAGE), (256, S.SCAN_SUCCEED)]
)
def test_half_of_the_block_must_be_in_use_if_some_is_swapped_out(
    machine: Machine, process: Process, block: int, referenced: int, expected: ScanResult
) -> None:
    """With swapped-out pages the daemon wants 256 used entries; 255 are not enough."""
    fill(process, block)
    machine.lru_add_drain_all()
    pageout(process, block, [511])
    forget_use(process, block, list(range(referenced, 511)))
    assert machine.collapse(process, block) is expected
    assert scans(machine)[-1].referenced == referenced
    assert scans(machine)[-1].unmapped == 1


def test_secondary_mmu_counts_as_use(machine: Machine, process: Process, block: int) -> None:
    """The scan asks the notifier about the block's first address, isolation about each page's."""
    asked: list[int] = []

    class Guest:
        def invalidate_range_start(self, start: int, end: int) -> None: ...

        def invalidate_range_end(self, start: int, end: int) -> None: ...

        def test_young(self, addr: int) -> bool:
            asked.append(addr)
            return addr == block

    fill(process, block)
    forget_use(process, block, list(range(NR)))
    process.register_mmu_notifier(Guest())
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert scans(machine)[-1].referenced == NR
    assert isolates(machine)[-1].referenced == 1
    assert set(asked) == {block + page * PAGE for page in range(NR)}


# NUMA.


@pytest.mark.parametrize(
    ("mode", "distance", "expected"),
    [(0, 40, S.SCAN_SUCCEED), (1, 30, S.SCAN_SUCCEED), (1, 31, S.SCAN_SCAN_ABORT)],
)
def test_nodes_beyond_the_reclaim_distance_abort_the_scan(
    make_machine: MakeMachine, mode: int, distance: int, expected: ScanResult
) -> None:
    """Only with node reclaim, and only beyond distance 30, a block on two nodes is refused."""
    machine = make_machine("64M", nodes=2, distances=[[10, distance], [distance, 10]])
    machine.node_reclaim_mode = mode
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    fill(process, addr + HPAGE)
    fill(process, addr, range(10))
    process.node = 1
    fill(process, addr, range(10, NR))
    if expected is S.SCAN_SUCCEED:
        assert madv_collapse(process, addr) is None
        return
    with pytest.raises(CollapseError) as failed:
        process.madvise(addr, 2 * HPAGE, Advice.MADV_COLLAPSE)
    assert failed.value.scan_result is expected
    assert failed.value.errno == EINVAL
    assert not process.is_huge(addr + HPAGE)  # it stops
    assert scans(machine)[-1].scan_pfn == pfn_of(process, addr, 10)


@pytest.mark.parametrize(("on_node_1", "nid"), [(255, 0), (256, 0), (257, 1), (512, 1), (0, 0)])
def test_huge_page_comes_from_the_node_with_most_pages(
    make_machine: MakeMachine, on_node_1: int, nid: int
) -> None:
    """The majority's node holds the huge page, of two equal ones the first."""
    machine = make_machine("64M", nodes=2)
    process = machine.process()
    addr = advised(process)
    fill(process, addr, range(NR - on_node_1))
    process.node = 1
    fill(process, addr, range(NR - on_node_1, NR))
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED
    assert machine.mem.nid_of(pfn_of(process, addr, 0)) == nid


def test_tied_nodes_may_both_serve(make_machine: MakeMachine) -> None:
    """Of two nodes with as many pages either will do; a third with fewer will not."""
    machine = make_machine(nodes=["4M", "32M", "32M"])
    process = machine.process()
    addr = advised(process)
    with faults(process, "never"):
        eater = process.mmap(3 * HPAGE // 2)
        process.write(eater, bytes(3 * HPAGE // 2))
    fill(process, addr, range(200))
    process.node = 1
    fill(process, addr, range(200, 400))
    process.node = 2
    fill(process, addr, range(400, NR))
    assert [int(machine.mem.nid_of(pfn_of(process, addr, page))) for page in (0, 200, 400)] == [
        0,
        1,
        2,
    ]
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED
    assert machine.mem.nid_of(pfn_of(process, addr, 0)) == 1


# Rows that only a race can reach: something else runs while mmap_lock is dropped.


class Race(NamedTuple):
    """What runs while a collapse is paused, and what the collapse then ends with."""

    result: ScanResult
    where: str
    run: Callable[[Machine, Process, int], object]


def exit_process(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.exit()


def unmap(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.munmap(addr, HPAGE)


def unmap_below_another(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.mmap(PAGE, addr=addr + 8 * HPAGE, fixed=True)
    process.munmap(addr, HPAGE)


def cut_off_the_end(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.munmap(addr + 511 * PAGE, PAGE)


def forbid(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.madvise(addr, HPAGE, Advice.MADV_NOHUGEPAGE)


def map_anew(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    """A fresh mapping in the same place has no anon_vma."""
    process.munmap(addr, HPAGE)
    advised(process, HPAGE, addr=addr)


def collapse_first(machine: Machine, process: Process, addr: int) -> None:
    assert machine.collapse(process, addr) is S.SCAN_SUCCEED


def swap_out(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    pageout(process, addr, [77])


def take_reference(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    return process.get(addr + 9 * PAGE, 1)


def lock(machine: Machine, process: Process, addr: int) -> object:  # noqa: ARG001
    return process.lock_page(addr + 8 * PAGE)


def write_protect(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    uffd = process.userfaultfd()
    uffd.register(addr, HPAGE, missing=False, wp=True)
    uffd.writeprotect(addr + 3 * PAGE, PAGE)


def watch_and_punch(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.userfaultfd().register(addr, HPAGE, missing=True)
    discard(process, addr, [30])


def migrate(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.migrate_to_device(addr + 50 * PAGE)


def make_read_only(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    process.mprotect(addr, HPAGE, PROT_READ)


def age(machine: Machine, process: Process, addr: int) -> None:  # noqa: ARG001
    forget_use(process, addr, list(range(NR)))


BEFORE = ("scanned", "prepared")
RACES = {
    f"{name}, {where}": Race(result, where, run)
    for name, result, run in (
        ("exit", S.SCAN_ANY_PROCESS, exit_process),
        ("munmap", S.SCAN_VMA_NULL, unmap),
        ("munmap below a VMA", S.SCAN_ADDRESS_RANGE, unmap_below_another),
        ("VMA too short", S.SCAN_ADDRESS_RANGE, cut_off_the_end),
        ("MADV_NOHUGEPAGE", S.SCAN_VMA_CHECK, forbid),
        ("fresh mapping", S.SCAN_VMA_CHECK, map_anew),
        ("another collapse", S.SCAN_PMD_MAPPED, collapse_first),
        ("page swapped out", S.SCAN_PTE_NON_PRESENT, swap_out),
        ("reference taken", S.SCAN_PAGE_COUNT, take_reference),
        ("page locked", S.SCAN_PAGE_LOCK, lock),
        ("uffd-wp", S.SCAN_PTE_UFFD_WP, write_protect),
        ("hole watched by userfaultfd", S.SCAN_EXCEED_NONE_PTE, watch_and_punch),
        ("migrated to a device", S.SCAN_PAGE_NULL, migrate),
        ("mprotect", S.SCAN_PAGE_RO, make_read_only),
        ("aged", S.SCAN_LACK_REFERENCED_PAGE, age),
    )
    for where in BEFORE
}


@pytest.mark.parametrize("race", RACES.values(), ids=RACES.keys())
def test_what_changes_while_the_lock_is_dropped_is_noticed(
    machine: Machine, process: Process, block: int, race: Race
) -> None:
    """The collapse ends with the race's result, says so twice in the trace, and undoes itself."""
    fill(process, block)
    machine.lru_add_drain_all()
    task = paused(machine, process, block, race.where)
    free = machine.vmstat()["nr_free_pages"]
    keep = race.run(machine, process, block)
    machine.trace.clear()
    assert task.finish() is race.result
    assert [event.status for event in collapses(machine)] == [race.result]
    assert not collapses(machine)[0].isolated
    assert scans(machine)[-1].status is race.result
    assert machine.vmstat()["nr_isolated_anon"] == 0
    if race.run in (take_reference, lock, make_read_only, age):
        machine.lru_add_drain_all()
        assert machine.vmstat()["nr_free_pages"] == free + NR
    machine.audit()
    if hasattr(keep, "release"):
        keep.release()


def spanning(process: Process) -> int:
    """A block in a GiB of its own, in a VMA that begins in the GiB below; both have pages."""
    addr = advised(process, 2 * HPAGE, addr=7 * GIB - HPAGE)
    fill(process, addr, [0])
    fill(process, addr + HPAGE)
    return addr + HPAGE


def replace_block(process: Process, addr: int) -> None:
    process.munmap(addr, HPAGE)
    advised(process, HPAGE, addr=addr)
    assert len(process.mm.vmas) == 1  # merged: the anon_vma is the old one


@pytest.mark.parametrize("where", BEFORE)
def test_pmd_null_when_the_pmd_table_went(machine: Machine, process: Process, where: str) -> None:
    """The block was unmapped with its PMD table, and mapped anew in the same VMA."""
    addr = spanning(process)
    task = paused(machine, process, addr, where)
    replace_block(process, addr)
    assert task.finish() is S.SCAN_PMD_NULL


@pytest.mark.parametrize("where", BEFORE)
def test_pmd_none_when_the_page_table_went(machine: Machine, process: Process, where: str) -> None:
    """The same where the PMD table is still needed."""
    addr = advised(process, 2 * HPAGE)
    fill(process, addr, [0])
    fill(process, addr + HPAGE)
    task = paused(machine, process, addr + HPAGE, where)
    replace_block(process, addr + HPAGE)
    assert task.finish() is S.SCAN_PMD_NONE


def test_fail_when_the_pmd_lies_elsewhere(machine: Machine, process: Process) -> None:
    """The same, filled again with another PMD table: the remembered PMD pointer is stale."""
    addr = spanning(process)
    machine.lru_add_drain_all()
    task = paused(machine, process, addr, "prepared")
    old = process.mm.pmd_tables[addr // GIB]
    process.munmap(addr, HPAGE)
    machine.process("other").mmap(PAGE)
    other = machine.process("other")
    fill(other, advised(other), range(40))  # takes the freed frames
    advised(process, HPAGE, addr=addr)
    fill(process, addr)
    assert process.mm.pmd_tables[addr // GIB] != old
    assert task.finish() is S.SCAN_FAIL
    assert process.read(addr, HPAGE) == block_bytes()


def test_page_lock_at_isolation_of_a_page_another_collapse_holds(
    machine: Machine, process: Process, block: int
) -> None:
    """Parent and child share pages; the child's collapse has locked them."""
    machine.khugepaged_settings.max_ptes_shared = 511
    fill(process, block, range(1, NR))
    child = process.fork("child")
    fill(child, block, [0])
    fill(process, block, [0])
    task = paused(machine, process, block, "prepared")
    other = paused(machine, child, block, "copied")
    assert task.finish() is S.SCAN_PAGE_LOCK
    assert isolates(machine)[-1].status is S.SCAN_PAGE_LOCK
    assert isolates(machine)[-1].scan_pfn == pfn_of(process, block, 1)
    assert other.finish() is S.SCAN_SUCCEED


def test_page_lock_when_swap_in_meets_a_locked_page(
    machine: Machine, process: Process, block: int
) -> None:
    """The swap cache's page is locked: swap-in gives up with ret=0, the result is page_locked."""
    fill(process, block)
    machine.lru_add_drain_all()
    pageout(process, block, [4, 5, 6])
    child = process.fork("child")
    fill(process, block, [0])
    child.read(block + 5 * PAGE, 1)
    page = child.lock_page(block + 5 * PAGE)
    assert madv_collapse(process, block) is S.SCAN_PAGE_LOCK
    (event,) = swapins(machine)
    assert (event.swapped_in, event.ret) == (1, 0)
    assert not isolates(machine)
    page.release()


def test_failed_swap_in_keeps_what_came_in(machine: Machine, process: Process, block: int) -> None:
    """Pages before the unreadable one stay in; the result is failed, before any isolation."""
    unreadable_swap(machine, process, block)
    assert machine.collapse(process, block) is S.SCAN_FAIL
    (event,) = swapins(machine)
    assert (event.swapped_in, event.ret) == (1, 0)
    assert process.mm.rss_stat[2] == 2  # MM_SWAPENTS
    assert not isolates(machine)
    assert machine.vmstat()["thp_collapse_alloc"] == 1


def test_known_poison_fails_at_swap_in(machine: Machine, process: Process, block: int) -> None:
    """A hwpoison entry counts as swap in the scan, and fails the swap-in after the allocation."""
    fill(process, block, set(range(NR)) - {9})
    ptes_of(process, block)[9] = make_swap_pte(SWP_HWPOISON, 1234)
    assert madv_collapse(process, block) is S.SCAN_FAIL
    assert scans(machine)[-1].unmapped == 1
    assert machine.vmstat()["thp_collapse_alloc"] == 1


# Rows that no run of the model reaches in anonymous memory; the tests are reached by hand.


def test_page_anon_is_what_the_scan_says_of_a_page_that_is_not_anonymous(
    machine: Machine, process: Process, block: int
) -> None:
    """An anonymous VMA never maps such a page; the mark is taken off by hand."""
    fill(process, block)
    pfn = pfn_of(process, block, 20)
    machine.mem.pages.flags[pfn] &= ~np.uint32(PG_anon)
    assert madv_collapse(process, block) is S.SCAN_PAGE_ANON
    assert scans(machine)[-1].scan_pfn == pfn
    machine.mem.pages.flags[pfn] |= np.uint32(PG_anon)


@contextmanager
def off_the_lru(machine: Machine, process: Process, addr: int) -> Iterator[int]:
    """The page is on no list and nobody else refers to it: two instructions wide in a kernel."""
    pfn = pfn_of(process, addr, 0)
    assert flags_of(process, pfn) & PG_lru
    machine.mem.pages.flags[pfn] &= ~np.uint32(PG_lru)
    machine.mem.vmstat.mod_node(NR_INACTIVE_ANON, -1)
    yield pfn
    machine.mem.pages.flags[pfn] |= np.uint32(PG_lru)
    machine.mem.vmstat.mod_node(NR_INACTIVE_ANON, +1)


def test_del_page_lru_when_isolation_loses_the_page(
    machine: Machine, process: Process, block: int
) -> None:
    """Locked and counted right, but no longer on a list: could_not_delete_page_from_lru, EAGAIN."""
    fill(process, block)
    machine.lru_add_drain_all()
    task = machine.spawn(process.madvise.steps(block, HPAGE, Advice.MADV_COLLAPSE))
    task.run_until(READ_LOCK)
    task.run_until(READ_LOCK)
    with off_the_lru(machine, process, block + 200 * PAGE) as pfn:
        with pytest.raises(CollapseError) as failed:
            task.finish()
        assert failed.value.scan_result is S.SCAN_DEL_PAGE_LRU
        assert failed.value.errno == EAGAIN
        assert isolates(machine)[-1].scan_pfn == pfn


def test_page_lru_when_a_page_is_in_no_list(machine: Machine, process: Process, block: int) -> None:
    """The scan finds it before anything is allocated."""
    fill(process, block)
    machine.lru_add_drain_all()
    with off_the_lru(machine, process, block + 200 * PAGE) as pfn:
        assert machine.collapse(process, block) is S.SCAN_PAGE_LRU
        assert scans(machine)[-1].scan_pfn == pfn
    assert machine.vmstat()["thp_collapse_alloc"] == 0


def test_fault_during_a_collapse_waits(machine: Machine, process: Process, block: int) -> None:
    """While the PMD is cleared a fault has to wait for mmap_lock."""
    fill(process, block)
    task = paused(machine, process, block, "copied")
    with pytest.raises(WouldBlock):
        process.read(block, 1)
    assert task.finish() is S.SCAN_SUCCEED
    assert process.read(block, HPAGE) == block_bytes()
