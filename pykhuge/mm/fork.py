"""A copy of an address space (kernel/fork.c, copy_page_range of mm/memory.c)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT
from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.huge_memory import (
    OutOfMemory,
    alloc_page_table,
    pgtable_trans_huge_deposit,
    split_huge_pmd,
)
from pykhuge.mm.mm import insert_vma
from pykhuge.mm.mm_slot import khugepaged_fork
from pykhuge.mm.mm_types import (
    MMF_DISABLE_THP,
    MMF_DISABLE_THP_EXCEPT_ADVISED,
    MMF_HAS_PINNED,
    VM_DONTCOPY,
    VM_LOCKED,
    VM_UFFD_FLAGS,
    VM_WIPEONFORK,
    VM_WRITE,
    Mm,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import pmd_table, pte_table
from pykhuge.mm.page import Pfns, PG_anon_exclusive
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
    mod_mm_pages,
    page_add_new_anon_rmap,
    pmd_of,
    ptes_of,
    set_pmd,
)
from pykhuge.mm.swap import lru_cache_add, put_pages
from pykhuge.mm.swap_state import swap_duplicate
from pykhuge.mm.vmstat import MM_ANONPAGES, MM_SWAPENTS
from pykhuge.mm.zap import swap_slots

__all__ = ["dup_mmap"]


def dup_mmap(mem: Memory, mm: Mm, child: Mm) -> Steps[None]:
    """Fill `child` with a copy of `mm`'s address space, pages shared and write-protected in both.

    Raises: OutOfMemory; the child is then to be exited by the caller.
    Kernel: dup_mmap (kernel/fork.c), copy_page_range (mm/memory.c).
    """
    yield Acquire(mm.mmap_lock, WRITE)
    try:
        child.flags = mm.flags & (MMF_DISABLE_THP | MMF_DISABLE_THP_EXCEPT_ADVISED)
        child.mmap_base = mm.mmap_base
        khugepaged_fork(mem, mm, child)
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
    copy.vm_file, copy.anon_shmem = vma.vm_file, vma.anon_shmem
    insert_vma(child, copy)
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
        if pmd is not None:
            pmd_table(mem, child, low)
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
    first = pte_index(low)
    target = mem.ram.words[pte_table(mem, copy.mm, low), first : first + len(source)]
    swapped = is_swap_ptes(source) & (source >> np.uint64(SWP_TYPE_SHIFT) == 0)
    lost = is_swap_ptes(source) & ~swapped & (source != MARKER_UFFD_WP)
    target[lost] = source[lost]
    source[swapped] &= np.uint64(~PAGE_SWP_EXCLUSIVE & (1 << 64) - 1)
    target[swapped] = source[swapped] & ~np.uint64(PAGE_SWP_UFFD_WP)
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
