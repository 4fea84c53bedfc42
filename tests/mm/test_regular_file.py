"""Disk files: the host's bytes, by way of the page cache, and back to the host's disk."""

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    block_bytes,
    changes,
    flags_of,
    page_bytes,
    ptes_of,
    refused,
    rss,
    small_machine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import (
    PROT_EXEC,
    PROT_READ,
    Advice,
    BusError,
    File,
    Machine,
    OutOfMemory,
    Process,
    ScanResult,
)
from pykhuge.mm import regular_file
from pykhuge.mm.page import PG_dirty, PG_uptodate, PG_writeback
from pykhuge.mm.page_table import PAGE_DIRTY, PAGE_RW
from pykhuge.mm.regular_file import filemap_flush, page_cache_sync_readahead


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 16 pages of `page_bytes` and 100 bytes."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 16) + b"z" * 100)
    return path


def expect(number: int) -> Any:
    """The block raises an OSError, whose words are those of this errno."""
    return pytest.raises(OSError, match=os.strerror(number))


def flags_at(process: Process, file: File, index: int) -> int:
    """PG_* of the page cached at `index`."""
    pfn = process.cached_pfn(file, index)
    assert pfn is not None
    return flags_of(process, pfn)


def program(machine: Machine, process: Process, path: Path, blocks: int = 1) -> tuple[File, int]:
    """A file of whole blocks, mapped as programs are, its blocks collapsed."""
    path.write_bytes(block_bytes(0, blocks * NR))
    file = process.open(str(path))
    addr = process.mmap(blocks * HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(addr, blocks * HPAGE)
    for number in range(blocks):
        machine.lru_add_drain_all()
        result = machine.collapse(process, addr + number * HPAGE, is_khugepaged=False)
        assert result is ScanResult.SCAN_SUCCEED
    assert file.f_mapping.nr_thps == blocks
    return file, addr


# Reading.


def test_bytes_are_those_of_the_hosts_file(process: Process, path: Path) -> None:
    """By read(2) and by loads, at any offset, up to the end."""
    file, data = process.open(str(path)), path.read_bytes()
    assert file.inode.i_size == 16 * PAGE + 100
    for offset, length in (
        (0, 10),
        (PAGE - 3, 6),
        (5 * PAGE, 9 * PAGE),
        (0, 1 << 20),
        (16 * PAGE + 90, 99),
    ):
        assert process.pread(file, offset, length) == data[offset : offset + length]
    assert process.pread(file, 16 * PAGE + 100, 1) == b""
    addr = process.mmap(20 * PAGE, prot=PROT_READ, file=file)
    assert process.read(addr, 17 * PAGE) == data + bytes(PAGE - 100)


def test_bytes_are_read_once_and_kept(process: Process, path: Path) -> None:
    """A page that is cached does not change with the host's file behind our back."""
    file = process.open(str(path))
    assert process.pread(file, 0, 1) == page_bytes(0)[:1]
    cached = [page for page in range(17) if process.cached_pfn(file, page) is not None]
    assert cached == list(range(len(cached)))
    assert cached
    with path.open("r+b") as host:
        host.write(b"!" * 10)
    assert process.pread(file, 0, 10) == page_bytes(0)[:10]


def test_last_page_shows_nothing_of_what_its_frame_held(
    machine: Machine, process: Process, path: Path
) -> None:
    """It is cleared behind the end of the file."""
    old = process.memfd_create("old")
    process.pwrite(old, 0, b"!" * 64 * PAGE)
    process.close(old)
    machine.lru_add_drain_all()
    file = process.open(str(path))
    addr = process.mmap(17 * PAGE, prot=PROT_READ, file=file)
    assert process.read(addr + 16 * PAGE, PAGE) == b"z" * 100 + bytes(PAGE - 100)


def test_empty_file_reads_as_nothing(process: Process, tmp_path: Path) -> None:
    """No page is cached for it, and every touch of a mapping is SIGBUS."""
    path = tmp_path / "empty"
    path.touch()
    file = process.open(str(path))
    assert process.pread(file, 0, 100) == b""
    addr = process.mmap(PAGE, prot=PROT_READ, file=file)
    with pytest.raises(BusError):
        process.read(addr, 1)
    assert file.f_mapping.nrpages == 0


@pytest.mark.parametrize(
    ("wanted", "ra_pages", "expected"),
    # get_init_ra_size(): 4 times small requests, twice medium ones, else the window, at most 320.
    [
        (1, 32, 4),
        (2, 32, 4),
        (3, 32, 8),
        (8, 32, 16),
        (9, 32, 32),
        (512, 32, 320),
        (512, 1024, 1024),
        (5, 0, 1),
    ],
)
def test_readahead_window_follows_the_request(
    process: Process, tmp_path: Path, wanted: int, ra_pages: int, expected: int
) -> None:
    """page_cache_sync_ra: what is wanted and some more, bounded by the device."""
    path = tmp_path / "long"
    path.write_bytes(block_bytes(0, 3 * NR))
    file = process.open(str(path))
    file.ra_pages = ra_pages
    memcg = process.mm.memcg
    page_cache_sync_readahead(process.mem, file, 7, wanted, memcg=memcg, nid=0)
    cached = [page for page in range(3 * NR) if process.cached_pfn(file, page) is not None]
    assert cached == list(range(7, 7 + expected))
    assert process.pread(file, 7 * PAGE, PAGE) == page_bytes(7)


def test_readahead_stops_where_memory_does(machine: Machine, path: Path) -> None:
    """What the cgroup has room for is read; the page that was asked for comes first."""
    process = machine.process("a", memcg=machine.memcg(3 * PAGE))
    file = process.open(str(path))
    assert process.pread(file, 0, 3 * PAGE) == block_bytes(0, 3)
    with pytest.raises(OutOfMemory):
        process.pread(file, 3 * PAGE, 1)
    assert file.f_mapping.nrpages == 3


def test_device_error_is_eio_and_sigbus_and_tried_again(
    process: Process, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page stays, not up to date, until a later read of it succeeds."""

    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, "broken")

    file = process.open(str(path))
    addr = process.mmap(17 * PAGE, prot=PROT_READ, file=file)
    with monkeypatch.context() as patch:
        patch.setattr(regular_file.os, "pread", broken)
        with expect(errno.EIO):
            process.pread(file, 0, 1)
        with pytest.raises(BusError, match="BUS_ADRERR"):
            process.read(addr + 2 * PAGE, 1)
    assert not flags_at(process, file, 2) & PG_uptodate
    assert process.read(addr, 16 * PAGE) == block_bytes(0, 16)
    assert process.pread(file, 0, PAGE) == page_bytes(0)


def test_error_behind_the_first_page_cuts_a_read_short(
    process: Process, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read counts; the next call gets the error."""
    file, real = process.open(str(path)), os.pread

    def broken(fd: int, length: int, offset: int) -> bytes:
        if offset >= 2 * PAGE:
            raise OSError(errno.EIO, "broken")
        return real(fd, length, offset)

    monkeypatch.setattr(regular_file.os, "pread", broken)
    assert process.pread(file, 0, 9 * PAGE) == block_bytes(0, 2)
    with expect(errno.EIO):
        process.pread(file, 2 * PAGE, PAGE)


# Writing.


def test_writes_stay_in_the_cache_until_fsync(
    machine: Machine, process: Process, path: Path
) -> None:
    """The host's file changes with fsync alone, and then it has exactly those bytes."""
    file, before = process.open(str(path), os.O_RDWR), path.read_bytes()
    assert process.pwrite(file, PAGE - 2, b"wxyz") == 4
    assert path.read_bytes() == before
    assert machine.vmstat()["nr_dirty"] == 2
    process.fsync(file)
    assert path.read_bytes() == before[: PAGE - 2] + b"wxyz" + before[PAGE + 2 :]
    assert machine.vmstat()["nr_dirty"] == machine.vmstat()["nr_writeback"] == 0
    assert process.pread(file, PAGE - 2, 4) == b"wxyz"


@pytest.mark.parametrize("offset", [16 * PAGE + 100, 16 * PAGE + 50, 17 * PAGE, 20 * PAGE + 7])
def test_file_grows_by_writing(process: Process, path: Path, offset: int) -> None:
    """A gap reads as zeros, in the cache and on the disk."""
    file = process.open(str(path), os.O_RDWR)
    expected = bytearray(path.read_bytes())
    expected.extend(bytes(max(0, offset - len(expected))))
    expected[offset : offset + 5000] = page_bytes(1) + b"e" * (5000 - PAGE)
    process.pwrite(file, offset, page_bytes(1) + b"e" * (5000 - PAGE))
    assert file.inode.i_size == len(expected)
    assert process.pread(file, 0, 1 << 20) == expected
    process.fsync(file)
    assert path.read_bytes() == expected


def test_whole_pages_are_written_without_being_read(
    process: Process, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages written in part must be read first."""
    read: list[int] = []
    real = os.pread

    def counting(fd: int, length: int, offset: int) -> bytes:
        read.append(offset // PAGE)
        return real(fd, length, offset)

    monkeypatch.setattr(regular_file.os, "pread", counting)
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 2 * PAGE - 1, b"a" + b"b" * 2 * PAGE + b"c")
    assert read == [1, 4]


def test_write_that_runs_out_of_memory_is_short(machine: Machine, path: Path) -> None:
    """What fits is written; the next write fails whole."""
    process = machine.process("a", memcg=machine.memcg(3 * PAGE))
    file = process.open(str(path), os.O_RDWR)
    assert process.pwrite(file, 0, bytes(5 * PAGE)) == 3 * PAGE
    with pytest.raises(OutOfMemory):
        process.pwrite(file, 3 * PAGE, bytes(PAGE))
    process.fsync(file)
    assert path.read_bytes()[: 5 * PAGE] == bytes(3 * PAGE) + block_bytes(3, 2)


def test_stores_into_a_shared_mapping_reach_the_disk(
    machine: Machine, process: Process, path: Path
) -> None:
    """By fsync, whether the page is still mapped or not."""
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(17 * PAGE, file=file, shared=True)
    process.write(addr + 3 * PAGE, b"mapped")
    process.write(addr + 9 * PAGE, b"gone")
    process.munmap(addr + 8 * PAGE, 4 * PAGE)
    assert machine.vmstat()["nr_dirty"] == 2
    process.fsync(file)
    expected = bytearray(block_bytes(0, 16) + b"z" * 100)
    expected[3 * PAGE : 3 * PAGE + 6] = b"mapped"
    expected[9 * PAGE : 9 * PAGE + 4] = b"gone"
    assert path.read_bytes() == expected


def test_stores_behind_the_end_do_not_reach_the_disk(process: Process, path: Path) -> None:
    """The rest of the last page can be written to, and is nobody's."""
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(17 * PAGE, file=file, shared=True)
    process.write(addr + 16 * PAGE + 95, b"0123456789")
    process.fsync(file)
    assert path.read_bytes() == block_bytes(0, 16) + b"z" * 95 + b"01234"


def test_every_open_file_is_told_once_of_an_error_of_writeback(
    machine: Machine, process: Process, path: Path
) -> None:
    """Who opens it later is not told any more, but of the next error."""
    files = [process.open(str(path), os.O_RDWR) for _ in range(2)]
    process.pwrite(files[0], 0, b"lost")
    pfn = process.cached_pfn(files[0], 0)
    assert pfn is not None
    machine.mem.poison.poison(pfn, 0)
    untold = process.open(str(path), os.O_RDWR)
    assert refused(lambda: process.fsync(files[0])) == errno.EIO
    late = process.open(str(path), os.O_RDWR)
    machine.mem.poison.unpoison(pfn)
    told = [refused(lambda each=each: process.fsync(each)) for each in (*files, untold, late)]
    assert told == [None, errno.EIO, errno.EIO, None]
    process.pwrite(late, 0, b"lost again")
    machine.mem.poison.poison(pfn, 0)
    assert refused(lambda: process.fsync(late)) == errno.EIO
    machine.mem.poison.unpoison(pfn)
    assert refused(lambda: process.fsync(files[1])) == errno.EIO
    assert refused(lambda: process.fsync(files[1])) is None


def test_dirty_pages_outlive_the_process(machine: Machine, process: Process, path: Path) -> None:
    """The cache is the machine's; whoever opens the file next may sync it."""
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"left")
    process.exit()
    machine.drop_caches()
    assert machine.vmstat()["nr_dirty"] == 1
    other = machine.process("b")
    again = other.open(str(path))
    assert other.pread(again, 0, 4) == b"left"
    other.fsync(again)
    assert path.read_bytes()[:4] == b"left"


# Writeback.


def test_flush_starts_writeback_which_ends_later(
    machine: Machine, process: Process, path: Path
) -> None:
    """The pages are clean at once, and under writeback until the disk has them."""
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"w" * 3 * PAGE)
    before = machine.vmstat()
    filemap_flush(machine.mem, file.f_mapping)
    assert changes(before, machine.vmstat()) == {"nr_dirty": -3, "nr_writeback": 3}
    assert flags_at(process, file, 0) & (PG_dirty | PG_writeback) == PG_writeback
    machine.audit()
    machine.finish_io()
    assert machine.vmstat()["nr_writeback"] == 0
    assert path.read_bytes()[: 3 * PAGE] == b"w" * 3 * PAGE


def test_writeback_makes_shared_entries_clean_and_read_only(
    machine: Machine, process: Process, path: Path
) -> None:
    """page_mkclean: the next store is noticed by a fault, in every process, and written again."""
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    child = process.fork()
    for each in (process, child):
        each.write(addr, b"first")
    private = process.mmap(2 * PAGE, file=file)
    process.write(private + PAGE, b"own")
    process.fsync(file)
    for each in (process, child):
        assert not int(ptes_of(each, addr)[addr // PAGE % NR]) & (PAGE_RW | PAGE_DIRTY)
    assert int(ptes_of(process, private)[(private // PAGE + 1) % NR]) & PAGE_RW
    before = machine.vmstat()
    child.write(addr, b"again")
    assert changes(before, machine.vmstat()) == {"pgfault": 1, "nr_dirty": 1}
    process.fsync(file)
    assert path.read_bytes()[:5] == b"again"
    assert path.read_bytes()[PAGE : 2 * PAGE] == page_bytes(1)


def test_page_dirtied_during_writeback_is_written_again(
    machine: Machine, process: Process, path: Path
) -> None:
    """By a store; a write(2) waits for the disk first."""
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.write(addr, b"1")
    filemap_flush(machine.mem, file.f_mapping)
    process.write(addr, b"2")
    assert flags_at(process, file, 0) & PG_dirty
    machine.audit()
    process.pwrite(file, 1, b"3")
    assert machine.vmstat()["nr_writeback"] == 0
    process.fsync(file)
    assert path.read_bytes()[:2] == b"23"


def test_poisoned_page_cannot_be_written_and_fsync_tells(
    machine: Machine, process: Process, path: Path
) -> None:
    """The disk's DMA fails: EIO; that page stays dirty, the others are written."""
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"w" * 3 * PAGE)
    pfn = process.cached_pfn(file, 1)
    assert pfn is not None
    machine.mem.poison.poison(pfn, 40)
    for _ in range(2):
        with expect(errno.EIO):
            process.fsync(file)
        assert machine.vmstat()["nr_dirty"] == 1
    assert path.read_bytes()[: 3 * PAGE] == b"w" * PAGE + page_bytes(1) + b"w" * PAGE
    machine.mem.poison.unpoison(pfn)
    process.fsync(file)
    assert path.read_bytes()[: 3 * PAGE] == b"w" * 3 * PAGE


def test_error_of_an_earlier_flush_is_told_once(
    machine: Machine, process: Process, path: Path
) -> None:
    """Whoever syncs next hears of it, then it is forgotten."""
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"w" * PAGE)
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    machine.mem.poison.poison(pfn, 0)
    filemap_flush(machine.mem, file.f_mapping)
    machine.mem.poison.unpoison(pfn)
    with expect(errno.EIO):
        process.fsync(file)
    process.fsync(file)
    assert path.read_bytes()[:PAGE] == b"w" * PAGE


# Truncation.


@pytest.mark.parametrize("size", [0, 1, PAGE, 5 * PAGE + 77, 16 * PAGE + 99, 17 * PAGE, 30 * PAGE])
def test_truncation_is_the_hosts_too(process: Process, path: Path, size: int) -> None:
    """At once, cut or grown; what was dirty behind the end is never written."""
    file = process.open(str(path), os.O_RDWR)
    expected = bytearray(path.read_bytes())
    process.pwrite(file, 6 * PAGE, b"dirty")
    expected[6 * PAGE : 6 * PAGE + 5] = b"dirty"
    process.pread(file, 0, 17 * PAGE)
    process.ftruncate(file, size)
    del expected[size:]
    expected.extend(bytes(size - len(expected)))
    assert path.stat().st_size == file.inode.i_size == size
    assert process.pread(file, 0, 1 << 20) == expected
    process.fsync(file)
    assert path.read_bytes() == expected


def test_cut_bytes_do_not_come_back(process: Process, path: Path) -> None:
    """Grown again in the same page, the file shows zeros, cached and on the disk."""
    file = process.open(str(path), os.O_RDWR)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 4 * PAGE)
    process.ftruncate(file, PAGE + 10)
    with pytest.raises(BusError):
        process.read(addr + 2 * PAGE, 1)
    process.ftruncate(file, 3 * PAGE)
    expected = block_bytes(0, 2)[: PAGE + 10] + bytes(2 * PAGE - 10)
    assert process.read(addr, 3 * PAGE) == expected
    process.pwrite(file, PAGE, b"w")
    process.fsync(file)
    assert path.read_bytes() == expected[:PAGE] + b"w" + expected[PAGE + 1 :]


# Opening.


def test_open_takes_what_the_hosts_open_does(process: Process, tmp_path: Path) -> None:
    """Its errors come through; a folder, or anything but a regular file, is EINVAL."""
    with expect(errno.ENOENT):
        process.open(str(tmp_path / "nowhere"))
    with expect(errno.EINVAL):
        process.open(str(tmp_path))
    with expect(errno.EISDIR):
        process.open(str(tmp_path), os.O_RDWR)
    with expect(errno.EINVAL):
        process.open(os.devnull)
    assert process.mm.files == []
    assert process.mem.inodes == []


def test_open_may_create_and_empty(process: Process, path: Path, tmp_path: Path) -> None:
    """O_CREAT makes the host's file, O_TRUNC cuts it."""
    new = process.open(str(tmp_path / "new"), os.O_RDWR | os.O_CREAT)
    process.pwrite(new, 0, b"made")
    process.fsync(new)
    assert (tmp_path / "new").read_bytes() == b"made"
    reader = process.open(str(path))
    process.pread(reader, 0, PAGE)
    process.open(str(path), os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b""
    assert process.pread(reader, 0, PAGE) == b""
    assert reader.f_mapping.nrpages == 0


def test_one_file_has_one_cache_by_whatever_name(process: Process, path: Path) -> None:
    """Device and number decide: hard and symbolic links lead to the same pages."""
    links = path.with_name("hard"), path.with_name("soft")
    links[0].hardlink_to(path)
    links[1].symlink_to(path)
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"one")
    for link in links:
        other = process.open(str(link))
        assert other.inode is file.inode
        assert process.pread(other, 0, 3) == b"one"


def test_writers_are_counted_while_they_have_it_open(machine: Machine, path: Path) -> None:
    """i_writecount: descriptors and mappings of files open for writing, until the last goes."""
    first, second = machine.process("a"), machine.process("b")
    reader = first.open(str(path))
    assert reader.inode.i_writecount == 0
    writers = [first.open(str(path), os.O_RDWR), second.open(str(path), os.O_WRONLY)]
    assert reader.inode.i_writecount == 2
    addr = first.mmap(PAGE, file=writers[0], shared=True)
    first.close(writers[0])
    second.exit()
    assert reader.inode.i_writecount == 1
    first.munmap(addr, PAGE)
    assert reader.inode.i_writecount == 0
    first.pread(reader, 0, 1)


def test_file_opened_for_reading_first_can_be_written_later(process: Process, path: Path) -> None:
    """The host's descriptor is exchanged for one that may write."""
    reader = process.open(str(path))
    process.pread(reader, 0, 1)
    writer = process.open(str(path), os.O_RDWR)
    process.pwrite(writer, 0, b"written")
    process.close(writer)
    process.fsync(reader)
    assert path.read_bytes()[:7] == b"written"


def test_file_takes_one_descriptor_of_the_host(path: Path) -> None:
    """However often it is opened; it is closed when the machine is gone."""

    def descriptors() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(link) == str(path.resolve()) for link in links)

    machine = Machine()
    process = machine.process("a")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDONLY, os.O_RDWR):
        process.open(str(path), flags)
        assert descriptors() == 1
    machine.audit()
    del machine, process
    gc.collect()
    assert descriptors() == 0


def test_read_only_open_leaves_huge_pages_alone(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Only writers must not meet them."""
    file, addr = program(machine, process, tmp_path / "program")
    again = process.open(str(tmp_path / "program"))
    assert process.is_huge(addr)
    assert process.pread(again, 0, HPAGE) == block_bytes()
    assert file.f_mapping.nr_thps == 1


def test_open_for_writing_empties_a_cache_with_huge_pages(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """All of it, huge or small; mappings read it anew, in small pages, and see what is written."""
    path = tmp_path / "program"
    file, addr = program(machine, process, path, 2)
    process.munmap(addr, HPAGE)
    writer = process.open(str(path), os.O_RDWR)
    assert (file.f_mapping.nr_thps, file.f_mapping.nrpages) == (0, 0)
    counts = machine.vmstat()
    assert counts["nr_file_hugepages"] == counts["nr_file_pmdmapped"] == counts["nr_mapped"] == 0
    process.pwrite(writer, HPAGE, b"patched")
    assert process.read(addr + HPAGE, HPAGE) == b"patched" + block_bytes(NR)[7:]
    assert not process.is_huge(addr + HPAGE)


def test_open_for_writing_keeps_a_cache_of_small_pages(process: Process, path: Path) -> None:
    """There is no reason to throw it away."""
    reader = process.open(str(path))
    process.pread(reader, 0, 4 * PAGE)
    nrpages = reader.f_mapping.nrpages
    process.open(str(path), os.O_RDWR)
    assert reader.f_mapping.nrpages == nrpages > 0


def test_private_copies_outlive_the_emptying(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """A debugger's breakpoints, a library's data: what the mm wrote is not the file's."""
    path = tmp_path / "program"
    file, addr = program(machine, process, path)
    data = process.mmap(2 * PAGE, file=file, offset=10 * PAGE)
    process.write(data, b"own")
    assert process.read(data + PAGE, PAGE) == page_bytes(11)
    writer = process.open(str(path), os.O_RDWR)
    assert file.f_mapping.nrpages == 0
    assert rss(process)["MM_ANONPAGES"] == 1
    assert rss(process)["MM_FILEPAGES"] == 0
    process.pwrite(writer, 10 * PAGE, b"new" * 3000)
    assert process.read(data, PAGE) == b"own" + page_bytes(10)[3:]
    assert process.read(data + PAGE, 3) == (b"new" * 3000)[PAGE : PAGE + 3]
    assert process.read(addr + 10 * PAGE, 3) == b"new"


@pytest.mark.parametrize("first", ["collapse", "open"])
def test_writer_and_collapse_never_miss_each_other(
    machine: Machine, process: Process, tmp_path: Path, first: str
) -> None:
    """Each says so before it looks: whoever looks last sees the other."""
    path = tmp_path / "program"
    path.write_bytes(block_bytes())
    file = process.open(str(path))
    addr = process.mmap(HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(addr, HPAGE)
    machine.lru_add_drain_all()
    collapse = machine.spawn(machine.collapse.steps(process, addr, is_khugepaged=False))
    opener = machine.spawn(process.open.steps(str(path), os.O_RDWR))
    collapse.run_until("nr_thps")
    opener.run_until("i_writecount")
    assert (file.f_mapping.nr_thps, file.inode.i_writecount) == (1, 1)
    order: list[Any] = [collapse, opener] if first == "collapse" else [opener, collapse]
    while not all(task.done for task in order):
        for task in order:
            while task.step():
                machine.audit()
    assert collapse.result is ScanResult.SCAN_FAIL
    assert isinstance(opener.result, File)
    assert file.f_mapping.nr_thps == machine.vmstat()["nr_file_hugepages"] == 0
    assert process.read(addr, HPAGE) == block_bytes()


def test_closed_file_is_still_cached(machine: Machine, process: Process, path: Path) -> None:
    """Opened again its pages are there; only drop_caches lets them be read anew."""
    file = process.open(str(path))
    process.pread(file, 0, PAGE)
    process.close(file)
    path.write_bytes(b"!" * 17 * PAGE)
    again = process.open(str(path))
    assert process.pread(again, 0, PAGE) == page_bytes(0)
    machine.drop_caches()
    assert process.pread(again, 0, PAGE) == b"!" * PAGE


def test_machines_do_not_share_a_cache(make_machine: MakeMachine, path: Path) -> None:
    """What one has not synced the other does not see."""
    first, second = (make_machine().process("a") for _ in range(2))
    writer, reader = first.open(str(path), os.O_RDWR), second.open(str(path))
    first.pwrite(writer, 0, b"first")
    assert second.pread(reader, 0, PAGE) == page_bytes(0)


# Against a file.

SIZE = HPAGE + 8 * PAGE
offsets = st.one_of(st.integers(0, 10 * PAGE), st.integers(HPAGE - 3 * PAGE, SIZE))
lengths = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, 300 * PAGE))
operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["pwrite", "store", "load", "pread"]), offsets, lengths),
        st.tuples(st.just("truncate"), offsets, st.just(0)),
        st.tuples(
            st.sampled_from(["fsync", "flush", "finish_io", "drop_caches", "pageout", "close"]),
            st.just(0),
            st.just(0),
        ),
        st.tuples(st.just("collapse"), st.just(0), st.just(0)),
    ),
    min_size=3,
    max_size=20,
)


