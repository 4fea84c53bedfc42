"""Physical memory: one anonymous mapping, a byte of it for every byte of the modelled machine.

The mapping is reserved without swap space and touched page by page, so that a machine of 1 TiB
costs nothing until somebody writes to it. It is aligned to, and advised to use, the host's own huge
pages: a cold copy out of them is a fifth faster.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

__all__ = [
    "HPAGE_PMD_NR",
    "HPAGE_PMD_SIZE",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PLACES",
    "PhysicalMemory",
    "lazy_zeros",
]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
HPAGE_PMD_ORDER = 9
HPAGE_PMD_NR = 512
HPAGE_PMD_SIZE = HPAGE_PMD_NR * PAGE_SIZE
# Where each page of a block stands in it; int64[512], shared by all.
PLACES = np.arange(HPAGE_PMD_NR)
PLACES.flags.writeable = False

MAP_NORESERVE = 0x4000  # the mmap module names it from Python 3.13 on


def _reserve(nr_bytes: int) -> mmap.mmap:
    """Map `nr_bytes` of zeros that cost memory only where they are written.

    Raises: MemoryError if the host refuses to reserve so much address space.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        return mmap.mmap(-1, nr_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(
            f"cannot reserve {nr_bytes:#x} bytes of address space ({error.strerror}): make the"
            " machine smaller, or allow it with vm.overcommit_memory=0 or 1"
        ) from error


def lazy_zeros(length: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Zeros of `dtype` that cost nothing until written.

    np.zeros would ask for huge pages, and one touched element would cost 2 MiB.
    """
    kind = np.dtype(dtype)
    return np.frombuffer(_reserve(length * kind.itemsize), dtype=kind, count=length)


class PhysicalMemory:
    """The bytes of `nr_pages` page frames.

    pages: uint8[nr_pages, 4096], row `pfn` is the frame's bytes.
    words: uint64[nr_pages, 512], the same as page-table words.
    address: where frame 0 lies in this process, for the copy core.
    """

    def __init__(self, nr_pages: int) -> None:
        self.nr_pages = nr_pages
        arena = _reserve((nr_pages + HPAGE_PMD_NR) * PAGE_SIZE)
        whole = np.frombuffer(arena, dtype=np.uint8)
        unaligned = whole.ctypes.data % HPAGE_PMD_SIZE
        start = -unaligned % HPAGE_PMD_SIZE
        arena.madvise(mmap.MADV_HUGEPAGE)
        used = whole[start : start + nr_pages * PAGE_SIZE]
        self.pages = used.reshape(nr_pages, PAGE_SIZE)
        self.words = used.view(np.uint64).reshape(nr_pages, HPAGE_PMD_NR)
        self.address = used.ctypes.data
