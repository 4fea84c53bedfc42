"""FileCalls: what a process may do with files, and how it is told that it may not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, block_bytes, page_bytes

from pykhuge import File, KernelPanic, Machine, Process

CREATE = os.O_RDWR | os.O_CREAT


def expect(number: int, text: str = "") -> Any:
    """The block raises an OSError with this errno, which says `text`."""

    class Expect:
        def __enter__(self) -> None:
            pass

        def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> bool:
            assert isinstance(error, OSError), f"{errno.errorcode[number]} was not raised"
            assert errno.errorcode[error.errno or 0] == errno.errorcode[number]
            assert str(error).startswith(f"[Errno {number}] {os.strerror(number)}")
            assert text in str(error)
            return True

    return Expect()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of the host, 4 pages."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    return path


CALLS: dict[str, Callable[[Process, File], object]] = {
    "pread": lambda p, file: p.pread(file, 0, 1),
    "pwrite": lambda p, file: p.pwrite(file, 0, b"x"),
    "ftruncate": lambda p, file: p.ftruncate(file, 1),
    "fallocate": lambda p, file: p.fallocate(file, 0, 1),
    "fsync": lambda p, file: p.fsync(file),
    "close": lambda p, file: p.close(file),
    "mmap": lambda p, file: p.mmap(PAGE, file=file),
    "attach_private": lambda p, file: p.attach_private(file, 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_on_a_file_that_is_not_open_here_are_ebadf(
    machine: Machine, process: Process, call: str
) -> None:
    """Closed, or open in another process alone: the file is named, and not touched."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, b"kept")
    keep = machine.process("keeper")
    addr = process.mmap(PAGE, file=file, shared=True)
    with expect(errno.EBADF, "memfd:f is not open here"):
        CALLS[call](keep, file)
    process.close(file)
    with expect(errno.EBADF, "memfd:f is not open here"):
        CALLS[call](process, file)
    assert process.read(addr, 4) == b"kept"
    assert file.inode.i_size == 4


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fallocate"])
def test_files_open_for_reading_cannot_be_changed(
    machine: Machine, process: Process, disk: Path, call: str
) -> None:
    """EBADF, for shmem and disk files alike."""
    mount = machine.tmpfs()
    process.open("f", CREATE, tmpfs=mount)
    for file in (process.open("f", tmpfs=mount), process.open(str(disk))):
        with expect(errno.EBADF, f"{file.inode.name} is not open for writing"):
            CALLS[call](process, file)
        process.fsync(file)


def test_files_open_for_writing_alone_cannot_be_read(
    machine: Machine, process: Process, disk: Path
) -> None:
    """EBADF; writing works."""
    mount = machine.tmpfs()
    for file in (
        process.open("f", os.O_WRONLY | os.O_CREAT, tmpfs=mount),
        process.open(str(disk), os.O_WRONLY),
    ):
        with expect(errno.EBADF, "is not open for reading"):
            process.pread(file, 0, 1)
        assert process.pwrite(file, 0, b"x") == 1


@pytest.mark.parametrize("bad", [-1, -PAGE, 1 << 63, -(1 << 70)])
def test_offsets_and_lengths_have_bounds(process: Process, disk: Path, bad: int) -> None:
    """EINVAL with the value and the bound; nothing has changed."""
    for file in (process.memfd_create("f"), process.open(str(disk), os.O_RDWR)):
        before = file.inode.i_size
        calls: list[Callable[[], object]] = [
            lambda file=file: process.pread(file, bad, 1),
            lambda file=file: process.pread(file, 0, bad),
            lambda file=file: process.pwrite(file, bad, b"x"),
            lambda file=file: process.ftruncate(file, bad),
            lambda file=file: process.fallocate(file, bad, 1),
        ]
        for call in calls:
            with expect(errno.EINVAL, f"={bad}: allowed 0..{(1 << 63) - 1}"):
                call()
        assert file.inode.i_size == before


@pytest.mark.parametrize("length", [0, -1])
@pytest.mark.parametrize("punch_hole", [False, True])
def test_fallocate_of_nothing_is_refused(process: Process, length: int, punch_hole: bool) -> None:
    """EINVAL, as Linux has it for preallocation and holes alike."""
    file = process.memfd_create("f")
    with expect(errno.EINVAL, f"length={length}: allowed 1 and more"):
        process.fallocate(file, 0, length, punch_hole=punch_hole)


