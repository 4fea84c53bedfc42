"""Address spaces: mmap, munmap, mlock, exit (mm/mmap.c).

Each call is steps: it takes mmap_lock for write, changes the VMAs and the page tables below them,
and drops it. Arguments are checked before the lock is taken.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Foresee, Release, Steps
from pykhuge.mm.errors import check_int, os_error
from pykhuge.mm.file_table import (
    foresee_evictions,
    link_file_vma,
    release_file,
    unlink_file_vma,
)
from pykhuge.mm.huge_memory import (
    free_page_table,
    split_huge_pmd,
)
from pykhuge.mm.mm_slot import khugepaged_enter_vma, khugepaged_exit
from pykhuge.mm.mm_types import (
    VM_SHARED,
    VM_WRITE,
    File,
    Mm,
    ShmemInode,
    Userfaultfd,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import PG_head, PG_tail
from pykhuge.mm.page_table import (
    PUD_SHIFT,
    U_PRESENT,
    each_block,
    pmd_trans_huge,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.rmap import (
    anon_vma_clone,
    mlock_page,
    munlock_pages,
    pmd_of,
    ptes_of,
    set_pmd,
    unlink_anon_vmas,
)
from pykhuge.mm.swap import lru_add_drain
from pykhuge.mm.zap import zap_page_range

__all__ = [
    "TASK_SIZE",
    "change_flags",
    "change_vmas",
    "do_mmap",
    "do_munmap",
    "exit_mmap",
    "foresee_unmap",
    "free_pgtables",
    "vmas_in",
]

# With page tables of four levels; the last page below the hole is nobody's (arch/x86).
TASK_SIZE = (1 << 47) - PAGE_SIZE
ULONG_MAX = (1 << 64) - 1


def check_length(length: int, name: str = "length") -> None:
    """Raises: OSError EINVAL if that is nothing."""
    if length <= 0:
        raise os_error(errno.EINVAL, f"{name}={length}: allowed 1 and more")


def check_page_aligned(**values: int) -> None:
    """Raises: OSError EINVAL naming the first of `values` that is no multiple of a page's size."""
    for name, value in values.items():
        if value % PAGE_SIZE:
            raise os_error(errno.EINVAL, f"{name}={value:#x}: allowed multiples of {PAGE_SIZE}")


def check_below_task_size(addr: int, end: int, error: int = errno.EINVAL) -> None:
    """Raises: OSError `error` if [addr, end) is not all user space."""
    if addr < 0 or end > TASK_SIZE:
        length = end - addr
        raise os_error(error, f"addr={addr:#x} length={length:#x}: allowed up to {TASK_SIZE:#x}")


def check_span(addr: int, length: int, *, wraps: int = errno.EINVAL) -> int:
    """The end of a range that may be empty, and may lie beyond all that can be mapped.

    Raises: OSError EINVAL; `wraps` if the range comes to 2^64, where addresses begin anew.
    """
    check_int(addr=addr, length=length)
    check_page_aligned(addr=addr)
    end = page_align(addr + length)
    if addr < 0 or length < 0 or end > ULONG_MAX:
        raise os_error(
            errno.EINVAL if addr < 0 or length < 0 else wraps,
            f"addr={addr:#x} length={length:#x}: allowed 0 and more, up to {ULONG_MAX:#x}",
        )
    return end


def page_align(size: int) -> int:
    """PAGE_ALIGN(): `size` rounded up to whole pages."""
    return size + PAGE_SIZE - 1 & -PAGE_SIZE


def vmas_in(mm: Mm, start: int, end: int) -> list[Vma]:
    """The VMAs that overlap [start, end), lowest first; none if that is empty."""
    return [vma for vma in mm.vmas if max(start, vma.vm_start) < min(end, vma.vm_end)]


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
    what is there; otherwise `addr` is only a hint: rounded to a page, passed over if it is 0,
    occupied, or too high.
    Raises: OSError EINVAL, ENOMEM, EACCES (the file is not open for that).
    """
    addr, length = _check_place(addr, length, fixed=fixed)
    if file is not None:
        _check_file_access(file, vm_flags)
    if fixed and addr is not None:
        yield from foresee_unmap(mem, mm, (addr, addr + length))
    yield Acquire(mm.mmap_lock, WRITE)
    replaced: list[File] = []
    if fixed and addr is not None:
        replaced = unmap_range(mem, mm, addr, addr + length)
    elif addr is None or vmas_in(mm, addr, addr + length):
        addr = _unmapped_area(mm, length, pgoff)
        if addr + length > TASK_SIZE:
            yield Release(mm.mmap_lock)
            raise os_error(errno.ENOMEM, f"length={length:#x}: allowed up to what is free")
    if file is None:
        pgoff = addr >> PAGE_SHIFT
    vma = Vma(mm, addr, addr + length, vm_flags, pgoff, vm_file=file)
    vma.anon_shmem = file is not None and _is_anon_shmem(file)
    insert_vma(mm, vma)
    khugepaged_enter_vma(mem, vma_merge(mem, mm, vma))
    yield Release(mm.mmap_lock)
    yield from release_files(mem, replaced)
    return addr


def _is_anon_shmem(file: File) -> bool:
    return isinstance(file.inode, ShmemInode) and not file.inode.i_nlink


def release_files(mem: Memory, files: list[File]) -> Steps[None]:
    for file in files:
        yield from release_file(mem, file)


def _check_place(addr: int | None, length: int, *, fixed: bool) -> tuple[int | None, int]:
    """Where do_mmap() looks first, if anywhere, and for how many bytes."""
    check_int(length=length)
    check_length(length)
    length = page_align(length)
    check_below_task_size(0, length, errno.ENOMEM)
    if addr is None:
        return None, length
    check_int(addr=addr)
    if addr < 0:
        raise os_error(errno.EINVAL, f"addr={addr:#x}: allowed 0 and more")
    if fixed:
        check_below_task_size(addr, addr + length, errno.ENOMEM)
        check_page_aligned(addr=addr)
        return addr, length
    hint = addr & -PAGE_SIZE
    return hint if 0 < hint <= TASK_SIZE - length else None, length


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


def insert_vma(mm: Mm, vma: Vma) -> None:
    link_file_vma(vma)
    mm.vmas.append(vma)
    mm.vmas.sort(key=lambda each: each.vm_start)


def _split(mm: Mm, vma: Vma, addr: int) -> Vma:
    """Cut `vma` at `addr`; returns the upper part. Huge PMDs across the cut are the caller's."""
    upper = Vma(mm, addr, vma.vm_end, vma.vm_flags, vma.linear_page_index(addr))
    upper.userfaultfd_ctx, upper.vm_file = vma.userfaultfd_ctx, vma.vm_file
    upper.anon_shmem = vma.anon_shmem
    upper.anon_vma = vma.anon_vma
    anon_vma_clone(upper, vma)
    vma.vm_end = addr
    insert_vma(mm, upper)
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


