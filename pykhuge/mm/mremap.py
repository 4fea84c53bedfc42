"""Moving mappings (mm/mremap.c)."""

from __future__ import annotations

import errno

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.errors import os_error
from pykhuge.mm.fault import find_vma
from pykhuge.mm.file_table import unlink_file_vma
from pykhuge.mm.huge_memory import (
    OutOfMemory,
    pgtable_trans_huge_deposit,
    pgtable_trans_huge_withdraw,
    split_huge_pmd,
)
from pykhuge.mm.mm import (
    check_range,
    foresee_unmap,
    free_pgtables,
    insert_vma,
    isolate_vmas,
    release_files,
    unmap_range,
    vma_merge,
)
from pykhuge.mm.mm_types import (
    VM_UFFD_FLAGS,
    Mm,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import pmd_table, pte_table
from pykhuge.mm.page_table import (
    PAGE_UFFD_WP,
    pmd_trans_huge,
    pte_index,
)
from pykhuge.mm.rmap import (
    anon_vma_clone,
    pmd_of,
    ptes_of,
    set_pmd,
    uffd_wp_lifted,
    unlink_anon_vmas,
)

__all__ = ["do_mremap"]


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
    yield from foresee_unmap(mem, mm, new, new_end)
    yield Acquire(mm.mmap_lock, WRITE)
    vma = find_vma(mm, old)
    if vma is None or vma.vm_start > old or vma.vm_end < old_end:
        yield Release(mm.mmap_lock)
        raise os_error(errno.EFAULT, f"[{old:#x}, {old_end:#x}) is not inside one mapping")
    files = unmap_range(mem, mm, new, new_end)
    moved_end = min(old_end, old + new_end - new)
    if moved_end < old_end:
        files += unmap_range(mem, mm, moved_end, old_end)
    (vma,) = isolate_vmas(mem, mm, old, moved_end)
    # Without pages of its own it takes the place's offset, so that it can merge there (copy_vma).
    untouched = vma.anon_vma is None and vma.vm_file is None
    pgoff = new >> PAGE_SHIFT if untouched else vma.vm_pgoff
    moved = Vma(mm, new, new + moved_end - old, vma.vm_flags, pgoff)
    moved.userfaultfd_ctx, moved.vm_file = vma.userfaultfd_ctx, vma.vm_file
    moved.anon_vma = vma.anon_vma
    anon_vma_clone(moved, vma)
    insert_vma(mm, moved)
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
    moved = vma_merge(mem, mm, moved)
    if error is None:
        # No longer watched: and with it what it is one with in its new place (copy_vma merged it).
        moved.userfaultfd_ctx, moved.vm_flags = None, moved.vm_flags & ~VM_UFFD_FLAGS
    yield Release(mm.mmap_lock)
    yield from release_files(mem, files)
    if error is not None:
        raise error
    return new


def _move_page_tables(mem: Memory, old: Vma, new: Vma) -> None:
    mm, offset = old.mm, new.vm_start - old.vm_start
    lifts_wp = mem.version.mremap_lifts_uffd_wp and old.userfaultfd_ctx is not None
    keep = ~PAGE_UFFD_WP if lifts_wp else -1
    addr = old.vm_start
    while addr < old.vm_end:
        stop = min(
            old.vm_end,
            (addr & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE,
            (addr + offset & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE - offset,
        )
        pmd = pmd_of(mem, mm, addr)
        if pmd:
            pmd_table(mem, mm, addr + offset)
            whole = stop - addr == HPAGE_PMD_SIZE and not pmd_of(mem, mm, addr + offset)
            if whole and (pmd_trans_huge(pmd) or not lifts_wp):
                _move_pmd(mem, old, addr, addr + offset, pmd & keep)
            else:
                if pmd_trans_huge(pmd):
                    split_huge_pmd(mem, old, addr)
                if pmd_of(mem, mm, addr):  # a file's is gone: to be found again by a fault
                    _move_ptes(mem, mm, addr, stop, offset, lifts_wp=lifts_wp)
        addr = stop


def _move_ptes(mem: Memory, mm: Mm, start: int, stop: int, offset: int, *, lifts_wp: bool) -> None:
    """The new place gets a table even if there is nothing to move."""
    table, first = pte_table(mem, mm, start + offset), pte_index(start + offset)
    source = ptes_of(mem, mm, start, stop)
    moved = uffd_wp_lifted(source) if lifts_wp else source
    mem.ram.words[table, first : first + len(source)] = moved
    source[:] = 0


def _move_pmd(mem: Memory, vma: Vma, old: int, new: int, pmd: int) -> None:
    mm = vma.mm
    set_pmd(mem, mm, old, 0)
    set_pmd(mem, mm, new, pmd)
    if pmd_trans_huge(pmd) and vma.vm_file is None:
        pgtable_trans_huge_deposit(mm, new, pgtable_trans_huge_withdraw(mm, old))