def test_fallocate_of_a_disk_file_is_not_supported(process: Process, disk: Path) -> None:
    """The model has no file system below it that could."""
    file = process.open(str(disk), os.O_RDWR)
    with expect(errno.EOPNOTSUPP, "disk: allowed for shmem files"):
        process.fallocate(file, 0, PAGE)


@pytest.mark.parametrize(
    "flags", [os.O_APPEND, os.O_EXCL | os.O_CREAT, os.O_DIRECT, os.O_TMPFILE, 1 << 30]
)
def test_open_flags_that_the_model_has_not_are_refused(
    machine: Machine, process: Process, disk: Path, flags: int
) -> None:
    """EINVAL names the flags and those that are allowed; nothing is made or cut."""
    mount = machine.tmpfs()
    for path, where in ((str(disk), None), ("f", mount)):
        with expect(errno.EINVAL, f"flags={flags:#o}: allowed O_RDONLY, O_WRONLY, O_RDWR"):
            process.open(path, flags, tmpfs=where)
    assert mount.names == {}
    assert disk.stat().st_size == 4 * PAGE


def test_tmpfs_files_are_found_by_name_on_their_mount(machine: Machine, process: Process) -> None:
    """One file for a name, another on another mount; O_CREAT makes only what is not there."""
    here, there = machine.tmpfs(), machine.tmpfs()
    first = process.open("f", CREATE, tmpfs=here)
    process.pwrite(first, 0, b"here")
    again = process.open("f", CREATE, tmpfs=here)
    assert again.inode is first.inode
    assert process.pread(again, 0, 9) == b"here"
    other = process.open("f", CREATE, tmpfs=there)
    assert process.pread(other, 0, 9) == b""
    with expect(errno.ENOENT):
        process.open("g", os.O_RDWR, tmpfs=here)
    with expect(errno.ENOENT):
        process.unlink("g", tmpfs=here)


def test_o_trunc_empties_a_tmpfs_file(machine: Machine, process: Process) -> None:
    """Its pages are given back, also those that others have mapped."""
    mount = machine.tmpfs("1M")
    file = process.open("f", CREATE, tmpfs=mount)
    process.pwrite(file, 0, block_bytes(0, 8))
    process.read(process.mmap(8 * PAGE, file=file, shared=True), 8 * PAGE)
    process.open("f", os.O_RDWR | os.O_TRUNC, tmpfs=mount)
    assert (file.inode.i_size, mount.used_blocks) == (0, 0)


def test_each_open_is_a_file_of_its_own(machine: Machine, process: Process) -> None:
    """Closing one leaves the other; a file is closed once."""
    mount = machine.tmpfs()
    first, second = (process.open("f", CREATE, tmpfs=mount) for _ in range(2))
    assert first.inode.i_count == 2
    process.close(first)
    assert process.pwrite(second, 0, b"x") == 1
    with expect(errno.EBADF):
        process.close(first)
    process.close(second)
    assert second.inode.i_count == 0


def test_memfds_of_one_name_are_different_files(process: Process) -> None:
    """The name is for the trace."""
    first, second = process.memfd_create("n"), process.memfd_create("n")
    process.pwrite(first, 0, b"first")
    assert process.pread(second, 0, 9) == b""
    assert first.inode.name == "memfd:n"


def test_empty_reads_and_writes_do_nothing(process: Process, disk: Path) -> None:
    """Length 0 is no error, wherever it points."""
    for file in (process.memfd_create("f"), process.open(str(disk), os.O_RDWR)):
        assert process.pread(file, 1 << 40, 0) == b""
        assert process.pwrite(file, 1 << 40, b"") == 0
        assert file.f_mapping.nrpages == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_anything_with_bytes_in_it_can_be_written(process: Process, kind: Any) -> None:
    """As Process.write takes it."""
    file = process.memfd_create("f")
    assert process.pwrite(file, 3, kind(b"data")) == 4
    assert process.pread(file, 0, 9) == bytes(3) + b"data"