def vma_merge(mem: Memory, mm: Mm, vma: Vma) -> Vma:
    """vma_merge(): join `vma` with neighbours it cannot be told from; returns what it is then."""
    place, merged = mm.vmas.index(vma), vma
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
            khugepaged_enter_vma(mem, first)
            merged = first
    return merged


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
    """Unmap [addr, addr + length). Raises: OSError EINVAL."""
    check_int(addr=addr, length=length)
    check_page_aligned(addr=addr)
    check_length(length)
    end = page_align(addr + length)
    check_below_task_size(addr, end)
    yield from foresee_unmap(mem, mm, (addr, end))
    yield Acquire(mm.mmap_lock, WRITE)
    files = unmap_range(mem, mm, addr, end)
    yield Release(mm.mmap_lock)
    yield from release_files(mem, files)


def foresee_unmap(mem: Memory, mm: Mm, *ranges: tuple[int, int]) -> Steps[None]:
    """`foresee_evictions` of what unmapping these ranges, which do not overlap, gives up."""
    dropped = Counter(
        vma.vm_file
        for vma in mm.vmas
        if vma.vm_file is not None
        and vma.vm_end - vma.vm_start
        == sum(max(0, min(end, vma.vm_end) - max(start, vma.vm_start)) for start, end in ranges)
    )
    yield from foresee_evictions(mem, dropped)


def unmap_range(mem: Memory, mm: Mm, start: int, end: int) -> list[File]:
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


def change_vmas(
    mem: Memory,
    mm: Mm,
    start: int,
    end: int,
    change: Callable[[Vma], tuple[int, Userfaultfd | None]],
) -> list[tuple[int, int]]:
    """Give the VMAs of [start, end), cut to fit, the flags and userfaultfd that `change` returns.

    Those that have them already are left alone: nothing is cut, no huge PMD split. All is merged
    afterwards. Returns: the ranges that changed. Locks: mmap_lock for write.
    """
    changed = []
    for vma in vmas_in(mm, start, end):
        wanted = change(vma)
        if wanted == (vma.vm_flags, vma.userfaultfd_ctx):
            continue
        low, high = max(start, vma.vm_start), min(end, vma.vm_end)
        (part,) = isolate_vmas(mem, mm, low, high)
        part.vm_flags, part.userfaultfd_ctx = wanted
        changed.append((low, high))
    nr_before = 0
    while nr_before != len(mm.vmas):  # what is cut off at `end` may join what joined before it
        nr_before = len(mm.vmas)
        for vma in vmas_in(mm, start, end):
            if vma in mm.vmas:
                vma_merge(mem, mm, vma)
    return changed


def change_flags(
    mem: Memory, mm: Mm, start: int, end: int, change: Callable[[Vma], int]
) -> list[tuple[int, int]]:
    """`change_vmas` of the flags alone."""
    return change_vmas(mem, mm, start, end, lambda vma: (change(vma), vma.userfaultfd_ctx))


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


def mlock_vma_range(mem: Memory, mm: Mm, start: int, end: int, *, lock: bool) -> None:
    """Mark what is mapped in [start, end) as mlocked or not; the VMAs have VM_LOCKED already."""
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


def exit_mmap(mem: Memory, mm: Mm) -> Steps[None]:
    """The last user is gone: unmap everything.

    mm_users is 0 before the lock is taken, so that a collapse in progress sees it.
    """
    dropped = Counter(vma.vm_file for vma in mm.vmas if vma.vm_file is not None)
    dropped.update(mm.files)
    yield from foresee_evictions(mem, dropped)
    lock = mm.mmap_lock
    yield Foresee(f"acquire {lock.name} for write: {lock}", lambda: lock.available(WRITE))
    mm.mm_users = 0
    yield from khugepaged_exit(mem, mm)
    yield Acquire(lock, WRITE)
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
    yield from release_files(mem, files)
