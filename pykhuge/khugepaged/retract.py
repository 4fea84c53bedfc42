"""Page tables that still map the small pages of a block whose page cache has become huge.

`retract_page_tables` takes them away right after a collapse, from every VMA it can get hold of;
`collapse_pte_mapped_thp` does the same later for one block. Since 6.6, `retract_without_mmap_lock`,
the first needs no mmap_lock and passes nobody over, so that nothing is noted for later. Whoever
touches the block next maps the huge page by a PMD.
"""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_ORDER, HPAGE_PMD_SIZE
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.panic import KernelBug
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.revalidate import find_pmd_or_thp_or_none
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.fault import vma_lookup
from pykhuge.mm.file_fault import do_set_pmd
from pykhuge.mm.filemap import find_page, when_unlocked
from pykhuge.mm.gup import LockedPage
from pykhuge.mm.huge_memory import free_page_table, hugepage_vma_check
from pykhuge.mm.mm_slot import khugepaged_add_pte_mapped_thp
from pykhuge.mm.mm_types import VM_UFFD_WP, AddressSpace, Mm, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page_table import U_PRESENT, pte_pfn, pte_pfns
from pykhuge.mm.rmap import drop_file_ptes, set_pmd

__all__ = [
    "collapse_pte_mapped_thp",
    "khugepaged_collapse_pte_mapped_thps",
    "retract_page_tables",
]


def retract_page_tables(
    mem: Memory,
    mapping: AddressSpace,
    pgoff: int,
    target_mm: Mm,
    target_addr: int,
    hpage: int,
    cc: CollapseControl,
) -> Steps[ScanResult]:
    """Free the page tables of every VMA that maps block `pgoff`; map the target by a PMD at once.

    Returns: what became of the target's; SCAN_FAIL if it was not met, as where it has private
    copies or is out of step with the block. Since 6.6 success, which MADV_COLLAPSE hears as
    SCAN_PTE_MAPPED_HUGEPAGE, for it maps the target by itself.
    Locks: entered with `hpage` locked; takes i_mmap_rwsem, and tries mmap_lock and vm_lock, which
    faults take the other way round.
    """
    if mem.version.retract_without_mmap_lock:
        yield from _retract_all(mem, mapping, pgoff)
        mapped = cc.is_khugepaged
        return ScanResult.SCAN_SUCCEED if mapped else ScanResult.SCAN_PTE_MAPPED_HUGEPAGE
    target_result = ScanResult.SCAN_FAIL
    yield Acquire(mapping.i_mmap_rwsem, WRITE)
    for vma in sorted(mapping.i_mmap, key=lambda each: each.vm_pgoff):
        addr = vma.address_of(pgoff)
        if not vma.vm_start <= addr < vma.vm_end or vma.anon_vma is not None:
            continue
        if addr % HPAGE_PMD_SIZE or vma.vm_end < addr + HPAGE_PMD_SIZE:
            continue
        is_target = vma.mm is target_mm and addr == target_addr
        result = _retract(mem, vma, addr, hpage, is_target, cc)
        if is_target:
            target_result = result
    yield Release(mapping.i_mmap_rwsem)
    return target_result


def _retract_all(mem: Memory, mapping: AddressSpace, pgoff: int) -> Steps[None]:
    """Free every page table over block `pgoff` that may go, whoever holds mmap_lock.

    The page lock keeps faults from filling the tables again.
    """
    yield Acquire(mapping.i_mmap_rwsem, READ)
    for vma in sorted(mapping.i_mmap, key=lambda each: each.vm_pgoff):
        addr = vma.address_of(pgoff)
        if not vma.vm_start <= addr < vma.vm_end:
            continue
        if addr % HPAGE_PMD_SIZE or vma.vm_end < addr + HPAGE_PMD_SIZE:
            continue
        result, pmd = find_pmd_or_thp_or_none(mem, vma.mm, addr)
        if result is not ScanResult.SCAN_SUCCEED or vma.mm.mm_users == 0:
            continue
        # Private copies, or markers of userfaultfd, may stand in the table.
        if vma.anon_vma is None and not vma.vm_flags & VM_UFFD_WP:
            _collapse_and_free_pmd(mem, vma, addr, pmd)
    yield Release(mapping.i_mmap_rwsem)


