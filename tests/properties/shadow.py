"""What every byte of every process should be, kept without any memory management.

A `Shadow` is one process's arena as rows of 4096 bytes, with what the program asked for beside
them. `look` reads the modelled kernel's truth for the same arena from its page tables, without
touching anything: present pages from their frames, swapped ones from the device, none as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pykhuge.machine import Machine
from pykhuge.mm.page_table import (
    PAGE_PRESENT,
    PAGE_PSE,
    PAGE_RW,
    SWP_TYPE_SHIFT,
    is_swap_pte,
    pte_pfn,
    pte_pfns,
    swp_offset,
)
from pykhuge.mm.rmap import pmd_of
from pykhuge.process import PROT_READ, PROT_WRITE, Process

PAGE = 4096
BLOCK = 512 * PAGE
NR_BLOCKS = 4
NR_PAGES = NR_BLOCKS * 512
# The arena reaches over a GiB boundary, so that it hangs below two PMD tables.
BASE = 0x7F00_4000_0000 - 2 * BLOCK

# The fields of a shadow: type, and value where nothing is mapped.
_FIELDS = {
    "mapped": np.bool_,
    "prot": np.uint8,
    "lazy": np.bool_,  # MADV_FREEd: may turn to zeros until it is written
    "dontfork": np.bool_,
    "wipe": np.bool_,
    "locked": np.bool_,
    "uffd": np.uint8,  # registered modes: 1 missing, 2 write-protect
    "wp": np.bool_,  # write-protected by userfaultfd
}


class Shadow:
    """One process: `data` holds its bytes, the other arrays one value a page."""

    mapped: npt.NDArray[np.bool_]
    prot: npt.NDArray[np.uint8]
    lazy: npt.NDArray[np.bool_]
    dontfork: npt.NDArray[np.bool_]
    wipe: npt.NDArray[np.bool_]
    locked: npt.NDArray[np.bool_]
    uffd: npt.NDArray[np.uint8]
    wp: npt.NDArray[np.bool_]

    def __init__(self) -> None:
        self.data = np.zeros((NR_PAGES, PAGE), np.uint8)
        for name, kind in _FIELDS.items():
            setattr(self, name, np.zeros(NR_PAGES, kind))

    def clear(self, pages: slice) -> None:
        """Nothing is mapped at `pages` any more."""
        self.data[pages] = 0
        for name in _FIELDS:
            getattr(self, name)[pages] = 0

    def map(self, pages: slice, prot: int) -> None:
        """Fresh anonymous memory."""
        self.clear(pages)
        self.mapped[pages] = True
        self.prot[pages] = prot

    def move(self, old: slice, new: slice) -> None:
        """mremap: the userfaultfd does not follow."""
        self.data[new] = self.data[old]
        for name in _FIELDS:
            getattr(self, name)[new] = getattr(self, name)[old]
        self.uffd[new] = 0
        self.wp[new] = False
        self.clear(old)

    def fork(self) -> Shadow:
        """What a child has after fork()."""
        child = Shadow()
        child.data[:] = self.data
        for name in ("mapped", "prot", "lazy", "wipe"):
            getattr(child, name)[:] = getattr(self, name)
        child.data[self.wipe] = 0
        for page in np.flatnonzero(self.dontfork).tolist():
            child.clear(slice(page, page + 1))
        return child

    def bytes_at(self, addr: int, length: int) -> bytes:
        """What a read should give."""
        start = addr - BASE
        return self.data.reshape(-1)[start : start + length].tobytes()

    def write(self, addr: int, data: bytes) -> None:
        """What a write should leave."""
        start = addr - BASE
        self.data.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        if data:
            self.lazy[start // PAGE : (start + len(data) - 1) // PAGE + 1] = False

    def readable(self) -> npt.NDArray[np.bool_]:
        """Where a load may go: any permission lets x86 read."""
        allowed: npt.NDArray[np.bool_] = self.mapped & (self.prot != 0)
        return allowed

    def writable(self) -> npt.NDArray[np.bool_]:
        """Where a store may go."""
        allowed: npt.NDArray[np.bool_] = self.mapped & (self.prot & PROT_WRITE != 0)
        return allowed


@dataclass
class Look:
    """The page tables of one arena: a word a page (huge PMDs as 512 words that have PAGE_PSE).

    frames: int64, -1 where no frame is: none (or the zero page's own bytes elsewhere), swapped.
    """

    words: npt.NDArray[np.uint64]
    huge: list[bool]

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        result: npt.NDArray[np.bool_] = self.words & np.uint64(PAGE_PRESENT) != 0
        return result

    @property
    def frames(self) -> npt.NDArray[np.int64]:
        return np.where(self.present, pte_pfns(self.words), -1)

    @property
    def writable(self) -> npt.NDArray[np.bool_]:
        both = np.uint64(PAGE_PRESENT | PAGE_RW)
        result: npt.NDArray[np.bool_] = self.words & both == both
        return result

    def block(self, index: int) -> npt.NDArray[np.uint64]:
        return self.words[index * 512 : index * 512 + 512]


def look(machine: Machine, process: Process, *, detached: bool = True) -> Look:
    """Read `process`'s page tables, also those that a collapse has taken out for a while."""
    mem, mm = machine.mem, process.mm
    words = np.zeros(NR_PAGES, np.uint64)
    huge = [False] * NR_BLOCKS
    for index in range(NR_BLOCKS):
        addr = BASE + index * BLOCK
        pmd = pmd_of(mem, mm, addr) or (mm.detached.get(addr) if detached else None)
        here = words[index * 512 : index * 512 + 512]
        if pmd and pmd & PAGE_PSE:
            huge[index] = True
            here[:] = np.uint64(pmd) + np.arange(512, dtype=np.uint64) * np.uint64(PAGE)
        elif pmd:
            here[:] = mem.ram.words[pte_pfn(pmd)]
    return Look(words, huge)


def check_contents(machine: Machine, process: Process, shadow: Shadow) -> None:
    """Hold every byte of the arena against the shadow; a lazily freed page may have become zero."""
    mem, seen = machine.mem, look(machine, process)
    words = shadow.data.view(np.uint64)
    present = np.flatnonzero(seen.present)
    assert shadow.mapped[present].all(), "pages are present where nothing is mapped"
    differs = present[(mem.ram.words[seen.frames[present]] != words[present]).any(axis=1)].tolist()
    absent = np.flatnonzero(~seen.present)
    differs += [
        page
        for page in absent[words[absent].any(axis=1)].tolist()
        if _absent_contents(machine, int(seen.words[page])) != shadow.data[page].tobytes()
    ]
    for page in differs:
        now = _contents(machine, seen, page)
        if shadow.lazy[page] and not any(now):
            shadow.data[page] = 0
            continue
        first = int(np.flatnonzero(np.frombuffer(now, np.uint8) != shadow.data[page])[0])
        raise AssertionError(
            f"{process.mm.name}: byte {first:#x} of page {BASE + page * PAGE:#x} is"
            f" {now[first]:#x}, should be {int(shadow.data[page, first]):#x}"
            f" (entry {int(seen.words[page]):#x})"
        )
    shadow.wp &= seen.words != 0


def _contents(machine: Machine, seen: Look, page: int) -> bytes:
    if seen.present[page]:
        return bytes(machine.mem.ram.pages[seen.frames[page]])
    return _absent_contents(machine, int(seen.words[page]))


def _absent_contents(machine: Machine, word: int) -> bytes:
    if not is_swap_pte(word) or word >> SWP_TYPE_SHIFT:
        return bytes(PAGE)
    slot, mem = swp_offset(word), machine.mem
    if slot in mem.swap.cache:
        return bytes(mem.ram.pages[mem.swap.cache[slot]])
    return mem.swap.contents[slot]


def touched_poison(
    machine: Machine, frames: npt.NDArray[np.int64], addr: int, end: int
) -> int | None:
    """The first address of [addr, end) on a poisoned line of the frames mapped there."""
    for page in range((addr - BASE) // PAGE, (end - 1 - BASE) // PAGE + 1):
        word = int(machine.mem.poison.lines[frames[page]]) if frames[page] >= 0 else 0
        for line in range(64) if word else ():
            start = BASE + page * PAGE + line * 64
            if word >> line & 1 and start < end and start + 64 > addr:
                return max(start, addr)
    return None


READ_WRITE = PROT_READ | PROT_WRITE
