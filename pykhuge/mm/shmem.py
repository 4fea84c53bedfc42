"""shmem: files whose pages live in memory and swap alone (mm/shmem.c): tmpfs, memfd, shared memory.

Accounting. Every page a file has, cached or swapped out, is `alloced`, 8 of `i_blocks`, one of the
mount's `used_blocks`, and, unless the file was paid for as a whole, one of `vm_committed_as`.
Balanced, `alloced == nrpages + swapped`; what truncation frees is found as the excess.
"""

from __future__ import annotations

import contextlib
import enum
import errno

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE
from pykhuge.kernel.sched import Steps
from pykhuge.mm.errors import PageLocked, UserFault, os_error
from pykhuge.mm.filemap import (
    add_compound_to_page_cache,
    add_to_page_cache,
    file_page,
    filemap_remove_compound,
    filemap_remove_pages,
    foresee_truncation,
    mod_nrpages,
    mod_swapped,
    split_partial_page,
    truncate_pages,
    when_unlocked,
    zero_partial_page,
)
from pykhuge.mm.huge_memory import OutOfMemory, shmem_is_huge, transhuge_vma_suitable
from pykhuge.mm.mm_types import (
    VM_NORESERVE,
    VM_UFFD_MISSING,
    File,
    MemCgroup,
    ShmemInode,
    ShmemSuperBlock,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns, PG_dirty, PG_locked, PG_uptodate
from pykhuge.mm.page_alloc import alloc_compound_page, alloc_huge_page, alloc_pages, charge
from pykhuge.mm.swap import lru_add_huge_page, lru_cache_add, put_pages
from pykhuge.mm.swap_state import (
    add_to_swap,
    delete_from_swap_cache,
    get_swap_pages,
    swap_duplicate,
    swap_free,
    swap_readpage,
    swap_writepage,
)
from pykhuge.mm.vmstat import (
    PGMAJFAULT,
    PSWPIN,
    THP_FILE_ALLOC,
    THP_FILE_FALLBACK,
    THP_FILE_FALLBACK_CHARGE,
)
from pykhuge.mm.xarray import SWAPIN_ERROR, is_swap_value, swap_value

__all__ = [
    "BLOCKS_PER_PAGE",
    "Sgp",
    "shmem_add_pages",
    "shmem_allocates_huge",
    "shmem_charge",
    "shmem_evict_inode",
    "shmem_fallocate",
    "shmem_file_setup",
    "shmem_get_folio",
    "shmem_new_inode",
    "shmem_recalc_inode",
    "shmem_room",
    "shmem_truncate",
    "shmem_uncharge",
    "shmem_undo_range",
    "shmem_writepage",
]

BLOCKS_PER_PAGE = 8
U_DIRTY = np.uint32(PG_dirty)
U_UPTODATE = np.uint32(PG_uptodate)


class Sgp(enum.IntEnum):
    """enum sgp_type: what shmem_get_folio is to do about a hole."""

    SGP_READ = 0  # nothing
    SGP_NOALLOC = 1  # fail
    SGP_CACHE = 2  # allocate, inside of the file
    SGP_WRITE = 3  # allocate
    SGP_FALLOC = 4  # allocate, contents to be written later


def _pages_in(size: int) -> int:
    """VM_ACCT(): pages that `size` bytes take."""
    return -(-size // PAGE_SIZE)


def shmem_acct(mem: Memory, nr: int) -> bool:
    """security_vm_enough_memory(): commit `nr` pages, all or none."""
    if mem.commit_limit is not None and mem.vm_committed_as + nr > mem.commit_limit:
        return False
    _commit(mem, nr)
    return True


def _commit(mem: Memory, nr: int) -> None:
    mem.vm_committed_as += nr
    mem.vmstat.post("vm", "vm_committed_as", nr)


def _inode_acct_block(mem: Memory, inode: ShmemInode, nr: int) -> bool:
    """shmem_inode_acct_block(): charge commitment and mount for `nr` pages, all or none."""
    if nr > shmem_room(mem, inode):
        return False
    _inode_unacct_blocks(mem, inode, -nr)
    return True


def _inode_unacct_blocks(mem: Memory, inode: ShmemInode, nr: int) -> None:
    if inode.i_sb.max_blocks:
        inode.i_sb.used_blocks -= nr
        mem.vmstat.post("tmpfs", "used_blocks", -nr)
    if inode.flags & VM_NORESERVE:
        _commit(mem, -nr)


def _mod_alloced(mem: Memory, inode: ShmemInode, nr: int) -> None:
    inode.alloced += nr
    inode.i_blocks += nr * BLOCKS_PER_PAGE
    mem.vmstat.post(inode.name, "alloced", nr)
    mem.vmstat.post(inode.name, "i_blocks", nr * BLOCKS_PER_PAGE)


def shmem_recalc_inode(mem: Memory, inode: ShmemInode) -> None:
    """Give back what the file is charged for and no longer has."""
    freed = inode.alloced - inode.swapped - inode.i_mapping.nrpages
    if freed > 0:
        _mod_alloced(mem, inode, -freed)
        _inode_unacct_blocks(mem, inode, freed)


def shmem_room(mem: Memory, inode: ShmemInode) -> int:
    """How many more pages could be charged to the file now."""
    room, sb = 1 << 52, inode.i_sb
    if sb.max_blocks:
        room = min(room, sb.max_blocks - sb.used_blocks)
    if mem.commit_limit is not None and inode.flags & VM_NORESERVE:
        room = min(room, mem.commit_limit - mem.vm_committed_as)
    return max(0, room)


def shmem_charge(mem: Memory, inode: ShmemInode, nr: int) -> bool:
    """Charge a collapse's `nr` new pages, nrpages first; all or none."""
    if not _inode_acct_block(mem, inode, nr):
        return False
    mod_nrpages(mem, inode.i_mapping, nr)
    _mod_alloced(mem, inode, nr)
    return True


def shmem_uncharge(mem: Memory, inode: ShmemInode, nr: int) -> None:
    """Undo `shmem_charge`; nrpages is the caller's."""
    _mod_alloced(mem, inode, -nr)
    _inode_unacct_blocks(mem, inode, nr)


def shmem_new_inode(
    mem: Memory, sb: ShmemSuperBlock, name: str, *, size: int = 0, flags: int = VM_NORESERVE
) -> ShmemInode:
    """A new file of `size` bytes without pages. Raises: OSError ENOMEM if that is too much."""
    if not flags & VM_NORESERVE and not shmem_acct(mem, _pages_in(size)):
        raise os_error(errno.ENOMEM, f"size={size:#x}: allowed what commit_limit leaves")
    inode = ShmemInode(name, size, i_sb=sb, flags=flags & VM_NORESERVE)
    mem.new_address_space(inode)
    mem.inodes.append(inode)
    return inode


def shmem_file_setup(mem: Memory, name: str, size: int, flags: int = VM_NORESERVE) -> File:
    """A file without a name on the kernel's own mount: memfd, shared anonymous memory."""
    inode = shmem_new_inode(mem, mem.shm_mnt, name, size=size, flags=flags)
    inode.i_nlink, inode.i_count = 0, 1
    return File(inode, True, True, mem.ra_pages)


def shmem_get_folio(
    mem: Memory,
    inode: ShmemInode,
    index: int,
    sgp: Sgp,
    *,
    memcg: MemCgroup,
    nid: int,
    vma: Vma | None = None,
) -> int | None:
    """The frame of page `index`: cached, swapped in, or new; None for a hole that stays one.

    Args:
        vma: by way of which a fault asks; None for a system call or a collapse.
    Raises: OSError EINVAL (behind the end), ENOENT (SGP_NOALLOC of a hole), ENOSPC, EIO (swap);
    OutOfMemory; UserFault; PageLocked.
    Kernel: shmem_get_folio_gfp.
    """
    behind = index << PAGE_SHIFT >= inode.i_size
    if sgp <= Sgp.SGP_CACHE and behind:
        raise os_error(errno.EINVAL, f"page {index} of {inode.name}: allowed below its end")
    entry = inode.i_mapping.i_pages.load(index)
    if entry < 0:
        return _swapin_folio(mem, inode, index, entry, memcg, nid, vma)
    if entry > 0 and (page := _cached_page(mem, entry, index, sgp)) is not None:
        return page
    if sgp is Sgp.SGP_READ:
        return None
    if sgp is Sgp.SGP_NOALLOC:
        raise os_error(errno.ENOENT, f"page {index} of {inode.name} is a hole")
    if vma is not None and vma.vm_flags & VM_UFFD_MISSING:
        raise UserFault(vma.address_of(index), "missing")
    if shmem_allocates_huge(mem, inode, index, vma):
        head = _alloc_huge(mem, inode, index & -HPAGE_PMD_NR, memcg, nid)
        if head is not None:
            return head + index % HPAGE_PMD_NR
    pfns = shmem_add_pages(
        mem, inode, index, 1, memcg=memcg, nid=nid, uptodate=sgp is not Sgp.SGP_FALLOC
    )
    return int(pfns[0])


def shmem_allocates_huge(mem: Memory, inode: ShmemInode, index: int, vma: Vma | None) -> bool:
    """Whether a hole at `index` is to get a huge page; later kernels ask if `vma` could map it.

    Args:
        vma: as for `shmem_get_folio`.
    Kernel: shmem_is_huge; shmem_allowable_huge_orders, shmem_suitable_orders.
    """
    if not shmem_is_huge(mem, inode, index, vma):
        return False
    if vma is None or not mem.version.shmem_allocates_what_fits:
        return True
    return transhuge_vma_suitable(vma, vma.address_of(index))


def _cached_page(mem: Memory, entry: int, index: int, sgp: Sgp) -> int | None:
    """The page behind a cache entry; one that was only preallocated is a hole to readers."""
    if mem.pages.flags[entry] & PG_locked:
        raise PageLocked(entry)
    if mem.pages.flags[entry] & PG_uptodate:
        return file_page(mem, entry, index)
    if sgp is Sgp.SGP_READ:
        return None
    _clear(mem, np.array([entry]))
    return entry


def shmem_add_pages(
    mem: Memory,
    inode: ShmemInode,
    first: int,
    nr: int,
    *,
    memcg: MemCgroup,
    nid: int,
    uptodate: bool = True,
) -> Pfns:
    """Fill the holes [first, first + nr) with zeroed pages, from the first on, as far as it goes.

    uptodate: False leaves the contents to be cleared when somebody asks (fallocate).
    Returns: int64[1 .. nr]. Raises: OSError ENOSPC, OutOfMemory if not one page can be had.
    """
    limit = min(nr, shmem_room(mem, inode))
    if limit <= 0 or not _inode_acct_block(mem, inode, limit):
        raise os_error(errno.ENOSPC, f"no block left for page {first} of {inode.name}")
    room = max(0, min(limit, memcg.limit - memcg.usage)) if memcg.key else limit
    pfns = alloc_pages(mem, room, nid)
    if len(pfns) < limit:
        _inode_unacct_blocks(mem, inode, limit - len(pfns))
    if not len(pfns):
        raise OutOfMemory(f"no page for page {first} of {inode.name}")
    charge(mem, memcg, len(pfns))
    mem.pages.memcg[pfns] = memcg.key
    add_to_page_cache(mem, inode.i_mapping, np.arange(first, first + len(pfns)), pfns)
    lru_cache_add(mem, pfns)
    _mod_alloced(mem, inode, len(pfns))
    if uptodate:
        _clear(mem, pfns)
    else:
        mem.pages.flags[pfns] |= np.uint32(PG_dirty)
    return pfns


def _clear(mem: Memory, pfns: Pfns) -> None:
    mem.ram.pages[pfns] = 0
    mem.pages.flags[pfns] |= U_UPTODATE


def _alloc_huge(
    mem: Memory, inode: ShmemInode, start: int, memcg: MemCgroup, nid: int
) -> int | None:
    """A huge page for the empty block at `start`; None: fall back to small ones."""
    if inode.i_mapping.i_pages.node(start).any():
        return None
    if not _inode_acct_block(mem, inode, HPAGE_PMD_NR):
        return None
    head = alloc_huge_page(mem, nid)
    if head is None or not charge(mem, memcg, HPAGE_PMD_NR):
        mem.vmstat.count(THP_FILE_FALLBACK)
        if head is not None:
            mem.vmstat.count(THP_FILE_FALLBACK_CHARGE)
            put_pages(mem, np.array([head]))
        _inode_unacct_blocks(mem, inode, HPAGE_PMD_NR)
        return None
    mem.pages.memcg[head] = memcg.key
    mem.vmstat.count(THP_FILE_ALLOC)
    add_compound_to_page_cache(mem, inode.i_mapping, start, head)
    lru_add_huge_page(mem, head)
    put_pages(mem, np.array([head]))
    _mod_alloced(mem, inode, HPAGE_PMD_NR)
    mem.ram.pages[head : head + HPAGE_PMD_NR] = 0
    mem.pages.flags[head] |= U_UPTODATE
    return head


def _swapin_folio(
    mem: Memory,
    inode: ShmemInode,
    index: int,
    entry: int,
    memcg: MemCgroup,
    nid: int,
    vma: Vma | None = None,
) -> int:
    """shmem_swapin_folio(): the page comes back from swap, dirty, its slot is freed."""
    if not is_swap_value(entry):
        raise os_error(errno.EIO, f"page {index} of {inode.name} was lost by the swap device")
    major = vma is not None
    if inode.i_mapping.i_pages.order(index):
        watched = vma is not None and vma.userfaultfd_armed()
        head = None if watched else _swapin_compound(mem, inode, index, memcg, nid, major)
        if head is not None:
            return file_page(mem, head, index)
        _split_large_entry(mem, inode, index)
    slot = -entry
    pfn = mem.swap.cache.get(slot)
    if pfn is None:
        pfn = swap_readpage(mem, slot, memcg, nid, major=major)
        if pfn is None:
            raise OutOfMemory(f"no page to swap in page {index} of {inode.name}")
    elif mem.pages.flags[pfn] & PG_locked:
        raise PageLocked(pfn)
    else:
        mem.pages.refcount[pfn] += 1
    one = np.array([pfn])
    lost = not mem.pages.flags[pfn] & PG_uptodate
    if lost:
        inode.i_mapping.i_pages.store(np.array([index]), SWAPIN_ERROR)
    else:
        add_to_page_cache(mem, inode.i_mapping, np.array([index]), one)
    mod_swapped(mem, inode, -1)
    shmem_recalc_inode(mem, inode)
    delete_from_swap_cache(mem, pfn)
    mem.swap.shmem.discard(slot)
    swap_free(mem, slot)
    put_pages(mem, one)
    if lost:
        raise os_error(errno.EIO, f"page {index} of {inode.name} cannot be read from swap")
    return pfn


def _split_large_entry(mem: Memory, inode: ShmemInode, index: int) -> None:
    """What went to swap as one is to come back page by page, beginning with page `index`.

    Later kernels leave the pages around it together as far as they can.
    """
    i_pages = inode.i_mapping.i_pages
    if mem.version.split_leaves_pieces:
        i_pages.split_value(index)
    else:
        span = i_pages.span(index)
        i_pages.store(span, i_pages.node(index)[span % HPAGE_PMD_NR])


def _swapin_compound(
    mem: Memory, inode: ShmemInode, index: int, memcg: MemCgroup, nid: int, major: bool
) -> int | None:
    """What went to swap as one comes back as one; None if it must come page by page."""
    i_pages = inode.i_mapping.i_pages
    span = i_pages.span(index)
    slots = (-i_pages.node(index)[span % HPAGE_PMD_NR]).tolist()
    if any(slot in mem.swap.cache or slot in mem.swap.bad for slot in slots):
        return None
    head = alloc_compound_page(mem, i_pages.order(index), nid)
    if head is None:
        return None
    if not charge(mem, memcg, len(slots)):
        put_pages(mem, np.array([head]))
        return None
    mem.pages.memcg[head] = memcg.key
    mem.vmstat.count(PSWPIN, len(slots))
    if major:
        mem.vmstat.count(PGMAJFAULT)
    for place, slot in enumerate(slots):
        mem.ram.pages[head + place] = np.frombuffer(mem.swap.contents[slot], np.uint8)
    mod_swapped(mem, inode, -len(slots))
    add_compound_to_page_cache(mem, inode.i_mapping, int(span[0]), head)
    mem.pages.flags[head] |= U_UPTODATE | U_DIRTY
    lru_add_huge_page(mem, head)
    put_pages(mem, np.array([head]))
    for slot in slots:
        mem.swap.shmem.discard(slot)
        swap_free(mem, slot)
    return head


def shmem_writepage(mem: Memory, inode: ShmemInode, index: int, pfn: int) -> bool:
    """Move an unmapped page out to swap; it stays in the swap cache. False if there is no slot.

    The caller holds a reference. A page that was only preallocated is cleared first.
    """
    slots = get_swap_pages(mem, 1)
    if not slots:
        return False
    if not mem.pages.flags[pfn] & PG_uptodate:
        _clear(mem, np.array([pfn]))
    mod_swapped(mem, inode, +1)
    filemap_remove_pages(
        mem, inode.i_mapping, np.array([index]), np.array([pfn]), value=swap_value(slots[0])
    )
    shmem_recalc_inode(mem, inode)
    add_to_swap(mem, pfn, slots[0])
    mem.swap.shmem.add(slots[0])
    swap_duplicate(mem, slots[0])
    return swap_writepage(mem, pfn)


def shmem_truncate(mem: Memory, inode: ShmemInode, size: int) -> Steps[None]:
    """Give the file `size` bytes; what is cut off is freed, or was preallocated behind the end.

    Raises: OSError ENOMEM if growth cannot be committed. Kernel: shmem_setattr.
    """
    old = inode.i_size
    if size <= old:
        yield from foresee_truncation(mem, inode.i_mapping, size >> PAGE_SHIFT, 1 << 52)
    nr = _pages_in(size) - _pages_in(old)
    if not inode.flags & VM_NORESERVE:
        if nr > 0 and not shmem_acct(mem, nr):
            raise os_error(errno.ENOMEM, f"size={size:#x}: allowed what commit_limit leaves")
        if nr < 0:
            _commit(mem, nr)
    inode.i_size = size
    if size <= old:
        yield from shmem_undo_range(mem, inode, size, None, even_cows=True)


def shmem_undo_range(
    mem: Memory, inode: ShmemInode, start: int, end: int | None, *, even_cows: bool
) -> Steps[None]:
    """Bytes [start, end) leave the file; pages that are covered in part are zeroed there.

    end: None is up to the very last page. Kernel: shmem_undo_range, shmem_recalc_inode.
    """
    first = _pages_in(start)
    last = 1 << 52 if end is None else end >> PAGE_SHIFT
    yield from foresee_truncation(mem, inode.i_mapping, start >> PAGE_SHIFT, last + 1)
    if start % PAGE_SIZE:
        stop = (start & -PAGE_SIZE) + PAGE_SIZE
        yield from _zero(mem, inode, start, stop if end is None else min(stop, end))
    if end is not None and end % PAGE_SIZE and end >> PAGE_SHIFT >= first:
        yield from _zero(mem, inode, end & -PAGE_SIZE, end)
    for edge in (first, last):
        _swapin_cut(mem, inode, edge)
    if first < last:
        if first < inode.fallocend <= last:
            inode.fallocend = first
        yield from truncate_pages(mem, inode.i_mapping, first, last, even_cows=even_cows)
    shmem_recalc_inode(mem, inode)


def _swapin_cut(mem: Memory, inode: ShmemInode, edge: int) -> None:
    """What is on swap as one and is to be cut at page `edge` comes back for that."""
    i_pages = inode.i_mapping.i_pages
    if (entry := i_pages.load(edge)) < 0 and edge % (1 << i_pages.order(edge)):
        with contextlib.suppress(OSError, OutOfMemory):
            _swapin_folio(mem, inode, edge, entry, mem.memcgs[0], 0)


def _zero(mem: Memory, inode: ShmemInode, start: int, end: int) -> Steps[None]:
    """Zero bytes inside one page; a huge page is split, if that can be done.

    A swapped-out page is brought in for it; one that cannot be is left as it is.
    Kernel: shmem_get_partial_folio, truncate_inode_partial_folio.
    """
    mapping, index = inode.i_mapping, start >> PAGE_SHIFT
    try:
        yield from when_unlocked(mem, _zero_bytes, mem, inode, start, end)
    except (OSError, OutOfMemory):
        return
    if (entry := mapping.i_pages.load(index)) > 0:
        mem.pages.flags[entry] |= U_DIRTY
        if mapping.i_pages.order(index):
            split_partial_page(mem, mapping, entry, index - int(mem.pages.index[entry]))


def _zero_bytes(mem: Memory, inode: ShmemInode, start: int, end: int) -> None:
    index = start >> PAGE_SHIFT
    if is_swap_value(entry := inode.i_mapping.i_pages.load(index)):
        _swapin_folio(mem, inode, index, entry, mem.memcgs[0], 0)
    zero_partial_page(mem, inode.i_mapping, start, end)


def shmem_fallocate(
    mem: Memory,
    inode: ShmemInode,
    start: int,
    end: int,
    *,
    keep_size: bool,
    memcg: MemCgroup,
    nid: int,
) -> Steps[None]:
    """Preallocate bytes [start, end): pages not up to date in the holes. All or nothing.

    Raises: OSError ENOSPC, OutOfMemory; then the pages added are gone again.
    """
    first, last = start >> PAGE_SHIFT, -(-end // PAGE_SIZE)
    if inode.i_sb.max_blocks and last - first > inode.i_sb.max_blocks:
        raise os_error(errno.ENOSPC, f"end={end:#x}: allowed what the mount has room for")
    undo_fallocend, inode.fallocend = inode.fallocend, max(inode.fallocend, last)
    added: list[int] = []
    try:
        yield from _add_fallocated(mem, inode, range(first, last), added, memcg, nid)
    except (OSError, OutOfMemory, GeneratorExit):
        inode.fallocend = undo_fallocend
        _undo_fallocate(mem, inode, added)
        raise
    heads = [inode.i_mapping.i_pages.load(index) for index in range(first, last)]
    mem.pages.flags[[head for head in heads if head > 0]] |= U_DIRTY
    if not keep_size:
        inode.i_size = max(inode.i_size, end)


def _add_fallocated(
    mem: Memory, inode: ShmemInode, wanted: range, added: list[int], memcg: MemCgroup, nid: int
) -> Steps[None]:
    """Fill the holes among pages `wanted`; `added` is told where each page, small or huge, is."""
    index = wanted.start
    while index < wanted.stop:
        yield from when_unlocked(mem, _fallocate_page, mem, inode, index, added, memcg, nid)
        index = int(inode.i_mapping.i_pages.span(index)[-1]) + 1


def _fallocate_page(
    mem: Memory, inode: ShmemInode, index: int, added: list[int], memcg: MemCgroup, nid: int
) -> None:
    present = inode.i_mapping.i_pages.load(index)
    shmem_get_folio(mem, inode, index, Sgp.SGP_FALLOC, memcg=memcg, nid=nid)
    if not present:
        added.append(index)


def _undo_fallocate(mem: Memory, inode: ShmemInode, added: list[int]) -> None:
    """shmem_undo_range(unfalloc): of the pages added, those that nobody has used go again.

    Small ones are not up to date then; huge ones were cleared at once, and are not dirty.
    """
    mapping = inode.i_mapping
    for index in added:
        head = mapping.i_pages.load(index)
        used = head <= 0 or mem.pages.flags[head] & (PG_dirty | PG_locked)
        if mapping.i_pages.order(index) and not used and not mem.pages.total_mapcount(head):
            filemap_remove_compound(mem, mapping, head)
    indexes = np.array(added, np.int64)
    pfns = np.array([mapping.i_pages.load(index) for index in added], np.int64)
    fresh = (pfns > 0) & (mem.pages.flags[pfns] & U_UPTODATE == 0)
    filemap_remove_pages(mem, mapping, indexes[fresh], pfns[fresh])
    shmem_recalc_inode(mem, inode)


def shmem_evict_inode(mem: Memory, inode: ShmemInode) -> Steps[None]:
    """The last user of a file without a name is gone: all its pages are freed."""
    inode.i_freeing = True
    yield from shmem_undo_range(mem, inode, 0, None, even_cows=True)
    if not inode.flags & VM_NORESERVE:
        _commit(mem, -_pages_in(inode.i_size))
    mem.inodes.remove(inode)
    mem.mappings.pop(inode.i_mapping.key)
