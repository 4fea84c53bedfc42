"""The page allocator, by node, and the memory cgroup charge.

A frame is free when its refcount and flags are both 0, so nothing has to be kept but the number of
used frames of each 2 MiB block. Single frames come from the first block that is already broken
into; an order-9 page needs a block of which nothing is used, so fragmentation is real. A smaller
compound page takes the first run that is free and in line. There is no compaction and no reclaim.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_ORDER
from pykhuge.kernel.panic import KernelBug
from pykhuge.mm.mm_types import MemCgroup
from pykhuge.mm.mmzone import Memory, Node
from pykhuge.mm.page import Pfns, PG_head, PG_hwpoison, PG_tail, PG_zone_device
from pykhuge.mm.vmstat import NR_FREE_PAGES

__all__ = [
    "alloc_compound_page",
    "alloc_huge_page",
    "alloc_pages",
    "charge",
    "free_compound_page",
    "free_pages",
    "put_page_back_buddy",
    "take_page_off_buddy",
    "uncharge",
    "zonelist",
]

Mask = npt.NDArray[np.bool_]

U_HEAD = np.uint32(PG_head)
U_TAIL = np.uint32(PG_tail)


def zonelist(mem: Memory, nid: int) -> list[Node]:
    """The nodes in the order in which an allocation preferring `nid` tries them."""
    return sorted(mem.nodes, key=lambda node: (mem.distances[nid][node.nid], node.nid))


def alloc_pages(mem: Memory, nr: int, nid: int = 0) -> Pfns:
    """Allocate up to `nr` base pages, preferring node `nid`; fewer when memory runs out.

    Returns: int64[<= nr], each with refcount 1 and everything else zero; contents undefined.
    """
    found: list[Pfns] = []
    for node in zonelist(mem, nid) if len(mem.nodes) > 1 else mem.nodes:
        while nr > 0 and (block := _first_broken_block(node)) is not None:
            start = node.start_pfn + block * HPAGE_PMD_NR
            free = np.flatnonzero(_free_in(mem, start))[:nr] + start
            if not len(free):
                raise KernelBug(
                    f"block {start:#x} has {node.used[block]} pages in use, but none free"
                )
            node.used[block] += len(free)
            mem.pages.refcount[free] = 1
            mem.vmstat.mod_node(NR_FREE_PAGES, -len(free), node.nid)
            nr -= len(free)
            found.append(free)
    return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, np.int64)])


def alloc_huge_page(
    mem: Memory, nid: int = 0, nodemask: Collection[int] | None = None
) -> int | None:
    """Allocate an order-9 compound page on one of `nodemask` (all nodes if None), `nid` preferred.

    Returns: its first frame, with refcount 1; None if no node has a free block. Contents undefined.
    """
    for node in zonelist(mem, nid) if len(mem.nodes) > 1 else mem.nodes:
        if nodemask is not None and node.nid not in nodemask:
            continue
        block = _first_block(node, node.used[: node.high] == 0)
        if block is not None:
            head = node.start_pfn + block * HPAGE_PMD_NR
            _take_compound_page(mem, node, head, HPAGE_PMD_ORDER)
            return head
    return None


def alloc_compound_page(mem: Memory, order: int, nid: int = 0) -> int | None:
    """`alloc_huge_page` of any order from 1 on."""
    if order == HPAGE_PMD_ORDER:
        return alloc_huge_page(mem, nid)
    for node in zonelist(mem, nid):
        head = _first_run(mem, node, 1 << order)
        if head is None and (block := _first_block(node, node.used[: node.high] == 0)) is not None:
            head = node.start_pfn + block * HPAGE_PMD_NR
        if head is not None:
            _take_compound_page(mem, node, head, order)
            return head
    return None


def _take_compound_page(mem: Memory, node: Node, head: int, order: int) -> None:
    pages, nr = mem.pages, 1 << order
    node.used[(head - node.start_pfn) // HPAGE_PMD_NR] += nr
    pages.flags[head] = U_HEAD
    pages.flags[head + 1 : head + nr] = U_TAIL
    pages.order[head : head + nr] = order
    pages.refcount[head] = 1
    mem.vmstat.mod_node(NR_FREE_PAGES, -nr, node.nid)


def free_pages(mem: Memory, pfns: Pfns) -> None:
    """Give base pages back: their charge is returned, their flags and mapping are zeroed.

    Args:
        pfns: int64[n], distinct, with refcount 0. Index and list order mean nothing in a free page.
    Raises: KernelBug for a page still mapped.
    """
    pages = mem.pages
    if np.count_nonzero(pages.mapcount[pfns]):
        raise KernelBug(*(f"page {pfn:#x} is freed while mapped" for pfn in pfns.tolist()))
    _uncharge_pages(mem, pfns)
    # A bad frame is no longer anybody's, and does not come back to be allocated.
    bad = pages.flags[pfns] & np.uint32(PG_hwpoison) != 0
    pages.flags[pfns] = 0
    pages.mapping[pfns] = 0
    if np.count_nonzero(bad):
        pages.flags[pfns[bad]] = PG_hwpoison
        pfns = pfns[~bad]
    if mem.device_start < pages.nr_pages:
        pages.flags[pfns[pfns >= mem.device_start]] = PG_zone_device
        pfns = pfns[pfns < mem.device_start]
    for node in mem.nodes:
        own = (
            pfns if len(mem.nodes) == 1 else pfns[(pfns >= node.start_pfn) & (pfns < node.end_pfn)]
        )
        if len(own):
            blocks = (own - node.start_pfn) >> 9
            freed = np.bincount(blocks)
            node.used[: len(freed)] -= freed.astype(np.int16)
            mem.vmstat.mod_node(NR_FREE_PAGES, len(own), node.nid)


def free_compound_page(mem: Memory, head: int) -> None:
    """Give a compound page of any order back, charge and all.

    Raises: KernelBug if it is still referenced or mapped.
    """
    pages = mem.pages
    nr = pages.compound_nr(head)
    whole = slice(head, head + nr)
    if (
        pages.refcount[head]
        or pages.entire_mapcount[head]
        or pages.mapcount[whole].any()
        or pages.pincount[head]
    ):
        raise KernelBug(f"compound page {head:#x} is freed while in use")
    uncharge(mem, int(pages.memcg[head]), nr)
    pages.memcg[head] = 0
    bad = pages.flags[whole] & np.uint32(PG_hwpoison)
    pages.flags[whole] = bad
    pages.order[whole] = 0
    pages.mapping[head] = 0
    node = mem.nodes[mem.nid_of(head)]
    nr_freed = nr - int(np.count_nonzero(bad))
    node.used[(head - node.start_pfn) // HPAGE_PMD_NR] -= nr_freed
    mem.vmstat.mod_node(NR_FREE_PAGES, nr_freed, node.nid)


def take_page_off_buddy(mem: Memory, pfn: int) -> bool:
    """Take a free frame that is bad out of the allocator, for good; False if it is not free."""
    if mem.pages.refcount[pfn] or mem.pages.flags[pfn]:
        return False
    node = mem.nodes[mem.nid_of(pfn)]
    block = (pfn - node.start_pfn) // HPAGE_PMD_NR
    node.high = max(node.high, block + 1)
    node.used[block] += 1
    mem.pages.flags[pfn] = PG_hwpoison
    mem.pages.refcount[pfn] = 1
    mem.vmstat.mod_node(NR_FREE_PAGES, -1, node.nid)
    return True


def put_page_back_buddy(mem: Memory, pfn: int) -> None:
    """A frame that nobody but memory_failure has refers to is free again."""
    mem.pages.flags[pfn] &= np.uint32(~PG_hwpoison & 0xFFFFFFFF)
    mem.pages.refcount[pfn] = 0
    free_pages(mem, np.array([pfn]))


def charge(mem: Memory, memcg: MemCgroup, nr: int) -> bool:
    """mem_cgroup_charge(): take `nr` pages of the limit, all or none; says whether it could."""
    if memcg.key == 0:
        return True
    if memcg.usage + nr > memcg.limit:
        return False
    memcg.usage += nr
    mem.vmstat.post(f"memcg:{memcg.key}", "usage", nr)
    return True


def uncharge(mem: Memory, key: int, nr: int) -> None:
    """Return `nr` pages to the cgroup with this key; 0 is nobody's."""
    if key:
        mem.memcgs[key].usage -= nr
        mem.vmstat.post(f"memcg:{key}", "usage", -nr)


