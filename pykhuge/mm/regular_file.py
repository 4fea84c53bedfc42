"""Files on a disk: actual files of the host, by way of the page cache (fs/, mm/readahead.c).

A page is read from the host's file when somebody needs it, and written back there, if the file was
opened for writing, by `filemap_flush` and `fsync`. The file system knows nothing of huge pages
(READ_ONLY_THP_FOR_FS): khugepaged makes them while nobody may write, and `do_dentry_open` throws
them away before anybody can.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.errseq import errseq_check_and_advance, errseq_sample, errseq_set
from pykhuge.kernel.sched import Foresee, Preempt, Steps
from pykhuge.mm.errors import PageLocked, os_error
from pykhuge.mm.filemap import (
    add_to_page_cache,
    file_page,
    foresee_truncation,
    truncate_pages,
    wait_on_page,
    when_unlocked,
    zero_partial_page,
)
from pykhuge.mm.huge_memory import OutOfMemory
from pykhuge.mm.mm_types import AddressSpace, File, MemCgroup, RegularInode
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_dirty, PG_locked, PG_uptodate, PG_writeback
from pykhuge.mm.page_alloc import alloc_pages, charge
from pykhuge.mm.page_writeback import finish_io, start_page_writeback
from pykhuge.mm.rmap import page_mkclean
from pykhuge.mm.swap import lru_cache_add

__all__ = [
    "do_dentry_open",
    "filemap_flush",
    "fsync",
    "new_page",
    "page_cache_sync_readahead",
    "read_pages",
    "regular_truncate",
]


def do_dentry_open(
    mem: Memory, path: str, *, readable: bool, writable: bool, create: bool = False
) -> Steps[File]:
    """Open a file of the host.

    For writing, i_writecount goes up first; then, a full barrier later, huge pages are looked for,
    and if the cache has any it is emptied. Collapse does the same the other way round, so that one
    of the two always sees the other.
    Raises: OSError, as the host's open does; EINVAL for what is not a regular file.
    """
    inode = _inode_of(mem, path, writable, create)
    file = File(inode, readable, writable, mem.ra_pages)
    file.f_wb_err = errseq_sample(inode.i_mapping.wb_err)
    inode.i_count += 1
    if not writable:
        return file
    if inode.i_writecount < 0:
        inode.i_count -= 1
        raise os_error(errno.ETXTBSY, f"{path}: writing to it is denied")
    inode.i_writecount += 1
    mem.held_files.append(file)
    try:
        yield Preempt("i_writecount")
        if inode.i_mapping.nr_thps > 0:
            yield from foresee_truncation(mem, inode.i_mapping, 0, 1 << 52)
            # Private copies stay: executables and libraries are mapped that way.
            yield from truncate_pages(mem, inode.i_mapping, 0, 1 << 52, even_cows=False)
    except GeneratorExit:
        # A plain call that would have to wait is given up.
        inode.i_count -= 1
        inode.i_writecount -= 1
        raise
    finally:
        mem.held_files.remove(file)
    return file


def _inode_of(mem: Memory, path: str, writable: bool, create: bool) -> RegularInode:
    flags = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(path, flags | os.O_CLOEXEC | (os.O_CREAT if create else 0))
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise os_error(errno.EINVAL, f"{path}: allowed a regular file")
    key = (status.st_dev, status.st_ino)
    inode = mem.regular_inodes.get(key)
    if inode is None:
        inode = RegularInode(os.path.basename(path), status.st_size, path=path, fd=fd)
        inode.closer = weakref.finalize(inode, os.close, fd)
        mem.new_address_space(inode)
        mem.inodes.append(inode)
        mem.regular_inodes[key] = inode
    elif writable and not inode.writable:
        inode.closer()
        inode.fd, inode.closer = fd, weakref.finalize(inode, os.close, fd)
    else:
        os.close(fd)
    inode.writable = inode.writable or writable
    return inode


def read_pages(
    mem: Memory, file_mapping: AddressSpace, first: int, nr: int, *, memcg: MemCgroup, nid: int
) -> None:
    """Read those of pages [first, first + nr) that are not cached from the disk into the cache.

    Fewer where the file ends or memory does. A page that the disk cannot read is there, but not
    up to date. Kernel: page_cache_ra_unbounded.
    """
    inode = file_mapping.host
    assert isinstance(inode, RegularInode)
    end = min(first + nr, -(-inode.i_size // PAGE_SIZE))
    wanted = np.array(
        [index for index in range(first, end) if file_mapping.i_pages.load(index) <= 0], np.int64
    )
    if memcg.key:
        wanted = wanted[: max(0, memcg.limit - memcg.usage)]
    pfns = alloc_pages(mem, len(wanted), nid)
    if not len(pfns):
        return
    wanted = wanted[: len(pfns)]
    charge(mem, memcg, len(pfns))
    mem.pages.memcg[pfns] = memcg.key
    add_to_page_cache(mem, file_mapping, wanted, pfns)
    lru_cache_add(mem, pfns)
    for pfn, index in zip(pfns.tolist(), wanted.tolist(), strict=True):
        if _read_page(inode, index, mem.ram.pages[pfn]):
            mem.pages.flags[pfn] |= np.uint32(PG_uptodate)


def _read_page(inode: RegularInode, index: int, page: Pfns) -> bool:
    try:
        data = os.pread(inode.fd, PAGE_SIZE, index << PAGE_SHIFT)
    except OSError:
        return False
    page[: len(data)] = np.frombuffer(data, np.uint8)
    page[len(data) :] = 0
    return True


def page_cache_sync_readahead(
    mem: Memory, file: File, index: int, nr: int, *, memcg: MemCgroup, nid: int
) -> None:
    """Read page `index` and, as readahead sees fit, some behind it, of which `nr` are wanted.

    The window is the first one of a sequential read; the model has no asynchronous readahead.
    Kernel: page_cache_sync_ra, get_init_ra_size.
    """
    window = nr
    if file.ra_pages == 0:
        window = 1
    else:
        most = max(file.ra_pages, min(nr, mem.io_pages))
        size = 1 << max(nr - 1, 0).bit_length()
        if size <= most // 32:
            window = size * 4
        elif size <= most // 4:
            window = size * 2
        else:
            window = most
    read_pages(mem, file.f_mapping, index, window, memcg=memcg, nid=nid)


def read_folio(
    mem: Memory, file: File, index: int, window: range, *, memcg: MemCgroup, nid: int
) -> int:
    """The frame of page `index`, read from the disk with all of `window` if it is not cached.

    Raises: OSError EINVAL (behind the end), EIO; OutOfMemory; PageLocked.
    """
    mapping = file.f_mapping
    if index << PAGE_SHIFT >= file.inode.i_size:
        raise os_error(errno.EINVAL, f"page {index} of {file.inode.name}: allowed below its end")
    if mapping.i_pages.load(index) <= 0:
        read_pages(mem, mapping, window.start, len(window), memcg=memcg, nid=nid)
    if mapping.i_pages.load(index) <= 0:
        read_pages(mem, mapping, index, 1, memcg=memcg, nid=nid)
    entry = mapping.i_pages.load(index)
    if entry <= 0:
        raise OutOfMemory(f"no page for page {index} of {file.inode.name}")
    if mem.pages.flags[entry] & PG_locked:
        raise PageLocked(entry)
    if not mem.pages.flags[entry] & PG_uptodate:
        assert isinstance(file.inode, RegularInode)
        if not _read_page(file.inode, index, mem.ram.pages[entry]):
            raise os_error(errno.EIO, f"page {index} of {file.inode.name} cannot be read")
        mem.pages.flags[entry] |= np.uint32(PG_uptodate)
    return file_page(mem, entry, index)


def new_page(mem: Memory, file: File, index: int, *, memcg: MemCgroup, nid: int) -> int:
    """The frame of page `index`, which is to be written as a whole: not read from the disk.

    Raises: OutOfMemory, PageLocked.
    """
    mapping = file.f_mapping
    entry = mapping.i_pages.load(index)
    if entry > 0:
        if mem.pages.flags[entry] & PG_locked:
            raise PageLocked(entry)
        mem.pages.flags[entry] |= np.uint32(PG_uptodate)
        return entry
    room = not memcg.key or memcg.usage < memcg.limit
    pfns = alloc_pages(mem, 1 if room else 0, nid)
    if not len(pfns):
        raise OutOfMemory(f"no page for page {index} of {file.inode.name}")
    charge(mem, memcg, 1)
    mem.pages.memcg[pfns] = memcg.key
    add_to_page_cache(mem, mapping, np.array([index]), pfns)
    lru_cache_add(mem, pfns)
    mem.ram.pages[pfns] = 0
    mem.pages.flags[pfns] |= np.uint32(PG_uptodate)
    return int(pfns[0])


def filemap_flush(mem: Memory, mapping: AddressSpace) -> None:
    """Start to write all dirty pages to the disk; nobody waits for it.

    The disk reads them by DMA: what has a poisoned line cannot be written, stays dirty, and is told
    of by the next fsync (EIO).
    """
    inode = mapping.host
    assert isinstance(inode, RegularInode)
    for indexes, entries in mapping.i_pages.entries(0, 1 << 52):
        flags = mem.pages.flags[entries * (entries > 0)]
        ready = (entries > 0) & (flags & np.uint32(PG_dirty | PG_writeback | PG_locked) == PG_dirty)
        poisoned = mem.poison.lines[entries * ready] != 0
        if (poisoned & ready).any():
            mapping.wb_err = errseq_set(mapping.wb_err, errno.EIO)
        good = ready & ~poisoned
        for index, pfn in zip(indexes[good].tolist(), entries[good].tolist(), strict=True):
            length = min(PAGE_SIZE, inode.i_size - (index << PAGE_SHIFT))
            mem.ram.pages[pfn, length:] = 0  # what was mapped and written behind the end
            os.pwrite(inode.fd, mem.ram.pages[pfn, :length].tobytes(), index << PAGE_SHIFT)
        if good.any():
            page_mkclean(mem, entries[good])
            start_page_writeback(mem, entries[good])


def fsync(mem: Memory, file: File) -> Steps[None]:
    """Write all dirty pages, and wait for the disk.

    Raises: OSError EIO if one could not be written since this open file was last told.
    """
    yield Preempt("fsync")
    mapping = file.f_mapping
    unlocked = f"dirty pages of {file.inode.name} are unlocked"
    yield Foresee(unlocked, lambda: _locked_dirty_page(mem, mapping) is None)
    while (busy := _locked_dirty_page(mem, mapping)) is not None:
        yield from wait_on_page(mem, busy)
    finish_io(mem)
    filemap_flush(mem, mapping)
    finish_io(mem)
    error, mapping.wb_err, file.f_wb_err = errseq_check_and_advance(mapping.wb_err, file.f_wb_err)
    if error:
        raise os_error(error, f"{file.inode.name} could not be written")


def _locked_dirty_page(mem: Memory, mapping: AddressSpace) -> int | None:
    wanted = np.uint32(PG_locked | PG_dirty)
    for _, entries in mapping.i_pages.entries(0, 1 << 52):
        flags = mem.pages.flags[entries * (entries > 0)]
        found = entries[(entries > 0) & (flags & wanted == wanted)]
        if len(found):
            return int(found[0])
    return None


def regular_truncate(mem: Memory, inode: RegularInode, size: int) -> Steps[None]:
    """Give the file `size` bytes, on the host too; pages behind the new end leave the cache."""
    if size < inode.i_size:
        yield from foresee_truncation(mem, inode.i_mapping, size >> PAGE_SHIFT, 1 << 52)
    if size < inode.i_size and size % PAGE_SIZE:
        stop = min(inode.i_size, (size & -PAGE_SIZE) + PAGE_SIZE)
        yield from when_unlocked(mem, zero_partial_page, mem, inode.i_mapping, size, stop)
    shrinks = size < inode.i_size
    os.ftruncate(inode.fd, size)
    inode.i_size = size
    if shrinks:
        first = -(-size // PAGE_SIZE)
        yield from truncate_pages(mem, inode.i_mapping, first, 1 << 52, even_cows=True)
