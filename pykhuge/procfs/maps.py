"""/proc/pid/maps: a line for each VMA (show_map_vma, fs/proc/task_mmu.c)."""

from __future__ import annotations

import os

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.mm.mm_types import (
    VM_EXEC,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Inode,
    Mm,
    RegularInode,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory

__all__ = ["header", "map_line", "show_maps"]

# show_vma_header_prefix() pads up to here for a name: 25 characters and six pointers' worth.
NAME_COLUMN = 73


def show_maps(mem: Memory, mm: Mm) -> str:
    """The text of /proc/pid/maps."""
    return "".join(map_line(mem, vma) for vma in mm.vmas)


def map_line(mem: Memory, vma: Vma) -> str:
    """One line. An inode of shmem has the number by which page->mapping names its page cache."""
    offset, device, number = 0, (0, 0), 0
    if vma.vm_file is not None:
        offset = vma.vm_pgoff << PAGE_SHIFT
        device, number = _device_and_number(mem, vma.vm_file.inode)
    prefix = header(vma.vm_start, vma.vm_end, vma.vm_flags, offset, device, number)
    name = _path(vma)
    return (f"{prefix:{NAME_COLUMN}}{name}" if name else prefix) + "\n"


def header(
    start: int,
    end: int,
    flags: int = 0,
    offset: int = 0,
    device: tuple[int, int] = (0, 0),
    number: int = 0,
) -> str:
    """show_vma_header_prefix(), with the blank behind it."""
    letters = "".join(
        letter if flags & bit else "-"
        for bit, letter in ((VM_READ, "r"), (VM_WRITE, "w"), (VM_EXEC, "x"))
    )
    letters += "s" if flags & VM_SHARED else "p"
    major, minor = device
    return f"{start:08x}-{end:08x} {letters} {offset:08x} {major:02x}:{minor:02x} {number} "


def _device_and_number(mem: Memory, inode: Inode) -> tuple[tuple[int, int], int]:
    if isinstance(inode, RegularInode):
        device, number = next(key for key, each in mem.regular_inodes.items() if each is inode)
        return (os.major(device), os.minor(device)), number
    assert isinstance(inode, ShmemInode)
    # The kernel's own mount is the first that has no device; the others follow.
    mounts = [mem.shm_mnt, *mem.mounts]
    return (0, 1 + mounts.index(inode.i_sb)), inode.i_mapping.key


def _path(vma: Vma) -> str:
    """seq_file_path(): a file without a name is deleted."""
    if vma.vm_file is None:
        return ""
    inode = vma.vm_file.inode
    path = inode.path if isinstance(inode, RegularInode) else f"/{inode.name}"
    return path.replace("\n", "\\012") + " (deleted)" * (not inode.i_nlink)
