"""Address spaces: mmap, munmap, mprotect, mremap, mlock, fork, exit (mm/mmap.c, kernel/fork.c).

Each call is steps: it takes mmap_lock for write, changes the VMAs and the page tables below them,
and drops it. Arguments are checked before the lock is taken.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.errors import os_error
from pykhuge.mm.fault import find_vma
from pykhuge.mm.file_table import link_file_vma, release_file, unlink_file_vma
from pykhuge.mm.huge_memory import (
    OutOfMemory,
    alloc_page_table,
    free_page_table,
    pgtable_trans_huge_deposit,
    pgtable_trans_huge_withdraw,
    split_huge_pmd,
)
from pykhuge.mm.mm_types import (
    MMF_DISABLE_THP,
    MMF_HAS_PINNED,
    VM_DONTCOPY,
    VM_LOCKED,
    VM_SHARED,
    VM_UFFD_FLAGS,
    VM_WIPEONFORK,
    VM_WRITE,
    File,
    Mm,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import pmd_table, pte_table
from pykhuge.mm.page import Pfns, PG_anon_exclusive, PG_head, PG_tail
from pykhuge.mm.page_alloc import alloc_pages, charge
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_SWP_EXCLUSIVE,
    PAGE_SWP_UFFD_WP,
    PAGE_UFFD_WP,
    PAGE_USER,
    PUD_SHIFT,
    SWP_PTE_MARKER,
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    each_block,
    is_swap_ptes,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.rmap import (
    MARKER_UFFD_WP,
    anon_vma_clone,
    anon_vma_new,
    mlock_page,
    mod_mm_pages,
    munlock_pages,
    page_add_new_anon_rmap,
    pmd_of,
    ptes_of,
    set_pmd,
    unlink_anon_vmas,
)
from pykhuge.mm.swap import lru_add_drain, lru_cache_add, put_pages
from pykhuge.mm.swap_state import swap_duplicate
from pykhuge.mm.vmstat import MM_ANONPAGES, MM_SWAPENTS
from pykhuge.mm.zap import swap_slots, zap_page_range

__all__ = [
    "TASK_SIZE",
    "change_flags",
    "do_mmap",
    "do_mprotect",
    "do_mremap",
    "do_munmap",
    "dup_mmap",
    "exit_mmap",
    "free_pgtables",
    "vmas_in",
]

TASK_SIZE = 1 << 47
SWAP_FLAGS = np.uint64(PAGE_SWP_UFFD_WP)


def check_range(addr: int, length: int) -> int:
    """The end of an address range, checked as system calls do. Raises: OSError EINVAL, ENOMEM."""
    if addr % PAGE_SIZE:
        raise os_error(errno.EINVAL, f"addr={addr:#x}: allowed multiples of {PAGE_SIZE}")
    if length <= 0:
        raise os_error(errno.EINVAL, f"length={length}: allowed 1 and more")
    end = addr + (length + PAGE_SIZE - 1 & -PAGE_SIZE)
    if not 0 <= addr < end <= TASK_SIZE:
        raise os_error(
            errno.ENOMEM, f"addr={addr:#x} length={length:#x}: allowed up to {TASK_SIZE:#x}"
        )
    return end


def vmas_in(mm: Mm, start: int, end: int) -> list[Vma]:
    """The VMAs that overlap [start, end), lowest first."""
    return [vma for vma in mm.vmas if vma.vm_start < end and vma.vm_end > start]


def do_mmap(
    mem: Memory,
    mm: Mm,
    addr: int | None,
    length: int,
    vm_flags: int,
    *,
    fixed: bool,
    file: File | None = None,
    pgoff: int = 0,
) -> Steps[int]:
    """Map anonymous private memory, or `file` from page `pgoff` on.

    Without an address, the lowest gap above mmap_base is taken; if `length` is 2 MiB or more, in
    step with 2 MiB blocks, of the file if there is one (thp_get_unmapped_area). `fixed` replaces
    what is there; otherwise an occupied `addr` is only a hint.
    Raises: OSError EINVAL, ENOMEM, EACCES (the file is not open for that).
    """
    if file is not None:
        _check_file_access(file, vm_flags)
    if length <= 0:
        raise os_error(errno.EINVAL, f"length={length}: allowed 1 and more")
    if addr is not None:
        check_range(addr, length)
    length = length + PAGE_SIZE - 1 & -PAGE_SIZE
    yield Acquire(mm.mmap_lock, WRITE)
    replaced: list[File] = []
    if fixed and addr is not None:
        replaced = _unmap(mem, mm, addr, addr + length)
    elif addr is None or vmas_in(mm, addr, addr + length):
        addr = _unmapped_area(mm, length, pgoff)
        if addr + length > TASK_SIZE:
            yield Release(mm.mmap_lock)
            raise os_error(errno.ENOMEM, f"length={length:#x}: allowed up to what is free")
    if file is None:
        pgoff = addr >> PAGE_SHIFT
    vma = Vma(mm, addr, addr + length, vm_flags, pgoff, vm_file=file)
    _insert(mm, vma)
    _merge(mem, mm, vma)
    yield Release(mm.mmap_lock)
    yield from _release_files(mem, replaced)
    return addr


def _release_files(mem: Memory, files: list[File]) -> Steps[None]:
    for file in files:
        yield from release_file(mem, file)


def _check_file_access(file: File, vm_flags: int) -> None:
    """Raises: OSError EACCES if a mapping with these flags needs more than `file` is open for."""
    if not file.readable:
        raise os_error(errno.EACCES, f"{file.inode.name} is not open for reading")
    if vm_flags & VM_SHARED and vm_flags & VM_WRITE and not file.writable:
        raise os_error(errno.EACCES, f"{file.inode.name} is not open for writing")


def _unmapped_area(mm: Mm, length: int, pgoff: int) -> int:
    align = HPAGE_PMD_SIZE if length >= HPAGE_PMD_SIZE else PAGE_SIZE
    offset = pgoff << PAGE_SHIFT
    addr = mm.mmap_base + offset % align
    for vma in mm.vmas:
        if vma.vm_end <= addr:
            continue
        if vma.vm_start >= addr + length:
            break
        addr = vma.vm_end + (offset - vma.vm_end) % align
    return addr


def _insert(mm: Mm, vma: Vma) -> None:
    link_file_vma(vma)
    mm.vmas.append(vma)
    mm.vmas.sort(key=lambda each: each.vm_start)


def _split(mm: Mm, vma: Vma, addr: int) -> Vma:
    """Cut `vma` at `addr`; returns the upper part. Huge PMDs across the cut are the caller's."""
    upper = Vma(mm, addr, vma.vm_end, vma.vm_flags, vma.linear_page_index(addr))
    upper.userfaultfd_ctx, upper.vm_file = vma.userfaultfd_ctx, vma.vm_file
    upper.anon_vma = vma.anon_vma
    anon_vma_clone(upper, vma)
    vma.vm_end = addr
    _insert(mm, upper)
    return upper


