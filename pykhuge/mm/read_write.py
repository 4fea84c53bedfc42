"""read() and write() of files, by way of the page cache (fs/read_write.c)."""

from __future__ import annotations

import errno

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT
from pykhuge.kernel.sched import Steps
from pykhuge.mm.errors import PageLocked, os_error
from pykhuge.mm.filemap import (
    foresee_page_locks,
    wait_on_page,
    wait_on_page_writeback,
    when_unlocked,
)
from pykhuge.mm.huge_memory import OutOfMemory, shmem_is_huge
from pykhuge.mm.mm_types import File, Mm, ShmemInode
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import PG_hwpoison
from pykhuge.mm.page_table import run_of_none
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.regular_file import new_page, read_folio
from pykhuge.mm.shmem import Sgp, shmem_add_pages, shmem_get_folio

__all__ = ["vfs_read", "vfs_write"]


def vfs_read(mem: Memory, mm: Mm, file: File, offset: int, length: int) -> Steps[bytes]:
    """Up to `length` bytes from `offset` on; fewer at the end of the file.

    Raises: OSError EIO if nothing could be read; KernelPanic on poison: the kernel's copy out of
    the page cache is not machine-check safe.
    """
    out = bytearray()
    end = min(offset + length, file.inode.i_size)
    while offset < end:
        stop = min(end, (offset & -PAGE_SIZE) + PAGE_SIZE)
        try:
            pfn = _page_to_read(mem, mm, file, offset >> PAGE_SHIFT)
        except PageLocked as locked:
            busy = locked.pfn
        except OSError:
            if out:
                break
            raise
        else:
            low = offset % PAGE_SIZE
            if pfn is None:
                out += bytes(stop - offset)
            elif mem.pages.flags[pfn] & PG_hwpoison:
                if out:
                    break
                raise os_error(
                    errno.EIO, f"page {offset >> PAGE_SHIFT} of {file.inode.name} is lost"
                )
            else:
                _check_poison(mem, pfn, low, low + stop - offset)
                out += mem.ram.pages[pfn, low : low + stop - offset].tobytes()
            offset = stop
            continue
        yield from wait_on_page(mem, busy)
        end = min(end, file.inode.i_size)
    return bytes(out)


def _page_to_read(mem: Memory, mm: Mm, file: File, index: int) -> int | None:
    nid, memcg = mm.preferred_node, mm.memcg
    if isinstance(file.inode, ShmemInode):
        return shmem_get_folio(mem, file.inode, index, Sgp.SGP_READ, memcg=memcg, nid=nid)
    window = range(index, index + max(1, file.ra_pages))
    return read_folio(mem, file, index, window, memcg=memcg, nid=nid)


def _check_poison(mem: Memory, pfn: int, low: int, high: int) -> None:
    word = int(mem.poison.lines[pfn])
    for line in range(low >> LINE_SHIFT, (high - 1 >> LINE_SHIFT) + 1):
        if word >> line & 1:
            mce = mem.poison.machine_check(
                pfn, line, cpu=mem.sched.current.cpu, consumer="copy_page_to_iter", recovered=False
            )
            raise mem.die_of_machine_check(mce)


def vfs_write(mem: Memory, mm: Mm, file: File, offset: int, data: bytes) -> Steps[int]:
    """Write `data` at `offset`; the file grows as needed. Returns: how many bytes were written.

    Raises: OSError ENOSPC, EIO, OutOfMemory if not one could be.
    """
    source, done = np.frombuffer(data, np.uint8), 0
    behind = -(-(offset + len(source)) // PAGE_SIZE)
    yield from foresee_page_locks(mem, file.f_mapping, offset >> PAGE_SHIFT, behind)
    while done < len(source):
        at = offset + done
        try:
            pfns = yield from when_unlocked(
                mem, _pages_to_write, mem, mm, file, at, len(source) - done
            )
        except (OSError, OutOfMemory):
            if done:
                break
            raise
        for pfn in pfns:
            at = offset + done
            nr = min(PAGE_SIZE - at % PAGE_SIZE, len(source) - done)
            mem.ram.pages[pfn, at % PAGE_SIZE : at % PAGE_SIZE + nr] = source[done : done + nr]
            done += nr
        set_page_dirty(mem, np.array(pfns))
        file.inode.i_size = max(file.inode.i_size, offset + done)
    return done


def _pages_to_write(mem: Memory, mm: Mm, file: File, offset: int, length: int) -> list[int]:
    """The page at `offset`, and those behind it that can be had at once."""
    index, nid, memcg = offset >> PAGE_SHIFT, mm.preferred_node, mm.memcg
    inode = file.inode
    if not isinstance(inode, ShmemInode):
        whole = offset % PAGE_SIZE == 0 and length >= PAGE_SIZE
        if whole or index << PAGE_SHIFT >= inode.i_size:
            page = new_page(mem, file, index, memcg=memcg, nid=nid)
        else:
            page = read_folio(mem, file, index, range(index, index + 1), memcg=memcg, nid=nid)
        wait_on_page_writeback(mem, np.array([page]))
        return [page]
    last = offset + length - 1 >> PAGE_SHIFT
    slots = inode.i_mapping.i_pages.node(index)[index % HPAGE_PMD_NR :][: last - index + 1]
    nr = run_of_none(slots)
    if nr and not shmem_is_huge(mem, inode, index, None):
        return shmem_add_pages(mem, inode, index, nr, memcg=memcg, nid=nid).tolist()  # type: ignore[no-any-return]
    page_or_none = shmem_get_folio(mem, inode, index, Sgp.SGP_WRITE, memcg=memcg, nid=nid)
    assert page_or_none is not None
    if mem.pages.flags[page_or_none] & PG_hwpoison:
        raise os_error(errno.EIO, f"page {index} of {inode.name} is lost")
    return [page_or_none]