def _retract(
    mem: Memory, vma: Vma, addr: int, hpage: int, is_target: bool, cc: CollapseControl
) -> ScanResult:
    mm, task = vma.mm, mem.sched.current
    result, pmd = find_pmd_or_thp_or_none(mem, mm, addr)
    if result is not ScanResult.SCAN_SUCCEED:
        return result
    # MADV_COLLAPSE leaves the mappings of others to the daemon.
    wanted = cc.is_khugepaged or is_target
    if not wanted or not mm.mmap_lock.trylock(task, WRITE):
        if not is_target:
            khugepaged_add_pte_mapped_thp(mm, addr)
        return ScanResult.SCAN_PTE_MAPPED_HUGEPAGE
    try:
        if not vma.vm_lock.available(WRITE):
            return ScanResult.SCAN_PTE_MAPPED_HUGEPAGE
        if vma.anon_vma is not None:
            return ScanResult.SCAN_PAGE_ANON
        if mm.mm_users == 0:
            return ScanResult.SCAN_ANY_PROCESS
        # Its page table may hold markers.
        if vma.vm_flags & VM_UFFD_WP:
            return ScanResult.SCAN_PTE_UFFD_WP
        _collapse_and_free_pmd(mem, vma, addr, pmd)
        if cc.is_khugepaged or not is_target:
            return ScanResult.SCAN_SUCCEED
        return _set_huge_pmd(mem, vma, addr, hpage)
    finally:
        mm.mmap_lock.unlock(task)


def _collapse_and_free_pmd(mem: Memory, vma: Vma, addr: int, pmd: int) -> None:
    """Clear the PMD and free its page table, which must map nothing any more."""
    mm = vma.mm
    if (mem.ram.words[pte_pfn(pmd)] & U_PRESENT).any():
        raise KernelBug(f"{mm.name}: the page table at {addr:#x} is freed while it maps pages")
    for notifier in mm.mmu_notifiers:
        notifier.invalidate_range_start(addr, addr + HPAGE_PMD_SIZE)
    set_pmd(mem, mm, addr, 0)
    mm.tlb_gen += 1
    for notifier in mm.mmu_notifiers:
        notifier.invalidate_range_end(addr, addr + HPAGE_PMD_SIZE)
    free_page_table(mem, mm, pte_pfn(pmd))


def _set_huge_pmd(mem: Memory, vma: Vma, addr: int, hpage: int) -> ScanResult:
    """Map the huge page by the PMD at `addr`: clean, and as writable as the VMA's protection is."""
    if not do_set_pmd(mem, vma, addr, hpage, write=False):
        return ScanResult.SCAN_FAIL
    mem.pages.refcount[hpage] += 1
    return ScanResult.SCAN_SUCCEED


def khugepaged_collapse_pte_mapped_thps(mem: Memory, mm: Mm) -> Steps[None]:
    """The daemon looks at the blocks noted, if nobody holds mmap_lock, and forgets them."""
    task, slot = mem.sched.current, mm.mm_slot
    if slot is None or not slot.pte_mapped_thp or not mm.mmap_lock.trylock(task, WRITE):
        return
    try:
        if mm.mm_users:
            for addr in slot.pte_mapped_thp:
                yield from collapse_pte_mapped_thp(mem, mm, addr, install_pmd=False)
        slot.pte_mapped_thp.clear()
    except GeneratorExit:
        mm.mmap_lock.unlock(task)
        raise
    yield Release(mm.mmap_lock)


