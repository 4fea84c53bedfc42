"""Transparent huge pages: eligibility, the deposit of page tables, splitting (mm/huge_memory.c)."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.mm.mm_types import (
    MMF_DISABLE_THP,
    MMF_DISABLE_THP_EXCEPT_ADVISED,
    VM_EXEC,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_SPECIAL,
    Mm,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_has_hwpoisoned,
    PG_head,
    PG_hwpoison,
    PG_locked,
    PG_mlocked,
    PG_table,
    PG_tail,
    PG_unevictable,
)
from pykhuge.mm.page_alloc import alloc_huge_page, alloc_pages, charge
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_SPECIAL,
    PAGE_UFFD_WP,
    PAGE_USER,
    PUD_SHIFT,
    TABLE,
    pfn_ptes,
    pte_pfn,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.rmap import (
    mm_counter,
    page_mappings,
    page_remove_huge_rmap,
    page_remove_rmap,
    pmd_of,
    set_pmd,
)
from pykhuge.mm.swap import put_pages
from pykhuge.mm.vmstat import (
    MM_ANONPAGES,
    NR_PAGETABLE,
    THP_SPLIT_PAGE,
    THP_SPLIT_PAGE_FAILED,
    THP_SPLIT_PMD,
    THP_ZERO_PAGE_ALLOC,
    THP_ZERO_PAGE_ALLOC_FAILED,
)

__all__ = [
    "OutOfMemory",
    "alloc_page_table",
    "clear_huge_pmd",
    "free_page_table",
    "get_huge_zero_page",
    "hugepage_vma_check",
    "pgtable_trans_huge_deposit",
    "pgtable_trans_huge_withdraw",
    "shmem_is_huge",
    "split_huge_page",
    "split_huge_pmd",
    "transhuge_vma_suitable",
    "vma_thp_disabled",
]

# How the zero page is mapped.
ZERO_PROT = PAGE_PRESENT | PAGE_USER | PAGE_ACCESSED | PAGE_SPECIAL


class OutOfMemory(MemoryError):
    """The modelled machine, or the cgroup, has no page left; there is no reclaim to make one."""


def transhuge_vma_suitable(vma: Vma, addr: int) -> bool:
    """Whether a huge PMD could map the 2 MiB block that holds `addr`.

    It must lie inside `vma`, and a file must be mapped there in step with its own blocks.
    """
    haddr = addr & -HPAGE_PMD_SIZE
    if vma.vm_file is not None and ((vma.vm_start >> PAGE_SHIFT) - vma.vm_pgoff) % HPAGE_PMD_NR:
        return False
    return vma.vm_start <= haddr and haddr + HPAGE_PMD_SIZE <= vma.vm_end


def vma_thp_disabled(vma: Vma, vm_flags: int, *, forced: bool) -> bool:
    """Whether the mapping, if it has `vm_flags`, or its process wants no huge pages.

    forced: asked for MADV_COLLAPSE, or for a huge page that is there.
    """
    if vm_flags & VM_NOHUGEPAGE or vma.mm.flags & MMF_DISABLE_THP:
        return True
    advised = forced or vm_flags & VM_HUGEPAGE
    return not advised and bool(vma.mm.flags & MMF_DISABLE_THP_EXCEPT_ADVISED)


def hugepage_vma_check(
    mem: Memory,
    vma: Vma,
    vm_flags: int | None = None,
    *,
    smaps: bool = False,
    in_pf: bool = False,
    enforce_sysfs: bool = True,
) -> bool:
    """Whether `vma` may hold huge pages at all.

    Args:
        vm_flags: those it is about to get; its own if not given.
        smaps: asked by /proc/pid/smaps, which needs no anon_vma either.
        in_pf: asked by a page fault, which looks at its own block and needs no anon_vma yet.
        enforce_sysfs: heed `enabled`; MADV_COLLAPSE does not.
    Kernel: hugepage_vma_check (mm/huge_memory.c).
    """
    flags = vma.vm_flags if vm_flags is None else vm_flags
    if vma_thp_disabled(vma, flags, forced=not enforce_sysfs):
        return False
    if flags & (VM_SPECIAL | VM_HUGETLB):
        return False
    if not in_pf and not transhuge_vma_suitable(vma, vma.vm_end - HPAGE_PMD_SIZE):
        return False
    inode = vma.vm_file.inode if vma.vm_file is not None else None
    if isinstance(inode, ShmemInode) and not in_pf:
        heeded = vma.vm_flags if mem.version.shmem_heeds_past_advice else flags
        return shmem_is_huge(mem, inode, vma.vm_pgoff, vma, heeded, force=not enforce_sysfs)
    enabled = mem.thp.enabled
    if inode is None and mem.thp.size_enabled != "inherit":
        enabled = mem.thp.size_enabled
    if enforce_sysfs and not _enabled_for(enabled, flags):
        return False
    if inode is not None:
        exec_ok = mem.version.file_thp_without_exec or bool(flags & VM_EXEC)
        return not in_pf and exec_ok and inode.i_writecount <= 0
    return smaps or in_pf or vma.anon_vma is not None


def shmem_is_huge(
    mem: Memory,
    inode: ShmemInode,
    index: int,
    vma: Vma | None,
    vm_flags: int | None = None,
    *,
    force: bool = False,
) -> bool:
    """Whether page `index` of a shmem file may be part of a huge page, by `shmem_enabled`.

    Args:
        vma: by way of which it is asked for; None for a system call on the file.
        vm_flags: those `vma` is about to get; its own if not given.
        force: asked by MADV_COLLAPSE.
    """
    if mem.thp.shmem_enabled == "deny":
        return False
    flags = vm_flags if vm_flags is not None else vma.vm_flags if vma is not None else 0
    if vma is not None and vma_thp_disabled(vma, flags, forced=force):
        return False
    size_enabled = mem.thp.size_shmem_enabled
    if vma is not None and vma.anon_shmem and size_enabled != "inherit":
        if mem.thp.shmem_enabled == "force":
            return False
        # Of its policies each is for itself; that of a mount which is within_size is advise, too.
        advice = flags & VM_HUGEPAGE if size_enabled == "advise" else 0
        return _policy_gives(size_enabled, inode, index, advice)
    if force or mem.thp.shmem_enabled == "force":
        return True
    policy = mem.thp.shm_mnt_huge if inode.i_sb is mem.shm_mnt else inode.i_sb.huge
    return _policy_gives(policy, inode, index, flags & VM_HUGEPAGE)


def _policy_gives(policy: str, inode: ShmemInode, index: int, advised: int) -> bool:
    if policy == "always":
        return True
    if policy == "within_size":
        end = (index // HPAGE_PMD_NR + 1) * HPAGE_PMD_NR
        if -(-inode.i_size // PAGE_SIZE) >= end:
            return True
    return policy in ("within_size", "advise") and bool(advised)


def _enabled_for(enabled: str, vm_flags: int) -> bool:
    if enabled == "madvise":
        return bool(vm_flags & VM_HUGEPAGE)
    return enabled == "always"


def alloc_page_table(mem: Memory, mm: Mm) -> int:
    """A zeroed page for a page table of `mm`, counted and charged. Raises: OutOfMemory."""
    found = alloc_pages(mem, 1)
    if not len(found) or not charge(mem, mm.memcg, 1):
        put_pages(mem, found)
        raise OutOfMemory(f"no page for a page table of {mm.name}")
    pfn = int(found[0])
    mem.pages.memcg[pfn] = mm.memcg.key
    mem.ram.words[pfn] = 0
    mem.pages.flags[pfn] = PG_table
    mem.mod_page(NR_PAGETABLE, pfn, +1)
    mm.pgtables_bytes += PAGE_SIZE
    mem.vmstat.post(mm.name, "pgtables_bytes", PAGE_SIZE)
    return pfn


def free_page_table(mem: Memory, mm: Mm, pfn: int) -> None:
    """Give a page table back."""
    mem.mod_page(NR_PAGETABLE, pfn, -1)
    mm.pgtables_bytes -= PAGE_SIZE
    mem.vmstat.post(mm.name, "pgtables_bytes", -PAGE_SIZE)
    put_pages(mem, np.array([pfn]))


def pgtable_trans_huge_deposit(mm: Mm, addr: int, table: int) -> None:
    """Keep a page table for the day the huge PMD at `addr` is split."""
    mm.deposits.setdefault(addr >> PUD_SHIFT, []).append(table)


def pgtable_trans_huge_withdraw(mm: Mm, addr: int) -> int:
    """Take one deposited page table back: the oldest."""
    return mm.deposits[addr >> PUD_SHIFT].pop(0)


def get_huge_zero_page(mem: Memory) -> int | None:
    """The huge zero page, allocated at first use and kept; None if there is no free block."""
    if mem.huge_zero_pfn is None:
        head = alloc_huge_page(mem)
        if head is None:
            mem.vmstat.count(THP_ZERO_PAGE_ALLOC_FAILED)
            return None
        mem.ram.pages[head : head + HPAGE_PMD_NR] = 0
        mem.huge_zero_pfn = head
        mem.vmstat.count(THP_ZERO_PAGE_ALLOC)
    return mem.huge_zero_pfn


def split_huge_pmd(mem: Memory, vma: Vma, addr: int) -> None:
    """Map the block at `addr` by 512 PTEs instead of one huge PMD; the page stays compound.

    The PMD of a file is only cleared: its pages can be found again by a fault.
    Kernel: __split_huge_pmd_locked.
    """
    mm, haddr = vma.mm, addr & -HPAGE_PMD_SIZE
    pmd = pmd_of(mem, mm, haddr)
    assert pmd is not None
    if vma.vm_file is not None:
        mem.vmstat.count(THP_SPLIT_PMD)
        clear_huge_pmd(mem, vma, haddr, pmd)
        return
    table = pgtable_trans_huge_withdraw(mm, haddr)
    head = pte_pfn(pmd)
    mem.vmstat.count(THP_SPLIT_PMD)
    if head == mem.huge_zero_pfn:
        mem.ram.words[table] = (mem.zero_pfn << 12) | ZERO_PROT | pmd & PAGE_UFFD_WP
    else:
        _split_pmd_of_page(mem, head, table, pmd)
    set_pmd(mem, mm, haddr, (table << 12) | TABLE)
    if head != mem.huge_zero_pfn:
        # Last, so that no subpage looks unmapped in between: NR_ANON_MAPPED does not move. Nor may
        # the PMD still be there: munlock would find the page mlocked by it.
        page_remove_huge_rmap(mem, head, vma)


def clear_huge_pmd(mem: Memory, vma: Vma, haddr: int, pmd: int) -> None:
    """Take the huge PMD `pmd` at `haddr` away, with what it counts and refers to."""
    head = pte_pfn(pmd)
    set_pmd(mem, vma.mm, haddr, 0)
    if head == mem.huge_zero_pfn:
        return
    if vma.vm_file is not None and pmd & PAGE_DIRTY:
        set_page_dirty(mem, np.array([head]))
    page_remove_huge_rmap(mem, head, vma)
    mem.mod_mm(vma.mm, mm_counter(int(mem.pages.flags[head])), -HPAGE_PMD_NR)
    put_pages(mem, np.array([head]))


def _split_pmd_of_page(mem: Memory, head: int, table: int, pmd: int) -> None:
    pages = mem.pages
    subpages = np.arange(head, head + HPAGE_PMD_NR)
    prot = pmd & (PAGE_PRESENT | PAGE_USER | PAGE_RW | PAGE_ACCESSED | PAGE_DIRTY | PAGE_UFFD_WP)
    mem.ram.words[table] = pfn_ptes(subpages, prot)
    if pages.flags[head] & PG_anon_exclusive:
        pages.flags[subpages] |= np.uint32(PG_anon_exclusive)
    if pmd & PAGE_DIRTY:
        pages.flags[head] |= np.uint32(PG_dirty)
    pages.refcount[head] += HPAGE_PMD_NR - 1
    pages.mapcount[subpages] += 1


def split_huge_page(
    mem: Memory, head: int, *, pinned: int | None = None, to_swap: bool = False
) -> bool:
    """Make 512 base pages of one compound page. Refused while anything but mappings refers to it.

    Args:
        pinned: subpage to which the caller has a reference, which it keeps.
        to_swap: it is swapped out as one: its pages are told apart, but it is not split by name.
    Kernel: split_huge_page_to_list. Returns: whether it was split.
    """
    pages, pins = mem.pages, int(pinned is not None)
    if head == mem.huge_zero_pfn:  # refused before it counts as a page that could not be split
        if mem.hwpoison.split_warning.allows(mem.clock.now_ns, mem.printk):
            mem.printk("huge_memory: Called split_huge_page for huge zero page")
        return False
    if pages.flags[head] & PG_locked or pages.refcount[head] != pages.total_mapcount(head) + pins:
        mem.vmstat.count(THP_SPLIT_PAGE_FAILED)
        return False
    for mapping in list(page_mappings(mem, head)):
        if mapping.table < 0:
            split_huge_pmd(mem, mapping.vma, mapping.addr)
    subpages = np.arange(head, head + HPAGE_PMD_NR)
    if not to_swap:
        mem.vmstat.count(THP_SPLIT_PAGE)
    if not to_swap and mem.version.split_maps_zero_page and pages.flags[head] & PG_anon:
        _map_zero_page(mem, subpages)
    own = np.uint32(PG_anon_exclusive | PG_hwpoison)
    gone = PG_head | PG_tail | PG_mlocked | PG_unevictable | PG_has_hwpoisoned
    kept = np.uint32(~gone & 0xFFFFFFFF) & ~own
    pages.flags[subpages] = pages.flags[head] & kept | pages.flags[subpages] & own
    pages.order[subpages] = 0
    pages.refcount[subpages] = pages.mapcount[subpages]
    if pinned is not None:
        pages.refcount[pinned] += 1
    pages.mapping[subpages] = pages.mapping[head]
    pages.index[subpages] = pages.index[head] + np.arange(HPAGE_PMD_NR)
    pages.memcg[subpages] = pages.memcg[head]
    pages.lru_seq[subpages] = pages.lru_seq[head]
    _free_unmapped(mem, subpages)
    return True


def _map_zero_page(mem: Memory, subpages: Pfns) -> None:
    """Map the zero page instead of subpages without content, but where it is mlocked (Linux 6.12).

    Kernel: try_to_map_unused_to_zeropage.
    """
    pages = mem.pages
    pages.refcount[subpages[0]] += 1  # should nothing be left: it is counted anew afterwards
    empty = ~mem.ram.pages[subpages].any(axis=1)
    empty &= pages.flags[subpages] & np.uint32(PG_hwpoison) == 0
    for pfn in subpages[empty].tolist():
        for mapping in list(page_mappings(mem, pfn)):
            if mapping.vma.vm_flags & VM_LOCKED:
                continue
            word = int(mem.ram.words[mapping.table, mapping.slot])
            zero = (mem.zero_pfn << PAGE_SHIFT) | ZERO_PROT | word & PAGE_UFFD_WP
            mem.ram.words[mapping.table, mapping.slot] = zero
            page_remove_rmap(mem, np.array([pfn]), mapping.vma)
            mem.mod_mm(mapping.vma.mm, MM_ANONPAGES, -1)
            put_pages(mem, np.array([pfn]))


def _free_unmapped(mem: Memory, subpages: Pfns) -> None:
    """Subpages that nothing maps any more go free; a reference is taken so that it can be put."""
    unmapped = subpages[mem.pages.refcount[subpages] == 0]
    mem.pages.refcount[unmapped] = 1
    put_pages(mem, unmapped)