def isolate_vmas(mem: Memory, mm: Mm, start: int, end: int) -> list[Vma]:
    """Cut VMAs so that whole ones cover [start, end), and return those.

    Kernel: split_vma; vma_adjust_trans_huge splits a huge PMD that the cut goes through.
    """
    for vma in vmas_in(mm, start, end):
        part = vma
        for cut in (start, end):
            if part.vm_start < cut < part.vm_end:
                pmd = pmd_of(mem, mm, cut)
                if cut % HPAGE_PMD_SIZE and pmd and pmd_trans_huge(pmd):
                    split_huge_pmd(mem, part, cut)
                upper = _split(mm, part, cut)
                part = upper if cut == start else part
    return vmas_in(mm, start, end)


def _merge(mem: Memory, mm: Mm, vma: Vma) -> None:
    """vma_merge(): join `vma` with neighbours it cannot be told from."""
    place = mm.vmas.index(vma)
    for lower, upper in ((place, place + 1), (place - 1, place)):
        if lower < 0 or upper >= len(mm.vmas):
            continue
        first, second = mm.vmas[lower], mm.vmas[upper]
        if _can_merge(first, second):
            if first.anon_vma is None and second.anon_vma is not None:
                first.anon_vma = second.anon_vma
                anon_vma_clone(first, second)
            first.vm_end = second.vm_end
            _forget(mem, mm, second)


