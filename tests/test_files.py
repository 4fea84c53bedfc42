"""The system calls of a process that are about open files."""

import os

import pytest
from collapse_kit import HPAGE, PAGE

from pykhuge import Advice, Machine, Process
from pykhuge.kernel.sched import Task, WouldBlock
from pykhuge.mm.mm_types import File


def collapsing(machine: Machine, process: Process, file: File, offset: int) -> Task[object]:
    """A collapse of one block of `file` that has all its pages locked."""
    addr = process.mmap(HPAGE, file=file, offset=offset, shared=True)
    process.read(addr, HPAGE)
    machine.thp.shmem_enabled = "force"
    task = machine.spawn(machine.collapse.steps(process, addr), "khugepaged")
    task.run_until("copied")
    return task


def test_pwrite_that_would_wait_in_its_second_block_leaves_the_first(
    machine: Machine, process: Process
) -> None:
    """A write into pages that a collapse has locked writes nothing, also not before them."""
    file = process.memfd_create("x")
    process.pwrite(file, 0, b"x" * 2 * HPAGE)
    task = collapsing(machine, process, file, HPAGE)
    with pytest.raises(WouldBlock):
        process.pwrite(file, 0, b"y" * 2 * HPAGE)
    assert process.pread(file, 0, HPAGE) == b"x" * HPAGE
    assert process.pwrite(file, 0, b"y" * HPAGE) == HPAGE
    task.finish()
    assert process.pwrite(file, 0, b"z" * 2 * HPAGE) == 2 * HPAGE


def test_open_that_would_wait_to_truncate_leaves_nothing_open(
    machine: Machine, process: Process
) -> None:
    """open(O_TRUNC) of pages that a collapse has locked gives its descriptor back."""
    tmpfs = machine.tmpfs()
    file = process.open("x", os.O_RDWR | os.O_CREAT, tmpfs=tmpfs)
    process.pwrite(file, 0, b"x" * HPAGE)
    task = collapsing(machine, process, file, 0)
    with pytest.raises(WouldBlock):
        process.open("x", os.O_RDWR | os.O_TRUNC, tmpfs=tmpfs)
    assert process.mm.files == [file]
    assert file.inode.i_count == 1
    assert file.inode.i_size == HPAGE
    task.finish()


def test_truncation_frees_a_page_that_swap_could_not_take(
    machine: Machine, process: Process
) -> None:
    """A poisoned page waits in the swap cache in vain; with its slot it is freed too."""
    file = process.memfd_create("x")
    process.ftruncate(file, PAGE)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.write(addr, b"x")
    pfn = process.poison(addr, 0)
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    assert list(machine.mem.swap.cache.values()) == [pfn]
    process.ftruncate(file, 0)
    assert not machine.mem.swap.swap_map
    assert machine.mem.pages.refcount[pfn] == 0
