"""VmFlags of /proc/pid/smaps (show_smap_vma_flags, fs/proc/task_mmu.c)."""

from __future__ import annotations

from pykhuge.mm.mm_types import VM_NORESERVE, VM_SHARED, VM_WRITE, ShmemInode, Vma

__all__ = ["vm_flag_names"]

# Bits that the model has no use for, and derives here.
VM_MAYREAD, VM_MAYWRITE, VM_MAYEXEC, VM_MAYSHARE = 0x10, 0x20, 0x40, 0x80
VM_ACCOUNT = 0x100000
MNEMONICS = {
    0x1: "rd",
    0x2: "wr",
    0x4: "ex",
    0x8: "sh",
    VM_MAYREAD: "mr",
    VM_MAYWRITE: "mw",
    VM_MAYEXEC: "me",
    VM_MAYSHARE: "ms",
    0x200: "um",
    0x400: "pf",
    0x1000: "uw",
    0x2000: "lo",
    0x4000: "io",
    0x20000: "dc",
    0x40000: "de",
    VM_ACCOUNT: "ac",
    VM_NORESERVE: "nr",
    0x400000: "ht",
    0x2000000: "wf",
    0x10000000: "mm",
    0x20000000: "hg",
    0x40000000: "nh",
}


def vm_flag_names(vma: Vma) -> tuple[str, ...]:
    """The two-letter names of a VMA's flags, in the order of their bits; "sd" is not modelled."""
    flags = _all_flags(vma)
    return tuple(name for bit, name in MNEMONICS.items() if flags & bit)


def _all_flags(vma: Vma) -> int:
    """vm_flags with the bits that mmap(2) and mprotect(2) set beside those that the model keeps."""
    flags = vma.vm_flags | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
    if flags & VM_SHARED:
        flags |= VM_MAYSHARE
        # do_mmap(): a file that may not be written to is mapped as if it were private.
        if not vma.may_write():
            flags &= ~(VM_SHARED | VM_MAYWRITE)
        return flags | _noreserve(vma)
    # accountable_mapping(), when it was mapped or became writable; that it was shows by anon_vma.
    if flags & VM_WRITE or vma.anon_vma is not None:
        flags |= VM_ACCOUNT
    return flags


def _noreserve(vma: Vma) -> int:
    """MAP_NORESERVE of shared anonymous memory: its file, which nobody else has, remembers."""
    inode = vma.vm_file.inode if vma.vm_file is not None else None
    if isinstance(inode, ShmemInode) and inode.name == "dev/zero":
        return inode.flags & VM_NORESERVE
    return 0
