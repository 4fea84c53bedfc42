"""LRU lists, their per-CPU batches, and the dropping of references (mm/swap.c, mm/vmscan.c).

A page on its way to an LRU list first waits in the batch of the CPU that put it there: the batch
holds a reference, and PG_lru stays clear until the batch is full (15 pages), a compound page joins
it, or somebody drains it. Until then the page is in no list and cannot be isolated.
"""

from __future__ import annotations

import numpy as np

from pykhuge.kernel.panic import KernelBug
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_active,
    PG_head,
    PG_isolated,
    PG_lru,
    PG_swapbacked,
    PG_unevictable,
    compound_head,
)
from pykhuge.mm.page_alloc import free_huge_page, free_pages
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
    "isolate_lru_pages",
    "isolated_item",
    "lru_add_drain",
    "lru_add_drain_all",
    "lru_cache_add",
    "lru_item",
    "lru_pages",
    "put_pages",
    "putback_lru_pages",
]

PAGEVEC_SIZE = 15

U_LRU = np.uint32(PG_lru)
U_LRU_KIND = np.uint32(PG_unevictable | PG_swapbacked | PG_active)
U_HEAD = np.uint32(PG_head)


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

    pfns: int64[n], base pages or heads, in the order in which they go onto the list. Full batches of
    15 go onto their lists at once; the rest stays in the batch (folio_add_lru).
    """
    batch = mem.lru_batches[mem.sched.current.cpu]
    if len(pfns) == 1 and not mem.pages.flags[pfns[0]] & U_HEAD and len(batch) < PAGEVEC_SIZE - 1:
        batch.append(int(pfns[0]))
        return
    waiting = np.concatenate([np.array(batch, np.int64), pfns]) if batch else pfns
    heads = np.flatnonzero(mem.pages.flags[pfns] & U_HEAD)
    # A compound page flushes the batch it joins, so the count begins anew behind the last one.
    start = len(batch) + int(heads[-1]) + 1 if len(heads) else 0
    flush = start + (len(waiting) - start) // PAGEVEC_SIZE * PAGEVEC_SIZE
    batch[:] = waiting[flush:].tolist()
    if flush:
        _lru_add(mem, waiting[:flush])


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


def isolate_lru_pages(mem: Memory, pfns: Pfns, flags: np.ndarray) -> None:
    """folio_isolate_lru() of pages that are on an LRU list: one reference more, PG_lru clear.

    They count as isolated from here on, in NR_ISOLATED_*. flags: uint32[n], theirs.
    """
    mem.pages.refcount[pfns] += 1
    mem.pages.flags[pfns] = flags & np.uint32(~PG_lru & 0xFFFFFFFF) | np.uint32(PG_isolated)
    _account(mem, pfns, flags, -1, lru_item)
    _account(mem, pfns, flags, +1, isolated_item)


def putback_lru_pages(mem: Memory, pfns: Pfns) -> None:
    """Undo isolate_lru_pages: by way of the batch, to which the isolation's reference goes over."""
    if not len(pfns):
        return
    flags = mem.pages.flags[pfns]
    _account(mem, pfns, flags, -1, isolated_item)
    mem.pages.flags[pfns] = flags & np.uint32(~PG_isolated & 0xFFFFFFFF)
    lru_cache_add(mem, pfns)


def put_pages(mem: Memory, pfns: Pfns) -> None:
    """put_page() each of `pfns` (int64[n], any mix): those left without a reference are freed.

    Raises: KernelBug if a refcount would fall below 0.
    """
    heads = compound_head(mem.pages, pfns)
    refcount = mem.pages.refcount
    if (mem.pages.flags[heads] & U_HEAD).any():
        np.subtract.at(refcount, heads, 1)
        heads = np.unique(heads)
    else:
        refcount[heads] -= 1
    left = refcount[heads]
    if left.min(initial=0) < 0:
        raise KernelBug(
            *(
                f"page {pfn:#x} has refcount {n}"
                for pfn, n in zip(heads, left, strict=True)
                if n < 0
            )
        )
    _release(mem, heads[left == 0])


def lru_pages(mem: Memory, item: int) -> Pfns:
    """The pages of one LRU list (NR_INACTIVE_ANON ... NR_UNEVICTABLE), oldest first. int64[n]."""
    on_lru = np.concatenate(
        [node.start_pfn + np.flatnonzero(_used_flags(mem, node.nid) & U_LRU) for node in mem.nodes]
    )
    own = np.array([pfn for pfn in on_lru if lru_item(int(mem.pages.flags[pfn])) == item], np.int64)
    return own[np.argsort(mem.pages.lru_seq[own], kind="stable")]


def _used_flags(mem: Memory, nid: int) -> np.ndarray:
    node = mem.nodes[nid]
    return mem.pages.flags[node.start_pfn : node.start_pfn + node.high * 512]


def _lru_add(mem: Memory, pfns: Pfns) -> None:
    """A batch reaches the lists: its references are dropped, and pages nobody else has are freed."""
    pages = mem.pages
    left = pages.refcount[pfns] - 1
    pages.refcount[pfns] = left
    if not left.all():
        _release(mem, pfns[left == 0])
        pfns = pfns[left != 0]
    if len(pfns):
        flags = pages.flags[pfns]
        pages.flags[pfns] = flags | U_LRU
        pages.lru_seq[pfns] = np.arange(mem.lru_clock, mem.lru_clock + len(pfns))
        mem.lru_clock += len(pfns)
        _account(mem, pfns, flags, +1, lru_item)


def _release(mem: Memory, pfns: Pfns) -> None:
    """Free pages whose refcount is 0, taking those on an LRU list off it."""
    if not len(pfns):
        return
    flags = mem.pages.flags[pfns]
    on_lru = flags & U_LRU != 0
    if on_lru.any():
        _account(mem, pfns[on_lru], flags[on_lru], -1, lru_item)
    heads = flags & U_HEAD != 0
    if not heads.any():
        free_pages(mem, pfns)
        return
    for head in pfns[heads].tolist():
        free_huge_page(mem, head)
    free_pages(mem, pfns[~heads])


def _account(mem: Memory, pfns: Pfns, flags: np.ndarray, sign: int, item_of) -> None:  # type: ignore[no-untyped-def]
    """Count pages in the counter that `item_of` names for their flags; compound ones 512 times."""
    kinds = flags & (U_LRU_KIND | U_HEAD)
    first = int(kinds[0])
    if not first & PG_head and (kinds == kinds[0]).all():
        mem.mod_pages(item_of(first), pfns, sign)
        return
    for kind in np.unique(kinds).tolist():
        same = pfns[kinds == kind]
        if kind & PG_head:
            for head in same.tolist():
                mem.mod_page(item_of(kind), head, sign * 512)
        else:
            mem.mod_pages(item_of(kind), same, sign)
