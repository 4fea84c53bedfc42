"""References that somebody outside the page tables takes on user pages (mm/gup.c)."""

from __future__ import annotations

import errno

import numpy as np

from pykhuge.hw.memory import PAGE_SIZE
from pykhuge.kernel.sched import Steps, WouldBlock
from pykhuge.mm.errors import BusError, SegmentationFault, UserFault, os_error
from pykhuge.mm.fault import access_vma, handle_mm_fault
from pykhuge.mm.mm_types import MMF_HAS_PINNED, Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    GUP_PIN_COUNTING_BIAS,
    Pfns,
    PG_head,
    PG_locked,
    PG_referenced,
    compound_head,
)
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    U_PRESENT,
    each_block,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.rmap import pmd_of, ptes_of, set_pmd
from pykhuge.mm.swap import mark_page_accessed, put_pages

__all__ = [
    "LockedPage",
    "UserPages",
    "follow_page",
    "get_user_pages",
    "lock_page",
    "populate",
]


class UserPages:
    """Pages held for a device or a pipe: by FOLL_PIN (`pinned`) or FOLL_GET. Release them once.

    pfns: int64[n], in the order of the range.
    """

    def __init__(self, mem: Memory, pfns: Pfns, *, pinned: bool) -> None:
        self._mem = mem
        self.pfns = pfns
        self.pinned = pinned
        self.locked = False
        self.released = False
        mem.user_pages.append(self)

    def release(self) -> None:
        """unpin_user_pages(), or put_page() of each. Raises: ValueError the second time."""
        if self._mem.panic is not None:
            raise self._mem.panic
        if self.released:
            raise ValueError("these pages are released already")
        self.released = True
        self._mem.user_pages.remove(self)
        if self.pinned:
            _unpin(self._mem, self.pfns)
        # The zero page, or a compound page, may be held many times over.
        pfns, times = np.unique(compound_head(self._mem.pages, self.pfns), return_counts=True)
        self._mem.pages.refcount[pfns] -= times - 1
        put_pages(self._mem, pfns)

    def hand_over(self) -> None:
        """The references are somebody else's from now on."""
        self.released = True
        self._mem.user_pages.remove(self)


class LockedPage(UserPages):
    """A page locked and referenced by kernel code (writeback, migration). Release it once."""

    def __init__(self, mem: Memory, head: int) -> None:
        super().__init__(mem, np.array([head]), pinned=False)
        self.locked = True
        mem.pages.flags[head] |= np.uint32(PG_locked)

    def release(self) -> None:
        """unlock_page() and put_page(). Raises: ValueError the second time."""
        if not self.released and self._mem.panic is None:
            self._mem.pages.flags[self.pfns] &= np.uint32(~PG_locked & 0xFFFFFFFF)
        super().release()


def lock_page(mem: Memory, mm: Mm, addr: int) -> LockedPage:
    """Lock the page that `addr` maps to, with a reference.

    Raises: ValueError if no page of the mm's own is there, WouldBlock if it is locked already.
    """
    pfn = follow_page(mem, mm, addr)
    if pfn is None or pfn in (mem.zero_pfn, mem.huge_zero_pfn):
        raise ValueError(f"addr={addr:#x}: allowed where a page of the process's own is present")
    head = mem.pages.head_of(pfn)
    if mem.pages.flags[head] & PG_locked:
        raise WouldBlock(f"page {head:#x} is locked")
    mem.pages.refcount[head] += 1
    return LockedPage(mem, head)


def _grab(mem: Memory, pfn: int, *, pinned: bool) -> None:
    """try_grab_page(): a compound page counts pins apart, others in the refcount's upper part."""
    head = mem.pages.head_of(pfn)
    compound = mem.pages.flags[head] & PG_head
    mem.pages.refcount[head] += GUP_PIN_COUNTING_BIAS if pinned and not compound else 1
    if pinned and compound:
        mem.pages.pincount[head] += 1
    if pfn not in (mem.zero_pfn, mem.huge_zero_pfn):
        mem.pages.flags[head] |= np.uint32(PG_referenced)


