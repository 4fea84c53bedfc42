"""The audit: every count and reference once more, from first principles.

It walks the page tables, the swap map, the LRU batches and whatever else may refer to a page, adds
up, and holds the sums against what the code has counted on its way. It may be called whenever
no spinlock is held, also while tasks are paused in the middle of something.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import (
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    HPAGE_PMD_SIZE,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from pykhuge.kernel.locking import RwSem
from pykhuge.kernel.panic import KernelBug
from pykhuge.mm.mm_slot import MAX_PTE_MAPPED_THP
from pykhuge.mm.mm_types import (
    MMF_VM_HUGEPAGE,
    VM_NORESERVE,
    VM_SHARED,
    VM_UFFD_WP,
    VM_WRITE,
    AddressSpace,
    File,
    Inode,
    Mm,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    GUP_PIN_COUNTING_BIAS,
    Pfns,
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_frozen,
    PG_head,
    PG_hwpoison,
    PG_in_flight,
    PG_isolated,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_private,
    PG_swapbacked,
    PG_swapcache,
    PG_table,
    PG_tail,
    PG_writeback,
    PG_zone_device,
    compound_head,
    order_sizes,
)
from pykhuge.mm.page_table import (
    PAGE_RW,
    PAGE_SWP_EXCLUSIVE,
    PAGE_UFFD_WP,
    PUD_SHIFT,
    SWP_TYPE_SHIFT,
    U_PRESENT,
    Ptes,
    is_swap_ptes,
    pmd_trans_huge,
    pte_pfn,
    pte_pfns,
    swp_offsets,
)
from pykhuge.mm.rmap import mm_counter
from pykhuge.mm.shmem import BLOCKS_PER_PAGE
from pykhuge.mm.swap import isolated_item, lru_item
from pykhuge.mm.vmstat import (
    MM_COUNTERS,
    MM_SWAPENTS,
    NODE_STATS,
    NR_ANON_MAPPED,
    NR_ANON_THPS,
    NR_FILE_DIRTY,
    NR_FILE_MAPPED,
    NR_FILE_PAGES,
    NR_FILE_PMDMAPPED,
    NR_FILE_THPS,
    NR_FREE_PAGES,
    NR_MLOCK,
    NR_PAGETABLE,
    NR_SHMEM,
    NR_SHMEM_PMDMAPPED,
    NR_SHMEM_THPS,
    NR_SWAPCACHE,
    NR_WRITEBACK,
)
from pykhuge.mm.xarray import value_slots

__all__ = ["audit"]


@dataclass
class Recount:
    """What the walks have found. References go to heads, `mapped` to the very page."""

    references: list[Pfns] = field(default_factory=list)
    mapped: list[Pfns] = field(default_factory=list)
    entire: list[int] = field(default_factory=list)
    pins: Counter[int] = field(default_factory=Counter)
    tables: list[int] = field(default_factory=list)
    slots: Counter[int] = field(default_factory=Counter)
    exclusive_slots: list[int] = field(default_factory=list)
    files: Counter[File] = field(default_factory=Counter)
    cached: list[Pfns] = field(default_factory=list)
    detached: list[Pfns] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def expect(self, what: str, counted: object, recounted: object) -> None:
        if counted != recounted:
            self.findings.append(f"{what} is {counted}, recount {recounted}")

    def refer(self, pfns: list[int]) -> None:
        if pfns:
            self.references.append(np.array(pfns, np.int64))


def audit(mem: Memory) -> None:
    """Recount all of `mem`. Raises: KernelBug with a line for every difference."""
    recount = Recount()
    for mm in mem.mms:
        _walk_mm(mem, mm, recount)
    _check_vmas(mem, recount)
    _other_references(mem, recount)
    _check_files(mem, recount)
    used = _used_pages(mem)
    _check_pages(mem, recount, used)
    _check_node_stats(mem, recount, used)
    _check_swap(mem, recount, used)
    _check_memcgs(mem, recount, used)
    _check_locks(mem, recount)
    _check_mm_slots(mem, recount)
    _check_hwpoison(mem, recount, used)
    if recount.findings:
        raise KernelBug(*recount.findings)


def _used_pages(mem: Memory) -> Pfns:
    """Every frame that is not free, in ascending order."""
    ranges = [(node.start_pfn, node.start_pfn + node.high * HPAGE_PMD_NR) for node in mem.nodes]
    ranges.append((mem.device_start, mem.pages.nr_pages))
    found = []
    for start, end in ranges:
        flags = mem.pages.flags[start:end] & np.uint32(~PG_zone_device & 0xFFFFFFFF)
        found.append(start + np.flatnonzero((flags != 0) | (mem.pages.refcount[start:end] != 0)))
    return np.concatenate(found)


def _walk_mm(mem: Memory, mm: Mm, recount: Recount) -> None:
    rss: Counter[int] = Counter()
    tables = 0
    for gib, pmd_table in mm.pmd_tables.items():
        recount.tables.append(pmd_table)
        tables += 1
        words = mem.ram.words[pmd_table]
        huge = 0
        for place in np.flatnonzero(words).tolist():
            addr, pmd = (gib << PUD_SHIFT) + place * HPAGE_PMD_SIZE, int(words[place])
            if pmd_trans_huge(pmd):
                huge += _see_huge(mem, mm, addr, pmd, recount, rss)
            else:
                tables += 1
                recount.tables.append(pte_pfn(pmd))
                _see_table(mem, mm, addr, mem.ram.words[pte_pfn(pmd)], recount, rss)
        deposits = mm.deposits.get(gib, [])
        recount.expect(f"{mm.name}: deposited tables of GiB {gib}", len(deposits), huge)
        recount.tables.extend(deposits)
        tables += len(deposits)
    if mm.detached and mm.mmap_lock.writer is None:
        recount.findings.append(f"{mm.name}: a page table is detached, and nobody is at it")
    for addr, pmd in mm.detached.items():
        tables += 1
        recount.tables.append(pte_pfn(pmd))
        recount.detached.append(_mapped_heads(mem, mem.ram.words[pte_pfn(pmd)]))
        _see_table(mem, mm, addr, mem.ram.words[pte_pfn(pmd)], recount, rss)
    for item, name in enumerate(MM_COUNTERS):
        recount.expect(f"{mm.name}: {name}", mm.rss_stat[item], rss[item])
    recount.expect(f"{mm.name}: pgtables_bytes", mm.pgtables_bytes, tables * PAGE_SIZE)


def _check_vmas(mem: Memory, recount: Recount) -> None:
    """VMAs are in order and apart; they and their anon_vmas and files know each other."""
    linked: Counter[tuple[int, int]] = Counter()
    for mm in mem.mms:
        recount.files.update(mm.files)
        ends = [vma.vm_end for vma in mm.vmas]
        for vma, end in zip(mm.vmas, [0, *ends], strict=False):
            if not end <= vma.vm_start < vma.vm_end or (vma.vm_start | vma.vm_end) % PAGE_SIZE:
                recount.findings.append(f"{mm.name}: VMA {vma} is out of order")
            linked.update((anon_vma.key, id(vma)) for anon_vma in vma.anon_vma_chain)
            if vma.anon_vma is not None and vma.anon_vma not in vma.anon_vma_chain:
                recount.findings.append(f"{mm.name}: VMA {vma} is not on its own anon_vma")
            if vma.vm_file is not None:
                recount.files[vma.vm_file] += 1
                linked[vma.vm_file.f_mapping.key, id(vma)] += 1
    for mapping in mem.mappings.values():
        vmas = mapping.i_mmap if isinstance(mapping, AddressSpace) else mapping.vmas
        linked.subtract((mapping.key, id(vma)) for vma in vmas)
    for key in sorted({key for (key, _), number in linked.items() if number}):
        recount.findings.append(f"mapping {key} and its VMAs do not know each other")


def _mapped_heads(mem: Memory, ptes: Ptes) -> Pfns:
    """The pages, by their heads, that a page table maps."""
    return compound_head(mem.pages, pte_pfns(ptes[ptes & U_PRESENT != 0]))


def _see_huge(mem: Memory, mm: Mm, addr: int, pmd: int, recount: Recount, rss: Counter[int]) -> int:
    """Count one huge PMD; returns how many page tables are deposited for it."""
    head = pte_pfn(pmd)
    vma = _vma_at(mm, addr)
    if vma is None or vma.vm_end < addr + HPAGE_PMD_SIZE:
        recount.findings.append(f"{mm.name}: a huge PMD at {addr:#x} reaches beyond its VMA")
        return 0
    if head == mem.huge_zero_pfn:
        return 1
    rss[mm_counter(int(mem.pages.flags[head]))] += HPAGE_PMD_NR
    recount.entire.append(head)
    recount.refer([head])
    _check_rmap(mem, vma, np.array([addr]), np.array([head]), recount)
    _check_write(vma, np.array([addr]), np.array([pmd], np.uint64), recount)
    if vma.vm_file is not None:
        return 0
    if pmd & PAGE_RW and not mem.pages.flags[head] & PG_anon_exclusive:
        recount.findings.append(f"{mm.name}: huge page {head:#x} is writable but not exclusive")
    return 1


def _see_table(
    mem: Memory, mm: Mm, addr: int, ptes: Ptes, recount: Recount, rss: Counter[int]
) -> None:
    """Count one page table, its pages and swap entries."""
    swapped = ptes[is_swap_ptes(ptes)]
    swapped = swapped[swapped >> np.uint64(SWP_TYPE_SHIFT) == 0]
    recount.slots.update(swp_offsets(swapped).tolist())
    recount.exclusive_slots.extend(
        swp_offsets(swapped[swapped & np.uint64(PAGE_SWP_EXCLUSIVE) != 0]).tolist()
    )
    places = np.flatnonzero(ptes & U_PRESENT)
    pfns = pte_pfns(ptes[places])
    normal = pfns != mem.zero_pfn
    places, pfns = places[normal], pfns[normal]
    recount.mapped.append(pfns)
    heads = compound_head(mem.pages, pfns)
    recount.references.append(heads)
    for flags, nr in Counter(mem.pages.flags[heads].tolist()).items():
        rss[mm_counter(flags)] += nr
    rss[MM_SWAPENTS] += len(swapped)
    addrs = addr + (places << PAGE_SHIFT)
    for vma in mm.vmas:
        inside = (addrs >= vma.vm_start) & (addrs < vma.vm_end)
        if inside.any():
            _check_rmap(mem, vma, addrs[inside], pfns[inside], recount)
            _check_write(vma, addrs[inside], ptes[places[inside]], recount)
            if vma.vm_file is not None and not vma.vm_flags & VM_SHARED:
                _check_private(mem, vma, addrs[inside], ptes[places[inside]], recount)
            pfns, addrs, places = pfns[~inside], addrs[~inside], places[~inside]
    recount.findings.extend(
        f"{mm.name}: page {pfn:#x} is mapped at {at:#x}, outside of any VMA"
        for pfn, at in zip(pfns.tolist(), addrs.tolist(), strict=True)
    )
    writable = pte_pfns(ptes[(ptes & U_PRESENT != 0) & (ptes & np.uint64(PAGE_RW) != 0)])
    anon = mem.pages.flags[compound_head(mem.pages, writable)] & np.uint32(PG_anon) != 0
    shared = writable[anon & (mem.pages.flags[writable] & np.uint32(PG_anon_exclusive) == 0)]
    recount.findings.extend(
        f"{mm.name}: page {pfn:#x} is writable but not exclusive" for pfn in shared.tolist()
    )


def _check_write(vma: Vma, addrs: npt.NDArray[np.int64], ptes: Ptes, recount: Recount) -> None:
    """Entries are writable only where the VMA is, and never where userfaultfd protects them."""
    writable = ptes & np.uint64(PAGE_RW) != 0
    if vma.vm_flags & VM_WRITE:
        watched = bool(vma.vm_flags & VM_UFFD_WP)
        writable &= (ptes & np.uint64(PAGE_UFFD_WP) != 0) & watched
    for addr in addrs[writable].tolist():
        recount.findings.append(f"{vma.mm.name}: the entry at {addr:#x} may not be writable")


def _check_private(
    mem: Memory, vma: Vma, addrs: npt.NDArray[np.int64], ptes: Ptes, recount: Recount
) -> None:
    """A private mapping never writes to the file's own pages."""
    anon = mem.pages.flags[compound_head(mem.pages, pte_pfns(ptes))] & np.uint32(PG_anon) != 0
    for addr in addrs[~anon & (ptes & np.uint64(PAGE_RW) != 0)].tolist():
        recount.findings.append(f"{vma.mm.name}: the file's own page is writable at {addr:#x}")


