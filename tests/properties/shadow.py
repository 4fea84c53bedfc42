"""What every byte of every process and file should be, kept without any memory management.

A `Shadow` is one process's arena as rows of 4096 bytes, with what the program asked for beside
them; in a `FileShadow` a page shows a page of a `ShadowFile`, or the process's own copy. `look`
reads the modelled kernel's truth for the same arena from its page tables, without touching
anything: present pages from their frames, swapped ones from the device, none as zeros.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from pykhuge.machine import Machine
from pykhuge.mm.mm import vmas_in
from pykhuge.mm.mm_types import Inode, ShmemSuperBlock
from pykhuge.mm.page import PG_anon, PG_locked, PG_uptodate, compound_head
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
from pykhuge.mm.xarray import is_swap_value
from pykhuge.process import PROT_READ, PROT_WRITE, Process

S = TypeVar("S", bound="Shadow")

PAGE = 4096
BLOCK = 512 * PAGE
NR_BLOCKS = 4
NR_PAGES = NR_BLOCKS * 512
# The arena reaches over a GiB boundary, so that it hangs below two PMD tables.
BASE = 0x7F00_4000_0000 - 2 * BLOCK


class Shadow:
    """One process: `data` holds its bytes, the other arrays one value a page."""

    # Type of each array; where nothing is mapped all are zero.
    FIELDS: ClassVar[dict[str, Any]] = {
        "mapped": np.bool_,
        "prot": np.uint8,
        "lazy": np.bool_,  # MADV_FREEd: may turn to zeros until it is written
        "dontfork": np.bool_,
        "wipe": np.bool_,
        "locked": np.bool_,
        "uffd": np.uint8,  # registered modes: 1 missing, 2 write-protect
        "wp": np.bool_,  # write-protected by userfaultfd
    }
    INHERITED: ClassVar = ("mapped", "prot", "lazy", "wipe")

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
        for name, kind in self.FIELDS.items():
            setattr(self, name, np.zeros(NR_PAGES, kind))

    def clear(self, pages: slice) -> None:
        """Nothing is mapped at `pages` any more."""
        self.data[pages] = 0
        for name in self.FIELDS:
            getattr(self, name)[pages] = 0

    def map(self, pages: slice, prot: int) -> None:
        """Fresh anonymous memory."""
        self.clear(pages)
        self.mapped[pages] = True
        self.prot[pages] = prot

    def move(self, old: slice, new: slice) -> None:
        """mremap: the userfaultfd does not follow."""
        self.data[new] = self.data[old]
        for name in self.FIELDS:
            getattr(self, name)[new] = getattr(self, name)[old]
        self.uffd[new] = 0
        self.wp[new] = False
        self.clear(old)

    def refused_move(self, old: slice, new: slice, error: int) -> None:
        """A move that failed; what ends behind its mapping failed when `new` was gone already."""
        if not self.mapped[old.start]:
            assert error == errno.EFAULT
        elif old.start < new.stop and new.start < old.stop:
            assert error == errno.EINVAL
        else:
            assert error == errno.EFAULT
            self.clear(new)

    def fork(self: S) -> S:
        """What a child has after fork()."""
        child = type(self)()
        child.data[:] = self.data
        for name in self.INHERITED:
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


@dataclass(eq=False)
class ShadowFile:
    """One file: `data` holds its pages, up to the end of the last one; behind that all is zero.

    path: of a disk file, on the host. tmpfs: where `linked` files are found by `name`.
    """

    name: str
    size: int
    data: npt.NDArray[np.uint8]
    inode: Inode
    path: Path | None = None
    tmpfs: ShmemSuperBlock | None = None
    linked: bool = False

    @property
    def nr_pages(self) -> int:
        """How many pages begin below its end."""
        return -(-self.size // PAGE)

    def on_disk(self) -> npt.NDArray[np.uint8]:
        """The pages of the file below the cache; zeros if it has none."""
        below = np.zeros(NR_PAGES * PAGE, np.uint8)
        if self.path is not None:
            content = np.fromfile(self.path, np.uint8)
            below[: len(content)] = content
        return below.reshape(NR_PAGES, PAGE)

    def write(self, offset: int, data: bytes) -> None:
        """What pwrite should leave."""
        self.data.reshape(-1)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self.size = max(self.size, offset + len(data) if data else 0)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """What pread should give."""
        return self.data.reshape(-1)[offset : min(offset + length, self.size)].tobytes()

    def zero(self, offset: int, end: int) -> None:
        """What truncation and holes leave."""
        self.data.reshape(-1)[offset:end] = 0


class FileShadow(Shadow):
    """A process whose pages show those of files; `data` holds its `own` private copies."""

    FIELDS: ClassVar[dict[str, Any]] = Shadow.FIELDS | {
        "file": object,  # the ShadowFile, 0 for none
        "index": np.int64,
        "shared": np.bool_,
        "maywrite": np.bool_,
        "own": np.bool_,
    }
    INHERITED: ClassVar = ("mapped", "prot", "file", "index", "shared", "maywrite", "own")

    file: npt.NDArray[Any]
    index: npt.NDArray[np.int64]
    shared: npt.NDArray[np.bool_]
    maywrite: npt.NDArray[np.bool_]
    own: npt.NDArray[np.bool_]

    def map_file(
        self, pages: slice, prot: int, file: ShadowFile, first: int, *, shared: bool, maywrite: bool
    ) -> None:
        """Pages of `file` from `first` on; `maywrite`: it was opened for writing."""
        self.map(pages, prot)
        self.file[pages] = file
        self.index[pages] = first + np.arange(pages.stop - pages.start)
        self.shared[pages] = shared
        self.maywrite[pages] = maywrite

    def row(self, page: int) -> npt.NDArray[np.uint8]:
        """The bytes a page should show."""
        row: npt.NDArray[np.uint8]
        row = self.data[page] if self.own[page] else self.file[page].data[self.index[page]]
        return row

    def bytes_at(self, addr: int, length: int) -> bytes:
        """What a read should give."""
        first, skip = (addr - BASE) // PAGE, (addr - BASE) % PAGE
        last = (addr - BASE + length - 1) // PAGE
        rows = b"".join(self.row(page).tobytes() for page in range(first, last + 1))
        return rows[skip : skip + length]

    def write(self, addr: int, data: bytes) -> None:
        """What a write should leave, in private copies and in files."""
        source, done = np.frombuffer(data, np.uint8), 0
        while done < len(source):
            page, skip = divmod(addr - BASE + done, PAGE)
            nr = min(PAGE - skip, len(source) - done)
            assert self.own[page] or self.shared[page], "a private write went to the file"
            self.row(page)[skip : skip + nr] = source[done : done + nr]
            done += nr

    def behind_end(self) -> npt.NDArray[np.bool_]:
        """Where a touch is SIGBUS: nothing of the process's own, behind the end of the file."""
        result = np.zeros(NR_PAGES, np.bool_)
        for file in set(self.file[self.mapped].tolist()):
            result |= (self.file == file) & (self.index >= file.nr_pages)
        result &= ~self.own
        return result


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


