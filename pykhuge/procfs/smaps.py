"""/proc/pid/smaps and smaps_rollup: how much of each VMA is there, and with whom it is shared.

`mem_size_stats` gathers the numbers of one VMA as the kernel does; all pages of it at once. Sizes
are in bytes; what a page's sharers divide among them has PSS_SHIFT more bits, as there.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE
from pykhuge.mm.huge_memory import hugepage_vma_check
from pykhuge.mm.mm_types import VM_LOCKED, VM_SHARED, VM_WRITE, Mm, ShmemInode, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_anon,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    PG_young,
    PG_zone_device,
    compound_head,
    order_sizes,
)
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PSE,
    SWP_HWPOISON,
    SWP_PTE_MARKER,
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    each_block,
    is_swap_ptes,
    pte_pfns,
    swp_offsets,
)
from pykhuge.mm.xarray import XArray, is_swap_values
from pykhuge.procfs.kpage import page_mapcounts
from pykhuge.procfs.maps import NAME_COLUMN, header, map_line
from pykhuge.procfs.vm_flags import vm_flag_names
from pykhuge.procfs.walk import page_words

__all__ = ["Smaps", "show_smaps", "show_smaps_rollup", "smaps"]

PSS_SHIFT = 12
Bools = npt.NDArray[np.bool_]
Stats = Counter[str]

SUMS = (
    "Rss",
    "Pss",
    "Pss_Dirty",
    "Pss_Anon",
    "Pss_File",
    "Pss_Shmem",
    "Shared_Clean",
    "Shared_Dirty",
    "Private_Clean",
    "Private_Dirty",
    "Referenced",
    "Anonymous",
    "LazyFree",
    "AnonHugePages",
    "ShmemPmdMapped",
    "FilePmdMapped",
    "Shared_Hugetlb",
    "Private_Hugetlb",
    "Swap",
    "SwapPss",
    "Locked",
)
SHARES = frozenset({"Pss", "Pss_Dirty", "Pss_Anon", "Pss_File", "Pss_Shmem", "SwapPss", "Locked"})
ROLLUP_ONLY = frozenset({"Pss_Anon", "Pss_File", "Pss_Shmem"})


class Smaps(NamedTuple):
    """What smaps says of [start, end).

    fields: kB by name, in the file's order; THPeligible is 0 or 1. flags: VmFlags.
    """

    start: int
    end: int
    fields: dict[str, int]
    flags: tuple[str, ...]


def smaps(mem: Memory, mm: Mm) -> list[Smaps]:
    """The numbers of /proc/pid/smaps. Kernel: show_smap (fs/proc/task_mmu.c)."""
    return [_smap(mem, vma) for vma in mm.vmas]


def _smap(mem: Memory, vma: Vma) -> Smaps:
    page = PAGE_SIZE >> 10
    size = (vma.vm_end - vma.vm_start) >> 10
    fields = {"Size": size, "KernelPageSize": page, "MMUPageSize": page}
    sums = _kilobytes(mem_size_stats(mem, vma))
    fields |= {name: sums[name] for name in SUMS if name not in ROLLUP_ONLY}
    fields["THPeligible"] = int(hugepage_vma_check(mem, vma, smaps=True))
    return Smaps(vma.vm_start, vma.vm_end, fields, vm_flag_names(vma))


def show_smaps(mem: Memory, mm: Mm) -> str:
    """The text of /proc/pid/smaps."""
    return "".join(
        map_line(mem, vma) + _lines(entry.fields) + f"VmFlags: {' '.join(entry.flags)} \n"
        for vma, entry in zip(mm.vmas, smaps(mem, mm), strict=True)
    )


def show_smaps_rollup(mem: Memory, mm: Mm) -> str:
    """The text of /proc/pid/smaps_rollup: all VMAs in one. Kernel: show_smaps_rollup."""
    total = Stats()
    for vma in mm.vmas:
        total.update(mem_size_stats(mem, vma))
    start, end = (mm.vmas[0].vm_start, mm.vmas[-1].vm_end) if mm.vmas else (0, 0)
    return f"{header(start, end):{NAME_COLUMN}}[rollup]\n" + _lines(_kilobytes(total))


def _kilobytes(stats: Stats) -> dict[str, int]:
    return {name: stats[name] >> (10 + PSS_SHIFT * (name in SHARES)) for name in SUMS}


def _lines(fields: dict[str, int]) -> str:
    return "".join(_line(name, value) for name, value in fields.items())


def _line(name: str, value: int) -> str:
    if name == "THPeligible":
        return f"{name + ':':16}{value}\n"
    # Private_Hugetlb: leaves room for seven digits only.
    label = f"{name + ':':16}" if len(name) < 15 else f"{name}: "
    return f"{label}{value:{24 - len(label)}} kB\n"


def mem_size_stats(mem: Memory, vma: Vma) -> Stats:
    """smap_gather_stats() of one VMA."""
    stats = Stats()
    blocks = list(page_words(mem, vma.mm, vma.vm_start, vma.vm_end))
    words = np.concatenate([words for _, words in blocks]) if blocks else np.zeros(0, np.uint64)
    locked = bool(vma.vm_flags & VM_LOCKED)
    _add_present(mem, stats, words[words & U_PRESENT != 0], locked)
    _add_swapped(mem, stats, words[is_swap_ptes(words)], locked)
    _add_shmem_swap(stats, vma, blocks)
    return stats


def _add_present(mem: Memory, stats: Stats, words: Ptes, locked: bool) -> None:
    """smaps_pte_entry() and smaps_pmd_entry() of present entries, a word a page."""
    pfns = pte_pfns(words)
    huge = words & np.uint64(PAGE_PSE) != 0
    zero = pfns == mem.zero_pfn
    if mem.huge_zero_pfn is not None:
        zero |= huge & (pfns & -HPAGE_PMD_NR == mem.huge_zero_pfn)
    words, pfns, huge = words[~zero], pfns[~zero], huge[~zero]
    flags = mem.pages.flags[compound_head(mem.pages, pfns[huge])]
    anon, backed = (flags & np.uint32(bit) != 0 for bit in (PG_anon, PG_swapbacked))
    device = flags & np.uint32(PG_zone_device) != 0
    stats["AnonHugePages"] += _bytes(anon)
    stats["ShmemPmdMapped"] += _bytes(~anon & backed)
    stats["FilePmdMapped"] += _bytes(~anon & ~backed & ~device)
    young, dirty = (words & np.uint64(bit) != 0 for bit in (PAGE_ACCESSED, PAGE_DIRTY))
    _account(mem, stats, pfns, young, dirty, locked)


def _bytes(pages: Bools) -> int:
    return int(np.count_nonzero(pages)) << PAGE_SHIFT


def _account(
    mem: Memory,
    stats: Stats,
    pfns: Pfns,
    young: Bools,
    dirty: Bools,
    locked: bool,
    migration: bool = False,
) -> None:
    """smaps_account() and smaps_page_accumulate() of mapped pages (int64[n], maybe repeated)."""
    heads = compound_head(mem.pages, pfns)
    flags = mem.pages.flags[heads]
    anon, backed, page_dirty = (
        flags & np.uint32(bit) != 0 for bit in (PG_anon, PG_swapbacked, PG_dirty)
    )
    dirty = dirty | page_dirty
    stats["Rss"] += len(pfns) << PAGE_SHIFT
    stats["Anonymous"] += _bytes(anon)
    stats["LazyFree"] += _bytes(anon & ~backed & ~dirty)
    stats["Referenced"] += _bytes(young | (flags & np.uint32(PG_referenced | PG_young) != 0))

    # A page with one reference is mapped once, and one being moved counts as such.
    alone = (mem.pages.refcount[heads] == 1) | migration
    mapcounts = np.where(alone, 1, page_mapcounts(mem, pfns))
    private = mapcounts < 2
    shares = (PAGE_SIZE << PSS_SHIFT) // np.maximum(mapcounts, 1)
    pss = int(shares.sum())
    stats["Pss"] += pss
    stats["Pss_Dirty"] += int(shares[dirty].sum())
    stats["Pss_Anon"] += int(shares[anon].sum())
    stats["Pss_Shmem"] += int(shares[~anon & backed].sum())
    stats["Pss_File"] += int(shares[~anon & ~backed].sum())
    stats["Locked"] += pss * locked
    stats["Private_Dirty"] += _bytes(private & dirty)
    stats["Private_Clean"] += _bytes(private & ~dirty)
    stats["Shared_Dirty"] += _bytes(~private & dirty)
    stats["Shared_Clean"] += _bytes(~private & ~dirty)


def _add_swapped(mem: Memory, stats: Stats, words: Ptes, locked: bool) -> None:
    """smaps_pte_entry() of entries that are not present. At v6.4 hwpoison entries count nowhere."""
    kinds, offsets = words >> np.uint64(SWP_TYPE_SHIFT), swp_offsets(words)
    slots, entries = np.unique(offsets[kinds < SWP_HWPOISON], return_counts=True)
    stats["Swap"] += int(entries.sum()) << PAGE_SHIFT
    device = mem.swap
    # swp_swapcount() leaves out the swap cache, as swap_map does here.
    for slot, nr in zip(slots.tolist(), entries.tolist(), strict=True):
        share = (PAGE_SIZE << PSS_SHIFT) // max(device.swap_map.get(slot, 1), 1)
        stats["SwapPss"] += share * nr
    for migration, first, last in (
        (True, SWP_HWPOISON + 1, SWP_HWPOISON + 4),
        (False, SWP_HWPOISON + 4, SWP_PTE_MARKER),
    ):
        pfns = offsets[(kinds >= first) & (kinds < last)]
        no = np.zeros(len(pfns), np.bool_)
        _account(mem, stats, pfns, no, no, locked, migration)


def _add_shmem_swap(stats: Stats, vma: Vma, blocks: list[tuple[int, Ptes]]) -> None:
    """Pages of a shmem file that are on swap, which no entry names.

    A writable private mapping counts those under holes of its page tables alone: where it has an
    entry, that is its own. What went to swap as one counts whole at every look-up that finds a part
    of it, so that a table's holes, looked up one by one, make much of it.
    Kernel: smap_gather_stats, shmem_swap_usage, smaps_pte_hole.
    """
    inode = vma.vm_file.inode if vma.vm_file is not None else None
    if not isinstance(inode, ShmemInode) or not inode.swapped:
        return
    if vma.vm_flags & (VM_SHARED | VM_WRITE) == VM_WRITE:
        nr = _swapped_under_holes(vma, inode, blocks)
    elif vma.vm_pgoff == 0 and vma.vm_end - vma.vm_start >= inode.i_size:
        nr = inode.swapped
    else:
        i_pages = inode.i_mapping.i_pages
        nr = _partial_swap_usage(i_pages, vma.vm_pgoff, vma.linear_page_index(vma.vm_end))
    stats["Swap"] += nr << PAGE_SHIFT


def _swapped_under_holes(vma: Vma, inode: ShmemInode, blocks: list[tuple[int, Ptes]]) -> int:
    i_pages, tables, nr = inode.i_mapping.i_pages, dict(blocks), 0
    for low, high in each_block(vma.vm_start, vma.vm_end):
        first, last = vma.linear_page_index(low), vma.linear_page_index(high)
        if low in tables:
            holes = first + np.flatnonzero(tables[low] == 0)
            nr += _swapped_at_each(i_pages, holes)
        else:
            nr += _partial_swap_usage(i_pages, first, last)
    return nr


def _swapped_at_each(i_pages: XArray, indexes: Pfns) -> int:
    """`_partial_swap_usage` of one page after the other (int64[n]), each by the whole entry."""
    nr, bases = 0, indexes & -HPAGE_PMD_NR
    for base in np.unique(bases).tolist():
        places = indexes[bases == base] - base
        swapped = places[is_swap_values(i_pages.node(base)[places])]
        nr += int(order_sizes(i_pages.node_orders(base)[swapped]).sum())
    return nr


def _partial_swap_usage(i_pages: XArray, first: int, last: int) -> int:
    """shmem_partial_swap_usage(): pages on swap in [first, last), by whole entries."""
    nr = 0
    for indexes, entries in i_pages.entries(first, last):
        swapped = indexes[is_swap_values(entries)]
        sizes = order_sizes(i_pages.node_orders(int(indexes[0]))[swapped % HPAGE_PMD_NR])
        _, first_of_each = np.unique(swapped & -sizes, return_index=True)
        nr += int(sizes[first_of_each].sum())
    return nr
