"""userfaultfd: ranges whose faults a program answers itself (mm/userfaultfd.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.errors import check_int, os_error
from pykhuge.mm.fault import find_vma
from pykhuge.mm.file_fault import map_file_pages
from pykhuge.mm.huge_memory import OutOfMemory, split_huge_pmd
from pykhuge.mm.mm import (
    change_vmas,
    check_below_task_size,
    check_length,
    check_page_aligned,
    vmas_in,
)
from pykhuge.mm.mm_types import (
    VM_SHARED,
    VM_UFFD_FLAGS,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    Mm,
    ShmemInode,
    Userfaultfd,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.mprotect import mkwrite_range, wrprotect_range
from pykhuge.mm.new_pages import VM_PAGE_PROT, map_new_pages, new_user_pages, pte_table
from pykhuge.mm.page_table import (
    PAGE_SPECIAL,
    PAGE_UFFD_WP,
    PTE_MARKER_POISONED,
    SWP_PTE_MARKER,
    each_block,
    is_marker,
    is_poison_marker,
    make_swap_pte,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
)
from pykhuge.mm.rmap import anon_vma_prepare, pmd_of, set_pmd, uffd_wp_lifted
from pykhuge.mm.shmem import shmem_add_pages

__all__ = [
    "uffd_copy",
    "uffd_poison",
    "uffd_register",
    "uffd_unregister",
    "uffd_writeprotect",
    "uffd_zeropage",
]

MARKER_POISONED = make_swap_pte(SWP_PTE_MARKER, PTE_MARKER_POISONED)


def uffd_register(
    mem: Memory, mm: Mm, ctx: Userfaultfd, addr: int, length: int, *, missing: bool, wp: bool
) -> Steps[None]:
    """UFFDIO_REGISTER: watch [addr, addr + length) for missing pages, writes, or both.

    What it watches for that already, and maybe for more, is left alone.
    """
    if not missing and not wp:
        raise os_error(errno.EINVAL, "missing=False wp=False: allowed one of them or both")
    flags = VM_UFFD_MISSING * missing | VM_UFFD_WP * wp
    end = _check_range(addr, length)
    yield Acquire(mm.mmap_lock, WRITE)
    try:
        for vma in _check_mapped(mm, addr, end):
            _check_can_userfault(vma)
            if not vma.may_write():
                raise os_error(errno.EPERM, f"the file mapped at {vma} is not open for writing")
            if vma.userfaultfd_ctx not in (None, ctx):
                raise os_error(errno.EBUSY, f"{vma} belongs to another userfaultfd")
    except OSError:
        yield Release(mm.mmap_lock)
        raise

    def watch(vma: Vma) -> tuple[int, Userfaultfd | None]:
        if vma.userfaultfd_ctx is ctx and vma.vm_flags & flags == flags:
            return vma.vm_flags, ctx
        return vma.vm_flags & ~VM_UFFD_FLAGS | flags, ctx

    change_vmas(mem, mm, addr, end, watch)
    yield Release(mm.mmap_lock)


def _check_range(addr: int, length: int) -> int:
    """validate_range(): the end of at least one page, all in user space. Raises: OSError EINVAL."""
    check_int(addr=addr, length=length)
    check_page_aligned(addr=addr, length=length)
    check_length(length)
    check_below_task_size(addr, addr + length)
    return addr + length


def _check_mapped(mm: Mm, start: int, end: int) -> list[Vma]:
    """The VMAs of a range. Raises: OSError EINVAL if there are none."""
    vmas = vmas_in(mm, start, end)
    if not vmas:
        raise os_error(errno.EINVAL, f"nothing is mapped in [{start:#x}, {end:#x})")
    return vmas


def _check_can_userfault(vma: Vma) -> None:
    """vma_can_userfault(). Raises: OSError EINVAL."""
    if vma.vm_file is not None and not isinstance(vma.vm_file.inode, ShmemInode):
        raise os_error(errno.EINVAL, f"{vma} maps a file on a disk: allowed memory, shmem")


def uffd_unregister(mem: Memory, mm: Mm, ctx: Userfaultfd, addr: int, length: int) -> Steps[None]:
    """UFFDIO_UNREGISTER: watch no longer; write protection by userfaultfd is lifted.

    Until Linux 6.16 what another userfaultfd watches is let go too.
    """
    end = _check_range(addr, length)
    yield Acquire(mm.mmap_lock, WRITE)
    try:
        for vma in _check_mapped(mm, addr, end):
            _check_can_userfault(vma)
            if mem.version.uffd_unregisters_its_own and vma.userfaultfd_ctx not in (None, ctx):
                raise os_error(errno.EINVAL, f"{vma} belongs to another userfaultfd")
    except OSError:
        yield Release(mm.mmap_lock)
        raise
    for vma in vmas_in(mm, addr, end):
        if vma.vm_flags & VM_UFFD_WP:
            _unprotect(mem, mm, max(addr, vma.vm_start), min(end, vma.vm_end))
    change_vmas(mem, mm, addr, end, lambda vma: (vma.vm_flags & ~VM_UFFD_FLAGS, None))
    yield Release(mm.mmap_lock)


def uffd_copy(mem: Memory, mm: Mm, addr: int, data: bytes) -> Steps[None]:
    """UFFDIO_COPY: answer missing faults with `data`, whole pages of it."""
    if len(data) % PAGE_SIZE:
        raise os_error(
            errno.EINVAL, f"data has {len(data)} bytes: allowed multiples of {PAGE_SIZE}"
        )
    end = _check_range(addr, len(data))
    yield from _fill_pages(
        mem, mm, addr, end, lambda page: _fill(mem, mm, page, data[page - addr :][:PAGE_SIZE])
    )


def _fill_pages(
    mem: Memory, mm: Mm, start: int, end: int, fill: Callable[[int], None]
) -> Steps[None]:
    """mfill_atomic(): page by page, all within one VMA.

    Raises: OSError of the first page; EAGAIN for one behind it.
    """
    yield Acquire(mm.mmap_lock, READ)
    try:
        vma = find_vma(mm, start)
        if vma is None or not vma.vm_start <= start < end <= vma.vm_end:
            raise os_error(errno.ENOENT, f"[{start:#x}, {end:#x}) is not inside one mapping")
        for page in range(start, end, PAGE_SIZE):
            try:
                fill(page)
            except OSError as error:
                if page == start:
                    raise
                raise os_error(errno.EAGAIN, f"filled up to {page:#x}: {error}") from error
    finally:
        mm.mmap_lock.unlock(mem.sched.current)


def uffd_zeropage(mem: Memory, mm: Mm, addr: int, length: int) -> Steps[None]:
    """UFFDIO_ZEROPAGE: answer missing faults with the zero page."""
    end = _check_range(addr, length)
    yield from _fill_pages(mem, mm, addr, end, lambda page: _map_zero(mem, mm, page))


def _map_zero(mem: Memory, mm: Mm, addr: int) -> None:
    vma, table, place = _missing(mem, mm, addr)
    if vma.vm_file is not None and vma.vm_flags & VM_SHARED:
        _fill_shmem(mem, vma, addr, table, place, bytes(PAGE_SIZE))
        return
    if mem.ram.words[table, place]:
        raise os_error(errno.EEXIST, f"{addr:#x} has a marker")
    anon_vma_prepare(mem, vma)
    mem.ram.words[table, place] = (mem.zero_pfn << PAGE_SHIFT) | VM_PAGE_PROT | PAGE_SPECIAL


def uffd_poison(mem: Memory, mm: Mm, addr: int, length: int) -> Steps[None]:
    """UFFDIO_POISON: answer missing faults with SIGBUS, as memory that is lost would.

    Later than the rest of the model: fc71884a5f59 ("mm: userfaultfd: add new UFFDIO_POISON ioctl",
    Linux 6.6). Nothing is overwritten, no marker either; UFFDIO_COPY does overwrite this one.
    Kernel: mfill_atomic_pte_poison.
    """
    end = _check_range(addr, length)
    yield from _fill_pages(mem, mm, addr, end, lambda page: _mark_poisoned(mem, mm, page))


def _mark_poisoned(mem: Memory, mm: Mm, addr: int) -> None:
    vma, table, place = _missing(mem, mm, addr, none=True)
    if not vma.vm_flags & VM_SHARED:
        anon_vma_prepare(mem, vma)
    mem.ram.words[table, place] = MARKER_POISONED


def _fill(mem: Memory, mm: Mm, addr: int, data: bytes) -> None:
    vma, table, place = _missing(mem, mm, addr)
    if vma.vm_file is not None and vma.vm_flags & VM_SHARED:
        _fill_shmem(mem, vma, addr, table, place, data)
        return
    anon_vma_prepare(mem, vma)
    pfns = new_user_pages(mem, vma, 1)
    if not len(pfns):
        raise OutOfMemory(f"no page for {addr:#x} of {mm.name}")
    mem.ram.pages[pfns[0]] = np.frombuffer(data, np.uint8)
    map_new_pages(mem, vma, addr, pfns, mem.ram.words[table, place : place + 1])


def _fill_shmem(mem: Memory, vma: Vma, addr: int, table: int, place: int, data: bytes) -> None:
    """A new page of the file, mapped at once (shmem_mfill_atomic_pte)."""
    assert vma.vm_file is not None
    inode, index = vma.vm_file.inode, vma.linear_page_index(addr)
    assert isinstance(inode, ShmemInode)
    if inode.i_mapping.i_pages.load(index):
        raise os_error(errno.EEXIST, f"page {index} of {inode.name} is there")
    memcg, nid = vma.mm.memcg, vma.mm.preferred_node
    pfns = shmem_add_pages(mem, inode, index, 1, memcg=memcg, nid=nid)
    mem.ram.pages[pfns[0]] = np.frombuffer(data, np.uint8)
    if is_poison_marker(int(mem.ram.words[table, place])):
        mem.ram.words[table, place] = 0
    map_file_pages(mem, vma, mem.ram.words[table], np.array([place]), pfns, write=True)


def _missing(mem: Memory, mm: Mm, addr: int, *, none: bool = False) -> tuple[Vma, int, int]:
    """The VMA, table and place of `addr`, which maps nothing; `none`: and has no marker."""
    vma = find_vma(mm, addr)
    if vma is None or vma.vm_start > addr or vma.userfaultfd_ctx is None:
        raise os_error(errno.ENOENT, f"{addr:#x} is not registered with a userfaultfd")
    pmd = pmd_of(mem, mm, addr)
    if pmd and pmd_trans_huge(pmd):
        raise os_error(errno.EEXIST, f"{addr:#x} is mapped")
    _check_file_size(vma, addr)
    table, place = pte_table(mem, mm, addr), pte_index(addr)
    pte = int(mem.ram.words[table, place])
    if pte and (none or not (is_marker(pte) or is_poison_marker(pte))):
        raise os_error(errno.EEXIST, f"{addr:#x} is mapped")
    return vma, table, place


def _check_file_size(vma: Vma, addr: int) -> None:
    """mfill_file_over_size(), for private mappings of a file as well."""
    inode = vma.vm_file.inode if vma.vm_file is not None else None
    if inode is not None and vma.linear_page_index(addr) << PAGE_SHIFT >= inode.i_size:
        raise os_error(errno.EFAULT, f"{addr:#x} lies behind the end of {inode.name}")


def uffd_writeprotect(mem: Memory, mm: Mm, addr: int, length: int, *, protect: bool) -> Steps[None]:
    """UFFDIO_WRITEPROTECT: protect what is mapped in the range, or lift it.

    VMA by VMA, up to one that is not registered for it: ENOENT.
    """
    end = _check_range(addr, length)
    yield Acquire(mm.mmap_lock, READ)
    try:
        vmas = vmas_in(mm, addr, end)
        if not vmas:
            raise os_error(errno.ENOENT, f"nothing is mapped in [{addr:#x}, {end:#x})")
        for vma in vmas:
            if not vma.vm_flags & VM_UFFD_WP:
                raise os_error(errno.ENOENT, f"{vma} is not registered for write protection")
            low, high = max(addr, vma.vm_start), min(end, vma.vm_end)
            if protect:
                wrprotect_range(mem, mm, low, high, PAGE_UFFD_WP)
            else:
                _unprotect(mem, mm, low, high)
    finally:
        mm.mmap_lock.unlock(mem.sched.current)


def _unprotect(mem: Memory, mm: Mm, start: int, end: int) -> None:
    """Take the uffd-wp mark away; pages that are this mm's alone become writable at once.

    Kernel: uffd_wp_range, with MM_CP_UFFD_WP_RESOLVE and MM_CP_TRY_CHANGE_WRITABLE.
    """
    for low, high in each_block(start, end):
        pmd = pmd_of(mem, mm, low)
        if pmd and pmd_trans_huge(pmd):
            if high - low == HPAGE_PMD_SIZE:
                set_pmd(mem, mm, low, pmd & ~PAGE_UFFD_WP)
                continue
            vma = find_vma(mm, low)
            assert vma is not None
            split_huge_pmd(mem, vma, low)
            pmd = pmd_of(mem, mm, low)
        if pmd:
            first = pte_index(low)
            ptes = mem.ram.words[pte_pfn(pmd), first : first + (high - low >> PAGE_SHIFT)]
            ptes[:] = uffd_wp_lifted(ptes)
    for vma in vmas_in(mm, start, end):
        if vma.vm_flags & VM_WRITE:
            mkwrite_range(mem, mm, max(start, vma.vm_start), min(end, vma.vm_end))
