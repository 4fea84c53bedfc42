"""LRU lists, their per-CPU batches, and the dropping of references (mm/swap.c, mm/vmscan.c).

A page on its way to an LRU list first waits in the batch of the CPU that put it there: the batch
holds a reference, and PG_lru stays clear until the batch is full (15 pages), a compound page joins
it, or somebody drains it. Until then the page is in no list and cannot be isolated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.kernel.panic import KernelBug
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_active,
    PG_head,
    PG_isolated,
    PG_lru,
    PG_mlocked,
    PG_referenced,
    PG_swapbacked,
    PG_tail,
    PG_unevictable,
    compound_head,
)
from pykhuge.mm.page_alloc import free_compound_page, free_pages
from pykhuge.mm.vmstat import (
    NR_ACTIVE_ANON,
    NR_ACTIVE_FILE,
    NR_INACTIVE_ANON,
    NR_INACTIVE_FILE,
    NR_ISOLATED_ANON,
    NR_ISOLATED_FILE,
    NR_UNEVICTABLE,
)

__all__ = [
    "PAGEVEC_SIZE",
    "del_pages_from_lru",
    "isolate_lru_pages",
    "isolated_item",
    "lru_add_drain",
    "lru_add_drain_all",
    "lru_add_huge_page",
    "lru_cache_add",
    "lru_item",
    "lru_pages",
    "mark_page_accessed",
    "put_pages",
    "putback_lru_pages",
]

PAGEVEC_SIZE, LATER_PAGEVEC_SIZE = 15, 31

U_LRU = np.uint32(PG_lru)
U_NOT_LRU = np.uint32(~PG_lru & 0xFFFFFFFF)
U_HEAD = np.uint32(PG_head)
U_COMPOUND = np.uint32(PG_head | PG_tail)
U_KIND = np.uint32(PG_unevictable | PG_swapbacked | PG_active | PG_head)

Flags = npt.NDArray[np.uint32]


def lru_item(flags: int) -> int:
    """folio_lru_list() as the NR_* counter of the list that a page with `flags` belongs on."""
    if flags & PG_unevictable:
        return NR_UNEVICTABLE
    if flags & PG_swapbacked:
        return NR_ACTIVE_ANON if flags & PG_active else NR_INACTIVE_ANON
    return NR_ACTIVE_FILE if flags & PG_active else NR_INACTIVE_FILE


def isolated_item(flags: int) -> int:
    """NR_ISOLATED_ANON + page_is_file_lru()."""
    return NR_ISOLATED_ANON if flags & PG_swapbacked else NR_ISOLATED_FILE


def lru_cache_add(mem: Memory, pfns: Pfns) -> None:
    """Put pages into this CPU's batch, which takes over one reference of each.

    pfns: int64[n], base pages or heads, in the order in which they go onto the list. Full batches
    of 15, in later kernels 31, go onto their lists at once; the rest stays (folio_add_lru).
    """
    batch = mem.lru_batches[mem.sched.current.cpu]
    size = LATER_PAGEVEC_SIZE if mem.version.lru_batch_of_31 else PAGEVEC_SIZE
    if len(pfns) == 1 and not mem.pages.flags[pfns[0]] & U_HEAD and len(batch) < size - 1:
        batch.append(int(pfns[0]))
        return
    waiting = np.concatenate([np.array(batch, np.int64), pfns]) if batch else pfns
    start = 0
    if np.bitwise_or.reduce(mem.pages.flags[pfns]) & U_HEAD:
        # A compound page flushes the batch it joins, so the count begins anew behind the last one.
        heads = np.flatnonzero(mem.pages.flags[waiting] & U_HEAD)
        start = int(heads[-1]) + 1
    flush = start + (len(waiting) - start) // size * size
    batch[:] = waiting[flush:].tolist()
    if flush:
        _lru_add(mem, waiting[:flush])


def lru_add_huge_page(mem: Memory, head: int) -> None:
    """Put a compound page that somebody refers to onto its list.

    It flushes the batch it joins, so the batch's own reference to it comes and goes at once. One
    that is mlocked does not join that batch (mlock_new_folio).
    """
    if not mem.pages.flags[head] & PG_mlocked:
        lru_add_drain(mem)
    flags = int(mem.pages.flags[head])
    mem.pages.flags[head] = flags | PG_lru
    mem.pages.lru_seq[head] = mem.lru_clock
    mem.lru_clock += 1
    mem.mod_page(lru_item(flags), head, mem.pages.compound_nr(head))


def mark_page_accessed(mem: Memory, head: int) -> None:
    """folio_mark_accessed(): referenced the first time, active the second.

    An active page moves at once: there is no batch of pages to be activated.
    """
    flags = int(mem.pages.flags[head])
    if not flags & PG_referenced:
        mem.pages.flags[head] |= np.uint32(PG_referenced)
        return
    if flags & (PG_active | PG_unevictable):
        return
    active = flags & ~PG_referenced | PG_active
    mem.pages.flags[head] = active
    if flags & PG_lru:
        nr = mem.pages.compound_nr(head)
        mem.mod_page(lru_item(flags), head, -nr)
        mem.mod_page(lru_item(active), head, nr)


def lru_add_drain(mem: Memory, cpu: int | None = None) -> None:
    """Put this CPU's batch (or that of `cpu`) onto the LRU lists."""
    batch = mem.lru_batches[mem.sched.current.cpu if cpu is None else cpu]
    if batch:
        pfns = np.array(batch, np.int64)
        batch.clear()
        _lru_add(mem, pfns)


def lru_add_drain_all(mem: Memory) -> None:
    """Drain the batches of all CPUs."""
    for cpu in range(len(mem.lru_batches)):
        lru_add_drain(mem, cpu)