def _can_merge(first: Vma, second: Vma) -> bool:
    if first.vm_end != second.vm_start or first.vm_flags != second.vm_flags:
        return False
    if first.userfaultfd_ctx is not second.userfaultfd_ctx or first.vm_file is not second.vm_file:
        return False
    if first.linear_page_index(second.vm_start) != second.vm_pgoff:
        return False
    if first.anon_vma is None or second.anon_vma is None:
        # One without pages joins one that never forked away from another.
        return max(len(first.anon_vma_chain), len(second.anon_vma_chain)) <= 1
    return first.anon_vma is second.anon_vma and first.anon_vma_chain == second.anon_vma_chain


def _forget(mem: Memory, mm: Mm, vma: Vma) -> None:
    mm.vmas.remove(vma)
    unlink_anon_vmas(mem, vma)
    for file in unlink_file_vma(mem, vma):
        mem.held_files.remove(file)
        file.f_count -= 1  # the neighbour it has been joined with refers to the file too


def do_munmap(mem: Memory, mm: Mm, addr: int, length: int) -> Steps[None]:
    """Unmap [addr, addr + length)."""
    end = check_range(addr, length)
    yield Acquire(mm.mmap_lock, WRITE)
    files = _unmap(mem, mm, addr, end)
    yield Release(mm.mmap_lock)
    yield from _release_files(mem, files)


def _unmap(mem: Memory, mm: Mm, start: int, end: int) -> list[File]:
    """Unmap a range; returns the files of its VMAs, to be put once mmap_lock is dropped."""
    files: list[File] = []
    for vma in isolate_vmas(mem, mm, start, end):
        zap_page_range(mem, vma, vma.vm_start, vma.vm_end, drop_markers=True)
        mm.vmas.remove(vma)
        free_pgtables(mem, mm, vma.vm_start, vma.vm_end)
        unlink_anon_vmas(mem, vma)
        files += unlink_file_vma(mem, vma)
    return files


def free_pgtables(mem: Memory, mm: Mm, start: int, end: int) -> None:
    """Free the page tables of [start, end) in whose reach no VMA is left, then such PMD tables."""
    for block, _ in each_block(start & -HPAGE_PMD_SIZE, end):
        pmd = pmd_of(mem, mm, block)
        if pmd and not vmas_in(mm, block, block + HPAGE_PMD_SIZE):
            set_pmd(mem, mm, block, 0)
            free_page_table(mem, mm, pte_pfn(pmd))
    for gib in range(start >> PUD_SHIFT, (end - 1 >> PUD_SHIFT) + 1):
        if gib in mm.pmd_tables and not vmas_in(mm, gib << PUD_SHIFT, gib + 1 << PUD_SHIFT):
            free_page_table(mem, mm, mm.pmd_tables.pop(gib))


def change_flags(
    mem: Memory, mm: Mm, start: int, end: int, change: Callable[[Vma], int]
) -> list[Vma]:
    """Give the VMAs of [start, end), cut to fit, the flags that `change` returns; merge afterwards.

    Returns: the VMAs as they are then. Locks: mmap_lock for write.
    """
    for vma in isolate_vmas(mem, mm, start, end):
        vma.vm_flags = change(vma)
    for vma in vmas_in(mm, start, end):
        if vma in mm.vmas:
            _merge(mem, mm, vma)
    return vmas_in(mm, start, end)


def mapped_up_to(mm: Mm, start: int, end: int) -> int:
    """Where the first gap of [start, end) begins; `end` if there is none."""
    for vma in vmas_in(mm, start, end):
        if vma.vm_start > start:
            break
        start = vma.vm_end
    return min(start, end)


