"""MADV_COLLAPSE of ranges: which blocks count, when it goes on, what it returns."""

from __future__ import annotations

import errno

import pytest
from collapse_kit import HPAGE, NR, PAGE, block_bytes, fill, refused

from pykhuge import Advice, CollapseError, Machine, Process, ScanResult

S = ScanResult
BLOCKS = 3


@pytest.fixture
def area(process: Process) -> int:
    """Three full blocks of small pages, nothing advised."""
    addr = process.mmap(BLOCKS * HPAGE)
    for number in range(BLOCKS):
        fill(process, addr + number * HPAGE)
    process.mem.trace.clear()
    return addr


def huge(process: Process, area: int) -> list[bool]:
    """Which blocks are huge."""
    return [process.is_huge(area + number * HPAGE) for number in range(BLOCKS)]


def collapse(process: Process, addr: int, length: int) -> ScanResult | None:
    """The last failure; None if all whole blocks are huge."""
    try:
        process.madvise(addr, length, Advice.MADV_COLLAPSE)
    except CollapseError as error:
        return error.scan_result
    return None


@pytest.mark.parametrize("start", [0, 1, 511, 512])
@pytest.mark.parametrize("pages", [1, 511, 512, 513, 1023, 1024, 1535])
def test_whole_blocks_of_the_range_are_collapsed(
    process: Process, area: int, start: int, pages: int
) -> None:
    """The start is rounded up, the end down; a range within one block, off its edges, is EINVAL."""
    pages = min(pages, BLOCKS * NR - start)
    first, last = -(-start // NR), (start + pages) // NR
    inside = last < first
    expected = errno.EINVAL if inside else None
    length = pages * PAGE
    assert (
        refused(lambda: process.madvise(area + start * PAGE, length, Advice.MADV_COLLAPSE))
        == expected
    )
    assert huge(process, area) == [first <= number < last for number in range(BLOCKS)]
    assert process.read(area, HPAGE) == block_bytes()


def test_neither_the_knobs_nor_the_limits_are_heeded(machine: Machine, process: Process) -> None:
    """Nor does it count as the daemon's work."""
    machine.thp.enabled = machine.thp.shmem_enabled = "never"
    machine.khugepaged_settings.max_ptes_none = 0
    addr = process.mmap(HPAGE)
    process.write(addr, b"one page")
    assert collapse(process, addr, HPAGE) is None
    assert process.is_huge(addr)
    assert machine.khugepaged_settings.pages_collapsed == 0
    assert collapse(process, addr, HPAGE) is None  # huge already


def test_a_passing_failure_lets_it_go_on_and_is_what_it_returns(
    process: Process, area: int
) -> None:
    """PAGE_COUNT of the first block: the others are collapsed, and the call says EAGAIN."""
    pins = process.pin(area + 5 * PAGE, 1)
    assert collapse(process, area, BLOCKS * HPAGE) is S.SCAN_PAGE_COUNT
    assert huge(process, area) == [False, True, True]
    pins.release()
    assert collapse(process, area, BLOCKS * HPAGE) is None


def test_a_lasting_failure_ends_it(process: Process, area: int) -> None:
    """PMD_NONE of the second block: the third is not tried."""
    process.munmap(area + HPAGE, HPAGE)
    process.mmap(HPAGE, addr=area + HPAGE, fixed=True)
    assert collapse(process, area, BLOCKS * HPAGE) is S.SCAN_PMD_NONE
    assert huge(process, area) == [True, False, False]


def test_of_several_failures_the_last_is_told(process: Process, area: int) -> None:
    """A pin in the first block, poison in the second."""
    pins = process.pin(area + 5 * PAGE, 1)
    process.poison(area + HPAGE + 7 * PAGE)
    assert collapse(process, area, BLOCKS * HPAGE) is S.SCAN_COPY_MC
    assert huge(process, area) == [False, False, False]
    pins.release()


def test_memory_that_may_not_be_huge_is_refused(process: Process, area: int) -> None:
    """MADV_NOHUGEPAGE, and a VMA without a whole block."""
    process.madvise(area, HPAGE, Advice.MADV_NOHUGEPAGE)
    assert collapse(process, area, HPAGE) is S.SCAN_VMA_CHECK
    short = process.mmap(HPAGE - PAGE, addr=area + 2 * BLOCKS * HPAGE, fixed=True)
    process.write(short, b"x")
    assert collapse(process, short, PAGE) is S.SCAN_VMA_CHECK
    assert process.mem.trace.text() == ""


def test_each_vma_is_a_range_of_its_own(process: Process, area: int) -> None:
    """A block that two VMAs share is whole in neither; the first failure ends the walk."""
    process.mprotect(area + HPAGE + 9 * PAGE, PAGE, 1)
    assert collapse(process, area, BLOCKS * HPAGE) is S.SCAN_VMA_CHECK
    assert huge(process, area) == [True, False, False]


def test_a_gap_is_enomem_after_all_that_is_mapped(process: Process, area: int) -> None:
    """Both sides of it are collapsed first."""
    process.munmap(area + HPAGE, HPAGE)
    call = lambda: process.madvise(area, BLOCKS * HPAGE, Advice.MADV_COLLAPSE)  # noqa: E731
    assert refused(call) == errno.ENOMEM
    assert huge(process, area) == [True, False, True]


def test_what_goes_while_the_lock_is_dropped_is_met_at_the_next_block(
    machine: Machine, process: Process, area: int
) -> None:
    """hugepage_vma_revalidate: VMA_NULL, EINVAL."""
    call = process.madvise.steps(area, BLOCKS * HPAGE, Advice.MADV_COLLAPSE)
    task = machine.spawn(call, "app")
    task.run_until("acquire mmap_lock for write")
    process.munmap(area + HPAGE, 2 * HPAGE)
    with pytest.raises(CollapseError) as refusal:
        task.finish()
    assert refusal.value.scan_result is S.SCAN_VMA_NULL
    assert refusal.value.errno == errno.EINVAL


def test_the_end_shrinks_with_the_vma(machine: Machine, process: Process, area: int) -> None:
    """The last block goes meanwhile: two of two are success."""
    call = process.madvise.steps(area, BLOCKS * HPAGE, Advice.MADV_COLLAPSE)
    task = machine.spawn(call, "app")
    task.run_until("acquire mmap_lock for write")
    process.munmap(area + 2 * HPAGE, HPAGE)
    task.finish()
    assert huge(process, area) == [True, True, False]