class Shadowed:
    """A disk file that is opened for writing when that is needed, beside its expected bytes."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self.machine, self.process, self.path = machine, machine.process("a"), path
        self.expected = bytearray(block_bytes(3, NR + 4))
        path.write_bytes(self.expected)
        self.reader = self.process.open(str(path))
        self.code = self.process.mmap(SIZE, file=self.reader, prot=PROT_READ | PROT_EXEC)
        self.writer: File | None = None
        self.data = 0
        self.filler = 0

    def open(self) -> File:
        if self.writer is None:
            self.writer = self.process.open(str(self.path), os.O_RDWR)
            self.data = self.process.mmap(SIZE, file=self.writer, shared=True)
        return self.writer

    def close(self) -> None:
        if self.writer is not None:
            self.process.close(self.writer)
            self.process.munmap(self.data, SIZE)
            self.writer = None

    def bytes_of(self, length: int) -> bytes:
        self.filler += 1
        return block_bytes(self.filler * 4001, -(-length // PAGE))[:length]

    def apply(self, name: str, where: int, length: int) -> None:
        """Do one operation, and to the expected bytes what it must have done."""
        process, size = self.process, len(self.expected)
        stop = min(where + length, size, SIZE)
        if name == "pwrite":
            data = self.bytes_of(length)
            process.pwrite(self.open(), where, data)
            self.expected.extend(bytes(max(0, where - size)))
            self.expected[where : where + length] = data
        elif name == "truncate":
            process.ftruncate(self.open(), where)
            del self.expected[where:]
            self.expected.extend(bytes(max(0, where - size)))
        elif name == "store" and where < stop:
            data = self.bytes_of(stop - where)
            self.open()
            process.write(self.data + where, data)
            self.expected[where:stop] = data
        elif name == "load" and where < stop:
            assert process.read(self.code + where, stop - where) == self.expected[where:stop]
        elif name == "pread":
            data = process.pread(self.reader, where, length)
            assert data == self.expected[where : where + length]
        else:
            self.housekeeping(name)

    def housekeeping(self, name: str) -> None:
        """Nothing of this may change a byte."""
        machine, process = self.machine, self.process
        calls: dict[str, Callable[[], object]] = {
            "fsync": self.sync,
            "flush": lambda: filemap_flush(machine.mem, self.reader.f_mapping),
            "finish_io": machine.finish_io,
            "drop_caches": machine.drop_caches,
            "pageout": lambda: process.madvise(self.code, 40 * PAGE, Advice.MADV_PAGEOUT),
            "collapse": self.collapse,
            "close": self.close,
        }
        machine.lru_add_drain_all()
        calls.get(name, machine.lru_add_drain_all)()

    def collapse(self) -> None:
        """Make the first block huge, if it is all there: nobody may write, nothing be dirty."""
        if len(self.expected) < HPAGE:
            return
        self.close()
        self.sync()
        self.process.read(self.code, HPAGE)
        self.machine.lru_add_drain_all()
        self.machine.collapse(self.process, self.code, is_khugepaged=False)
        assert self.process.is_huge(self.code)

    def sync(self) -> None:
        self.process.fsync(self.reader)
        assert self.path.read_bytes() == self.expected


@settings(max_examples=40, deadline=None)
@given(operations)
def test_random_use_of_a_disk_file_is_that_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Cached, dirty, written, dropped, huge or truncated, its bytes are those that were written."""
    machine = small_machine("64M")
    shadowed = Shadowed(machine, tmp_path_factory.mktemp("disk") / "file")
    for name, where, length in steps:
        shadowed.apply(name, where, length)
        machine.audit()
    shadowed.sync()
    process = shadowed.process
    assert process.pread(shadowed.reader, 0, 2 * SIZE) == shadowed.expected
    process.exit()
    machine.drop_caches()
    machine.audit()
    counts = machine.vmstat()
    assert counts["nr_file_pages"] == counts["nr_dirty"] == counts["nr_writeback"] == 0