def check_whole(stop: int, end: int) -> None:
    """Raises: OSError ENOMEM if a range up to `end` has a gap at `stop`."""
    if stop < end:
        raise os_error(errno.ENOMEM, f"nothing is mapped at {stop:#x}")


def check_mapped(mm: Mm, start: int, end: int) -> None:
    """Raises: OSError ENOMEM if [start, end) has a gap."""
    check_whole(mapped_up_to(mm, start, end), end)


def do_mprotect(mem: Memory, mm: Mm, addr: int, length: int, prot: int) -> Steps[None]:
    """Change VM_READ, VM_WRITE, VM_EXEC of [addr, addr + length) to `prot`.

    Raises: OSError ENOMEM at the first gap; what lies below it is changed, as in the kernel.
    """
    if length == 0 and addr % PAGE_SIZE == 0:
        return
    end = check_range(addr, length)
    yield Acquire(mm.mmap_lock, WRITE)
    stop = mapped_up_to(mm, addr, end)
    denied = _first_denied(mm, addr, stop, prot)
    if denied is not None:
        stop = max(addr, denied.vm_start)
    changed: list[tuple[int, int]] = []

    def change(vma: Vma) -> int:
        flags = vma.vm_flags & ~0x7 | prot
        if flags != vma.vm_flags:
            changed.append((vma.vm_start, vma.vm_end))
        return flags

    change_flags(mem, mm, addr, stop, change)
    for low, high in changed:
        if prot & VM_WRITE:
            mkwrite_range(mem, mm, low, high)
        else:
            wrprotect_range(mem, mm, low, high)
    yield Release(mm.mmap_lock)
    if denied is not None:
        raise os_error(errno.EACCES, f"the file mapped at {denied} is not open for writing")
    check_whole(stop, end)


def _first_denied(mm: Mm, start: int, end: int, prot: int) -> Vma | None:
    """The first VMA whose file does not allow `prot` (VM_MAYWRITE is not set)."""
    for vma in vmas_in(mm, start, end) if prot & VM_WRITE else []:
        if vma.vm_flags & VM_SHARED and vma.vm_file is not None and not vma.vm_file.writable:
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
                ptes[swapped & (ptes >> np.uint64(SWP_TYPE_SHIFT) == 0)] |= SWAP_FLAGS


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


def do_mremap(mem: Memory, mm: Mm, old: int, length: int, new: int, new_length: int) -> Steps[int]:
    """Move [old, old + length) to `new`, replacing what is there (MREMAP_MAYMOVE | MREMAP_FIXED).

    What `new_length` cuts off is unmapped before the move, what it adds is empty. Whole page tables
    move where both ends are 2 MiB aligned; elsewhere huge PMDs are split first, and their subpages
    end up in foreign page tables.
    Raises: OSError EINVAL, EFAULT; OutOfMemory: the range is back where it was, `new` is unmapped.
    """
    old_end, new_end = check_range(old, length), check_range(new, new_length)
    if old < new_end and new < old_end:
        raise os_error(
            errno.EINVAL, f"[{old:#x}, {old_end:#x}) and [{new:#x}, {new_end:#x}) overlap"
        )
    yield Acquire(mm.mmap_lock, WRITE)
    vma = find_vma(mm, old)
    if vma is None or vma.vm_start > old or vma.vm_end < old_end:
        yield Release(mm.mmap_lock)
        raise os_error(errno.EFAULT, f"[{old:#x}, {old_end:#x}) is not inside one mapping")
    files = _unmap(mem, mm, new, new_end)
    moved_end = min(old_end, old + new_end - new)
    if moved_end < old_end:
        files += _unmap(mem, mm, moved_end, old_end)
    (vma,) = isolate_vmas(mem, mm, old, moved_end)
    # Without pages of its own it takes the place's offset, so that it can merge there (copy_vma).
    untouched = vma.anon_vma is None and vma.vm_file is None
    pgoff = new >> PAGE_SHIFT if untouched else vma.vm_pgoff
    moved = Vma(mm, new, new + moved_end - old, vma.vm_flags & ~VM_UFFD_FLAGS, pgoff)
    moved.vm_file = vma.vm_file
    moved.anon_vma = vma.anon_vma
    anon_vma_clone(moved, vma)
    _insert(mm, moved)
    error: OutOfMemory | None = None
    try:
        _move_page_tables(mem, vma, moved)
    except OutOfMemory as failure:
        # The tables that have moved find their old places still there: moving back cannot fail.
        _move_page_tables(mem, moved, vma)
        error, vma, moved = failure, moved, vma
    else:
        moved.vm_end = new_end
    mm.vmas.remove(vma)
    free_pgtables(mem, mm, vma.vm_start, vma.vm_end)
    unlink_anon_vmas(mem, vma)
    files += unlink_file_vma(mem, vma)
    _merge(mem, mm, moved)
    yield Release(mm.mmap_lock)
    yield from _release_files(mem, files)
    if error is not None:
        raise error
    return new


