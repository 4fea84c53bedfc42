"""Taking a page out of use before it fails (soft_offline_page of mm/memory-failure.c).

Nothing is lost and nobody is killed: what the page holds moves to another frame (mm/migrate.c), or
is dropped where it can be read again, and the frame is never allocated again.

The log's lines are the kernel's but for `, type %pGp` behind the last two: what a page's flags look
like hangs on the kernel's configuration (nodes, zones, last CPU); nor are all of them kept here.
"""

from __future__ import annotations

import errno

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.kernel.sched import Foresee, Steps
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.filemap import (
    filemap_releasable,
    filemap_release_pages,
    filemap_remove_pages,
    wait_on_page,
    wait_on_page_writeback,
)
from pykhuge.mm.memory_failure import get_hwpoison_page, try_to_split_thp_page, will_be_handled
from pykhuge.mm.mm_types import AddressSpace
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    PG_dirty,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_private,
    PG_swapbacked,
    PG_swapcache,
)
from pykhuge.mm.page_alloc import alloc_pages, take_page_off_buddy
from pykhuge.mm.page_table import PFN_MASK
from pykhuge.mm.rmap import mapped_item, page_mappings
from pykhuge.mm.swap import (
    isolate_lru_pages,
    isolated_item,
    lru_add_drain,
    lru_add_drain_all,
    put_pages,
    putback_lru_pages,
)
from pykhuge.mm.vmstat import (
    NR_FILE_DIRTY,
    NR_FILE_PAGES,
    NR_MLOCK,
    NR_SHMEM,
    NR_SWAPCACHE,
    PGMIGRATE_FAIL,
    PGMIGRATE_SUCCESS,
)

__all__ = ["soft_offline_page"]


def soft_offline_page(mem: Memory, pfn: int, *, count_increased: bool = False) -> Steps[int]:
    """Move what frame `pfn` holds elsewhere, and keep the frame from use.

    Args:
        count_increased: the caller has a reference to the page, which goes over to this call.
    Returns: 0, also for a page that is bad already; EIO for device memory and pages of kinds that
    cannot be dealt with; EBUSY (somebody else refers to it); ENOMEM (there is nowhere to move to).
    Raises: KernelPanic if the page is poisoned and must be copied: that copy has no recovery.
    """
    pages, one = mem.pages, np.array([pfn])
    head = pages.head_of(pfn)
    yield Foresee(
        f"page {head:#x} is unlocked",
        lambda: not (pages.flags[head] & PG_locked and will_be_handled(mem, head)),
    )
    if pfn >= mem.device_start:
        if count_increased:
            put_pages(mem, one)
        return errno.EIO
    if pages.flags[pfn] & PG_hwpoison:
        _log(mem, pfn, "page already poisoned", older="soft_offline_page: {} {}")
        if count_increased:
            put_pages(mem, one)
        return 0
    if not count_increased and take_page_off_buddy(mem, pfn):
        mem.hwpoison.refs.add(pfn)
        mem.num_poisoned_pages += 1
        return 0
    if not (get_hwpoison_page(mem, pfn) if not count_increased else _handlable(mem, pfn)):
        mem.printk(f"Memory failure: {pfn:#x}: unhandlable page.")
        return errno.EIO
    if pages.is_compound(pfn) and not (yield from try_to_split_thp_page(mem, pfn)):
        put_pages(mem, np.array([pages.head_of(pfn)]))
        _log(mem, pfn, "thp split failed")
        return errno.EBUSY
    yield from wait_on_page(mem, pfn)
    wait_on_page_writeback(mem, one)
    if pages.flags[pfn] & PG_hwpoison:
        put_pages(mem, one)
        _log(mem, pfn, "page already poisoned", older="soft offline: {} {}")
        return 0
    return _soft_offline_small_page(mem, pfn)


def _handlable(mem: Memory, pfn: int) -> bool:
    """The caller's reference is to a page on an LRU list; it is dropped if not."""
    head = mem.pages.head_of(pfn)
    if not mem.pages.flags[head] & PG_lru:
        lru_add_drain_all(mem)
    if mem.pages.flags[head] & PG_lru:
        return True
    put_pages(mem, np.array([head]))
    return False


def _soft_offline_small_page(mem: Memory, pfn: int) -> int:
    """soft_offline_in_use_page(): drop it if the disk has it, else migrate it."""
    pages, one = mem.pages, np.array([pfn])
    if _evict(mem, pfn):
        _log(mem, pfn, "invalidated", older="soft_offline: {}: {}")
    elif not pages.flags[pfn] & PG_lru:
        put_pages(mem, one)
        _log(mem, pfn, f"page isolation failed, page count {int(pages.refcount[pfn])}")
        return errno.EBUSY
    else:
        isolate_lru_pages(mem, one)
        pages.refcount[pfn] -= 1  # the isolation's reference is enough
        left = migrate_pages(mem, pfn)
        if left:
            putback_lru_pages(mem, one)
            _log(mem, pfn, f"page migration failed {left}")
            return errno.EBUSY if left > 0 else -left
    return _page_handle_poison(mem, pfn)