def _vma_at(mm: Mm, addr: int) -> Vma | None:
    return next((vma for vma in mm.vmas if vma.vm_start <= addr < vma.vm_end), None)


def _check_rmap(
    mem: Memory, vma: Vma, addrs: npt.NDArray[np.int64], pfns: Pfns, recount: Recount
) -> None:
    """The pages mapped at `addrs` must be found there by an rmap walk."""
    heads = compound_head(mem.pages, pfns)
    keys = [anon_vma.key for anon_vma in vma.anon_vma_chain]
    if vma.vm_file is not None:
        keys.append(vma.vm_file.f_mapping.key)
    indexes = vma.vm_pgoff + ((addrs - vma.vm_start) >> PAGE_SHIFT)
    found = np.isin(mem.pages.mapping[heads], keys) & (
        mem.pages.index[heads] + pfns - heads == indexes
    )
    for addr in addrs[~found].tolist():
        recount.findings.append(f"{vma.mm.name}: rmap does not find the page mapped at {addr:#x}")


def _check_files(mem: Memory, recount: Recount) -> None:
    """Page caches hold what their files count, and files are open as often as they say."""
    recount.files.update(mem.held_files)
    opened: Counter[Inode] = Counter(file.inode for file in recount.files)
    writers: Counter[Inode] = Counter(file.inode for file in recount.files if file.writable)
    committed = 0
    for file, nr in recount.files.items():
        recount.expect(f"{file.inode.name}: f_count", file.f_count, nr)
    for inode in mem.inodes:
        name, mapping = inode.name, inode.i_mapping
        recount.expect(f"{name}: i_count", inode.i_count, opened[inode])
        values = _see_cache(mem, mapping, recount)
        if isinstance(inode, ShmemInode):
            if not inode.i_nlink and not inode.i_count and not inode.i_freeing:
                recount.findings.append(f"{name}: nobody has the file any more, and it is there")
            recount.expect(f"{name}: swapped", inode.swapped, values)
            # Reclaim of a clean page leaves an excess, which the next recalculation frees.
            if inode.alloced < mapping.nrpages + inode.swapped:
                recount.expect(f"{name}: alloced", inode.alloced, mapping.nrpages + inode.swapped)
            recount.expect(f"{name}: i_blocks", inode.i_blocks, inode.alloced * BLOCKS_PER_PAGE)
            if inode.i_sb.max_blocks:
                sb = inode.i_sb
                others = (each for each in mem.inodes if isinstance(each, ShmemInode))
                alloced = sum(each.alloced for each in others if each.i_sb is sb)
                recount.expect("tmpfs: used_blocks", sb.used_blocks, alloced)
            reserved = -(-inode.i_size // PAGE_SIZE)
            committed += inode.alloced if inode.flags & VM_NORESERVE else reserved
        else:
            recount.expect(f"{name}: i_writecount", inode.i_writecount, writers[inode])
            under_way = sum(mem.pages.mapping[head] == mapping.key for head in mem.in_flight)
            huge = len(mapping.i_pages.orders)
            if not huge <= mapping.nr_thps <= huge + under_way:
                recount.expect(f"{name}: nr_thps", mapping.nr_thps, huge)
    recount.expect("vm_committed_as", mem.vm_committed_as, committed)


def _see_cache(mem: Memory, mapping: AddressSpace, recount: Recount) -> int:
    """Walk one page cache; returns how many swap slots stand in it."""
    pages, name = mem.pages, mapping.host.name
    nrpages, slots = 0, 0
    for indexes, entries in mapping.i_pages.entries(0, 1 << 52):
        present = entries > 0
        nrpages += int(np.count_nonzero(present))
        values = value_slots(entries).tolist()
        recount.slots.update(values)
        slots += len(values)
        pfns, places = entries[present], indexes[present]
        # The huge page of a collapse under way has one reference, the collapse's.
        settled = pages.flags[pfns] & np.uint32(PG_in_flight) == 0
        recount.references.append(pfns[settled])
        orders = mapping.i_pages.node_orders(int(indexes[0]))
        _check_values(name, indexes[~present], orders, recount)
        orders = orders[places % HPAGE_PMD_NR]
        wrong = pages.order[pfns] != orders
        recount.findings.extend(
            f"{name}: the order of page {pfn:#x} is not its entry's"
            for pfn in pfns[wrong & settled].tolist()
        )
        first = places % order_sizes(orders) == 0
        pfns, places, settled = pfns[first], places[first], settled[first]
        recount.cached.append(pfns[settled])
        wrong = (pages.mapping[pfns] != mapping.key) | ((pages.index[pfns] != places) & settled)
        recount.findings.extend(
            f"{name}: page {pfn:#x} is cached and does not know it" for pfn in pfns[wrong].tolist()
        )
    recount.expect(f"{name}: nrpages", mapping.nrpages, nrpages + mem.charged_ahead[mapping.key])
    return slots


def _check_values(
    name: str, indexes: Pfns, orders: npt.NDArray[np.uint8], recount: Recount
) -> None:
    """What stands for 2**order pages on swap stands at 2**order indexes."""
    sizes = order_sizes(orders[indexes % HPAGE_PMD_NR])
    entries, first, found = np.unique(indexes & -sizes, return_index=True, return_counts=True)
    recount.findings.extend(
        f"{name}: the value at {index} is not at all of its indexes"
        for index in entries[found != sizes[first]].tolist()
    )


def _other_references(mem: Memory, recount: Recount) -> None:
    recount.refer(recount.tables)
    recount.refer(list(mem.swap.cache.values()))
    recount.refer(sorted(mem.hwpoison.refs))
    for batch in mem.lru_batches:
        recount.refer(batch)
    recount.refer([mem.zero_pfn] + ([mem.huge_zero_pfn] if mem.huge_zero_pfn is not None else []))
    for held in mem.user_pages:
        for head in compound_head(mem.pages, held.pfns).tolist():
            compound = mem.pages.flags[head] & PG_head
            recount.refer([head] * (GUP_PIN_COUNTING_BIAS if held.pinned and not compound else 1))
            if held.pinned and compound:
                recount.pins[head] += 1


def _check_pages(mem: Memory, recount: Recount, used: Pfns) -> None:
    pages = mem.pages
    flags = pages.flags[used]
    held = np.uint32(PG_isolated | PG_in_flight | PG_frozen)
    recount.references.append(used[flags & np.uint32(PG_isolated | PG_in_flight) != 0])
    recount.references.append(used[flags & np.uint32(PG_private) != 0])
    _check_compound(mem, recount, used)
    _check_cached(mem, recount, used)
    _compare(recount, "refcount", pages.refcount, used, np.concatenate(recount.references))
    _compare(recount, "mapcount", pages.mapcount, used, np.concatenate([*recount.mapped, used[:0]]))
    _compare(
        recount, "entire_mapcount", pages.entire_mapcount, used, np.array(recount.entire, np.int64)
    )
    _compare(
        recount, "pincount", pages.pincount, used, np.array(list(recount.pins.elements()), np.int64)
    )
    in_flight = used[flags & np.uint32(PG_in_flight) != 0].tolist()
    recount.expect("huge pages in flight", sorted(mem.in_flight), in_flight)
    for head, task in mem.in_flight.items():
        if task.idle:
            recount.findings.append(f"huge page {head:#x} is held by {task.comm}, which has ended")
    waiting = np.array([pfn for batch in mem.lru_batches for pfn in batch], np.int64)
    for pfn in waiting[pages.flags[waiting] & np.uint32(PG_lru) != 0].tolist():
        recount.findings.append(f"page {pfn:#x} is in an LRU batch and on a list")
    exclusive = used[
        (flags & np.uint32(PG_anon_exclusive) != 0) & (flags & np.uint32(PG_tail) == 0)
    ]
    several = exclusive[pages.mapcount[exclusive] + pages.entire_mapcount[exclusive] > 1]
    recount.findings.extend(
        f"exclusive page {pfn:#x} is mapped more than once" for pfn in several.tolist()
    )
    tables = np.sort(np.array(recount.tables, np.int64))
    if not np.array_equal(tables, used[flags & np.uint32(PG_table) != 0]):
        recount.findings.append("page-table pages are not those that the address spaces use")
    isolated = used[flags & np.uint32(PG_isolated) != 0]
    by_collapses = np.concatenate([*recount.detached, used[:0]])
    recount.findings.extend(
        f"page {pfn:#x} is isolated, and no collapse is at it"
        for pfn in isolated[~np.isin(isolated, by_collapses)].tolist()
    )
    locked = used[(flags & np.uint32(PG_locked) != 0) & (flags & held == 0)]
    by_others = {pfn for each in mem.user_pages if each.locked for pfn in each.pfns.tolist()}
    by_others |= set(mem.page_locks)
    recount.findings.extend(
        f"page {pfn:#x} is locked by {task.comm}, which has ended"
        for pfn, task in mem.page_locks.items()
        if task.idle
    )
    recount.findings.extend(
        f"page {pfn:#x} is locked, and nobody has isolated it"
        for pfn in locked.tolist()
        if pfn not in by_others
    )


def _check_compound(mem: Memory, recount: Recount, used: Pfns) -> None:
    """The tails of a compound page are those that its order says, and say the same order."""
    pages = mem.pages
    compound = used[pages.flags[used] & np.uint32(PG_head | PG_tail) != 0]
    heads = compound_head(pages, compound)
    wrong = (pages.flags[heads] & np.uint32(PG_head) == 0) | (
        pages.order[heads] != pages.order[compound]
    )
    wrong |= (compound != heads) != (pages.flags[compound] & np.uint32(PG_tail) != 0)
    recount.findings.extend(
        f"page {pfn:#x} is not part of the compound page that it says"
        for pfn in compound[wrong].tolist()
    )
    expected = int(order_sizes(pages.order[heads[compound == heads]]).sum())
    recount.expect("pages of compound pages", len(compound), expected)


def _check_cached(mem: Memory, recount: Recount, used: Pfns) -> None:
    """Pages that name a page cache are in it, or taken out by a collapse under way."""
    pages = mem.pages
    caches = [key for key, each in mem.mappings.items() if isinstance(each, AddressSpace)]
    own = used[np.isin(pages.mapping[used], caches)]
    flags = pages.flags[own]
    outside = own[flags & np.uint32(PG_frozen | PG_in_flight) == 0]
    cached = np.sort(np.concatenate([*recount.cached, used[:0]]))
    if not np.array_equal(cached, outside):
        odd = np.setxor1d(cached, outside).tolist()
        recount.findings.append(f"pages {odd} are cached and do not say so, or not")
    frozen = own[flags & np.uint32(PG_frozen) != 0]
    collapsing = pages.mapping[np.array(list(mem.in_flight), np.int64)]
    recount.findings.extend(
        f"page {pfn:#x} is frozen, and no collapse is at it"
        for pfn in frozen[~np.isin(pages.mapping[frozen], collapsing)].tolist()
    )
    recount.cached.append(frozen)


def _compare(
    recount: Recount, what: str, counted: npt.NDArray[np.int32], used: Pfns, found: Pfns
) -> None:
    """`found` holds every page as often as it should be counted."""
    pfns, expected = np.unique(np.concatenate([used, found]), return_counts=True)
    expected = expected - np.isin(pfns, used)
    for index in np.flatnonzero(counted[pfns] != expected).tolist():
        recount.expect(
            f"page {pfns[index]:#x}: {what}", int(counted[pfns[index]]), int(expected[index])
        )


# collapse_file leaves the small pages' counts on their own nodes, and the huge page is taken off
# its node when it goes: with several nodes these are right in total only, as in the kernel.
_DRIFTING = (NR_FILE_PAGES, NR_SHMEM)


def _check_node_stats(mem: Memory, recount: Recount, used: Pfns) -> None:
    expected = [[0] * len(NODE_STATS) for _ in mem.nodes]
    flags = mem.pages.flags[used]
    nids = mem.nids_of(used)
    heads = compound_head(mem.pages, used)
    mapped = (mem.pages.mapcount[used] > 0) | (mem.pages.entire_mapcount[heads] > 0)
    swapbacked = mem.pages.flags[heads] & np.uint32(PG_swapbacked) != 0
    by_pmd = mem.pages.entire_mapcount[used] > 0
    cached = np.isin(used, np.concatenate([*recount.cached, used[:0]]))
    huge = cached & (mem.pages.order[used] == HPAGE_PMD_ORDER)
    swapcache = flags & np.uint32(PG_swapcache) != 0
    anon = mem.pages.flags[heads] & np.uint32(PG_anon) != 0
    disk = ~anon & ~swapbacked
    size = np.where(flags & np.uint32(PG_tail), 0, order_sizes(mem.pages.order[used]))
    by_mask = {
        NR_ANON_MAPPED: (mapped & anon) * 1,
        NR_FILE_MAPPED: (mapped & ~anon) * 1,
        NR_ANON_THPS: (by_pmd & anon) * size,
        NR_SHMEM_PMDMAPPED: (by_pmd & ~anon & swapbacked) * size,
        NR_FILE_PMDMAPPED: (by_pmd & disk) * size,
        NR_SHMEM: (cached & swapbacked) * size,
        NR_SHMEM_THPS: (huge & swapbacked) * size,
        NR_FILE_THPS: (huge & ~swapbacked) * size,
        NR_FILE_DIRTY: (disk & (flags & np.uint32(PG_dirty) != 0)) * size,
        NR_WRITEBACK: (flags & np.uint32(PG_writeback) != 0) * size,
        NR_PAGETABLE: (flags & np.uint32(PG_table) != 0) * 1,
        NR_MLOCK: (flags & np.uint32(PG_mlocked) != 0) * size,
        NR_FILE_PAGES: (swapcache | cached) * size,
        NR_SWAPCACHE: swapcache * size,
    }
    for node in mem.nodes:
        own = nids == node.nid
        for item, amount in by_mask.items():
            expected[node.nid][item] = int(amount[own].sum())
        for bit, item_of in ((PG_lru, lru_item), (PG_isolated, isolated_item)):
            listed = own & (flags & np.uint32(bit) != 0)
            for kind in np.unique(flags[listed]).tolist():
                expected[node.nid][item_of(kind)] += int(size[listed & (flags == kind)].sum())
        inside = used[own & (used < node.end_pfn)]
        expected[node.nid][NR_FREE_PAGES] = node.end_pfn - node.start_pfn - len(inside)
        blocks = np.bincount((inside - node.start_pfn) // HPAGE_PMD_NR, minlength=node.high)
        for block in np.flatnonzero(node.used[: node.high] != blocks).tolist():
            recount.expect(
                f"node{node.nid}: used pages of block {block}",
                int(node.used[block]),
                int(blocks[block]),
            )
        for item, name in enumerate(NODE_STATS):
            if len(mem.nodes) == 1 or item not in _DRIFTING:
                counted = mem.vmstat.node[node.nid][item]
                recount.expect(f"node{node.nid}: {name}", counted, expected[node.nid][item])
    for item in _DRIFTING if len(mem.nodes) > 1 else ():
        total = sum(each[item] for each in expected)
        recount.expect(f"all nodes: {NODE_STATS[item]}", mem.vmstat.total(item), total)


def _check_swap(mem: Memory, recount: Recount, used: Pfns) -> None:
    device = mem.swap
    shmem = {
        slot
        for inode in mem.inodes
        for _, entries in inode.i_mapping.i_pages.entries(0, 1 << 52)
        for slot in value_slots(entries).tolist()
    }
    recount.expect("swap slots of shmem", sorted(device.shmem), sorted(shmem))
    for slot in sorted(set(device.swap_map) | set(recount.slots)):
        recount.expect(f"swap slot {slot}: users", device.swap_map.get(slot), recount.slots[slot])
        if not recount.slots[slot] and slot not in device.cache:
            recount.findings.append(f"swap slot {slot} is kept for nobody")
    recount.findings.extend(
        f"swap slot {slot} is exclusive, and not the only one"
        for slot in recount.exclusive_slots
        if recount.slots[slot] > 1
    )
    cached = used[mem.pages.flags[used] & np.uint32(PG_swapcache) != 0]
    recount.expect("swap cache", sorted(device.cache.values()), cached.tolist())
    for slot, pfn in device.cache.items():
        recount.expect(f"page {pfn:#x}: swap slot", int(mem.pages.private[pfn]), slot)
    recount.expect("swap slots", len(device.swap_map) + len(device.free) + 1, device.next_slot)


def _check_memcgs(mem: Memory, recount: Recount, used: Pfns) -> None:
    charged: Counter[int] = Counter()
    keys = mem.pages.memcg[used]
    size = order_sizes(mem.pages.order[used])
    for key in np.unique(keys).tolist():
        charged[key] = int(size[keys == key].sum())
    for memcg in mem.memcgs[1:]:
        recount.expect(f"memcg {memcg.key}: usage", memcg.usage, charged[memcg.key])


def _check_locks(mem: Memory, recount: Recount) -> None:
    for mm in mem.mms:
        recount.expect(f"{mm.name}: page_table_lock held", mm.page_table_lock.held, False)
        locks = [mm.mmap_lock, *(vma.anon_vma.lock for vma in mm.vmas if vma.anon_vma is not None)]
        _check_holders(mm.name, locks, recount)
    for inode in mem.inodes:
        _check_holders(inode.name, [inode.i_rwsem, inode.i_mapping.i_mmap_rwsem], recount)


def _check_hwpoison(mem: Memory, recount: Recount, used: Pfns) -> None:
    """Every bad page is counted, each time it was reported; what memory_failure keeps is bad."""
    bad = used[mem.pages.flags[used] & np.uint32(PG_hwpoison) != 0]
    counted = mem.num_poisoned_pages - mem.hwpoison.device - mem.hwpoison.again
    recount.expect("num_poisoned_pages", counted, len(bad))
    recount.findings.extend(
        f"page {pfn:#x} is kept by memory_failure, and is not bad"
        for pfn in sorted(mem.hwpoison.refs - set(bad.tolist()))
    )


def _check_mm_slots(mem: Memory, recount: Recount) -> None:
    """The daemon's list holds every registered mm once; one that has ended only as the cursor."""
    scan = mem.khugepaged_scan
    listed = Counter(slot.mm for slot in scan.mm_head)
    for mm in mem.mms:
        registered = bool(mm.flags & MMF_VM_HUGEPAGE)
        recount.expect(f"{mm.name}: slots in the daemon's list", listed.pop(mm, 0), registered)
        recount.expect(f"{mm.name}: has an mm_slot", mm.mm_slot is not None, registered)
    recount.findings.extend(
        f"{mm.name} has ended and is in the daemon's list"
        for mm in listed
        if scan.mm_slot is None or mm is not scan.mm_slot.mm
    )
    for slot in scan.mm_head:
        if slot.mm.mm_slot is not slot or len(slot.pte_mapped_thp) > MAX_PTE_MAPPED_THP:
            recount.findings.append(f"{slot.mm.name}: its mm_slot is another, or overfull")
    if scan.mm_slot is not None and scan.mm_slot not in scan.mm_head:
        recount.findings.append(f"the daemon is at {scan.mm_slot.mm.name}, not one of its list")


def _check_holders(name: str, locks: list[RwSem], recount: Recount) -> None:
    recount.findings.extend(
        f"{name}: {lock} by a task that has ended"
        for lock in locks
        for holder in lock.holders
        if holder.idle
    )