def test_fsync_of_shmem_does_nothing(machine: Machine, process: Process) -> None:
    """There is no disk; the pages stay dirty, for swap."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, page_bytes(0))
    before = machine.vmstat()
    process.fsync(file)
    assert machine.vmstat() == before


def test_cached_pfn_tells_frames_of_small_and_huge_pages(
    machine: Machine, process: Process
) -> None:
    """None for holes, and for pages on swap."""
    file = process.memfd_create("f")
    process.pwrite(file, PAGE, page_bytes(1))
    assert process.cached_pfn(file, 0) is None
    pfn = process.cached_pfn(file, 1)
    assert pfn is not None
    assert machine.mem.ram.pages[pfn].tobytes() == page_bytes(1)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.read(addr + PAGE, 1)
    machine.lru_add_drain_all()
    process.madvise(addr + PAGE, PAGE, 21)
    assert process.cached_pfn(file, 1) is None
    machine.thp.shmem_enabled = "always"
    huge = process.memfd_create("h")
    process.pwrite(huge, 0, block_bytes())
    head = process.cached_pfn(huge, 0)
    assert head is not None
    assert head % NR == 0
    assert process.cached_pfn(huge, 300) == head + 300
    assert machine.mem.ram.pages[head + 300].tobytes() == page_bytes(300)


def test_private_data_goes_with_small_cached_disk_pages(process: Process, disk: Path) -> None:
    """ValueError with the index elsewhere; twice is once."""
    file, memfd = process.open(str(disk)), process.memfd_create("f")
    process.pwrite(memfd, 0, b"x")
    for each in (file, memfd):
        with pytest.raises(ValueError, match="index=0: allowed where a small page of a disk file"):
            process.attach_private(each, 0)
    process.pread(file, 0, 1)
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    before = int(process.mem.pages.refcount[pfn])
    for _ in range(2):
        process.attach_private(file, 0)
    assert process.mem.pages.refcount[pfn] == before + 1


@pytest.mark.parametrize("call", CALLS)
def test_exited_process_has_no_files(process: Process, call: str) -> None:
    """ESRCH, like every other call of a process that is gone."""
    file = process.memfd_create("f")
    process.exit()
    with expect(errno.ESRCH, f"process {process.pid} has exited"):
        CALLS[call](process, file)
    with expect(errno.ESRCH):
        process.memfd_create("g")
    with expect(errno.ESRCH):
        process.open("/")


@pytest.mark.parametrize("call", CALLS)
def test_dead_host_has_no_files(make_machine: MakeMachine, call: str) -> None:
    """Every call raises the panic again."""
    machine = make_machine()
    process = machine.process("a")
    file = process.memfd_create("f")
    process.pwrite(file, 0, b"x")
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    machine.mem.poison.poison(pfn, 0)
    with pytest.raises(KernelPanic) as died:
        process.pread(file, 0, 1)
    for again in (
        lambda: CALLS[call](process, file),
        lambda: process.memfd_create("g"),
        machine.tmpfs,
    ):
        with pytest.raises(KernelPanic) as raised:
            again()
        assert raised.value is died.value


@pytest.mark.parametrize("call", ["pread", "pwrite", "ftruncate", "fallocate", "fsync", "close"])
def test_calls_can_be_taken_as_steps(machine: Machine, process: Process, call: str) -> None:
    """Nothing happens before the first step; at the end all is as after a plain call."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, page_bytes(0))
    steps = {
        "pread": lambda: process.pread.steps(file, 0, PAGE),
        "pwrite": lambda: process.pwrite.steps(file, 0, b"new"),
        "ftruncate": lambda: process.ftruncate.steps(file, 5),
        "fallocate": lambda: process.fallocate.steps(file, 0, HPAGE),
        "fsync": lambda: process.fsync.steps(file),
        "close": lambda: process.close.steps(file),
    }
    task: Any = machine.spawn(steps[call]())
    assert (file in process.mm.files, file.inode.i_size) == (True, PAGE)
    result = task.finish()
    expected = {"pread": page_bytes(0), "pwrite": 3}
    assert result == expected.get(call)
    assert file.inode.i_size == {"ftruncate": 5, "fallocate": HPAGE}.get(call, PAGE)
    assert (file in process.mm.files) == (call != "close")


def test_tmpfs_options_are_checked(machine: Machine) -> None:
    """ValueError names what is allowed."""
    with pytest.raises(ValueError, match="huge='sometimes': allowed always, within_size"):
        machine.tmpfs(huge="sometimes")
    with pytest.raises(ValueError, match="size='much'"):
        machine.tmpfs("much")
    assert machine.tmpfs("1M").max_blocks == 256
    assert machine.tmpfs().max_blocks == 0