def blocks_of_one_mapping(process: Process, pages: slice) -> list[int]:
    """The blocks whole in `pages` and in one VMA each: MADV_COLLAPSE passes over all others."""
    whole = range(-(-pages.start // 512), pages.stop // 512)
    starts = [(block, BASE + block * BLOCK) for block in whole]
    return [block for block, at in starts if len(vmas_in(process.mm, at, at + BLOCK)) == 1]


def pins_poison(machine: Machine) -> bool:
    """Whether fork() may have to copy poison: a huge page is pinned as a whole."""
    pages = machine.mem.pages
    bad = np.flatnonzero(machine.mem.poison.lines).tolist()
    return any(pages.maybe_dma_pinned(pages.head_of(pfn)) for pfn in bad)


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
    return _swapped(machine, swp_offset(word))


def _swapped(machine: Machine, slot: int) -> bytes:
    mem = machine.mem
    if slot in mem.swap.cache:
        return bytes(mem.ram.pages[mem.swap.cache[slot]])
    return mem.swap.contents[slot]


def own_pages(machine: Machine, seen: Look) -> npt.NDArray[np.bool_]:
    """Which pages of an arena are private copies, present or swapped out."""
    flags = machine.mem.pages.flags
    frames = seen.frames
    heads = compound_head(machine.mem.pages, frames * (frames >= 0))
    anon = (flags[heads] & np.uint32(PG_anon) != 0) & seen.present
    swapped: npt.NDArray[np.bool_] = ~seen.present & (seen.words != 0)
    return anon | swapped


def check_file(machine: Machine, file: ShadowFile) -> npt.NDArray[np.int64]:
    """Hold every byte of a file against the shadow: its cache, swap, and the disk below.

    Returns: int64[NR_PAGES], the frame that caches each page, or -1. Pages that are locked belong
    to whoever locked them, and are not looked into.
    """
    mem = machine.mem
    frames, known = np.full(NR_PAGES, -1, np.int64), np.zeros(NR_PAGES, np.bool_)
    mapping = file.inode.i_mapping
    assert file.inode.i_size == file.size
    for places, entries in mapping.i_pages.entries(0, 1 << 52):
        for index in places[entries < 0].tolist():
            value = mapping.i_pages.load(index)
            if is_swap_value(value):
                known[index] = True
                assert _swapped(machine, -value) == file.data[index].tobytes(), (file.name, index)
        indexes, heads = places[entries > 0], entries[entries > 0]
        if not len(indexes):
            continue
        pfns = heads + indexes % 512 if mapping.i_pages.order(int(indexes[0])) else heads
        frames[indexes], known[indexes] = pfns, True
        flags = mem.pages.flags[heads]
        ready = flags & np.uint32(PG_locked | PG_uptodate) == PG_uptodate
        differs = (mem.ram.pages[pfns[ready]] != file.data[indexes[ready]]).any(axis=1)
        assert not differs.any(), f"{file.name}: cached page {indexes[ready][differs][0]} differs"
        fresh = indexes[flags & np.uint32(PG_locked | PG_uptodate) == 0]
        assert file.path or not file.data[fresh].any(), f"{file.name}: preallocated, not zero"
    differs = (file.on_disk() != file.data).any(axis=1) & ~known
    assert not differs.any(), f"{file.name}: page {np.flatnonzero(differs)[0]} was lost"
    return frames


@contextmanager
def emptied_by_open(file: ShadowFile) -> Iterator[None]:
    """An open for writing that meets huge pages: what it drops from the cache is as on the disk.

    Linux empties the cache without writeback, the dirty pages of others with it.
    """
    before = _cached(file)
    yield
    gone = before & ~_cached(file)
    file.data[gone] = file.on_disk()[gone]


def _cached(file: ShadowFile) -> npt.NDArray[np.bool_]:
    cached = np.zeros(NR_PAGES, np.bool_)
    for places, entries in file.inode.i_mapping.i_pages.entries(0, NR_PAGES):
        cached[places[entries > 0]] = True
    return cached


def check_mappings(
    machine: Machine,
    process: Process,
    shadow: FileShadow,
    cached: dict[ShadowFile, npt.NDArray[np.int64]],
) -> None:
    """What is mapped is the page the file caches, or a copy with the right bytes."""
    seen = look(machine, process)
    name, frames = process.mm.name, seen.frames
    assert shadow.mapped[seen.words != 0].all(), f"{name}: entries where nothing is mapped"
    assert (own_pages(machine, seen) == shadow.own).all(), f"{name}: private copies came or went"
    for page in np.flatnonzero(shadow.own).tolist():
        assert _contents(machine, seen, page) == shadow.data[page].tobytes(), (name, page)
    shown = seen.present & ~shadow.own
    for file in set(shadow.file[shown].tolist()):
        here = shown & (shadow.file == file)
        assert (frames[here] == cached[file][shadow.index[here]]).all(), (name, file.name)
    assert not (shown & seen.writable & ~shadow.shared).any(), f"{name}: writable, private"


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