def collapse_pte_mapped_thp(
    mem: Memory, mm: Mm, addr: int, *, install_pmd: bool
) -> Steps[ScanResult]:
    """Take away the page table at `addr` if all it maps is the huge page cached there.

    Args:
        install_pmd: map the huge page by the PMD at once.
    Locks: mmap_lock for write; takes the page lock and i_mmap_rwsem. Since 6.6 mmap_lock for read
    and the page lock are enough.
    """
    result, vma = _check_pte_mapped_vma(mem, mm, addr)
    if vma is None:
        return result
    assert vma.vm_file is not None
    locked = yield from _find_lock_page(mem, vma.vm_file.f_mapping, vma.linear_page_index(addr))
    if locked is None:
        return ScanResult.SCAN_PAGE_NULL
    hpage = int(locked.pfns[0])
    try:
        if mem.pages.order[hpage] != HPAGE_PMD_ORDER:
            at_once = mem.version.retract_without_mmap_lock
            return ScanResult.SCAN_PAGE_COMPOUND if at_once else ScanResult.SCAN_FAIL
        result = yield from _drop_table(mem, vma, addr, hpage)
        if install_pmd and result is ScanResult.SCAN_SUCCEED:
            return _set_huge_pmd(mem, vma, addr, hpage)
        return result
    finally:
        locked.release()


def _check_pte_mapped_vma(mem: Memory, mm: Mm, addr: int) -> tuple[ScanResult, Vma | None]:
    """The VMA at `addr`; or None, and why its table stays. Later kernels look at it first."""
    mapped, _ = find_pmd_or_thp_or_none(mem, mm, addr)
    vma = vma_lookup(mm, addr)
    unfit = vma is None or vma.vm_file is None or vma.vm_end < addr + HPAGE_PMD_SIZE
    if mapped is ScanResult.SCAN_PMD_MAPPED and not (
        unfit and mem.version.retract_without_mmap_lock
    ):
        return mapped, None
    # Faults map huge pages whatever sysfs says.
    if vma is None or unfit or not hugepage_vma_check(mem, vma, enforce_sysfs=False):
        return ScanResult.SCAN_VMA_CHECK, None
    if vma.vm_flags & VM_UFFD_WP:
        return ScanResult.SCAN_PTE_UFFD_WP, None
    return ScanResult.SCAN_SUCCEED, vma


def _drop_table(mem: Memory, vma: Vma, addr: int, hpage: int) -> Steps[ScanResult]:
    """Free the table at `addr` if it maps nothing but `hpage`; success too if there is none."""
    result, pmd = find_pmd_or_thp_or_none(mem, vma.mm, addr)
    if mem.version.retract_without_mmap_lock:
        if result in (ScanResult.SCAN_PMD_NONE, ScanResult.SCAN_PMD_NULL):
            return ScanResult.SCAN_SUCCEED
        found = result is ScanResult.SCAN_SUCCEED
        return _drop_ptes(mem, vma, addr, pmd, hpage) if found else result
    if result is not ScanResult.SCAN_SUCCEED:
        return ScanResult.SCAN_SUCCEED if result is ScanResult.SCAN_PMD_NONE else result
    assert vma.vm_file is not None
    i_mmap_rwsem = vma.vm_file.f_mapping.i_mmap_rwsem
    yield Acquire(i_mmap_rwsem, WRITE)
    result = _drop_ptes(mem, vma, addr, pmd, hpage)
    yield Release(i_mmap_rwsem)
    return result


def _find_lock_page(mem: Memory, mapping: AddressSpace, index: int) -> Steps[LockedPage | None]:
    """The page cached at `index`, locked and referenced; None if there is none."""
    pfn = yield from when_unlocked(mem, find_page, mem, mapping, index)
    if pfn is None:
        return None
    mem.pages.refcount[mem.pages.head_of(pfn)] += 1
    return LockedPage(mem, mem.pages.head_of(pfn))


def _drop_ptes(mem: Memory, vma: Vma, addr: int, pmd: int, hpage: int) -> ScanResult:
    """Check that every entry is none or the huge page's own, drop them, and free the table."""
    ptes = mem.ram.words[pte_pfn(pmd)]
    places = np.flatnonzero(ptes)
    present = ptes[places] & U_PRESENT != 0
    wrong = ~present | (pte_pfns(ptes[places]) != hpage + places)
    if wrong.any():
        first_present = present[wrong.argmax()]
        return ScanResult.SCAN_FAIL if first_present else ScanResult.SCAN_PTE_NON_PRESENT
    if len(places):
        words = ptes[places]
        ptes[places] = 0
        drop_file_ptes(mem, vma, words, hpage + places)
        mem.pages.refcount[hpage] -= len(places)
    _collapse_and_free_pmd(mem, vma, addr, pmd)
    return ScanResult.SCAN_SUCCEED