def _uncharge_pages(mem: Memory, pfns: Pfns) -> None:
    if len(mem.memcgs) == 1:
        return
    charged = mem.pages.memcg[pfns]
    if np.count_nonzero(charged):
        for key, nr in enumerate(np.bincount(charged).tolist()):
            uncharge(mem, key, nr)
        mem.pages.memcg[pfns] = 0


def _first_broken_block(node: Node) -> int | None:
    """The first block with both used and free frames, else the first free one."""
    used = node.used[: node.high]
    block = _first(used.view(np.uint16) - np.uint16(1) < HPAGE_PMD_NR - 1)
    return block if block is not None else _first_block(node, used == 0)


def _first_block(node: Node, free: Mask) -> int | None:
    """The first block marked free, else one never used; `high` covers it then."""
    block = _first(free)
    if block is None and node.high < node.nr_blocks:
        block = node.high
        node.high += 1
    return block


def _first_run(mem: Memory, node: Node, nr: int) -> int | None:
    """The first of `nr` free frames in line, in a block that has both used and free ones."""
    used = node.used[: node.high]
    for block in np.flatnonzero((used > 0) & (used <= HPAGE_PMD_NR - nr)).tolist():
        start = node.start_pfn + block * HPAGE_PMD_NR
        run = _first(np.logical_and.reduce(_free_in(mem, start).reshape(-1, nr), axis=1))
        if run is not None:
            return int(start + run * nr)
    return None


def _first(mask: Mask) -> int | None:
    index = int(mask.argmax()) if len(mask) else 0
    return index if len(mask) and mask[index] else None


def _free_in(mem: Memory, start: int) -> Mask:
    whole = slice(start, start + HPAGE_PMD_NR)
    free: Mask = (mem.pages.refcount[whole] == 0) & (mem.pages.flags[whole] == 0)
    return free
