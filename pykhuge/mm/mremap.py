"""Moving mappings (mm/mremap.c)."""

from __future__ import annotations

import errno

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.errors import check_int, os_error
from pykhuge.mm.fault import find_vma
from pykhuge.mm.file_table import unlink_file_vma
from pykhuge.mm.huge_memory import (
    OutOfMemory,
    pgtable_trans_huge_deposit,
    pgtable_trans_huge_withdraw,
    split_huge_pmd,
)
from pykhuge.mm.mm import (
    check_below_task_size,
    check_length,
    check_page_aligned,
    foresee_unmap,
    free_pgtables,
    insert_vma,
    isolate_vmas,
    page_align,
    release_files,
    unmap_range,
    vma_merge,
    vmas_in,
)
from pykhuge.mm.mm_types import (
    VM_UFFD_FLAGS,
    File,
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
        So it is after some errors (see `_make_room`).
    """
    check_int(old=old, length=length, new=new, new_length=new_length)
    check_page_aligned(old=old)
    check_length(length)
    check_length(new_length, "new_length")
    end, new_end = old + page_align(length), new + page_align(new_length)
    if mem.version.mremap_moves_many:
        _check_places(old, end, new, new_end)
        resized, first = end - old != new_end - new, find_vma(mm, old)
        if not resized and first is not None and first.vm_start <= old and first.vm_end < end:
            parts = vmas_in(mm, old, end)
            yield from _move_many(mem, mm, parts, old, end, new)
            return new
    yield from _move(mem, mm, old, end, new, new_end)
    return new


def _check_places(old: int, end: int, new: int, new_end: int) -> None:
    """Raises: OSError EINVAL if [old, end) cannot move to [new, new_end), whatever is mapped."""
    check_page_aligned(new=new)
    check_below_task_size(new, new_end)
    if old < new_end and new < end:
        raise os_error(errno.EINVAL, f"[{old:#x}, {end:#x}) and [{new:#x}, {new_end:#x}) overlap")


def _move_many(mem: Memory, mm: Mm, parts: list[Vma], old: int, end: int, new: int) -> Steps[None]:
    """Mapping by mapping, each over what is in its place; gaps stay gaps (remap_move)."""
    for vma in parts:
        if vma.userfaultfd_armed():
            raise os_error(errno.EFAULT, f"{vma} has a userfaultfd: allowed by itself alone")
        low, high = max(old, vma.vm_start), min(end, vma.vm_end)
        yield from _move(mem, mm, low, high, new + low - old, new + high - old)


def _make_room(
    mem: Memory, mm: Mm, old: int, end: int, new: int, new_end: int, files: list[File]
) -> None:
    """Unmap what is at the new place, and what is cut off; `files` gets those to be put.

    Until Linux 6.16 the source is looked at when that is done; since then before.
    Raises: OSError EFAULT, EINVAL.
    """
    early, moved_end = mem.version.mremap_moves_many, min(end, old + new_end - new)
    _check_one_mapping(mm, old, moved_end if early else old + PAGE_SIZE)
    if not early:
        _check_places(old, end, new, new_end)
    files += unmap_range(mem, mm, new, new_end)
    if moved_end < end:
        check_below_task_size(moved_end, end)
        files += unmap_range(mem, mm, moved_end, end)
    _check_one_mapping(mm, old, moved_end)


def _check_one_mapping(mm: Mm, start: int, end: int) -> None:
    """Raises: OSError EFAULT if [start, end) is not inside one mapping."""
    vma = find_vma(mm, start)
    if vma is None or vma.vm_start > start or vma.vm_end < end:
        raise os_error(errno.EFAULT, f"[{start:#x}, {end:#x}) is not inside one mapping")


def _move(mem: Memory, mm: Mm, old: int, end: int, new: int, new_end: int) -> Steps[None]:
    """mremap_to(): one mapping, or a part of one."""
    moved_end = min(end, old + new_end - new)
    yield from foresee_unmap(mem, mm, (new, new_end), (moved_end, end))
    yield Acquire(mm.mmap_lock, WRITE)
    files: list[File] = []
    try:
        _make_room(mem, mm, old, end, new, new_end, files)
    except OSError:
        yield Release(mm.mmap_lock)
        yield from release_files(mem, files)
        raise
    (vma,) = isolate_vmas(mem, mm, old, moved_end)
    # Without pages of its own it takes the place's offset, so that it can merge there (copy_vma).
    untouched = vma.anon_vma is None and vma.vm_file is None
    pgoff = new >> PAGE_SHIFT if untouched else vma.vm_pgoff
    moved = Vma(mm, new, new + moved_end - old, vma.vm_flags, pgoff)
    moved.userfaultfd_ctx, moved.vm_file = vma.userfaultfd_ctx, vma.vm_file
    moved.anon_shmem = vma.anon_shmem
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
