"""Page faults (mm/memory.c): anonymous memory here, files in `file_fault`.

`handle_mm_fault` brings in a range, block by block, as a task that touches it from low to high
would; neighbouring pages of one kind are brought in together. A fault that the kernel would answer
with a signal raises `BusError` or `SegmentationFault` in the task, and the host lives on.
"""

from __future__ import annotations

import enum

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Release, Steps, WouldBlock
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.errors import (
    BUS_ADRERR,
    BUS_MCEERR_AR,
    BusError,
    PageLocked,
    SegmentationFault,
    UserFault,
)
from pykhuge.mm.file_fault import do_fault, map_huge_file_page
from pykhuge.mm.filemap import wait_on_page
from pykhuge.mm.huge_memory import (
    OutOfMemory,
    alloc_page_table,
    get_huge_zero_page,
    hugepage_vma_check,
    pgtable_trans_huge_deposit,
    split_huge_pmd,
    transhuge_vma_suitable,
)
from pykhuge.mm.memory_failure import memory_failure_queue, memory_failure_work
from pykhuge.mm.mm_slot import khugepaged_enter_vma
from pykhuge.mm.mm_types import (
    VM_EXEC,
    VM_LOCKED,
    VM_READ,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    Mm,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import VM_PAGE_PROT, map_new_pages, new_user_pages, pte_table
from pykhuge.mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_swapcache,
    PG_uptodate,
    PG_zone_device,
)
from pykhuge.mm.page_alloc import alloc_huge_page, charge
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_PSE,
    PAGE_RW,
    PAGE_SPECIAL,
    PAGE_SWP_EXCLUSIVE,
    PAGE_SWP_UFFD_WP,
    PAGE_UFFD_WP,
    PUD_SHIFT,
    SWP_HWPOISON,
    SWP_PTE_MARKER,
    Ptes,
    is_marker,
    is_poison_marker,
    is_swap_pte,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    run_of_none,
    swp_offset,
    swp_type,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.rmap import (
    anon_vma_prepare,
    mlock_page,
    mod_mm_pages,
    page_add_anon_rmap,
    page_add_new_huge_anon_rmap,
    page_move_anon_rmap,
    page_remove_rmap,
    pmd_of,
    set_pmd,
)
from pykhuge.mm.swap import lru_add_drain, lru_add_huge_page, put_pages
from pykhuge.mm.swap_state import (
    delete_from_swap_cache,
    folio_swapped,
    free_swap_cache,
    swap_free,
    swap_readpage,
)
from pykhuge.mm.vmstat import (
    MM_ANONPAGES,
    MM_SWAPENTS,
    PGFAULT,
    THP_FAULT_ALLOC,
    THP_FAULT_FALLBACK,
    THP_FAULT_FALLBACK_CHARGE,
)

__all__ = [
    "SwapFault",
    "do_swap_page",
    "find_vma",
    "handle_mm_fault",
    "vma_lookup",
]


class SwapFault(enum.Enum):
    """What do_swap_page answers: VM_FAULT_* as far as its callers tell them apart."""

    DONE = "done"
    RETRY = "the page is locked"
    SIGBUS = "the device could not read it"
    HWPOISON = "the entry is poisoned"


def find_vma(mm: Mm, addr: int) -> Vma | None:
    """The first VMA that ends above `addr` (it may begin above it too)."""
    for vma in mm.vmas:
        if vma.vm_end > addr:
            return vma
    return None


def vma_lookup(mm: Mm, addr: int) -> Vma | None:
    """The VMA that `addr` lies in."""
    vma = find_vma(mm, addr)
    return vma if vma is not None and vma.vm_start <= addr else None


