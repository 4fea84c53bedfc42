"""Swap entries and the swap cache (mm/swap_state.c, mm/swapfile.c).

A slot's `swap_map` counts the page-table entries that name it. A page in the swap cache holds one
reference of its own for that, is found by its slot, and keeps the slot until the cache lets go.
"""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.kernel.panic import KernelBug
from pykhuge.kernel.ratelimit import RateLimit
from pykhuge.mm.mm_types import MemCgroup, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_anon_exclusive,
    PG_dirty,
    PG_locked,
    PG_swapbacked,
    PG_swapcache,
    PG_uptodate,
)
from pykhuge.mm.page_alloc import alloc_pages, charge, uncharge
from pykhuge.mm.page_table import PAGE_DIRTY, PAGE_UFFD_WP, Ptes, make_swap_pte
from pykhuge.mm.rmap import page_remove_rmap
from pykhuge.mm.swap import lru_cache_add, put_pages
from pykhuge.mm.vmstat import (
    MM_ANONPAGES,
    MM_SWAPENTS,
    NR_FILE_PAGES,
    NR_SWAPCACHE,
    PGMAJFAULT,
    PSWPIN,
    PSWPOUT,
)

__all__ = [
    "add_to_swap",
    "delete_from_swap_cache",
    "free_swap_cache",
    "get_swap_pages",
    "swap_duplicate",
    "swap_free",
    "swap_readpage",
    "swap_writepage",
    "unmap_to_swap",
]

SWAP_DEVICE = "253:0"  # of /dev/zram0, which /proc/swaps names


def get_swap_pages(mem: Memory, nr: int) -> list[int]:
    """Reserve up to `nr` free slots; fewer when the device is full."""
    device = mem.swap
    slots: list[int] = []
    while len(slots) < nr:
        if device.free:
            slots.append(device.free.pop())
        elif device.next_slot < device.nr_slots:
            slots.append(device.next_slot)
            device.next_slot += 1
        else:
            break
    for slot in slots:
        device.swap_map[slot] = 0
    return slots


def swap_duplicate(mem: Memory, slot: int) -> None:
    """One more page-table entry names the slot."""
    mem.swap.swap_map[slot] += 1


def swap_free(mem: Memory, slot: int) -> None:
    """One page-table entry less names the slot; the last one frees it, unless it is in the cache.

    Raises: KernelBug if nobody named it.
    """
    left = mem.swap.swap_map.get(slot, 0) - 1
    if left < 0:
        raise KernelBug(f"swap slot {slot} is freed more often than used")
    mem.swap.swap_map[slot] = left
    if left == 0 and slot not in mem.swap.cache:
        _slot_free(mem, slot)


def _slot_free(mem: Memory, slot: int) -> None:
    device = mem.swap
    del device.swap_map[slot]
    device.contents.pop(slot, None)
    device.bad.discard(slot)
    device.free.append(slot)


def add_to_swap(mem: Memory, pfn: int, slot: int) -> None:
    """The page enters the swap cache at `slot`, dirty, with a reference of the cache's own."""
    mem.pages.refcount[pfn] += 1
    mem.pages.flags[pfn] |= np.uint32(PG_swapcache | PG_swapbacked | PG_dirty)
    mem.pages.private[pfn] = slot
    mem.swap.cache[slot] = pfn
    mem.mod_page(NR_FILE_PAGES, pfn, +1)
    mem.mod_page(NR_SWAPCACHE, pfn, +1)


def swap_writepage(mem: Memory, pfn: int) -> bool:
    """Write a page of the swap cache to its slot; says whether that went well.

    The device reads it by DMA: a poisoned line fails the write, and the page stays dirty in the
    cache.
    """
    if mem.poison.lines[pfn]:
        _log_error(mem, mem.swap.write_errors, "Write", int(mem.pages.private[pfn]))
        return False
    mem.swap.contents[int(mem.pages.private[pfn])] = mem.ram.pages[pfn].tobytes()
    mem.pages.flags[pfn] &= np.uint32(~PG_dirty & 0xFFFFFFFF)
    mem.vmstat.count(PSWPOUT)
    return True


def _log_error(mem: Memory, limit: RateLimit, what: str, slot: int) -> None:
    if limit.allows(mem.clock.now_ns, mem.printk):
        sector = slot << PAGE_SHIFT - 9
        mem.printk(f"{what}-error on swap-device ({SWAP_DEVICE}:{sector})")


