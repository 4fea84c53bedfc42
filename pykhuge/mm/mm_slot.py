"""The address spaces that the daemon visits (struct khugepaged_mm_slot, linux/khugepaged.h).

An mm is registered once, when one of its VMAs has become eligible: by a fault, mmap, madvise, or by
birth from a parent that is. It leaves when it exits. This lies below faults, which register.
"""

from __future__ import annotations

from pykhuge.kernel.locking import WRITE
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.mm.huge_memory import hugepage_vma_check
from pykhuge.mm.mm_types import MMF_VM_HUGEPAGE, Mm, MmSlot, Vma
from pykhuge.mm.mmzone import Memory

__all__ = [
    "free_mm_slot",
    "khugepaged_add_pte_mapped_thp",
    "khugepaged_enter_vma",
    "khugepaged_exit",
    "khugepaged_fork",
]

MAX_PTE_MAPPED_THP = 8


def khugepaged_enter_vma(mem: Memory, vma: Vma, vm_flags: int | None = None) -> None:
    """Register the mm of `vma`, unless it is, if the VMA is eligible (with `vm_flags`)."""
    registered = vma.mm.flags & MMF_VM_HUGEPAGE
    if not registered and mem.thp.pmd_enabled() and hugepage_vma_check(mem, vma, vm_flags):
        _khugepaged_enter(mem, vma.mm)


def khugepaged_fork(mem: Memory, mm: Mm, child: Mm) -> None:
    """A child is registered if its parent is, whatever it inherits."""
    if mm.flags & MMF_VM_HUGEPAGE:
        _khugepaged_enter(mem, child)


def _khugepaged_enter(mem: Memory, mm: Mm) -> None:
    """Last in the list, to be visited last; the daemon is woken only if it had nobody to visit."""
    scan = mem.khugepaged_scan
    mm.flags |= MMF_VM_HUGEPAGE
    mm.mm_slot = MmSlot(mm)
    scan.mm_head.append(mm.mm_slot)
    if len(scan.mm_head) == 1:
        scan.wakeup()


def khugepaged_exit(mem: Memory, mm: Mm) -> Steps[None]:
    """An mm without users leaves the list, before its memory goes.

    If the daemon is at it, the daemon frees the slot when it moves on; here it is only waited for,
    by way of mmap_lock, until it has let go of the page tables.
    """
    slot = mm.mm_slot
    if slot is not None and slot is mem.khugepaged_scan.mm_slot:
        yield Acquire(mm.mmap_lock, WRITE)
        yield Release(mm.mmap_lock)
    elif slot is not None:
        free_mm_slot(mem, slot)


def free_mm_slot(mem: Memory, slot: MmSlot) -> None:
    """Take a slot out of the list for good."""
    mem.khugepaged_scan.mm_head.remove(slot)
    slot.mm.flags &= ~MMF_VM_HUGEPAGE
    slot.mm.mm_slot = None


def khugepaged_add_pte_mapped_thp(mm: Mm, addr: int) -> bool:
    """Note a block for the daemon's next visit; False if the mm has no slot, or one with 8."""
    slot = mm.mm_slot
    if slot is None or len(slot.pte_mapped_thp) >= MAX_PTE_MAPPED_THP:
        return False
    slot.pte_mapped_thp.append(addr)
    return True