def handle_mm_fault(
    mem: Memory, mm: Mm, start: int, end: int, *, write: bool, user: bool = False
) -> Steps[None]:
    """Make [start, end) readable, or writable, for a task of `mm`.

    Args:
        user: the task itself has touched it (FAULT_FLAG_USER). Who calls has the log tell of its
            end before kernel workers deal with poison met here.
    Raises: SegmentationFault, BusError, UserFault, OutOfMemory; pages below the fault stay in.
    Locks: takes mmap_lock for read.
    """
    yield Acquire(mm.mmap_lock, READ)
    locked_mm = True
    try:
        while start < end:
            vma = access_vma(mm, start, write=write)
            stop = min(end, vma.vm_end, (start & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE)
            try:
                _fault_block(mem, vma, start, stop, write)
                start = stop
            except BusError as error:
                # si_addr is the very address that was touched, not its page (do_sigbus).
                raise BusError(max(error.address, start), error.code, error.lsb) from None
            except PageLocked as locked:
                busy = locked.pfn
            else:
                continue
            # The lock of a cached page is awaited without mmap_lock (VM_FAULT_RETRY).
            locked_mm = False
            yield Release(mm.mmap_lock)
            yield from wait_on_page(mem, busy)
            yield Acquire(mm.mmap_lock, READ)
            locked_mm = True
    except BaseException:
        if locked_mm:
            mm.mmap_lock.unlock(mem.sched.current)
        if not user:
            memory_failure_work(mem)
        raise
    yield Release(mm.mmap_lock)


def access_vma(mm: Mm, addr: int, *, write: bool) -> Vma:
    """The VMA that lets a task touch `addr`. Raises: SegmentationFault."""
    vma = find_vma(mm, addr)
    if (
        vma is None
        or vma.vm_start > addr
        or not vma.vm_flags & (VM_WRITE if write else VM_READ | VM_WRITE | VM_EXEC)
    ):
        raise SegmentationFault(addr, "write" if write else "read")
    return vma


def _fault_block(mem: Memory, vma: Vma, start: int, end: int, write: bool) -> None:
    """Fault in [start, end), which lies in one block and one VMA. Locks: mmap_lock."""
    try:
        _answer_faults(mem, vma, start, end, write)
    except (BusError, UserFault, OutOfMemory, PageLocked) as error:
        # A fault counts whatever becomes of it; later kernels pass over what will be tried again.
        again = isinstance(error, (UserFault, PageLocked))
        if not (again and mem.version.pgfault_without_retries):
            mem.vmstat.count(PGFAULT)
        raise


def _answer_faults(mem: Memory, vma: Vma, start: int, end: int, write: bool) -> None:
    if _pmd_fault(mem, vma, start, write):
        return
    table = pte_table(mem, vma.mm, start)
    first = pte_index(start)
    last = first + ((end - 1 >> PAGE_SHIFT) - (start >> PAGE_SHIFT)) + 1
    ptes = mem.ram.words[table]
    addr = start & -PAGE_SIZE
    while True:
        wanted = np.uint64(PAGE_PRESENT | PAGE_RW if write else PAGE_PRESENT)
        missing = np.flatnonzero(ptes[first:last] & wanted != wanted)
        if not len(missing):
            return
        addr += int(missing[0]) << PAGE_SHIFT
        first += int(missing[0])
        pte = int(ptes[first])
        if is_marker(pte) and not vma.vm_flags & VM_UFFD_WP:
            pte = 0  # left over from a registration that is gone
            ptes[first] = 0
        if vma.vm_file is not None and (pte == 0 or is_marker(pte)):
            nr = do_fault(mem, vma, addr, ptes, first, last, write)
        elif pte == 0:
            nr = run_of_none(ptes[first:last])
            _do_anonymous_pages(mem, vma, addr, ptes[first : first + nr], write)
        elif is_swap_pte(pte):
            nr = 1
            _swap_fault(mem, vma, addr, ptes, first, write)
            if write and int(ptes[first]) & (PAGE_PRESENT | PAGE_RW) == PAGE_PRESENT:
                _do_wp_page(mem, vma, addr, ptes, first)  # within the same fault
        else:
            nr = 1
            _do_wp_page(mem, vma, addr, ptes, first)
        mem.vmstat.count(PGFAULT, nr)


def _pmd_fault(mem: Memory, vma: Vma, addr: int, write: bool) -> bool:
    """A fault where a huge page is, or could be, mapped. False: go on with PTEs."""
    pmd = pmd_of(mem, vma.mm, addr)
    if pmd and not pmd_trans_huge(pmd):
        return False
    if vma.vm_file is None:
        if pmd:
            return _do_huge_pmd_fault(mem, vma, addr, pmd, write)
        return _do_huge_pmd_anonymous_page(mem, vma, addr, write)
    if pmd:
        if not write or pmd & PAGE_RW:
            return True
        split_huge_pmd(mem, vma, addr)
    return map_huge_file_page(mem, vma, addr, write)


def _do_anonymous_pages(mem: Memory, vma: Vma, addr: int, ptes: Ptes, write: bool) -> None:
    """Fill a run of none PTEs: zero-page entries for a read, new zeroed pages for a write.

    Kernel: do_anonymous_page.
    """
    if vma.vm_flags & VM_UFFD_MISSING:
        raise UserFault(addr, "missing")
    if not write:
        ptes[:] = (mem.zero_pfn << PAGE_SHIFT) | VM_PAGE_PROT | PAGE_SPECIAL
        return
    anon_vma_prepare(mem, vma)
    pfns = new_user_pages(mem, vma, len(ptes))
    mem.ram.pages[pfns] = 0
    map_new_pages(mem, vma, addr, pfns, ptes)
    if len(pfns) < len(ptes):
        mem.vmstat.count(PGFAULT, len(pfns))
        raise OutOfMemory(f"no page for {addr + (len(pfns) << PAGE_SHIFT):#x} of {vma.mm.name}")


def _do_huge_pmd_anonymous_page(mem: Memory, vma: Vma, addr: int, write: bool) -> bool:
    """Answer a fault in an empty block with a huge page. False: fall back to small ones."""
    haddr = addr & -HPAGE_PMD_SIZE
    if not hugepage_vma_check(mem, vma, in_pf=True) or not transhuge_vma_suitable(vma, addr):
        return False
    anon_vma_prepare(mem, vma)
    khugepaged_enter_vma(mem, vma)
    head = (
        _huge_page_for_fault(mem, vma)
        if write or not mem.thp.use_zero_page
        else get_huge_zero_page(mem)
    )
    if head is None:
        if not write and mem.thp.use_zero_page:
            mem.vmstat.count(THP_FAULT_FALLBACK)
        return False
    mm = vma.mm
    try:
        if pmd_of(mem, mm, haddr) is None:
            mm.pmd_tables[haddr >> PUD_SHIFT] = alloc_page_table(mem, mm)
        if vma.vm_flags & VM_UFFD_MISSING:
            raise UserFault(addr, "missing")  # seen under the table's lock, with the page in hand
        pgtable_trans_huge_deposit(mm, haddr, alloc_page_table(mem, mm))
    except (OutOfMemory, UserFault):
        if head != mem.huge_zero_pfn:
            put_pages(mem, np.array([head]))
        raise
    if head == mem.huge_zero_pfn:
        set_pmd(mem, mm, haddr, (head << PAGE_SHIFT) | VM_PAGE_PROT | PAGE_PSE)
    else:
        mem.ram.pages[head : head + HPAGE_PMD_NR] = 0
        map_new_huge_page(mem, vma, haddr, head)
        mem.mod_mm(mm, MM_ANONPAGES, HPAGE_PMD_NR)
        mem.vmstat.count(THP_FAULT_ALLOC)
    mem.vmstat.count(PGFAULT)
    return True


def map_new_huge_page(mem: Memory, vma: Vma, haddr: int, head: int) -> None:
    """Map a new huge page by a PMD: exclusive, LRU, dirty, and writable if the VMA is."""
    prot = VM_PAGE_PROT | PAGE_PSE | PAGE_DIRTY | (PAGE_RW if vma.vm_flags & VM_WRITE else 0)
    page_add_new_huge_anon_rmap(mem, head, vma, haddr)
    if vma.vm_flags & VM_LOCKED:
        mlock_page(mem, head)
    lru_add_huge_page(mem, head)
    set_pmd(mem, vma.mm, haddr, (head << PAGE_SHIFT) | prot)


def _huge_page_for_fault(mem: Memory, vma: Vma) -> int | None:
    head = alloc_huge_page(mem, vma.mm.preferred_node)
    if head is None:
        mem.vmstat.count(THP_FAULT_FALLBACK)
        return None
    if not charge(mem, vma.mm.memcg, HPAGE_PMD_NR):
        put_pages(mem, np.array([head]))
        mem.vmstat.count(THP_FAULT_FALLBACK)
        mem.vmstat.count(THP_FAULT_FALLBACK_CHARGE)
        return None
    mem.pages.memcg[head] = vma.mm.memcg.key
    return head


def _do_huge_pmd_fault(mem: Memory, vma: Vma, addr: int, pmd: int, write: bool) -> bool:
    """A fault on a huge PMD: reuse an exclusive page, else split and let the PTE path copy.

    Kernel: do_huge_pmd_wp_page.
    """
    if not write or pmd & PAGE_RW:
        return True
    if pmd & PAGE_UFFD_WP and vma.vm_flags & VM_UFFD_WP:
        raise UserFault(addr, "wp")
    head, pages = pte_pfn(pmd), mem.pages
    if head != mem.huge_zero_pfn:
        exclusive = bool(pages.flags[head] & PG_anon_exclusive)
        if not exclusive and not pages.flags[head] & PG_locked and pages.refcount[head] == 1:
            page_move_anon_rmap(mem, head, vma)
            exclusive = True
        if exclusive:
            set_pmd(mem, vma.mm, addr, pmd | PAGE_RW | PAGE_DIRTY | PAGE_ACCESSED)
            mem.vmstat.count(PGFAULT)
            return True
    elif mem.version.huge_zero_page_gives_huge and _do_huge_zero_wp_pmd(mem, vma, addr):
        return True
    split_huge_pmd(mem, vma, addr)
    return False


def _do_huge_zero_wp_pmd(mem: Memory, vma: Vma, addr: int) -> bool:
    """Put a huge page in place of the huge zero page, if there is one (Linux 6.13)."""
    head = _huge_page_for_fault(mem, vma)
    if head is None:
        return False
    mem.ram.pages[head : head + HPAGE_PMD_NR] = 0
    map_new_huge_page(mem, vma, addr & -HPAGE_PMD_SIZE, head)
    mem.mod_mm(vma.mm, MM_ANONPAGES, HPAGE_PMD_NR)
    mem.vmstat.count(THP_FAULT_ALLOC)
    mem.vmstat.count(PGFAULT)
    return True


def _swap_fault(mem: Memory, vma: Vma, addr: int, ptes: Ptes, slot: int, write: bool) -> None:
    outcome = do_swap_page(mem, vma, addr, ptes, slot, write=write)
    if outcome is SwapFault.RETRY:
        raise WouldBlock(f"fault at {addr:#x} waits for the lock of the page in its swap slot")
    if outcome is SwapFault.SIGBUS:
        raise BusError(addr, BUS_ADRERR)
    if outcome is SwapFault.HWPOISON:
        raise BusError(addr, BUS_MCEERR_AR, PAGE_SHIFT)


def do_swap_page(
    mem: Memory, vma: Vma, addr: int, ptes: Ptes, slot: int, *, write: bool
) -> SwapFault:
    """Bring in the page behind the swap-type word `ptes[slot]`.

    After a read the page stays in the swap cache, unless the device is more than half full.
    Raises: OutOfMemory. Locks: mmap_lock. Kernel: do_swap_page (mm/memory.c).
    """
    pte, pages = int(ptes[slot]), mem.pages
    if swp_type(pte) == SWP_HWPOISON or is_poison_marker(pte):
        return SwapFault.HWPOISON
    if swp_type(pte) == SWP_PTE_MARKER:
        ptes[slot] = 0  # a leftover uffd-wp marker: anonymous memory needs none
        return SwapFault.DONE
    entry = swp_offset(pte)
    pfn = _get_swap_page(mem, vma, addr, entry)
    if pfn is None:
        return SwapFault.RETRY
    if pages.flags[pfn] & PG_hwpoison:
        put_pages(mem, np.array([pfn]))
        return SwapFault.HWPOISON
    if not pages.flags[pfn] & PG_uptodate:
        put_pages(mem, np.array([pfn]))
        return SwapFault.SIGBUS
    anon_vma_prepare(mem, vma)
    if write and not pages.flags[pfn] & PG_lru:
        lru_add_drain(mem)
    exclusive = bool(pte & PAGE_SWP_EXCLUSIVE) or not pages.flags[pfn] & PG_swapcache
    swap_free(mem, entry)
    if _should_try_to_free_swap(mem, vma, pfn, write) and not folio_swapped(mem, pfn):
        delete_from_swap_cache(mem, pfn)
    mem.mod_mm(vma.mm, MM_ANONPAGES, +1)
    mem.mod_mm(vma.mm, MM_SWAPENTS, -1)
    exclusive = exclusive or pages.refcount[pfn] == 1
    prot = VM_PAGE_PROT
    if exclusive and write and not pte & PAGE_SWP_UFFD_WP:
        prot |= PAGE_DIRTY | PAGE_RW
    if pte & PAGE_SWP_UFFD_WP:
        prot |= PAGE_UFFD_WP
    page_add_anon_rmap(mem, pfn, vma, addr, exclusive=exclusive)
    ptes[slot] = (pfn << PAGE_SHIFT) | prot
    return SwapFault.DONE


def _get_swap_page(mem: Memory, vma: Vma, addr: int, entry: int) -> int | None:
    """The slot's page, from the swap cache or read anew, with a reference; None if it is locked.

    From a device that answers at once, a page that only this entry wants skips the cache.
    """
    pfn = mem.swap.cache.get(entry)
    if pfn is None:
        alone = mem.swap.synchronous_io and mem.swap.swap_map[entry] == 1
        pfn = swap_readpage(mem, entry, vma.mm.memcg, vma.mm.preferred_node, skip_cache=alone)
        if pfn is None:
            raise OutOfMemory(f"no page to swap in {addr:#x} of {vma.mm.name}")
    elif mem.pages.flags[pfn] & PG_locked:
        return None
    else:
        mem.pages.refcount[pfn] += 1
    return pfn


def _should_try_to_free_swap(mem: Memory, vma: Vma, pfn: int, write: bool) -> bool:
    flags = mem.pages.flags[pfn]
    if not flags & PG_swapcache:
        return False
    if mem.swap.vm_swap_full() or vma.vm_flags & VM_LOCKED or flags & PG_mlocked:
        return True
    # The caller's reference and the swap cache's: nobody else could want the slot again.
    return write and bool(mem.pages.refcount[pfn] == 2)


def _do_wp_page(mem: Memory, vma: Vma, addr: int, ptes: Ptes, slot: int) -> None:
    """A write to a read-only PTE: reuse the page if it is this mm's alone, else copy it.

    Raises: UserFault, OutOfMemory, BusError if the page to copy is poisoned.
    Kernel: do_wp_page, wp_page_copy.
    """
    pte = int(ptes[slot])
    # mremap leaves the bit behind in memory that no userfaultfd watches any more.
    if pte & PAGE_UFFD_WP and vma.vm_flags & VM_UFFD_WP:
        raise UserFault(addr, "wp")
    pfn = pte_pfn(pte)
    if vma.vm_flags & VM_SHARED:
        set_page_dirty(mem, np.array([pfn]))
    if pfn != mem.zero_pfn and _wp_can_reuse(mem, vma, pfn):
        ptes[slot] = pte | PAGE_RW | PAGE_DIRTY | PAGE_ACCESSED
        return
    anon_vma_prepare(mem, vma)
    new = new_user_pages(mem, vma, 1)
    if not len(new):
        raise OutOfMemory(f"no page to copy {addr:#x} of {vma.mm.name} to")
    if pfn == mem.zero_pfn:
        mem.ram.pages[new] = 0
    else:
        _copy_mc_user_page(mem, addr, pfn, int(new[0]))
        old = np.array([pfn])
        # Gone before rmap is asked: munlock would find the page mlocked by this very entry.
        ptes[slot] = 0
        page_remove_rmap(mem, old, vma)
        mod_mm_pages(mem, vma.mm, old, -1)
    map_new_pages(mem, vma, addr, new, ptes[slot : slot + 1])
    if pfn != mem.zero_pfn:
        free_swap_cache(mem, old)
        put_pages(mem, old)


def _wp_can_reuse(mem: Memory, vma: Vma, pfn: int) -> bool:
    pages = mem.pages
    flags = int(pages.flags[pfn])
    if flags & PG_anon_exclusive or vma.vm_flags & VM_SHARED:
        return True
    head = pages.head_of(pfn)
    if not pages.flags[head] & PG_anon:
        return False
    if pages.is_compound(pfn) or flags & PG_zone_device:
        if pages.is_compound(pfn) and pages.refcount[head] > 1:
            return False
    elif pages.refcount[pfn] > 3:
        return False
    if not pages.flags[head] & PG_lru:
        lru_add_drain(mem)
    if pages.refcount[head] > 1 + bool(flags & PG_swapcache) or flags & PG_locked:
        return False
    if flags & PG_swapcache:
        if folio_swapped(mem, pfn):
            return False
        delete_from_swap_cache(mem, pfn)
    page_move_anon_rmap(mem, pfn, vma)
    return True


def _copy_mc_user_page(mem: Memory, addr: int, pfn: int, new: int) -> None:
    """Copy one page for copy-on-write; poison kills the task, since 6.2 not the host.

    The page is taken away from everybody soon after.

    Kernel: __wp_page_copy_user.
    """
    recovery = mem.version.cow_recovers
    if copy_mc_page(mem, new, pfn, consumer="__wp_page_copy_user", recovery=recovery) is None:
        return
    memory_failure_queue(mem, pfn)
    put_pages(mem, np.array([new]))
    raise BusError(addr, BUS_MCEERR_AR, PAGE_SHIFT)