def _evict(mem: Memory, pfn: int) -> bool:
    """mapping_evict_folio(): a clean page of a cache that only the cache, and we, refer to."""
    pages, one = mem.pages, np.array([pfn])
    mapping = mem.mappings.get(int(pages.mapping[pfn]))
    flags = int(pages.flags[pfn])
    if not isinstance(mapping, AddressSpace) or flags & PG_dirty or not flags & PG_lru:
        return False
    private = bool(flags & PG_private)
    if pages.refcount[pfn] > 2 + private or not filemap_releasable(mem, one)[0]:
        return False
    filemap_release_pages(mem, one)
    filemap_remove_pages(mem, mapping, np.array([int(pages.index[pfn])]), one)
    return True


def _page_handle_poison(mem: Memory, pfn: int) -> int:
    """Nothing is in the frame any more: give it up, and keep it by a reference of its own."""
    mem.pages.flags[pfn] |= np.uint32(PG_hwpoison)
    put_pages(mem, np.array([pfn]))
    mem.pages.refcount[pfn] += 1
    mem.hwpoison.refs.add(pfn)
    mem.num_poisoned_pages += 1
    return 0


def migrate_pages(mem: Memory, old: int) -> int:
    """Move one isolated page to a frame nearby, if only page tables and its cache refer to it.

    Returns: 0; with nothing changed, 1 (the pages left) or -ENOMEM.
    """
    found = alloc_pages(mem, 1, mem.nid_of(old))
    free = int(mem.pages.refcount[old]) == _expected_references(mem, old)
    if len(found) and free:
        _migrate_folio_move(mem, old, int(found[0]))
        mem.vmstat.count(PGMIGRATE_SUCCESS)
        return 0
    mem.vmstat.count(PGMIGRATE_FAIL)
    put_pages(mem, found)
    return 1 if len(found) else -errno.ENOMEM


def _expected_references(mem: Memory, pfn: int) -> int:
    """From the isolation, page tables and the page's own cache (folio_expected_refs)."""
    flags = int(mem.pages.flags[pfn])
    mapping = mem.mappings.get(int(mem.pages.mapping[pfn]))
    cached = isinstance(mapping, AddressSpace) or bool(flags & PG_swapcache)
    return 1 + int(mem.pages.mapcount[pfn]) + cached + bool(flags & PG_private)


def _migrate_folio_move(mem: Memory, old: int, new: int) -> None:
    """The new page takes the old one's place everywhere; the old one keeps one reference."""
    pages, flags = mem.pages, int(mem.pages.flags[old])
    mapping = mem.mappings.get(int(pages.mapping[old]))
    was_mapped = pages.mapcount[old] > 0
    copy_mc_page(mem, new, old, consumer="migrate_folio", recovery=False)
    for entry in page_mappings(mem, old):
        words = mem.ram.words[entry.table]
        words[entry.slot] = int(words[entry.slot]) & ~PFN_MASK | new << PAGE_SHIFT
    _move_counts(mem, old, new, flags)
    for name in ("mapcount", "mapping", "index", "private", "memcg"):
        values = getattr(pages, name)
        values[new] = values[old]
        values[old] = 0
    pages.flags[new] = flags
    pages.refcount[new], pages.refcount[old] = pages.refcount[old], 1
    if isinstance(mapping, AddressSpace):
        mapping.i_pages.store(np.array([int(pages.index[new])]), np.array([new]))
    elif flags & PG_swapcache:
        mem.swap.cache[int(pages.private[new])] = new
    pages.flags[old] = 0
    putback_lru_pages(mem, np.array([new]))
    # Before its entries are put back: that mlocks it, which wants it on its list.
    if flags & PG_mlocked or (was_mapped and not mem.version.migration_drains_mlocked):
        lru_add_drain(mem)


def _move_counts(mem: Memory, old: int, new: int, flags: int) -> None:
    """What the page is counted in on the old frame's node, it is counted in on the new one's."""
    cached = isinstance(mem.mappings.get(int(mem.pages.mapping[old])), AddressSpace)
    counted = {
        isolated_item(flags): True,
        mapped_item(flags): mem.pages.mapcount[old] > 0,
        NR_MLOCK: flags & PG_mlocked,
        NR_FILE_PAGES: cached or flags & PG_swapcache,
        NR_SWAPCACHE: flags & PG_swapcache,
        NR_SHMEM: cached and flags & PG_swapbacked,
        NR_FILE_DIRTY: cached and flags & (PG_swapbacked | PG_dirty) == PG_dirty,
    }
    for item, holds in counted.items():
        if holds:
            mem.mod_page(item, old, -1)
            mem.mod_page(item, new, +1)


def _log(mem: Memory, pfn: int, text: str, *, older: str = "soft offline: {}: {}") -> None:
    """older: how the line was put together until 6.10."""
    form = "Soft offline: {}: {}" if mem.version.offline_logs_frame_first else older
    mem.printk(form.format(f"{pfn:#x}", text))
