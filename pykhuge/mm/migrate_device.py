"""Moving an anonymous page to device memory (mm/migrate_device.c).

A device-coherent page is mapped by an ordinary present entry, but it is no normal page: it is on no
LRU list and cannot be part of a huge page.
"""

from __future__ import annotations

import errno

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.errors import os_error
from pykhuge.mm.fault import access_vma
from pykhuge.mm.mm_types import Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import PG_anon_exclusive, PG_locked, PG_lru, PG_swapcache, PG_zone_device
from pykhuge.mm.page_table import PAGE_PRESENT, PFN_MASK, pmd_trans_huge, pte_index, pte_pfn
from pykhuge.mm.rmap import page_add_anon_rmap, page_remove_rmap, pmd_of
from pykhuge.mm.swap import lru_add_drain_all, put_pages

__all__ = ["migrate_to_device"]


def migrate_to_device(mem: Memory, mm: Mm, addr: int) -> Steps[int]:
    """Move the base page at `addr`, which this mm alone maps, to a frame of device memory.

    Counters stay what they were: the page is as anonymous there as here.
    Returns: the frame. Raises: OSError EFAULT (no page), EBUSY (shared, pinned, locked, in the swap
    cache or compound), ENOMEM; KernelPanic if the page is poisoned, for this copy has no recovery.
    Kernel: migrate_vma_setup, migrate__normal_pages with MIGRATE_VMA_SELECT_SYSTEM.
    """
    yield Acquire(mm.mmap_lock, READ)
    try:
        pfn = _migrate_page(mem, access_vma(mm, addr, write=False), addr)
    except BaseException:
        mm.mmap_lock.unlock(mem.sched.current)
        raise
    yield Release(mm.mmap_lock)
    return pfn


def _migrate_page(mem: Memory, vma: Vma, addr: int) -> int:
    pmd = pmd_of(mem, vma.mm, addr) or 0
    if pmd_trans_huge(pmd):
        raise os_error(errno.EBUSY, f"a huge page maps {addr:#x}")
    table, slot = pte_pfn(pmd), pte_index(addr)
    old = _normal_page(mem, table, slot) if pmd else None
    if old is None:
        raise os_error(errno.EFAULT, f"no page of the process's own is present at {addr:#x}")
    lru_add_drain_all(mem)
    pages = mem.pages
    flags = int(pages.flags[old])
    if flags & (PG_locked | PG_swapcache) or not flags & PG_lru or pages.is_compound(old):
        raise os_error(errno.EBUSY, f"page {old:#x} at {addr:#x} cannot be isolated")
    if pages.mapcount[old] != 1 or pages.refcount[old] != 1:
        raise os_error(errno.EBUSY, f"page {old:#x} at {addr:#x} is used by others")
    new = _alloc_device_page(mem)
    copy_mc_page(mem, new, old, consumer="migrate_copy", recovery=False)
    pages.memcg[new], pages.memcg[old] = pages.memcg[old], 0
    page_remove_rmap(mem, np.array([old]), vma)
    page_add_anon_rmap(mem, new, vma, addr, exclusive=bool(flags & PG_anon_exclusive))
    pages.flags[new] |= flags & np.uint32(~(PG_lru | PG_anon_exclusive) & 0xFFFFFFFF)
    word = int(mem.ram.words[table, slot])
    mem.ram.words[table, slot] = word & ~PFN_MASK | new << PAGE_SHIFT
    put_pages(mem, np.array([old]))
    return new


def _normal_page(mem: Memory, table: int, slot: int) -> int | None:
    """vm_normal_page() of one entry, device pages aside: None for holes, swap, the zero page."""
    pte = int(mem.ram.words[table, slot])
    if not pte & PAGE_PRESENT or pte_pfn(pte) == mem.zero_pfn or mem.is_device(pte_pfn(pte)):
        return None
    return pte_pfn(pte)


def _alloc_device_page(mem: Memory) -> int:
    free = np.flatnonzero(mem.pages.refcount[mem.device_start :] == 0)
    if not len(free):
        raise os_error(errno.ENOMEM, "no free frame of device memory: see Machine(device_memory=)")
    pfn = mem.device_start + int(free[0])
    mem.pages.flags[pfn] = PG_zone_device
    mem.pages.refcount[pfn] = 1
    return pfn
