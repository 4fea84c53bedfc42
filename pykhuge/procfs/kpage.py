"""/proc/kpageflags and /proc/kpagecount: what is known of a frame (fs/proc/page.c)."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from pykhuge.mm.errors import check_int
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    Pfns,
    PG_active,
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_error,
    PG_head,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_private,
    PG_referenced,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_table,
    PG_tail,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
    PG_zone_device,
    compound_head,
)

__all__ = ["Kpf", "kpagecount", "kpageflags", "page_mapcounts"]

Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]


class Kpf(enum.IntFlag):
    """KPF_*, the bits of /proc/kpageflags that the model can set."""

    KPF_LOCKED = 1 << 0
    KPF_ERROR = 1 << 1
    KPF_REFERENCED = 1 << 2
    KPF_UPTODATE = 1 << 3
    KPF_DIRTY = 1 << 4
    KPF_LRU = 1 << 5
    KPF_ACTIVE = 1 << 6
    KPF_WRITEBACK = 1 << 8
    KPF_BUDDY = 1 << 10
    KPF_MMAP = 1 << 11
    KPF_ANON = 1 << 12
    KPF_SWAPCACHE = 1 << 13
    KPF_SWAPBACKED = 1 << 14
    KPF_COMPOUND_HEAD = 1 << 15
    KPF_COMPOUND_TAIL = 1 << 16
    KPF_UNEVICTABLE = 1 << 18
    KPF_HWPOISON = 1 << 19
    KPF_NOPAGE = 1 << 20
    KPF_THP = 1 << 22
    KPF_ZERO_PAGE = 1 << 24
    KPF_PGTABLE = 1 << 26
    KPF_RESERVED = 1 << 32
    KPF_MLOCKED = 1 << 33
    KPF_MAPPEDTODISK = 1 << 34
    KPF_PRIVATE = 1 << 35


# Bits of the very page. PG_anon_exclusive is PG_mappedtodisk by another name (page-flags.h).
_COPIED = {
    PG_locked: Kpf.KPF_LOCKED,
    PG_error: Kpf.KPF_ERROR,
    PG_referenced: Kpf.KPF_REFERENCED,
    PG_uptodate: Kpf.KPF_UPTODATE,
    PG_dirty: Kpf.KPF_DIRTY,
    PG_lru: Kpf.KPF_LRU,
    PG_active: Kpf.KPF_ACTIVE,
    PG_writeback: Kpf.KPF_WRITEBACK,
    PG_swapbacked: Kpf.KPF_SWAPBACKED,
    PG_head: Kpf.KPF_COMPOUND_HEAD,
    PG_tail: Kpf.KPF_COMPOUND_TAIL,
    PG_unevictable: Kpf.KPF_UNEVICTABLE,
    PG_hwpoison: Kpf.KPF_HWPOISON,
    PG_table: Kpf.KPF_PGTABLE,
    PG_reserved: Kpf.KPF_RESERVED,
    PG_mlocked: Kpf.KPF_MLOCKED,
    PG_anon_exclusive: Kpf.KPF_MAPPEDTODISK,
    PG_private: Kpf.KPF_PRIVATE,
}


def _has(flags: Flags, bits: int) -> Bools:
    """Whether all of `bits` are set. flags: uint32[n]."""
    found: Bools = flags & np.uint32(bits) == bits
    return found


def _frames(mem: Memory, pfn: int, nr: int) -> Pfns:
    check_int(pfn=pfn, nr=nr)
    end = mem.pages.nr_pages
    if not 0 <= pfn < end:
        raise ValueError(f"pfn={pfn}: allowed 0..{end - 1}")
    if not 0 <= nr <= end - pfn:
        raise ValueError(f"nr={nr}: allowed 0..{end - pfn} from frame {pfn} on")
    return np.arange(pfn, pfn + nr)


def page_mapcounts(mem: Memory, pfns: Pfns) -> npt.NDArray[np.int64]:
    """page_mapcount() of many: PTEs and PMDs that map each very page. Returns: int64[n]."""
    pages = mem.pages
    compound = pages.flags[pfns] & np.uint32(PG_head | PG_tail) != 0
    entire = np.where(compound, pages.entire_mapcount[compound_head(pages, pfns)], 0)
    return pages.mapcount[pfns].astype(np.int64) + entire


def kpagecount(mem: Memory, pfn: int, nr: int) -> Words:
    """How often each of `nr` frames from `pfn` on is mapped; 0 for device memory.

    Returns: uint64[nr]. Raises: ValueError.
    """
    pfns = _frames(mem, pfn, nr)
    device = _has(mem.pages.flags[pfns], PG_zone_device)
    return np.where(device, 0, page_mapcounts(mem, pfns)).astype(np.uint64)


def kpageflags(mem: Memory, pfn: int, nr: int) -> Words:
    """KPF_* of each of `nr` frames from `pfn` on. A tail has few flags of its own.

    Returns: uint64[nr]. Raises: ValueError. Kernel: stable_page_flags.
    """
    pfns = _frames(mem, pfn, nr)
    pages = mem.pages
    flags, heads = pages.flags[pfns], compound_head(pages, pfns)
    of_head = pages.flags[heads]
    compound = _has(of_head, PG_head)
    huge_zero = heads == (-1 if mem.huge_zero_pfn is None else mem.huge_zero_pfn)
    thp = compound & (_has(of_head, PG_lru) | _has(of_head, PG_anon) | huge_zero)
    free = (flags == 0) & (pages.refcount[pfns] == 0)

    words = np.zeros(nr, np.uint64)
    for bit, shown in _COPIED.items():
        words[_has(flags, bit)] |= np.uint64(shown)
    for where, shown in (
        (_mapped(mem, pfns, heads, compound), Kpf.KPF_MMAP),
        (_has(of_head, PG_anon), Kpf.KPF_ANON),
        (_has(of_head, PG_swapcache | PG_swapbacked), Kpf.KPF_SWAPCACHE),
        (thp, Kpf.KPF_THP),
        (huge_zero | (pfns == mem.zero_pfn), Kpf.KPF_ZERO_PAGE),
        (free, Kpf.KPF_BUDDY),
    ):
        words[where] |= np.uint64(shown)
    # pfn_to_online_page() knows no device memory.
    words[_has(flags, PG_zone_device)] = np.uint64(Kpf.KPF_NOPAGE)
    return words


def _mapped(mem: Memory, pfns: Pfns, heads: Pfns, compound: Bools) -> Bools:
    """page_mapped(): of a compound page, whether any part of it is."""
    mapped: Bools = mem.pages.mapcount[pfns] > 0
    mapped[compound] = mem.pages.total_mapcounts(heads[compound]) > 0
    return mapped
