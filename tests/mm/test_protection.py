"""mprotect, userfaultfd, MADV_FREE, munmap: entries and counts as the kernel leaves them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pykhuge import (
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Advice,
    Machine,
    Process,
    UserFault,
    WouldBlock,
)

PAGE = 4096
HPAGE = 512 * PAGE


@pytest.fixture
def block(process: Process) -> int:
    addr = process.mmap(4 * HPAGE)
    process.write(addr, bytes(range(256)) * (HPAGE // 256))
    return addr


@pytest.mark.parametrize("between", [PROT_NONE, PROT_READ])
@pytest.mark.parametrize("huge", [False, True])
def test_own_pages_become_writable_with_the_vma(
    machine: Machine, process: Process, block: int, between: int, huge: bool
) -> None:
    """As on a running kernel: no fault afterwards, and the block collapses."""
    if huge:
        process.madvise(block, HPAGE, Advice.MADV_COLLAPSE)
    process.mprotect(block, 4 * HPAGE, between)
    process.mprotect(block, 4 * HPAGE, PROT_READ | PROT_WRITE)
    faults = machine.vmstat()["pgfault"]
    process.write(block, bytes(HPAGE))
    assert machine.vmstat()["pgfault"] == faults
    process.madvise(block, HPAGE, Advice.MADV_COLLAPSE)
    machine.audit()


def test_shared_pages_stay_read_only(machine: Machine, process: Process, block: int) -> None:
    child = process.fork()
    child.mprotect(block, 4 * HPAGE, PROT_READ)
    child.mprotect(block, 4 * HPAGE, PROT_READ | PROT_WRITE)
    machine.audit()
    child.write(block, b"!")
    assert process.read(block, 1) == b"\0"


def test_unprotecting_one_page_of_a_huge_one_splits_it(
    machine: Machine, process: Process, block: int
) -> None:
    process.madvise(block, HPAGE, Advice.MADV_COLLAPSE)
    fd = process.userfaultfd()
    fd.register(block, HPAGE, missing=False, wp=True)
    fd.writeprotect(block, HPAGE)
    fd.writeprotect(block, PAGE, protect=False)
    process.write(block, b"free")
    with pytest.raises(UserFault):
        process.write(block + PAGE, b"watched")
    assert not process.is_huge(block)
    machine.audit()


def test_unmapped_pages_are_free_at_once(machine: Machine, process: Process) -> None:
    free = machine.vmstat()["nr_free_pages"]
    addr = process.mmap(HPAGE)
    process.write(addr, bytes(5 * PAGE))
    process.munmap(addr, HPAGE)
    assert machine.vmstat()["nr_free_pages"] == free


def test_a_collapse_that_would_wait_leaves_nothing(
    machine: Machine, process: Process, block: int
) -> None:
    """Somebody else holds mmap_lock for read: the huge page allocated by then goes back."""
    reader = machine.spawn(process.read.steps(block + HPAGE, 1))
    reader.run_until("release mmap_lock")
    free = machine.vmstat()["nr_free_pages"]
    with pytest.raises(WouldBlock):
        machine.collapse(process, block, is_khugepaged=False)
    assert machine.vmstat()["nr_free_pages"] == free
    reader.finish()
    machine.audit()


def test_lazily_freed_huge_page(machine: Machine, process: Process, block: int) -> None:
    process.madvise(block, HPAGE, Advice.MADV_COLLAPSE)
    process.madvise(block, HPAGE, Advice.MADV_FREE)
    assert process.is_huge(block)
    assert machine.vmstat()["nr_inactive_file"] == 512
    process.write(block + PAGE, b"kept")
    process.madvise(block, HPAGE, Advice.MADV_PAGEOUT)
    machine.audit()
    assert process.read(block + PAGE, 4) == b"kept"


def test_swap_cache_counts_as_file_pages(machine: Machine, process: Process, block: int) -> None:
    process.madvise(block, 3 * PAGE, Advice.MADV_PAGEOUT)
    process.read(block, 2 * PAGE)
    assert machine.vmstat()["nr_file_pages"] == machine.vmstat()["nr_swapcached"] == 2


def test_untouched_memory_merges_where_it_moves(process: Process) -> None:
    stay = process.mmap(HPAGE, addr=1 << 40)
    process.mremap(process.mmap(HPAGE, addr=3 << 40), HPAGE, stay + HPAGE)
    assert [str(vma) for vma in process.mm.vmas] == [f"{stay:012x}-{stay + 2 * HPAGE:012x}"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_protected_private_copy_leaves_a_marker(
    machine: Machine, process: Process, swapped: bool
) -> None:
    """MADV_DONTNEED of it gives the file's page back, and who writes to that is told, too."""
    file = process.memfd_create("file")
    process.ftruncate(file, HPAGE)
    addr = process.mmap(HPAGE, file=file)
    process.write(addr, b"x" * (4 * PAGE))
    fd = process.userfaultfd()
    fd.register(addr, HPAGE, missing=False, wp=True)
    fd.writeprotect(addr, 2 * PAGE)
    if swapped:
        machine.lru_add_drain_all()
        process.madvise(addr, 4 * PAGE, Advice.MADV_PAGEOUT)
    process.madvise(addr, 4 * PAGE, Advice.MADV_DONTNEED)
    assert process.read(addr, 4 * PAGE) == bytes(4 * PAGE)
    with pytest.raises(UserFault):
        process.write(addr + PAGE, b"watched")
    process.write(addr + 2 * PAGE, b"free")
    process.munmap(addr, HPAGE)
    machine.audit()


def test_what_may_not_be_written_to_is_refused_in_the_middle_too(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """EACCES before anything is cut, and mmap_lock is let go."""
    (tmp_path / "data").write_bytes(bytes(4 * PAGE))
    file = process.open(tmp_path / "data")
    addr = process.mmap(4 * PAGE, file=file, shared=True, prot=PROT_READ)
    with pytest.raises(OSError, match="not open for writing") as refused:
        process.mprotect(addr + PAGE, PAGE, PROT_READ | PROT_WRITE)
    assert refused.value.errno == errno.EACCES
    assert [(vma.vm_start, vma.vm_end) for vma in process.mm.vmas] == [(addr, addr + 4 * PAGE)]
    process.mprotect(addr + PAGE, PAGE, PROT_NONE)
    machine.audit()