def _move_page_tables(mem: Memory, old: Vma, new: Vma) -> None:
    mm, offset = old.mm, new.vm_start - old.vm_start
    addr = old.vm_start
    while addr < old.vm_end:
        stop = min(
            old.vm_end,
            (addr & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE,
            (addr + offset & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE - offset,
        )
        pmd = pmd_of(mem, mm, addr)
        if pmd:
            if stop - addr == HPAGE_PMD_SIZE and not pmd_of(mem, mm, addr + offset):
                _move_pmd(mem, old, addr, addr + offset, pmd)
            else:
                if pmd_trans_huge(pmd):
                    split_huge_pmd(mem, old, addr)
                    if not pmd_of(mem, mm, addr):
                        addr = stop  # a file's: to be found again by a fault
                        continue
                source = ptes_of(mem, mm, addr, stop)
                if source.any():
                    table, first = pte_table(mem, mm, addr + offset), pte_index(addr + offset)
                    mem.ram.words[table, first : first + len(source)] = source
                    source[:] = 0
        addr = stop


def _move_pmd(mem: Memory, vma: Vma, old: int, new: int, pmd: int) -> None:
    mm = vma.mm
    pmd_table(mem, mm, new)
    set_pmd(mem, mm, old, 0)
    set_pmd(mem, mm, new, pmd)
    if pmd_trans_huge(pmd) and vma.vm_file is None:
        pgtable_trans_huge_deposit(mm, new, pgtable_trans_huge_withdraw(mm, old))


def mlock_vma_range(mem: Memory, mm: Mm, start: int, end: int, *, lock: bool) -> None:
    """Mark what is mapped in [start, end) as mlocked or not; the VMAs have VM_LOCKED already."""
    if start == end:
        return
    lru_add_drain(mem)
    for low, high in each_block(start, end):
        pmd = pmd_of(mem, mm, low)
        if not pmd:
            continue
        if pmd_trans_huge(pmd):
            pfns = np.array([pte_pfn(pmd)])
            pfns = pfns[pfns != (mem.huge_zero_pfn or -1)]
        else:
            ptes = ptes_of(mem, mm, low, high)
            pfns = pte_pfns(ptes[ptes & U_PRESENT != 0])
            pfns = pfns[
                (pfns != mem.zero_pfn) & (mem.pages.flags[pfns] & np.uint32(PG_head | PG_tail) == 0)
            ]
        if lock:
            for pfn in pfns.tolist():
                mlock_page(mem, pfn)
        else:
            munlock_pages(mem, pfns)


def dup_mmap(mem: Memory, mm: Mm, child: Mm) -> Steps[None]:
    """Fill `child` with a copy of `mm`'s address space, pages shared and write-protected in both.

    Raises: OutOfMemory; the child is then to be exited by the caller.
    Kernel: dup_mmap (kernel/fork.c), copy_page_range (mm/memory.c).
    """
    yield Acquire(mm.mmap_lock, WRITE)
    try:
        child.flags = mm.flags & MMF_DISABLE_THP
        child.mmap_base = mm.mmap_base
        for vma in list(mm.vmas):
            if not vma.vm_flags & VM_DONTCOPY:
                _dup_vma(mem, vma, child)
    except OutOfMemory:
        mm.mmap_lock.unlock(mem.sched.current)
        raise
    yield Release(mm.mmap_lock)


def _dup_vma(mem: Memory, vma: Vma, child: Mm) -> None:
    copy = Vma(
        child, vma.vm_start, vma.vm_end, vma.vm_flags & ~(VM_LOCKED | VM_UFFD_FLAGS), vma.vm_pgoff
    )
    copy.vm_file = vma.vm_file
    _insert(child, copy)
    # Pages of a file are found again by faults; only private copies must be handed on.
    if vma.vm_flags & VM_WIPEONFORK or vma.anon_vma is None:
        return
    anon_vma_clone(copy, vma)
    own = anon_vma_new(mem, vma.anon_vma.root or vma.anon_vma)
    own.vmas.append(copy)
    copy.anon_vma_chain.append(own)
    copy.anon_vma = own
    for low, high in each_block(vma.vm_start, vma.vm_end):
        pmd = pmd_of(mem, vma.mm, low)
        if pmd and pmd_trans_huge(pmd) and vma.vm_file is not None:
            continue
        if pmd and pmd_trans_huge(pmd) and not _copy_huge_pmd(mem, vma, copy, low, pmd):
            split_huge_pmd(mem, vma, low)
            pmd = pmd_of(mem, vma.mm, low)
        if pmd and not pmd_trans_huge(pmd):
            _copy_pte_range(mem, vma, copy, low, high)


def _copy_huge_pmd(mem: Memory, vma: Vma, copy: Vma, addr: int, pmd: int) -> bool:
    """Share a huge page with the child. False if it may be pinned: the child needs its own copy."""
    child, head, pages = copy.mm, pte_pfn(pmd), mem.pages
    zero = head == mem.huge_zero_pfn
    if not zero and pages.flags[head] & PG_anon_exclusive and _needs_cow_for_dma(mem, vma, head):
        return False
    pmd_table(mem, child, addr)
    pgtable_trans_huge_deposit(child, addr, alloc_page_table(mem, child))
    if not zero:
        pages.refcount[head] += 1
        pages.entire_mapcount[head] += 1
        pages.flags[head] &= np.uint32(~PG_anon_exclusive & 0xFFFFFFFF)
        mem.mod_mm(child, MM_ANONPAGES, HPAGE_PMD_NR)
    set_pmd(mem, vma.mm, addr, pmd & ~PAGE_RW)
    set_pmd(mem, child, addr, pmd & ~(PAGE_RW | PAGE_UFFD_WP | PAGE_ACCESSED))
    return True


def _needs_cow_for_dma(mem: Memory, vma: Vma, head: int) -> bool:
    return bool(vma.mm.flags & MMF_HAS_PINNED) and mem.pages.maybe_dma_pinned(head)


def _copy_pte_range(mem: Memory, vma: Vma, copy: Vma, low: int, high: int) -> None:
    """Copy one block's entries: pages shared and write-protected, swap entries duplicated."""
    source, pages = ptes_of(mem, vma.mm, low, high), mem.pages
    if not source.any():
        return
    first = pte_index(low)
    target = mem.ram.words[pte_table(mem, copy.mm, low), first : first + len(source)]
    markers = is_swap_ptes(source) & (source >> np.uint64(SWP_TYPE_SHIFT) == SWP_PTE_MARKER)
    swapped = is_swap_ptes(source) & ~markers
    source[swapped] &= np.uint64(~PAGE_SWP_EXCLUSIVE & (1 << 64) - 1)
    target[swapped] = source[swapped] & ~SWAP_FLAGS
    for slot in swap_slots(source[swapped]):
        swap_duplicate(mem, slot)
    mem.mod_mm(copy.mm, MM_SWAPENTS, int(np.count_nonzero(swapped)))

    present = np.flatnonzero(source & U_PRESENT)
    zero = present[pte_pfns(source[present]) == mem.zero_pfn]
    mask = np.uint64(~(PAGE_RW | PAGE_ACCESSED | PAGE_UFFD_WP) & (1 << 64) - 1)
    target[zero] = source[zero] & mask
    shared = present[pte_pfns(source[present]) != mem.zero_pfn]
    if vma.mm.flags & MMF_HAS_PINNED:
        shared = _copy_pinned(mem, copy, low, source, target, shared)
    pfns = pte_pfns(source[shared])
    pages.add_refs(pfns, +1)
    pages.mapcount[pfns] += 1
    pages.flags[pfns] &= np.uint32(~PG_anon_exclusive & 0xFFFFFFFF)
    source[shared] &= np.uint64(~PAGE_RW & (1 << 64) - 1)
    target[shared] = source[shared] & mask
    mod_mm_pages(mem, copy.mm, pfns, +1)


def _copy_pinned(
    mem: Memory, copy: Vma, low: int, source: Ptes, target: Ptes, shared: Pfns
) -> Pfns:
    """Give the child its own copy of exclusive pages that may be pinned; returns the rest.

    The copy here is not machine-check safe (copy_user_highpage): poison met by it kills the host.
    Kernel: copy_present_page.
    """
    rest = []
    for place in shared.tolist():
        pfn = pte_pfn(int(source[place]))
        head = mem.pages.head_of(pfn)
        if not (mem.pages.flags[pfn] & PG_anon_exclusive and mem.pages.maybe_dma_pinned(head)):
            rest.append(place)
            continue
        new = alloc_pages(mem, 1, copy.mm.preferred_node)
        if not len(new) or not charge(mem, copy.mm.memcg, 1):
            put_pages(mem, new)
            raise OutOfMemory(f"no page for {copy.mm.name} in place of pinned {pfn:#x}")
        mem.pages.memcg[new] = copy.mm.memcg.key
        copy_mc_page(mem, int(new[0]), pfn, consumer="copy_present_page", recovery=False)
        page_add_new_anon_rmap(
            mem, new, copy, np.array([copy.linear_page_index(low + (place << PAGE_SHIFT))])
        )
        mem.mod_mm(copy.mm, MM_ANONPAGES, +1)
        writable = PAGE_RW if copy.vm_flags & VM_WRITE else 0
        target[place] = (
            (int(new[0]) << PAGE_SHIFT)
            | PAGE_PRESENT
            | PAGE_USER
            | PAGE_ACCESSED
            | PAGE_DIRTY
            | writable
        )
        mem.pages.refcount[new] += 1
        lru_cache_add(mem, new)
    return np.array(rest, np.int64)


def exit_mmap(mem: Memory, mm: Mm) -> Steps[None]:
    """The last user is gone: unmap everything.

    mm_users is 0 before the lock is taken, so that a collapse in progress sees it.
    """
    mm.mm_users = 0
    try:
        yield Acquire(mm.mmap_lock, WRITE)
    except GeneratorExit:
        # A plain call that would have to wait is given up: then nothing has happened.
        mm.mm_users = 1
        raise
    for vma in list(mm.vmas):
        zap_page_range(mem, vma, vma.vm_start, vma.vm_end, drop_markers=True)
    files, mm.files = mm.files, []
    mem.held_files += files
    # One by one: a PMD table must stay until the last VMA below it has given up its page tables.
    while mm.vmas:
        vma = mm.vmas.pop()
        free_pgtables(mem, mm, vma.vm_start, vma.vm_end)
        unlink_anon_vmas(mem, vma)
        files += unlink_file_vma(mem, vma)
    mem.mms.remove(mm)
    yield Release(mm.mmap_lock)
    yield from _release_files(mem, files)