def _unpin(mem: Memory, pfns: Pfns) -> None:
    """Undo `_grab` but for one reference each, which the caller puts."""
    for pfn in pfns.tolist():
        head = mem.pages.head_of(pfn)
        if mem.pages.flags[head] & PG_head:
            mem.pages.pincount[head] -= 1
        else:
            mem.pages.refcount[head] -= GUP_PIN_COUNTING_BIAS - 1


def follow_page(mem: Memory, mm: Mm, addr: int, *, write: bool = False) -> int | None:
    """The frame that `addr` maps to; None if a read, or a write, would fault."""
    pmd = pmd_of(mem, mm, addr)
    if not pmd:
        return None
    wanted = PAGE_PRESENT | PAGE_RW if write else PAGE_PRESENT
    if pmd_trans_huge(pmd):
        return pte_pfn(pmd) + pte_index(addr) if pmd & wanted == wanted else None
    pte = int(mem.ram.words[pte_pfn(pmd), pte_index(addr)])
    return pte_pfn(pte) if pte & wanted == wanted else None


def get_user_pages(
    mem: Memory, mm: Mm, addr: int, length: int, *, pinned: bool
) -> Steps[UserPages]:
    """Fault [addr, addr + length) in and hold its pages: for writing when pinned, else for reading.

    Raises: OSError EFAULT where a task would get SIGSEGV or SIGBUS, also for poison: EHWPOISON is
    for those who ask for it by FOLL_HWPOISON; UserFault, OutOfMemory. Nothing is held then.
    """
    start, end = addr & -PAGE_SIZE, addr + length
    try:
        yield from _fault_in(mem, mm, start, end, write=pinned)
    except (SegmentationFault, BusError) as fault:
        raise os_error(errno.EFAULT, str(fault)) from fault
    pfns: list[int] = []
    for page in range(start, end, PAGE_SIZE):
        pfn = follow_page(mem, mm, page, write=pinned)
        assert pfn is not None
        _grab(mem, pfn, pinned=pinned)
        pfns.append(pfn)
    if pinned:
        mm.flags |= MMF_HAS_PINNED
    return UserPages(mem, np.array(pfns, np.int64), pinned=pinned)


def populate(mem: Memory, mm: Mm, start: int, end: int, *, write: bool) -> Steps[None]:
    """Fault [start, end) in and touch it, as mlock and MADV_POPULATE_* do (FOLL_TOUCH).

    Raises: what `handle_mm_fault` does, with all below the fault touched.
    """
    stop = start
    try:
        yield from handle_mm_fault(mem, mm, start, end, write=write)
        stop = end
    except (SegmentationFault, BusError, UserFault) as fault:
        stop = fault.address & -PAGE_SIZE
        raise
    finally:
        for low, high in each_block(start, stop):
            _touch(mem, mm, low, high, write=write)


def _touch(mem: Memory, mm: Mm, low: int, high: int, *, write: bool) -> None:
    """Mark one block's pages accessed, and for writing those dirty that no entry says are."""
    pmd = pmd_of(mem, mm, low)
    if not pmd:
        return
    if pmd_trans_huge(pmd):
        set_pmd(mem, mm, low, pmd | PAGE_ACCESSED | (PAGE_DIRTY if write else 0))
        return
    ptes = ptes_of(mem, mm, low, high)
    ptes = ptes[(ptes & U_PRESENT != 0) & (pte_pfns(ptes) != mem.zero_pfn)]
    clean = pte_pfns(ptes[ptes & np.uint64(PAGE_DIRTY) == 0])
    if write and len(clean):
        set_page_dirty(mem, clean)
    for head in compound_head(mem.pages, pte_pfns(ptes)).tolist():
        mark_page_accessed(mem, head)


def _fault_in(mem: Memory, mm: Mm, start: int, end: int, *, write: bool) -> Steps[None]:
    # Entries of a VMA without permission are not present to get_user_pages_fast either.
    page = start
    while page < end:
        page = access_vma(mm, page, write=write).vm_end
    while any(
        follow_page(mem, mm, page, write=write) is None for page in range(start, end, PAGE_SIZE)
    ):
        yield from handle_mm_fault(mem, mm, start, end, write=write)