def isolate_lru_pages(mem: Memory, pfns: Pfns, mark: int = 0) -> None:
    """folio_isolate_lru() of pages that are on an LRU list: one reference more, PG_lru clear.

    They count as isolated from here on, in NR_ISOLATED_*. mark: flags to set with it (PG_locked).
    """
    mem.pages.refcount[pfns] += 1
    flags = mem.pages.flags[pfns]
    mem.pages.flags[pfns] = flags & U_NOT_LRU | np.uint32(PG_isolated | mark)
    for kind, same in _by_kind(flags, pfns):
        _mod_lru(mem, lru_item(kind), kind, same, -1)
        _mod_lru(mem, isolated_item(kind), kind, same, +1)


def del_pages_from_lru(mem: Memory, pfns: Pfns) -> None:
    """lruvec_del_folio() of pages that are on an LRU list; nothing else of them changes."""
    flags = mem.pages.flags[pfns]
    mem.pages.flags[pfns] = flags & U_NOT_LRU
    for kind, same in _by_kind(flags, pfns):
        _mod_lru(mem, lru_item(kind), kind, same, -1)


def putback_lru_pages(mem: Memory, pfns: Pfns, mark: int = 0) -> None:
    """Undo isolate_lru_pages: by way of the batch, to which the isolation's reference goes over."""
    if not len(pfns):
        return
    flags = mem.pages.flags[pfns]
    mem.pages.flags[pfns] = flags & np.uint32(~(PG_isolated | mark) & 0xFFFFFFFF)
    for kind, same in _by_kind(flags, pfns):
        _mod_lru(mem, isolated_item(kind), kind, same, -1)
    lru_cache_add(mem, pfns)


def put_pages(mem: Memory, pfns: Pfns) -> None:
    """put_page() each of `pfns` (int64[n], any mix): those left without a reference are freed.

    Raises: KernelBug if a refcount would fall below 0.
    """
    refcount = mem.pages.refcount
    if np.bitwise_or.reduce(mem.pages.flags[pfns]) & U_COMPOUND:
        pfns = compound_head(mem.pages, pfns)
        np.subtract.at(refcount, pfns, 1)
        pfns = np.unique(pfns)
        left = refcount[pfns]
    else:
        left = refcount[pfns] - 1
        refcount[pfns] = left
    if np.count_nonzero(left) < len(left):
        if left.min() < 0:
            raise KernelBug(*(f"page {pfn:#x} is put too often" for pfn in pfns[left < 0].tolist()))
        _release(mem, pfns[left == 0])


def lru_pages(mem: Memory, item: int) -> Pfns:
    """The pages of one LRU list (NR_INACTIVE_ANON ... NR_UNEVICTABLE), oldest first. int64[n]."""
    on_lru = np.concatenate(
        [node.start_pfn + np.flatnonzero(_used_flags(mem, node.nid) & U_LRU) for node in mem.nodes]
    )
    own = np.array([pfn for pfn in on_lru if lru_item(int(mem.pages.flags[pfn])) == item], np.int64)
    return own[np.argsort(mem.pages.lru_seq[own], kind="stable")]


def _used_flags(mem: Memory, nid: int) -> Flags:
    node = mem.nodes[nid]
    return mem.pages.flags[node.start_pfn : node.start_pfn + node.high * HPAGE_PMD_NR]


def _lru_add(mem: Memory, pfns: Pfns) -> None:
    """A batch reaches the lists: its references are dropped, pages nobody else has are freed."""
    pages = mem.pages
    left = pages.refcount[pfns] - 1
    pages.refcount[pfns] = left
    nr_kept = np.count_nonzero(left)
    if nr_kept == 0:
        _release(mem, pfns)
        return
    if nr_kept < len(pfns):
        _release(mem, pfns[left == 0])
        pfns = pfns[left != 0]
    flags = pages.flags[pfns]
    pages.flags[pfns] = flags | U_LRU
    pages.lru_seq[pfns] = np.arange(mem.lru_clock, mem.lru_clock + len(pfns))
    mem.lru_clock += len(pfns)
    for kind, same in _by_kind(flags, pfns):
        _mod_lru(mem, lru_item(kind), kind, same, +1)


def _release(mem: Memory, pfns: Pfns) -> None:
    """Free pages whose refcount is 0, taking those on an LRU list off it."""
    flags = mem.pages.flags[pfns]
    bits = np.bitwise_or.reduce(flags)
    if bits & U_LRU:
        on_lru = flags & U_LRU != 0
        for kind, same in _by_kind(flags[on_lru], pfns[on_lru]):
            _mod_lru(mem, lru_item(kind), kind, same, -1)
    if bits & U_HEAD:
        heads = flags & U_HEAD != 0
        for head in pfns[heads].tolist():
            free_compound_page(mem, head)
        pfns = pfns[~heads]
    if len(pfns):
        free_pages(mem, pfns)


def _by_kind(flags: Flags, pfns: Pfns) -> list[tuple[int, Pfns]]:
    """Pages sorted by what decides over their list: (flags as far as these matter, pages)."""
    kinds = flags & U_KIND
    if not np.count_nonzero(kinds != kinds[0]):
        return [(int(kinds[0]), pfns)]
    return [(kind, pfns[kinds == kind]) for kind in sorted(set(kinds.tolist()))]


def _mod_lru(mem: Memory, item: int, kind: int, pfns: Pfns, sign: int) -> None:
    """Count pages of one kind in NR_* `item`, compound ones by all of their pages."""
    if not kind & PG_head:
        mem.mod_pages(item, pfns, sign)
        return
    for head in pfns.tolist():
        mem.mod_page(item, head, sign * mem.pages.compound_nr(head))
