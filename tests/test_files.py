"""The system calls of a process that are about open files."""

import errno
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


def test_another_process_receives_an_open_file(machine: Machine, process: Process) -> None:
    """As over a socket: it outlives the sender's descriptor. What nobody has open is refused."""
    file = process.memfd_create("sent")
    process.pwrite(file, 0, b"hello")
    other = machine.process("other")
    assert other.receive(file) is file
    process.close(file)
    assert other.pread(file, 0, 5) == b"hello"
    other.close(file)
    with pytest.raises(OSError, match="not open in any process") as raised:
        process.receive(file)
    assert raised.value.errno == errno.EBADF
    machine.audit()


@pytest.mark.parametrize("name", ["a\0b", "x" * 250])
def test_memfd_names_are_linuxs(machine: Machine, process: Process, name: str) -> None:
    """EINVAL, and there is no file."""
    with pytest.raises(OSError, match="allowed up to 249") as raised:
        process.memfd_create(name)
    assert raised.value.errno == errno.EINVAL
    assert machine.mem.inodes == []
    machine.audit()


def test_a_read_is_cut_where_linux_cuts_it(machine: Machine, process: Process) -> None:
    """MAX_RW_COUNT, before a byte is allocated for it; the file is a hole, and small."""
    file = process.memfd_create("small")
    process.ftruncate(file, 10)
    assert process.pread(file, 0, 1 << 62) == bytes(10)
    machine.audit()


def test_a_call_on_what_is_no_file_says_so(machine: Machine, process: Process) -> None:
    """TypeError with the value."""
    with pytest.raises(TypeError, match="file='x': allowed a File"):
        process.pwrite("x", 0, b"data")  # type: ignore[arg-type]
    machine.audit()


def test_a_mount_is_never_smaller_than_asked_for(machine: Machine, process: Process) -> None:
    """Sizes are rounded up to a page: 5 bytes are one page, and not no limit."""
    file = process.open("name", os.O_RDWR | os.O_CREAT, tmpfs=machine.tmpfs(5))
    assert process.pwrite(file, 0, bytes(3 * PAGE)) == PAGE
    machine.audit()
