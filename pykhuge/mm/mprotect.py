"""Changing what may be done with mapped pages (mm/mprotect.c)."""

from __future__ import annotations

import contextlib
import errno

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_SIZE
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.errors import BusError, SegmentationFault, UserFault, os_error
from pykhuge.mm.fault import find_vma
from pykhuge.mm.gup import populate
from pykhuge.mm.huge_memory import OutOfMemory, split_huge_pmd
from pykhuge.mm.mm import change_flags, check_span, check_whole, mapped_up_to, vmas_in
from pykhuge.mm.mm_types import (
    VM_LOCKED,
    VM_SHARED,
    VM_WRITE,
    Mm,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import pte_table
from pykhuge.mm.page import PG_anon_exclusive
from pykhuge.mm.page_table import (
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_SWP_UFFD_WP,
    PAGE_UFFD_WP,
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    each_block,
    is_swap_ptes,
    pmd_trans_huge,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.rmap import (
    MARKER_UFFD_WP,
    pmd_of,
    ptes_of,
    set_pmd,
)

__all__ = ["do_mprotect", "mkwrite_range", "wrprotect_range"]


def do_mprotect(mem: Memory, mm: Mm, addr: int, length: int, prot: int) -> Steps[None]:
    """Change VM_READ, VM_WRITE, VM_EXEC of [addr, addr + length) to `prot`.

    Raises: OSError ENOMEM at the first gap; what lies below it is changed, as in the kernel.
    """
    end = check_span(addr, length, wraps=errno.ENOMEM)
    if end == addr:
        return
    yield Acquire(mm.mmap_lock, WRITE)
    stop = mapped_up_to(mm, addr, end)
    denied = _first_denied(mm, addr, stop, prot)
    if denied is not None:
        stop = max(addr, denied.vm_start)
    locked = [
        (max(addr, vma.vm_start), min(stop, vma.vm_end))
        for vma in vmas_in(mm, addr, stop)
        if prot & VM_WRITE and vma.vm_flags & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED
    ]
    changed = change_flags(mem, mm, addr, stop, lambda vma: vma.vm_flags & ~0x7 | prot)
    for low, high in changed:
        if prot & VM_WRITE:
            mkwrite_range(mem, mm, low, high)
        else:
            wrprotect_range(mem, mm, low, high)
    yield Release(mm.mmap_lock)
    for low, high in locked:
        # What is mlocked and private is copied now, not when it is written to; errors are ignored.
        with contextlib.suppress(BusError, SegmentationFault, OutOfMemory, UserFault):
            yield from populate(mem, mm, low, high, write=True)
    if denied is not None:
        raise os_error(errno.EACCES, f"the file mapped at {denied} is not open for writing")
    check_whole(stop, end)


def _first_denied(mm: Mm, start: int, end: int, prot: int) -> Vma | None:
    """The first VMA whose file does not allow `prot`."""
    for vma in vmas_in(mm, start, end) if prot & VM_WRITE else []:
        if not vma.may_write():
            return vma
    return None


def wrprotect_range(mem: Memory, mm: Mm, start: int, end: int, bits: int = 0) -> None:
    """Take PAGE_RW away from all entries of [start, end), and add `bits` (PAGE_UFFD_WP)."""
    keep = np.uint64(~PAGE_RW & (1 << 64) - 1)
    for low, high in each_block(start, end):
        pmd = pmd_of(mem, mm, low)
        vma = find_vma(mm, low)
        watched_file = bool(bits) and vma is not None and vma.vm_file is not None
        if pmd and pmd_trans_huge(pmd):
            assert vma is not None
            if high - low == HPAGE_PMD_SIZE and not watched_file:
                set_pmd(mem, mm, low, pmd & ~PAGE_RW | bits)
                continue
            split_huge_pmd(mem, vma, low)
        if watched_file:
            pte_table(mem, mm, low)
        if pmd_of(mem, mm, low):
            ptes = ptes_of(mem, mm, low, high)
            present, swapped = ptes & U_PRESENT != 0, is_swap_ptes(ptes)
            if watched_file:
                # Where no page is mapped, a marker remembers that it is protected.
                ptes[ptes == 0] = MARKER_UFFD_WP
            ptes[present] = ptes[present] & keep | np.uint64(bits)
            if bits & PAGE_UFFD_WP:
                entries = swapped & (ptes >> np.uint64(SWP_TYPE_SHIFT) == 0)
                ptes[entries] |= np.uint64(PAGE_SWP_UFFD_WP)


def mkwrite_range(mem: Memory, mm: Mm, start: int, end: int) -> None:
    """Make the entries of [start, end), which lies in a writable VMA, writable without a fault.

    Only where the page is this mm's alone and userfaultfd does not protect it.
    Kernel: can_change_pte_writable, can_change_pmd_writable (MM_CP_TRY_CHANGE_WRITABLE).
    """
    for low, high in each_block(start, end):
        pmd, vma = pmd_of(mem, mm, low), find_vma(mm, low)
        assert vma is not None
        if pmd and pmd_trans_huge(pmd):
            own_pmd = mem.pages.flags[pte_pfn(pmd)] & PG_anon_exclusive or vma.vm_flags & VM_SHARED
            if own_pmd and not pmd & PAGE_UFFD_WP:
                set_pmd(mem, mm, low, pmd | PAGE_RW)
        elif pmd:
            ptes = ptes_of(mem, mm, low, high)
            places = np.flatnonzero(ptes & np.uint64(PAGE_PRESENT | PAGE_UFFD_WP) == U_PRESENT)
            ptes[places[_own(mem, vma, ptes[places])]] |= np.uint64(PAGE_RW)


def _own(mem: Memory, vma: Vma, ptes: Ptes) -> npt.NDArray[np.bool_]:
    """Which present entries of a writable VMA may be written without a fault. Returns: bool[n]."""
    if vma.vm_file is not None and vma.vm_flags & VM_SHARED:
        if isinstance(vma.vm_file.inode, ShmemInode):
            return np.ones(len(ptes), np.bool_)
        # The file system must hear of the first write to a clean page.
        dirty: npt.NDArray[np.bool_] = ptes & np.uint64(PAGE_DIRTY) != 0
        return dirty
    own: npt.NDArray[np.bool_] = mem.pages.flags[pte_pfns(ptes)] & np.uint32(PG_anon_exclusive) != 0
    return own
