"""Swapping in during a collapse, with other threads in the way."""

from __future__ import annotations

import pytest
from collapse_kit import advised

from pykhuge import Advice, KernelBug, Machine, Process, ScanResult

PAGE = 4096
HPAGE = 512 * PAGE


def swapped_out(process: Process, addr: int, nr: int) -> bytes:
    """512 written pages, the first `nr` of them swapped out."""
    data = b"".join(page.to_bytes(2, "little") * (PAGE // 2) for page in range(512))
    process.madvise(addr, HPAGE, Advice.MADV_NOHUGEPAGE)
    process.write(addr, data)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.madvise(addr, nr * PAGE, Advice.MADV_PAGEOUT)
    return data


def test_an_entry_that_is_freed_while_another_is_read_is_passed_over(
    machine: Machine, process: Process
) -> None:
    """mmap_lock is held for read alone: MADV_DONTNEED may come in between."""
    addr = advised(process)
    data = swapped_out(process, addr, 3)
    collapse = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False))
    collapse.run_until("swapin")
    collapse.run_until("swapin")
    machine.audit()
    process.madvise(addr + 2 * PAGE, PAGE, Advice.MADV_DONTNEED)
    assert collapse.finish() is ScanResult.SCAN_SUCCEED
    (swapin,) = [
        record.event
        for record in machine.trace
        if record.event.name == "mm_collapse_huge_page_swapin"
    ]
    assert "swapped_in=2," in swapin.body()
    assert process.read(addr, 2 * PAGE) == data[: 2 * PAGE]
    assert process.read(addr + 2 * PAGE, PAGE) == bytes(PAGE)
    assert process.read(addr + 3 * PAGE, HPAGE - 3 * PAGE) == data[3 * PAGE :]


def test_a_fault_in_between_brings_its_page_in_first(machine: Machine, process: Process) -> None:
    """Whoever comes first reads the slot; the collapse counts only what it brought in."""
    addr = advised(process)
    data = swapped_out(process, addr, 2)
    collapse = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False))
    collapse.run_until("swapin")
    assert process.read(addr, PAGE) == data[:PAGE]
    assert collapse.finish() is ScanResult.SCAN_SUCCEED
    assert process.is_huge(addr)
    assert process.read(addr, HPAGE) == data


def test_the_audit_finds_a_huge_page_that_nobody_will_map(
    machine: Machine, process: Process
) -> None:
    """A collapse that ends without giving its huge page back is not taken for one in progress."""
    addr = advised(process)
    process.write(addr, b"x" * HPAGE)
    process.madvise(addr, HPAGE, Advice.MADV_DONTNEED)
    swapped_out(process, addr, 1)
    collapse = machine.spawn(machine.collapse.steps(process, addr), "leaker")
    collapse.run_until("swapin")
    machine.audit()
    collapse.done = True
    with pytest.raises(KernelBug, match="is held by leaker, which has ended"):
        machine.audit()
    collapse.done = False
    assert collapse.finish() is ScanResult.SCAN_SUCCEED