def swap_readpage(
    mem: Memory,
    slot: int,
    memcg: MemCgroup,
    nid: int,
    *,
    major: bool = True,
    skip_cache: bool = False,
) -> int | None:
    """read_swap_cache_async(): a new page in the swap cache with the slot's contents.

    Args:
        major: count it as a fault that had to wait for the device.
        skip_cache: the page does not enter the swap cache (SWP_SYNCHRONOUS_IO).
    Returns: its frame, with one reference for the caller; None if there is no memory for it. It is
    not PG_uptodate if the device failed.
    """
    if not charge(mem, memcg, 1):
        return None
    found = alloc_pages(mem, 1, nid)
    if not len(found):
        uncharge(mem, memcg.key, 1)
        return None
    pfn = int(found[0])
    mem.pages.memcg[pfn] = memcg.key
    if skip_cache:
        mem.pages.flags[pfn] |= np.uint32(PG_swapbacked)
    else:
        add_to_swap(mem, pfn, slot)
        mem.pages.flags[pfn] &= np.uint32(~PG_dirty & 0xFFFFFFFF)
    mem.vmstat.count(PSWPIN)
    if major:
        mem.vmstat.count(PGMAJFAULT)
    if slot not in mem.swap.bad:
        mem.ram.pages[pfn] = np.frombuffer(mem.swap.contents[slot], np.uint8)
        mem.pages.flags[pfn] |= np.uint32(PG_uptodate)
    else:
        _log_error(mem, mem.swap.read_errors, "Read", slot)
    mem.pages.refcount[pfn] += 1
    lru_cache_add(mem, found)
    return pfn


def delete_from_swap_cache(mem: Memory, pfn: int) -> None:
    """The page leaves the swap cache, dirty; the cache's reference is dropped."""
    slot = int(mem.pages.private[pfn])
    del mem.swap.cache[slot]
    mem.pages.flags[pfn] &= np.uint32(~PG_swapcache & 0xFFFFFFFF)
    mem.pages.flags[pfn] |= np.uint32(PG_dirty)
    mem.pages.private[pfn] = 0
    mem.mod_page(NR_FILE_PAGES, pfn, -1)
    mem.mod_page(NR_SWAPCACHE, pfn, -1)
    if mem.swap.swap_map[slot] == 0:
        _slot_free(mem, slot)
    put_pages(mem, np.array([pfn]))


def unmap_to_swap(mem: Memory, vma: Vma, ptes: Ptes, place: int, pfn: int, slot: int) -> None:
    """The entry `ptes[place]`, which maps a page of the swap cache, names its slot instead."""
    pte = int(ptes[place])
    exclusive = bool(mem.pages.flags[pfn] & PG_anon_exclusive)
    if pte & PAGE_DIRTY:
        mem.pages.flags[pfn] |= np.uint32(PG_dirty)
    swap_duplicate(mem, slot)
    ptes[place] = make_swap_pte(0, slot, exclusive=exclusive, uffd_wp=bool(pte & PAGE_UFFD_WP))
    mem.pages.flags[pfn] &= np.uint32(~PG_anon_exclusive & 0xFFFFFFFF)
    one = np.array([pfn])
    page_remove_rmap(mem, one, vma)
    mem.mod_mm(vma.mm, MM_ANONPAGES, -1)
    mem.mod_mm(vma.mm, MM_SWAPENTS, +1)
    put_pages(mem, one)


def free_swap_cache(mem: Memory, pfns: Pfns) -> None:
    """free_swap_cache(): pages that nothing maps and whose slot no entry names leave the cache."""
    cached = pfns[mem.pages.flags[pfns] & np.uint32(PG_swapcache) != 0]
    for pfn in cached.tolist():
        locked = mem.pages.flags[pfn] & PG_locked
        if not locked and not mem.pages.mapcount[pfn] and not folio_swapped(mem, pfn):
            delete_from_swap_cache(mem, pfn)


def folio_swapped(mem: Memory, pfn: int) -> bool:
    """Whether a page-table entry still names the slot of this cached page."""
    return mem.swap.swap_map[int(mem.pages.private[pfn])] > 0
