"""Page faults in mappings of files (do_fault of mm/memory.c, filemap_map_pages).

A read maps what is cached around it; a shared write maps the page itself, writable and dirty; a
private write maps a copy. Huge pages are mapped by a PMD where that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pykhuge.hw.memory import (
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    HPAGE_PMD_SIZE,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from pykhuge.mm.copy_mc import copy_mc_page
from pykhuge.mm.errors import BUS_ADRERR, BUS_MCEERR_AR, BusError, PageLocked, UserFault
from pykhuge.mm.filemap import file_pages
from pykhuge.mm.huge_memory import OutOfMemory, transhuge_vma_suitable, vma_thp_disabled
from pykhuge.mm.mm_types import (
    VM_HUGEPAGE,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    ShmemInode,
    Vma,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.new_pages import (
    VM_PAGE_PROT,
    map_new_pages,
    new_user_pages,
    pmd_table,
)
from pykhuge.mm.page import (
    Pfns,
    PG_has_hwpoisoned,
    PG_hwpoison,
    PG_locked,
    PG_uptodate,
    compound_head,
)
from pykhuge.mm.page_table import (
    PAGE_DIRTY,
    PAGE_PSE,
    PAGE_RW,
    PAGE_UFFD_WP,
    Ptes,
    pfn_ptes,
    pte_index,
    run_of_none,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.regular_file import read_folio
from pykhuge.mm.rmap import (
    anon_vma_prepare,
    mm_counter,
    mod_mm_pages,
    page_add_file_rmap,
    page_add_huge_file_rmap,
    pmd_of,
    set_pmd,
)
from pykhuge.mm.shmem import Sgp, shmem_add_pages, shmem_allocates_huge, shmem_get_folio
from pykhuge.mm.vmstat import PGFAULT, PGMAJFAULT, THP_FILE_MAPPED

__all__ = ["do_fault", "do_set_pmd", "map_file_pages", "map_huge_file_page"]

FAULT_AROUND_PAGES = 16


def _vm_page_prot(vma: Vma) -> int:
    """vm_page_prot: writable for shared shmem; others must notice the first write."""
    assert vma.vm_file is not None
    kind = VM_SHARED | VM_WRITE | VM_UFFD_WP
    shared = vma.vm_flags & kind == VM_SHARED | VM_WRITE
    writable = shared and isinstance(vma.vm_file.inode, ShmemInode)
    return VM_PAGE_PROT | (PAGE_RW if writable else 0)


def do_set_pmd(mem: Memory, vma: Vma, haddr: int, head: int, *, write: bool) -> bool:
    """Map a cached huge page by the PMD at `haddr`; the caller's reference goes over to it.

    False, and nothing happens, if the VMA is not suitable or the PMD is not none, and, in later
    kernels, if the VMA or its process wants no huge pages.
    """
    if not _may_set_pmd(mem, vma, haddr) or mem.pages.flags[head] & PG_has_hwpoisoned:
        return False
    pmd_table(mem, vma.mm, haddr)
    prot = _vm_page_prot(vma) | PAGE_PSE
    if write:
        prot |= PAGE_DIRTY | (PAGE_RW if vma.vm_flags & VM_WRITE else 0)
    mem.mod_mm(vma.mm, mm_counter(int(mem.pages.flags[head])), HPAGE_PMD_NR)
    page_add_huge_file_rmap(mem, head, vma)
    set_pmd(mem, vma.mm, haddr, (head << PAGE_SHIFT) | prot)
    mem.vmstat.count(THP_FILE_MAPPED)
    return True


def _may_set_pmd(mem: Memory, vma: Vma, haddr: int) -> bool:
    if not transhuge_vma_suitable(vma, haddr) or pmd_of(mem, vma.mm, haddr):
        return False
    refused = vma_thp_disabled(vma, vma.vm_flags, forced=True)
    return not (refused and mem.version.set_pmd_heeds_nohugepage)


def map_huge_file_page(mem: Memory, vma: Vma, addr: int, write: bool) -> bool:
    """Answer a fault at `addr`, where the PMD is none, by the huge page cached there, or a new one.

    False: there is none, or it must be mapped by PTEs. Raises: PageLocked, BusError, UserFault.
    """
    assert vma.vm_file is not None
    mapping, index = vma.vm_file.f_mapping, vma.linear_page_index(addr)
    inode = mapping.host
    haddr = addr & -HPAGE_PMD_SIZE
    if (write and not vma.vm_flags & VM_SHARED) or not _may_set_pmd(mem, vma, haddr):
        return False
    if index << PAGE_SHIFT >= inode.i_size:
        raise BusError(addr, BUS_ADRERR)
    if isinstance(inode, ShmemInode) and _comes_huge(mem, vma, inode, index):
        with _sigbus_at(addr):
            _get_pages(mem, vma, index, 1)
    if mapping.i_pages.order(index) != HPAGE_PMD_ORDER:
        return False
    head = mapping.i_pages.load(index)
    if mem.pages.flags[head] & PG_locked:
        raise PageLocked(head)
    if not do_set_pmd(mem, vma, haddr, head, write=write):
        return False
    mem.pages.refcount[head] += 1
    if write:
        set_page_dirty(mem, np.array([head]))
    mem.vmstat.count(PGFAULT)
    return True


def _comes_huge(mem: Memory, vma: Vma, inode: ShmemInode, index: int) -> bool:
    """Whether a fault will bring a huge page into the page cache, a new one or from swap."""
    entry = inode.i_mapping.i_pages.load(index)
    if entry == 0:
        return shmem_allocates_huge(mem, inode, index, vma)
    return entry < 0 and inode.i_mapping.i_pages.order(index) == HPAGE_PMD_ORDER


def do_fault(
    mem: Memory, vma: Vma, addr: int, ptes: Ptes, place: int, end: int, write: bool
) -> int:
    """Answer faults from `ptes[place]` on, which maps `addr` and is none or a marker.

    Args:
        ptes: uint64[512], the whole table. end: place where the task's access ends.
    Returns: how many faults that were; neighbours that need the same are brought in together.
    Raises: BusError, UserFault, OutOfMemory, PageLocked.
    """
    with _sigbus_at(addr):
        if not write:
            return _do_read_fault(mem, vma, addr, ptes, place, end)
        if vma.vm_flags & VM_SHARED:
            return _map_run(mem, vma, addr, ptes, place, end, write=True)
        return _do_cow_fault(mem, vma, addr, ptes, place)


@contextmanager
def _sigbus_at(addr: int) -> Iterator[None]:
    """vmf_error(): an errno is SIGBUS to who touched `addr`; a wait for userfaultfd stays one."""
    try:
        yield
    except UserFault:
        raise
    except OSError as error:
        raise BusError(addr, BUS_ADRERR) from error


def _do_read_fault(mem: Memory, vma: Vma, addr: int, ptes: Ptes, place: int, end: int) -> int:
    if not vma.vm_flags & VM_UFFD_WP:
        _map_around(mem, vma, addr, ptes, place)
        if ptes[place]:
            return 1
    return _map_run(mem, vma, addr, ptes, place, end, write=False)


def _map_around(mem: Memory, vma: Vma, addr: int, ptes: Ptes, place: int) -> None:
    """Map what is cached, unlocked and up to date in the 16 pages around (filemap_map_pages).

    The window begins at a multiple of 16, or with the VMA, and ends 16 pages on, if they are there.
    """
    first = max(place & -FAULT_AROUND_PAGES, place - ((addr - vma.vm_start) >> PAGE_SHIFT))
    vma_end = place + ((vma.vm_end - addr) >> PAGE_SHIFT)
    last = min(first + FAULT_AROUND_PAGES, HPAGE_PMD_NR, vma_end)
    assert vma.vm_file is not None
    index = vma.linear_page_index(addr) + first - place
    pages = _cached(mem, vma, index, last - first)
    around = np.zeros(HPAGE_PMD_NR, np.int64)
    around[first:last] = pages
    if mem.version.fault_around_maps_folios:
        _add_whole_folios(mem, vma, addr, around)
    places = np.flatnonzero((around > 0) & (ptes == 0))
    if len(places):
        map_file_pages(mem, vma, ptes, places, around[places], write=False)


def _add_whole_folios(mem: Memory, vma: Vma, addr: int, around: Pfns) -> None:
    """All of each compound page that the window has a part of (filemap_map_folio_range)."""
    for head in np.unique(compound_head(mem.pages, around[around > 0])).tolist():
        if not mem.pages.is_compound(head):
            continue
        place = int(np.flatnonzero(compound_head(mem.pages, around) == head)[0])
        at = addr + (place - pte_index(addr) << PAGE_SHIFT)
        whole = _places_of_folio(mem, vma, at, int(around[place]))
        if whole is not None:
            pfns = np.arange(head, head + mem.pages.compound_nr(head))
            bad = mem.pages.flags[pfns] & np.uint32(PG_hwpoison) != 0
            around[whole] = np.where(bad, 0, pfns)


def _places_of_folio(mem: Memory, vma: Vma, addr: int, pfn: int) -> slice | None:
    """Where in its table a compound page would be mapped whose page `pfn` is mapped at `addr`.

    None if that is not within the VMA and one table.
    """
    head = mem.pages.head_of(pfn)
    nr, place = mem.pages.compound_nr(head), pte_index(addr) - (pfn - head)
    start = (addr & -PAGE_SIZE) - (pfn - head << PAGE_SHIFT)
    inside = vma.vm_start <= start and start + (nr << PAGE_SHIFT) <= vma.vm_end
    return slice(place, place + nr) if inside and 0 <= place <= HPAGE_PMD_NR - nr else None


def _cached(mem: Memory, vma: Vma, index: int, nr: int) -> Pfns:
    """The frames of pages [index, index + nr) that can be mapped at once; 0 for the others."""
    assert vma.vm_file is not None
    mapping = vma.vm_file.f_mapping
    end = -(-mapping.host.i_size // PAGE_SIZE)
    found = np.zeros(nr, np.int64)
    # A VMA out of step with the file's blocks looks at two of them.
    for start in range(index & -HPAGE_PMD_NR, index + nr, HPAGE_PMD_NR):
        low, high = max(index, start), min(index + nr, start + HPAGE_PMD_NR, end)
        if low < high:
            found[low - index : high - index] = mapping.i_pages.node(low)[
                low - start : high - start
            ]
    found[found < 0] = 0
    found = file_pages(mem, found, np.arange(index, index + nr))
    flags = mem.pages.flags[compound_head(mem.pages, found)]
    flags |= mem.pages.flags[found] & np.uint32(PG_hwpoison)
    found[flags & np.uint32(PG_locked | PG_uptodate | PG_hwpoison) != PG_uptodate] = 0
    return found


def _map_run(
    mem: Memory, vma: Vma, addr: int, ptes: Ptes, place: int, end: int, *, write: bool
) -> int:
    """Map the page at `addr`, and those behind it that need the same, each a fault of its own."""
    assert vma.vm_file is not None
    index = vma.linear_page_index(addr)
    nr = max(1, run_of_none(ptes[place:end]))
    pages = _cached(mem, vma, index, nr if write else 1)
    if pages[0] == 0:
        pages = _get_pages(mem, vma, index, nr)
    elif not pages.all():
        pages = pages[: int((pages == 0).argmax())]
    _check_hwpoison(mem, addr, pages)
    return _finish_fault(mem, vma, addr, ptes, pages, write=write)


def _maps_whole_folios(mem: Memory, vma: Vma) -> bool:
    """Of shmem first, of all files since fault-around does so too; not where somebody watches."""
    assert vma.vm_file is not None
    shmem = isinstance(vma.vm_file.inode, ShmemInode)
    wanted = shmem or mem.version.fault_around_maps_folios
    return wanted and mem.version.finish_fault_maps_folios and not vma.userfaultfd_armed()


def _finish_fault(mem: Memory, vma: Vma, addr: int, ptes: Ptes, pages: Pfns, *, write: bool) -> int:
    """Map `pages` from `addr` on, each for a fault of its own; returns how many that were.

    Later kernels answer one fault by all of a compound page, if it fits and nothing is in its way.
    """
    place = pte_index(addr)
    if _maps_whole_folios(mem, vma):
        small = run_of_none(mem.pages.order[pages])  # before the first compound page
        whole = None if small else _places_of_folio(mem, vma, addr, int(pages[0]))
        if whole is not None and not ptes[whole].any():
            places = np.arange(whole.start, whole.stop)
            pfns = mem.pages.head_of(int(pages[0])) + places - whole.start
            map_file_pages(mem, vma, ptes, places, pfns, write=write)
            return 1
        pages = pages[: max(1, small)]
    map_file_pages(mem, vma, ptes, np.arange(place, place + len(pages)), pages, write=write)
    return len(pages)


def _get_pages(mem: Memory, vma: Vma, index: int, nr: int) -> Pfns:
    """__do_fault(): pages from `index` on that were not there; more than one for holes of shmem."""
    file, mm = vma.vm_file, vma.mm
    assert file is not None
    inode = file.inode
    if not isinstance(inode, ShmemInode):
        if file.f_mapping.i_pages.load(index) <= 0:
            mem.vmstat.count(PGMAJFAULT)
        window = _read_around(vma, index, file.ra_pages)
        page = read_folio(mem, file, index, window, memcg=mm.memcg, nid=mm.preferred_node)
        return np.array([page])
    within = -(-inode.i_size // PAGE_SIZE) - index
    slots = inode.i_mapping.i_pages.node(index)[index % HPAGE_PMD_NR :][: max(0, min(nr, within))]
    plain = not vma.vm_flags & VM_UFFD_MISSING and not shmem_allocates_huge(mem, inode, index, vma)
    nr_holes = run_of_none(slots)
    if nr_holes and plain:
        return shmem_add_pages(mem, inode, index, nr_holes, memcg=mm.memcg, nid=mm.preferred_node)
    page_or_none = shmem_get_folio(
        mem, inode, index, Sgp.SGP_CACHE, memcg=mm.memcg, nid=mm.preferred_node, vma=vma
    )
    assert page_or_none is not None
    return np.array([page_or_none])


def _check_hwpoison(mem: Memory, addr: int, pages: Pfns) -> None:
    """A page known to be bad is not mapped again. Raises: BusError."""
    if mem.pages.flags[pages[0]] & PG_hwpoison:
        raise BusError(addr, BUS_MCEERR_AR, PAGE_SHIFT)


def _read_around(vma: Vma, index: int, ra_pages: int) -> range:
    """do_sync_mmap_readahead(): two blocks from its own on by MADV_HUGEPAGE, else a window."""
    if vma.vm_flags & VM_HUGEPAGE:
        start = index & -HPAGE_PMD_NR
        return range(start, start + 2 * HPAGE_PMD_NR)
    start = max(0, index - ra_pages // 2)
    return range(start, start + ra_pages)


def map_file_pages(
    mem: Memory, vma: Vma, ptes: Ptes, places: Pfns, pfns: Pfns, *, write: bool
) -> None:
    """Map cached pages `pfns` (int64[n]) at `places` of a table, which are none or markers.

    Kernel: do_set_pte, finish_fault, fault_dirty_shared_page.
    """
    protected = ptes[places] != 0  # a marker: write protection by userfaultfd comes back
    prot = _vm_page_prot(vma)
    if write:
        prot |= PAGE_DIRTY | (PAGE_RW if vma.vm_flags & VM_WRITE else 0)
        set_page_dirty(mem, pfns)
    words = pfn_ptes(pfns, prot)
    if protected.any():
        words[protected] = words[protected] & ~np.uint64(PAGE_RW) | np.uint64(PAGE_UFFD_WP)
    page_add_file_rmap(mem, pfns, vma)
    mem.pages.add_refs(pfns, +1)
    mod_mm_pages(mem, vma.mm, pfns, +1)
    ptes[places] = words


def _do_cow_fault(mem: Memory, vma: Vma, addr: int, ptes: Ptes, place: int) -> int:
    """A private write to a page that is not mapped: a copy of it is.

    The copy is not machine-check safe here (copy_user_highpage): poison met by it kills the host.
    """
    anon_vma_prepare(mem, vma)
    index = vma.linear_page_index(addr)
    source = _cached(mem, vma, index, 1)
    if source[0] == 0:
        source = _get_pages(mem, vma, index, 1)
    _check_hwpoison(mem, addr, source)
    new = new_user_pages(mem, vma, 1)
    if not len(new):
        raise OutOfMemory(f"no page for a copy of {addr:#x} of {vma.mm.name}")
    copy_mc_page(mem, int(new[0]), int(source[0]), consumer="do_cow_fault", recovery=False)
    protected = ptes[place] != 0  # a marker: write protection by userfaultfd comes back
    map_new_pages(mem, vma, addr, new, ptes[place : place + 1])
    if protected:
        ptes[place] = ptes[place] & ~np.uint64(PAGE_RW) | np.uint64(PAGE_UFFD_WP)
    return 1
