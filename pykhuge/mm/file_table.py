"""Open files, by whoever refers to them: descriptors and VMAs (fs/file_table.c)."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.filemap import foresee_truncation
from pykhuge.mm.mm_types import File, Inode, RegularInode, ShmemInode, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.shmem import shmem_evict_inode

__all__ = [
    "foresee_evictions",
    "fput",
    "get_file",
    "hold_file",
    "inode_locked",
    "link_file_vma",
    "release_file",
    "unlink_file_vma",
]

T = TypeVar("T")


def get_file(file: File) -> File:
    """One more refers to the open file."""
    file.f_count += 1
    return file


def hold_file(mem: Memory, file: File) -> File:
    """`get_file` for code in progress, which is to call `release_file`."""
    mem.held_files.append(file)
    return get_file(file)


def release_file(mem: Memory, file: File) -> Steps[None]:
    """Undo `hold_file`."""
    mem.held_files.remove(file)
    yield from fput(mem, file)


def fput(mem: Memory, file: File) -> Steps[None]:
    """One less does; the last one closes it, and takes a file without a name with it."""
    file.f_count -= 1
    if file.f_count:
        return
    inode = file.inode
    inode.i_count -= 1
    if isinstance(inode, RegularInode) and file.writable:
        inode.i_writecount -= 1
    if isinstance(inode, ShmemInode) and not inode.i_count and not inode.i_nlink:
        yield from shmem_evict_inode(mem, inode)


def foresee_evictions(mem: Memory, dropped: Counter[File]) -> Steps[None]:
    """To be asked before a call gives up references, `dropped` of each file.

    A file without a name goes with the last of them, and its locked pages will be waited for.
    """
    gone = Counter(file.inode for file, nr in dropped.items() if file.f_count == nr)
    for inode, nr in gone.items():
        if not inode.i_nlink and inode.i_count == nr:
            yield from foresee_truncation(mem, inode.i_mapping, 0, 1 << 52)


def inode_locked(mem: Memory, inode: Inode, call: Steps[T]) -> Steps[T]:
    """`call` with the inode locked: writes, truncation and preallocation exclude each other."""
    yield Acquire(inode.i_rwsem, WRITE)
    task = mem.sched.current
    try:
        result = yield from call
    except GeneratorExit:
        inode.i_rwsem.unlock(task)
        raise
    except BaseException:
        if mem.panic is None:
            yield Release(inode.i_rwsem)
        raise
    yield Release(inode.i_rwsem)
    return result


def link_file_vma(vma: Vma) -> None:
    """A new VMA of a file refers to it and is found by its i_mmap."""
    if vma.vm_file is not None:
        get_file(vma.vm_file).f_mapping.i_mmap.append(vma)


def unlink_file_vma(mem: Memory, vma: Vma) -> list[File]:
    """The VMA is found no more; returns its file, held, to be released without mmap_lock."""
    if vma.vm_file is None:
        return []
    vma.vm_file.f_mapping.i_mmap.remove(vma)
    mem.held_files.append(vma.vm_file)
    return [vma.vm_file]
