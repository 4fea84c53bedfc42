"""Random operations on files and their mappings, against a shadow of what every byte should be.

Files of shmem (memfd, tmpfs with and without a limit, shared anonymous memory) and of a disk are
mapped, privately and shared, by several processes at several places, while they are written,
truncated, swapped out and collapsed. After each step the machine is audited, all contents are held
against the shadow, and every page-table entry against the page cache. `--model-steps` makes it
longer.
"""

# ruff: noqa: PT017  a call may fail or not: what matters is that it does as the shadow says

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from collapse_kit import small_machine
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from properties.machines import Steps, address, pattern, run_machine, size, some_pages
from properties.shadow import (
    BASE,
    BLOCK,
    NR_BLOCKS,
    NR_PAGES,
    PAGE,
    READ_WRITE,
    FileShadow,
    ShadowFile,
    blocks_of_one_mapping,
    check_file,
    check_mappings,
    emptied_by_open,
    look,
    own_pages,
    pins_poison,
    touched_poison,
)

from pykhuge.kernel.sched import Task, WouldBlock
from pykhuge.khugepaged.scan_result import CollapseError, ScanResult
from pykhuge.mm.errors import BUS_ADRERR, BUS_MCEERR_AR, BusError, SegmentationFault
from pykhuge.mm.gup import UserPages
from pykhuge.mm.huge_memory import OutOfMemory
from pykhuge.mm.mm_types import VM_LOCKED, File, ShmemInode
from pykhuge.mm.xarray import SWAPIN_ERROR
from pykhuge.process import PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, Advice, Process

MAX_PROCESSES = 3
MAX_FILES = 6
EHWPOISON = 133
# Where a collapse of a file can stand still.
STOPS = [
    "release mmap_lock",
    "scanned",
    "swapin",
    "readahead",
    "nr_thps",
    "copy",
    "copied",
    "copied",
    "acquire i_mmap_rwsem for write",
    "release i_mmap_rwsem",
]

who = st.integers(0, MAX_PROCESSES - 1)
which = st.integers(0, MAX_FILES - 1)
seeds = st.integers(0, 1 << 16)
block_numbers = st.integers(0, NR_BLOCKS - 1)
whole_blocks = block_numbers.map(lambda block: slice(block * 512, block * 512 + 512))
page_ranges = st.one_of(whole_blocks, whole_blocks, some_pages)
byte_ranges = st.builds(
    lambda pages, skip, length: (
        pages.start * PAGE + skip,
        min(length, NR_PAGES * PAGE - pages.start * PAGE - skip),
    ),
    page_ranges,
    st.one_of(st.just(0), st.integers(0, PAGE - 1)),
    st.one_of(st.integers(1, 200), st.integers(1, 3 * PAGE), st.just(BLOCK)),
)
sizes = st.one_of(
    st.sampled_from([0, BLOCK, 2 * BLOCK, 3 * BLOCK]),
    st.integers(0, 3 * BLOCK // PAGE).map(lambda pages: pages * PAGE),
    st.integers(0, 3 * BLOCK),
)
prots = st.sampled_from(
    [READ_WRITE, READ_WRITE, PROT_READ | PROT_EXEC, PROT_READ | PROT_EXEC, PROT_READ, PROT_NONE]
)


@dataclass(eq=False)
class Actor:
    """A process, what it should see, and what it has open."""

    process: Process
    shadow: FileShadow = field(default_factory=FileShadow)
    opened: dict[ShadowFile, File] = field(default_factory=dict)


class FileOperations(RuleBasedStateMachine):
    """What processes do with files, on a machine that is too small for all of it."""

    # How many of its steps count for the total: some examples end early.
    STEPS_AN_EXAMPLE = 30
    # Outcomes of collapses without which a run would not be worth much.
    WANTED: ClassVar = {"SCAN_SUCCEED"}

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[Actor] = []
        self.files: list[ShadowFile] = []
        self.held: list[UserPages] = []
        self.machine = small_machine("16M")
        self.folder = Path(tempfile.mkdtemp())
        self.mounts = [self.machine.tmpfs()]
        self.made = 0

    @initialize(
        megabytes=st.sampled_from([16, 24]),
        nodes=st.sampled_from([1, 2]),
        commit=st.sampled_from([None, None, "10M"]),
        limit=st.sampled_from(["1M", "3M", "5M"]),
        seed=seeds,
    )
    def boot(self, megabytes: int, nodes: int, commit: str | None, limit: str, seed: int) -> None:
        """Two processes that map the same three files, one of each kind."""
        self.machine = small_machine(
            f"{megabytes}M", nodes=nodes, swap="3M", cpus=2, commit_limit=commit, seed=seed
        )
        self.machine.thp.enabled = "always"
        self.mounts = [self.machine.tmpfs(), self.machine.tmpfs(limit)]
        for _ in range(2):
            self.actors.append(Actor(self.machine.process()))
        self.memfd(0, BLOCK)
        self.open_tmpfs(0, seed % 2, BLOCK + 5 * PAGE)
        self.open_disk(0, 2 * BLOCK, seed)
        for number in range(2):
            for place, file in enumerate(self.files):
                pages = slice(place * 512, place * 512 + 512)
                shared = bool(number) or file.path is None
                self.map_file(number, place, pages, 0, shared, PROT_READ | PROT_EXEC)
            # Both have copies of their own of some pages of the first two files.
            first = slice(3 * 512, 3 * 512 + 256)
            self.map_file(number, number, first, 0, False, READ_WRITE)
            self.store(self.actors[number], address(first) + 5, pattern(seed, 30 * PAGE))

    def actor(self, number: int) -> Actor:
        return self.actors[number % len(self.actors)]

    def file(self, number: int) -> ShadowFile | None:
        return self.files[number % len(self.files)] if self.files else None

    def opened(
        self, actor: Actor, file: ShadowFile | None, *, writable: bool = False
    ) -> File | None:
        """The file as the process has it open; opened for that, if it can be."""
        if file is None:
            return None
        found = actor.opened.get(file)
        if found is None and file.linked:
            flags = os.O_RDWR if writable or file.path is None else os.O_RDONLY
            try:
                found = self.open_again(actor, file, flags)
            except WouldBlock:
                return None
            actor.opened[file] = found
        return None if found is None or (writable and not found.writable) else found

    def open_again(self, actor: Actor, file: ShadowFile, flags: int) -> File:
        if file.tmpfs is not None:
            return actor.process.open(file.name, flags, tmpfs=file.tmpfs)
        with emptied_by_open(file) if file.inode.i_mapping.nr_thps else nullcontext():
            return actor.process.open(str(file.path), flags)

    def add(self, actor: Actor | None, opened: File, **rest: Any) -> ShadowFile:
        data = np.zeros((NR_PAGES, PAGE), np.uint8)
        file = ShadowFile(opened.inode.name, 0, data, opened.inode, **rest)
        self.files.append(file)
        if actor is not None:
            actor.opened[file] = opened
        return file

    # Files come and go.

    @rule(number=who, length=sizes)
    def memfd(self, number: int, length: int) -> None:
        """A file without a name."""
        if len(self.files) < MAX_FILES:
            actor = self.actor(number)
            self.made += 1
            opened = actor.process.memfd_create(f"m{self.made}")
            file = self.add(actor, opened)
            self.truncate_to(actor, file, opened, length)

    @rule(number=who, mount=st.integers(0, 1), length=sizes)
    def open_tmpfs(self, number: int, mount: int, length: int) -> None:
        """A file of a mount, which may have a limit."""
        if len(self.files) < MAX_FILES:
            actor, tmpfs = self.actor(number), self.mounts[mount]
            self.made += 1
            name = f"t{self.made}"
            opened = actor.process.open(name, os.O_RDWR | os.O_CREAT, tmpfs=tmpfs)
            file = self.add(actor, opened, tmpfs=tmpfs, linked=True)
            file.name = name
            self.truncate_to(actor, file, opened, length)

    @rule(number=who, length=sizes, seed=seeds)
    def open_disk(self, number: int, length: int, seed: int) -> None:
        """A file of the host."""
        if len(self.files) < MAX_FILES and sum(file.path is not None for file in self.files) < 2:
            actor = self.actor(number)
            self.made += 1
            path = self.folder / f"d{self.made}"
            path.write_bytes(pattern(seed, length))
            file = self.add(actor, actor.process.open(str(path)), path=path, linked=True)
            file.write(0, pattern(seed, length))

    @rule(number=who, where=which)
    def open_for_writing(self, number: int, where: int) -> None:
        """Open a file for reading and writing, in place of what was open before."""
        actor, file = self.actor(number), self.file(where)
        if file is None or not file.linked:
            return
        try:
            opened = self.open_again(actor, file, os.O_RDWR)
        except WouldBlock:
            return
        self.replace(actor, file, opened)
        if isinstance(file.inode, ShmemInode):
            return
        if not self.paused():
            assert not file.inode.i_mapping.nr_thps, "huge pages, and somebody may write"

    def paused(self) -> bool:
        """Whether some task stands still."""
        return False

    def replace(self, actor: Actor, file: ShadowFile, opened: File | None) -> None:
        before = actor.opened.pop(file, None)
        if before is not None:
            actor.process.close(before)
        if opened is not None:
            actor.opened[file] = opened

    @rule(number=who, where=which)
    def close(self, number: int, where: int) -> None:
        """Close a file; one without a name goes with its last user."""
        file = self.file(where)
        if file is not None:
            self.replace(self.actor(number), file, None)

    @rule(where=which)
    def unlink(self, where: int) -> None:
        """The name of a file of a tmpfs goes."""
        file = self.file(where)
        if file is not None and file.tmpfs is not None and file.linked:
            try:
                self.actors[0].process.unlink(file.name, tmpfs=file.tmpfs)
            except WouldBlock:
                return
            file.linked = False

    # What is done with an open file.

    @rule(number=who, where=which, length=sizes)
    def ftruncate(self, number: int, where: int, length: int) -> None:
        """Cut a file, or let it grow."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file, writable=True)
        if opened is not None and file is not None:
            self.truncate_to(actor, file, opened, length)

    def truncate_to(self, actor: Actor, file: ShadowFile, opened: File, length: int) -> None:
        try:
            actor.process.ftruncate(opened, length)
        except WouldBlock:
            return
        if length < file.size:
            tail = min(-(-length // PAGE) * PAGE, NR_PAGES * PAGE)
            file.zero(tail, NR_PAGES * PAGE)
            self.zero_part(file, length, tail)
            for each in self.actors:
                gone = (each.shadow.file == file) & (each.shadow.index >= -(-length // PAGE))
                each.shadow.own[gone] = False
        file.size = length

    def zero_part(self, file: ShadowFile, low: int, high: int) -> None:
        """Part of a page is zeroed; one that could not be swapped in for it stays as it is."""
        entry = file.inode.i_mapping.i_pages.load(low // PAGE)
        if low < high and not SWAPIN_ERROR <= entry < 0:
            file.zero(low, high)

    @rule(number=who, where=which, part=byte_ranges, keep_size=st.booleans())
    def fallocate(self, number: int, where: int, part: tuple[int, int], keep_size: bool) -> None:
        """Preallocate; all or nothing."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file, writable=True)
        if opened is None or file is None:
            return
        before = self.pages_of(file)
        try:
            actor.process.fallocate(opened, part[0], part[1], keep_size=keep_size)
        except (WouldBlock, OutOfMemory):
            pass
        except OSError as error:
            if file.path is not None:
                assert error.errno == errno.EOPNOTSUPP
                return
            assert error.errno == errno.ENOSPC
            assert self.limited(file)
        else:
            if not keep_size:
                file.size = max(file.size, sum(part))
            return
        assert self.pages_of(file) == before, "what was allocated stayed"

    def pages_of(self, file: ShadowFile) -> int:
        """Cached and on swap; what it is charged for may be more, until somebody counts anew."""
        swapped = file.inode.swapped if isinstance(file.inode, ShmemInode) else 0
        return file.inode.i_mapping.nrpages + swapped

    def limited(self, file: ShadowFile) -> bool:
        """Whether the file may run out of blocks."""
        return file.tmpfs is self.mounts[1] or self.machine.mem.commit_limit is not None

    @rule(number=who, where=which, part=byte_ranges, near=st.booleans())
    def punch_hole(
        self, number: int, where: int, part: tuple[int, int], near: bool = False
    ) -> None:
        """Punch a hole, also below private copies."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file, writable=True)
        if opened is None or file is None or file.path is not None:
            return
        shadows = [each.shadow for each in self.actors]
        copied = [shadow.index[shadow.own & (shadow.file == file)] for shadow in shadows]
        below = np.concatenate(copied)
        if near and len(below):
            offset = int(below[part[0] % len(below)]) * PAGE
            part = offset, min(part[1], NR_PAGES * PAGE - offset)
        try:
            actor.process.fallocate(opened, part[0], part[1], punch_hole=True)
        except WouldBlock:
            return
        self.punched(file, part[0], sum(part))

    def punched(self, file: ShadowFile, low: int, high: int) -> None:
        first, last = -(-low // PAGE) * PAGE, high & -PAGE
        if first <= last:
            self.zero_part(file, low, first)
            file.zero(first, last)
            self.zero_part(file, last, high)
        else:
            self.zero_part(file, low, high)

    @rule(number=who, pages=page_ranges)
    def madvise_remove(self, number: int, pages: slice) -> None:
        """Punch out what one VMA shows."""
        actor = self.actor(number)
        shadow, vma = actor.shadow, self.vma_of(actor, address(pages))
        if vma is None:
            return
        pages = slice(pages.start, min(pages.stop, vma.stop))
        file, first = shadow.file[pages.start], int(shadow.index[pages.start])
        try:
            actor.process.madvise(address(pages), size(pages), Advice.MADV_REMOVE)
        except WouldBlock:
            return
        except OSError as error:
            if shadow.locked[pages.start]:
                assert error.errno == errno.EINVAL
            elif not (shadow.shared & shadow.writable())[pages.start]:
                assert error.errno == errno.EACCES
            else:
                assert error.errno == errno.EOPNOTSUPP
                assert file.path is not None
            return
        assert file.path is None
        file.zero(first * PAGE, first * PAGE + size(pages))

    def vma_of(self, actor: Actor, addr: int) -> slice | None:
        """The pages of the VMA at `addr`."""
        for vma in actor.process.mm.vmas:
            if vma.vm_start <= addr < vma.vm_end:
                return slice((vma.vm_start - BASE) // PAGE, (vma.vm_end - BASE) // PAGE)
        return None

    @rule(number=who, where=which, part=byte_ranges, seed=seeds)
    def pwrite(self, number: int, where: int, part: tuple[int, int], seed: int) -> None:
        """Write to a file."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file, writable=True)
        if opened is not None and file is not None:
            self.put(actor, file, opened, part[0], pattern(seed, part[1]))

    def put(self, actor: Actor, file: ShadowFile, opened: File, offset: int, data: bytes) -> None:
        try:
            done = actor.process.pwrite(opened, offset, data)
        except (WouldBlock, OutOfMemory):
            return
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert self.limited(file)
            return
        assert done > 0
        file.write(offset, data[:done])

    @rule(number=who, where=which, part=byte_ranges)
    def pread(self, number: int, where: int, part: tuple[int, int]) -> None:
        """Read a file, but for poison: the kernel's copy out has no recovery."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file)
        if opened is None or file is None:
            return
        self.scrub()
        pages = range(part[0] // PAGE, (sum(part) - 1) // PAGE + 1)
        if any(self.poisoned(opened, page) for page in pages):
            return
        try:
            got = actor.process.pread(opened, *part)
        except (WouldBlock, OutOfMemory):
            return
        assert got == file.bytes_at(*part)

    def scrub(self) -> None:
        """Free frames become good: what reads a page brought in a moment ago has no recovery."""
        lines, pages = self.machine.mem.poison.lines, self.machine.mem.pages
        bad = np.flatnonzero(lines)
        lines[bad[(pages.refcount[bad] == 0) & (pages.flags[bad] == 0)]] = 0

    def poisoned(self, file: File, index: int) -> bool:
        """Whether a page of the file has a bad line, in the cache or in the swap cache."""
        mem = self.machine.mem
        entry = file.f_mapping.i_pages.load(index)
        if entry < 0:
            pfn = mem.swap.cache.get(-entry)
        else:
            pfn = self.actors[0].process.cached_pfn(file, index)
        return pfn is not None and bool(mem.poison.lines[pfn])

    @rule(number=who, where=which)
    def fsync(self, number: int, where: int) -> None:
        """What is dirty goes to the disk, unless it has a bad line."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file)
        if opened is None or file is None:
            return
        try:
            actor.process.fsync(opened)
        except OSError as error:
            assert error.errno == errno.EIO
            return
        if file.path is not None and not self.machine.mem.poison.lines.any():
            assert file.path.read_bytes() == file.bytes_at(0, file.size)

    # What is done with mappings.

    @rule(
        number=who,
        where=which,
        pages=page_ranges,
        first=st.one_of(st.sampled_from([0, 0, 512, 1024]), st.integers(0, 1600)),
        shared=st.booleans(),
        prot=prots,
    )
    def map_file(
        self, number: int, where: int, pages: slice, first: int, shared: bool, prot: int
    ) -> None:
        """Map a file over what is there."""
        actor, file = self.actor(number), self.file(where)
        opened = self.opened(actor, file, writable=shared and bool(prot & PROT_WRITE))
        opened = opened or self.opened(actor, file)
        if opened is None or file is None:
            return
        pages = slice(pages.start, min(pages.stop, pages.start + NR_PAGES - first))
        try:
            addr = actor.process.mmap(
                size(pages),
                addr=address(pages),
                fixed=True,
                file=opened,
                offset=first * PAGE,
                shared=shared,
                prot=prot,
            )
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.EACCES
            assert shared
            assert prot & PROT_WRITE
            assert not opened.writable
            return
        assert addr == address(pages)
        actor.shadow.map_file(
            pages, prot, file, first, shared=shared, maywrite=opened.writable or not shared
        )

    @rule(
        number=who,
        where=which,
        block=block_numbers,
        first=st.sampled_from([0, 0, 512, 7, 300]),
        shared=st.booleans(),
        part=st.tuples(st.integers(0, BLOCK - 1), st.integers(1, 20 * PAGE)),
        seed=seeds,
    )
    def map_and_write(
        self,
        number: int,
        where: int,
        block: int,
        first: int,
        shared: bool,
        part: tuple[int, int],
        seed: int,
    ) -> None:
        """Map a block of a file, privately or shared, and write to some of it."""
        pages = slice(block * 512, block * 512 + 512)
        if shared and seed % 4 == 0:
            self.open_for_writing(number, where)
        self.map_file(number, where, pages, first, shared, READ_WRITE)
        start = block * BLOCK + part[0]
        self.write(number, (start, min(part[1], (block + 1) * BLOCK - start)), seed)

    @rule(number=who, where=which, nr=st.sampled_from([1, 20, 100]), block=block_numbers)
    def swap_out(self, number: int, where: int, nr: int, block: int) -> None:
        """One process alone still maps some pages of a file, and lets them be reclaimed."""
        file = self.file(where)
        for each, actor in enumerate(self.actors):
            for page in np.flatnonzero(np.diff(actor.shadow.file == file, prepend=False)).tolist():
                vma = self.vma_of(actor, BASE + page * PAGE)
                if vma is not None:
                    self.advise_pages(each, vma, Advice.MADV_DONTNEED)
        first = block * 512
        self.read(number, (first * PAGE, nr * PAGE))
        self.advise_pages(number, slice(first, first + nr), Advice.MADV_PAGEOUT)

    @rule(number=who, pages=page_ranges, prot=prots, noreserve=st.booleans())
    def map_shared_anonymous(self, number: int, pages: slice, prot: int, noreserve: bool) -> None:
        """Memory to be shared with children."""
        if len(self.files) == MAX_FILES:
            return
        actor = self.actor(number)
        try:
            actor.process.mmap(
                size(pages),
                addr=address(pages),
                fixed=True,
                shared=True,
                prot=prot,
                noreserve=noreserve,
            )
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert self.machine.mem.commit_limit is not None
            return
        vmas = actor.process.mm.vmas
        (vma,) = [each for each in vmas if each.vm_start <= address(pages) < each.vm_end]
        assert vma.vm_file is not None
        file = self.add(None, vma.vm_file)
        file.size = size(pages)
        actor.shadow.map_file(pages, prot, file, 0, shared=True, maywrite=True)

    @rule(number=who, pages=page_ranges)
    def munmap(self, number: int, pages: slice) -> None:
        """Unmap."""
        actor = self.actor(number)
        try:
            actor.process.munmap(address(pages), size(pages))
        except WouldBlock:
            return
        actor.shadow.clear(pages)

    @rule(number=who, pages=page_ranges, prot=prots)
    def mprotect(self, number: int, pages: slice, prot: int) -> None:
        """Change protection, up to a gap or a file that is not open for that."""
        actor = self.actor(number)
        if prot & PROT_WRITE and self.dangerous(actor, pages):
            return
        shadow = actor.shadow
        gaps = np.flatnonzero(~shadow.mapped[pages])
        stop = pages.start + int(gaps[0]) if len(gaps) else pages.stop
        denied = np.flatnonzero(~shadow.maywrite[pages.start : stop]) if prot & PROT_WRITE else []
        expected = errno.EACCES if len(denied) else errno.ENOMEM if len(gaps) else 0
        try:
            actor.process.mprotect(address(pages), size(pages), prot)
        except WouldBlock:
            self.half_done(actor)
            return
        except OSError as error:
            assert error.errno == expected
        else:
            assert not expected
        shadow.prot[pages.start : pages.start + int(denied[0]) if len(denied) else stop] = prot
        self.settle(actor)  # what is mlocked is copied now

    def half_done(self, actor: Actor) -> None:
        """Flags are set, or not; of the pages that a call was to fault in, not all are there."""
        for vma in actor.process.mm.vmas:
            pages = slice((vma.vm_start - BASE) // PAGE, (vma.vm_end - BASE) // PAGE)
            actor.shadow.prot[pages] = vma.vm_flags & 7
            actor.shadow.locked[pages] = bool(vma.vm_flags & VM_LOCKED)
        self.settle(actor)

    @rule(number=who, pages=page_ranges, to=st.integers(0, NR_PAGES - 1), align=st.booleans())
    def mremap(self, number: int, pages: slice, to: int, align: bool) -> None:
        """Move a range, in step with blocks as it was or not."""
        actor, nr = self.actor(number), pages.stop - pages.start
        to = to & -512 | pages.start % 512 if align else to
        if to + nr > NR_PAGES:
            return
        new = slice(to, to + nr)
        try:
            actor.process.mremap(address(pages), size(pages), address(new))
        except OutOfMemory:
            actor.shadow.clear(new)
            return
        except WouldBlock:
            return
        except OSError as error:
            actor.shadow.refused_move(pages, new, error.errno)
            return
        actor.shadow.clear(new)
        actor.shadow.move(pages, new)

    @rule(
        number=who,
        pages=page_ranges,
        advice=st.sampled_from(
            [
                Advice.MADV_HUGEPAGE,
                Advice.MADV_HUGEPAGE,
                Advice.MADV_NOHUGEPAGE,
                Advice.MADV_DONTFORK,
                Advice.MADV_DOFORK,
            ]
        ),
    )
    def advise_flags(self, number: int, pages: slice, advice: Advice) -> None:
        """Advice that is only remembered; a gap is ENOMEM, after the rest was done."""
        actor = self.actor(number)
        mapped = actor.shadow.mapped[pages]
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert not mapped.all()
        else:
            assert mapped.all()
        if advice in (Advice.MADV_DONTFORK, Advice.MADV_DOFORK):
            actor.shadow.dontfork[pages] = mapped & (advice is Advice.MADV_DONTFORK)

    @rule(
        number=who,
        pages=page_ranges,
        advice=st.sampled_from([Advice.MADV_DONTNEED, Advice.MADV_PAGEOUT, Advice.MADV_PAGEOUT]),
    )
    def advise_pages(self, number: int, pages: slice, advice: Advice) -> None:
        """Drop private copies, or swap out: up to the first mlocked VMA, over gaps."""
        actor = self.actor(number)
        shadow = actor.shadow
        locked = np.flatnonzero(shadow.locked[pages])
        done = slice(pages.start, pages.start + int(locked[0])) if len(locked) else pages
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == (errno.EINVAL if len(locked) else errno.ENOMEM)
            assert len(locked) or not shadow.mapped[pages].all()
        else:
            assert shadow.mapped[pages].all()
            assert not len(locked)
        if advice is Advice.MADV_DONTNEED:
            shadow.own[done] = False

    @rule(number=who, pages=page_ranges, write=st.booleans())
    def populate(self, number: int, pages: slice, write: bool) -> None:
        """MADV_POPULATE_*: private copies may be made, no byte changes."""
        actor = self.actor(number)
        if write and self.dangerous(actor, pages):
            return
        advice = Advice.MADV_POPULATE_WRITE if write else Advice.MADV_POPULATE_READ
        allowed = actor.shadow.writable() if write else actor.shadow.readable()
        try:
            actor.process.madvise(address(pages), size(pages), advice)
        except (WouldBlock, OutOfMemory):
            pass
        except OSError as error:
            if error.errno not in (errno.EFAULT, EHWPOISON):
                # Mapping by mapping; a gap is told of behind the last.
                refused = actor.shadow.mapped[pages] & ~allowed[pages]
                assert error.errno == (errno.EINVAL if refused.any() else errno.ENOMEM)
        else:
            assert allowed[pages].all()
            assert not self.untouchable(actor)[pages].any()
        self.settle(actor)

    def dangerous(self, actor: Actor, pages: slice) -> bool:
        """Whether writing to private memory could copy poison where no recovery is."""
        self.scrub()
        shadow, lines = actor.shadow, self.machine.mem.poison.lines
        if not lines.any():
            return False
        seen = look(self.machine, actor.process)
        private = shadow.mapped & ~shadow.shared & ~shadow.own
        for page in (np.flatnonzero(private[pages]) + pages.start).tolist():
            mapping, index = shadow.file[page].inode.i_mapping, int(shadow.index[page])
            entry = mapping.i_pages.load(index)
            head = entry if entry >= 0 else self.machine.mem.swap.cache.get(-entry, 0)
            pfn = head + index % 512 if mapping.i_pages.order(index) else head
            if lines[pfn] and (seen.huge[page // 512] or not seen.present[page]):
                return True
        return False

    def settle(self, actor: Actor) -> None:
        """Private copies that have been made hold what the file held."""
        shadow = actor.shadow
        own = own_pages(self.machine, look(self.machine, actor.process))
        made = own & ~shadow.own & shadow.mapped & ~shadow.shared
        for page in np.flatnonzero(made).tolist():
            shadow.data[page] = shadow.file[page].data[shadow.index[page]]
        shadow.own |= made

    @rule(number=who, pages=page_ranges)
    def mlock(self, number: int, pages: slice) -> None:
        """Lock memory, which faults it in, private copies made where it may be written."""
        actor = self.actor(number)
        if self.dangerous(actor, pages):
            return
        shadow = actor.shadow
        gaps = np.flatnonzero(~shadow.mapped[pages])
        stop = pages.start + int(gaps[0]) if len(gaps) else pages.stop
        try:
            actor.process.mlock(address(pages), size(pages))
        except WouldBlock:
            self.half_done(actor)
            return
        except OutOfMemory:
            pass  # the VMAs are locked, not all pages are in
        except OSError as error:
            assert error.errno == errno.ENOMEM
        shadow.locked[pages.start : stop] = True
        self.settle(actor)

    @rule(number=who, pages=page_ranges)
    def munlock(self, number: int, pages: slice) -> None:
        """Unlock, up to the first gap."""
        actor = self.actor(number)
        gaps = np.flatnonzero(~actor.shadow.mapped[pages])
        try:
            actor.process.munlock(address(pages), size(pages))
        except WouldBlock:
            return
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert len(gaps)
        stop = pages.start + int(gaps[0]) if len(gaps) else pages.stop
        actor.shadow.locked[pages.start : stop] = False

    @rule(number=who, where=byte_ranges, seed=seeds)
    def write(self, number: int, where: tuple[int, int], seed: int) -> None:
        """Store to memory, in one run of pages that are shared or private."""
        actor = self.actor(number)
        shadow, first, skip = actor.shadow, where[0] // PAGE, where[0] % PAGE
        there = np.flatnonzero(shadow.writable() & ~shadow.behind_end())
        if seed % 8 and len(there) and first not in there:
            first = int(there[first % len(there)])
            where = first * PAGE + skip, min(where[1], NR_PAGES * PAGE - first * PAGE - skip)
        addr, last = BASE + where[0], (sum(where) - 1) // PAGE
        change = np.flatnonzero(np.diff(shadow.shared[first : last + 1].astype(np.int8)))
        if len(change):
            last = first + int(change[0])
        end = min(BASE + sum(where), BASE + (last + 1) * PAGE)
        end = self.up_to_tail(shadow, addr, end)
        if addr < end and not self.dangerous(actor, slice(first, last + 1)):
            self.store(actor, addr, pattern(seed, end - addr))

    def up_to_tail(self, shadow: FileShadow, addr: int, end: int) -> int:
        """Where the last page of a disk file is left: what lies behind its end may be lost."""
        for page in range((addr - BASE) // PAGE, (end - 1 - BASE) // PAGE + 1):
            file = shadow.file[page]
            if file and file.path and shadow.shared[page]:
                tail = file.size - int(shadow.index[page]) * PAGE
                if 0 < tail < PAGE:
                    end = min(end, BASE + page * PAGE + tail)
        return end

    def store(self, actor: Actor, addr: int, data: bytes) -> None:
        end = addr + len(data)
        shadow, first, last = actor.shadow, (addr - BASE) // PAGE, (end - 1 - BASE) // PAGE
        try:
            actor.process.write(addr, data)
        except (SegmentationFault, BusError, WouldBlock, OutOfMemory) as error:
            end = self.stopped_at(actor, addr, end, error)
        else:
            assert shadow.writable()[first : last + 1].all()
            assert not self.untouchable(actor)[first : last + 1].any()
            seen = look(self.machine, actor.process)
            assert touched_poison(self.machine, seen.frames, addr, end) is None
        self.settle(actor)
        shadow.write(addr, data[: end - addr])

    def stopped_at(self, actor: Actor, addr: int, end: int, error: Exception) -> int:
        """Where a write stopped, which must be where it had to."""
        shadow, seen = actor.shadow, look(self.machine, actor.process)
        there = seen.writable & shadow.writable()
        lacking = np.flatnonzero(~there[(addr - BASE) // PAGE : (end - 1 - BASE) // PAGE + 1])
        limit = max(addr, (addr & -PAGE) + int(lacking[0]) * PAGE) if len(lacking) else end
        bad = touched_poison(self.machine, seen.frames, addr, limit)
        if isinstance(error, SegmentationFault):
            assert not shadow.writable()[(error.address - BASE) // PAGE]
        elif isinstance(error, BusError):
            page = (error.address - BASE) // PAGE
            if error.code == BUS_ADRERR:
                self.check_no_page(shadow, page)
            elif bad is not None:
                assert (error.address, error.lsb) == (bad & -PAGE, 12)
                return bad
            else:
                # Copy on write reads the whole page.
                assert not there[page]
                assert self.machine.mem.poison.lines[seen.frames[page]]
        assert bad is None, "a write went over a poisoned line"
        return limit

    def untouchable(self, actor: Actor) -> npt.NDArray[np.bool_]:
        """Behind the end of a file, but where a huge PMD that maps the end reaches across it."""
        reached = np.repeat(look(self.machine, actor.process).huge, 512)
        behind: npt.NDArray[np.bool_] = actor.shadow.behind_end() & ~reached
        return behind

    def check_no_page(self, shadow: FileShadow, page: int) -> None:
        """SIGBUS was right: the file ends before, or it has no block left."""
        file = shadow.file[page]
        assert shadow.behind_end()[page] or (file.path is None and self.limited(file))

    @rule(number=who, where=byte_ranges)
    def read(self, number: int, where: tuple[int, int]) -> None:
        """Load from memory, and compare."""
        actor, addr, end = self.actor(number), BASE + where[0], BASE + sum(where)
        shadow, first, last = actor.shadow, where[0] // PAGE, (end - 1 - BASE) // PAGE
        try:
            got = actor.process.read(addr, end - addr)
        except SegmentationFault as fault:
            assert not shadow.readable()[(fault.address - BASE) // PAGE]
            assert shadow.readable()[first : (fault.address - BASE) // PAGE].all()
        except BusError as error:
            if error.code == BUS_ADRERR:
                self.check_no_page(shadow, (error.address - BASE) // PAGE)
                return
            frames = look(self.machine, actor.process).frames
            bad = touched_poison(self.machine, frames, addr, end)
            assert bad is not None
            assert error.address == bad & -PAGE
            assert (error.code, error.lsb) == (BUS_MCEERR_AR, 12)
        except (OutOfMemory, WouldBlock):
            pass
        else:
            assert shadow.readable()[first : last + 1].all()
            assert not self.untouchable(actor)[first : last + 1].any()
            frames = look(self.machine, actor.process).frames
            assert touched_poison(self.machine, frames, addr, end) is None
            assert got == shadow.bytes_at(addr, end - addr)

    # Others.

    @rule(number=who)
    def fork(self, number: int) -> None:
        """A child, unless a poisoned page is pinned: that copy has no recovery."""
        actor = self.actor(number)
        if len(self.actors) == MAX_PROCESSES or pins_poison(self.machine):
            return
        try:
            child = actor.process.fork()
        except (OutOfMemory, WouldBlock):
            return
        self.actors.append(Actor(child, actor.shadow.fork(), dict(actor.opened)))

    @rule(limit=st.sampled_from([None, "1M", "3M", "5M"]), node=st.integers(0, 1))
    def new_process(self, limit: str | None, node: int) -> None:
        """A process from nowhere, in a cgroup with little memory or in none."""
        if len(self.actors) == MAX_PROCESSES:
            return
        memcg = self.machine.memcg(limit) if limit else None
        process = self.machine.process(memcg=memcg, cpu=node)
        process.node = node % len(self.machine.mem.nodes)
        self.actors.append(Actor(process))

    @rule(number=who)
    def exit(self, number: int) -> None:
        """A process ends."""
        if len(self.actors) < 2:
            return
        actor = self.actor(number)
        try:
            actor.process.exit()
        except WouldBlock:
            return
        self.actors.remove(actor)

    @rule(number=who, where=byte_ranges, pinned=st.booleans())
    def hold(self, number: int, where: tuple[int, int], pinned: bool) -> None:
        """A device pins pages, or a pipe holds them."""
        actor, length = self.actor(number), min(where[1], 8 * PAGE)
        first, last = where[0] // PAGE, (where[0] + length - 1) // PAGE
        if pinned and self.dangerous(actor, slice(first, last + 1)):
            return
        shadow = actor.shadow
        allowed = shadow.writable() if pinned else shadow.readable()
        call = actor.process.pin if pinned else actor.process.get
        try:
            self.held.append(call(BASE + where[0], length))
        except (WouldBlock, OutOfMemory):
            pass
        except OSError as error:
            assert error.errno in (errno.EFAULT, EHWPOISON)
            if error.errno == errno.EFAULT and allowed[first : last + 1].all():
                files = set(shadow.file[first : last + 1].tolist())
                behind = shadow.behind_end()[first : last + 1].any()
                assert behind or any(self.limited(file) for file in files)
        else:
            assert allowed[first : last + 1].all()
        self.settle(actor)

    @rule(number=st.integers(0, 20))
    def release(self, number: int) -> None:
        """The device is done."""
        if self.held:
            self.held.pop(number % len(self.held)).release()

    @rule(where=which, index=st.integers(0, NR_PAGES - 1), line=st.integers(0, 63))
    def poison_cached(self, where: int, index: int, line: int) -> None:
        """A line of a cached page goes bad."""
        file = self.file(where)
        if file is not None:
            frames = self.cached_frames(file)
            there = np.flatnonzero(frames > 0)
            if len(there):
                frame = int(frames[there[index % len(there)]])
                self.machine.mem.poison.poison(frame, line)

    def cached_frames(self, file: ShadowFile) -> npt.NDArray[np.int64]:
        return check_file(self.machine, file)

    @rule(number=who, page=st.integers(0, NR_PAGES - 1), line=st.integers(0, 63))
    def poison_mapped(self, number: int, page: int, line: int) -> None:
        """A line of a mapped page goes bad."""
        frames = look(self.machine, self.actor(number).process).frames
        present = np.flatnonzero(frames > 0)
        if len(present):
            frame = int(frames[present[page % len(present)]])
            self.machine.mem.poison.poison(frame, line)

    @rule(nr=st.integers(0, 3))
    def unpoison(self, nr: int) -> None:
        """The frames are replaced, but for the last few."""
        poison = self.machine.mem.poison
        for pfn in np.flatnonzero(poison.lines)[nr:].tolist():
            poison.unpoison(pfn)

    @rule(
        limits=st.tuples(*[st.sampled_from([0, 64, 511, 511])] * 2),
        enabled=st.sampled_from(["always", "always", "madvise", "never"]),
        shmem=st.sampled_from(["never", "never", "advise", "always", "within_size", "force"]),
        huge=st.sampled_from(["never", "never", "advise", "within_size", "always"]),
        number=who,
        node=st.integers(0, 1),
    )
    def administer(
        self, limits: tuple[int, int], enabled: str, shmem: str, huge: str, number: int, node: int
    ) -> None:
        """The administrator turns every knob, and moves a process to another node."""
        for name, limit in zip(("none", "swap"), limits, strict=True):
            setattr(self.machine.khugepaged_settings, f"max_ptes_{name}", limit)
        self.machine.thp.enabled = enabled
        self.machine.thp.shmem_enabled = shmem
        self.mounts[0].huge = huge
        self.actor(number).process.node = node % len(self.machine.mem.nodes)

    @rule(drop=st.booleans(), finish=st.booleans())
    def house_keeping(self, drop: bool, finish: bool) -> None:
        """LRU batches are drained, the disk is done, caches are dropped."""
        if finish:
            self.machine.finish_io()
        if drop:
            self.machine.drop_caches()
        else:
            self.machine.lru_add_drain_all()

    # Collapse.

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let the daemon collapse whatever there is, meanwhile."""
        thp = self.machine.thp
        before = thp.enabled, thp.shmem_enabled
        thp.enabled, thp.shmem_enabled = "always", "force"
        try:
            yield
        finally:
            thp.enabled, thp.shmem_enabled = before

    @rule(number=who, block=block_numbers, is_khugepaged=st.booleans(), allow=st.booleans())
    def collapse(self, number: int, block: int, is_khugepaged: bool, allow: bool) -> None:
        """One block is looked at by khugepaged."""
        actor = self.actor(number)
        try:
            if allow:
                with self.allowed():
                    result = self.scan(actor, block, is_khugepaged)
            else:
                result = self.scan(actor, block, is_khugepaged)
        except WouldBlock:
            return
        Steps.met[result.name] += 1
        if result is ScanResult.SCAN_SUCCEED:
            self.check_huge(actor, block)

    def scan(self, actor: Actor, block: int, is_khugepaged: bool) -> ScanResult:
        addr = BASE + block * BLOCK
        return self.machine.collapse(actor.process, addr, is_khugepaged=is_khugepaged)

    def check_huge(self, actor: Actor, block: int) -> None:
        """The cache holds a huge page there, and no page table shows anything else."""
        file, index = actor.shadow.file[block * 512], int(actor.shadow.index[block * 512])
        assert file.inode.i_mapping.i_pages.order(index) == 9
        if file.path is not None:
            assert file.inode.i_mapping.nr_thps
            assert file.inode.i_writecount <= 0

    @rule(number=who, pages=page_ranges)
    def madvise_collapse(self, number: int, pages: slice) -> None:
        """MADV_COLLAPSE of any range."""
        actor = self.actor(number)
        whole = blocks_of_one_mapping(actor.process, pages)
        try:
            actor.process.madvise(address(pages), size(pages), Advice.MADV_COLLAPSE)
        except WouldBlock:
            return
        except CollapseError as error:
            Steps.met[error.scan_result.name] += 1
            assert error.errno == error.scan_result.errno
            assert error.errno
        except OSError as error:
            assert error.errno == errno.ENOMEM
            assert not actor.shadow.mapped[pages].all()
        else:
            Steps.met["SCAN_SUCCEED"] += len(whole)
            for block in whole:
                assert actor.process.is_huge(BASE + block * BLOCK)
                self.check_huge(actor, block)

    @rule(
        number=who,
        where=which,
        block=block_numbers,
        file_block=st.integers(0, 2),
        holes=st.sampled_from([0, 0, 1, 400]),
        bad=st.sampled_from([None, None, 0, 100]),
        touched=st.integers(0, 512),
        swapped=st.sampled_from([0, 0, 1, 30]),
        is_khugepaged=st.booleans(),
        seed=seeds,
    )
    def fill_and_collapse(
        self,
        number: int,
        where: int,
        block: int,
        file_block: int,
        holes: int,
        bad: int | None,
        touched: int,
        swapped: int,
        is_khugepaged: bool,
        seed: int,
    ) -> None:
        """A block comes to be what khugepaged looks for, but for what lies in the way already."""
        if self.prepare(number, where, block, file_block, holes, bad, touched, swapped, seed):
            self.collapse(number, block, is_khugepaged, True)

    def prepare(
        self,
        number: int,
        where: int,
        block: int,
        file_block: int,
        holes: int,
        bad: int | None,
        touched: int,
        swapped: int,
        seed: int,
    ) -> bool:
        actor, file = self.actor(number), self.file(where)
        if file is None or self.opened(actor, file) is None:
            return False
        first, pages = file_block * 512, slice(block * 512, block * 512 + 512)
        prot = PROT_READ | PROT_EXEC
        self.map_file(number, where, pages, first, file.path is None, prot)
        offset = file_block * BLOCK
        opened = self.opened(actor, file, writable=True)
        if opened is not None and file.path is None:
            before, self.machine.thp.shmem_enabled = self.machine.thp.shmem_enabled, "never"
            self.put(actor, file, opened, offset, pattern(seed, (512 - holes) * PAGE))
            self.truncate_to(actor, file, opened, max(file.size, offset + BLOCK))
            self.machine.thp.shmem_enabled = before
        elif opened is not None:
            self.put(actor, file, opened, offset, pattern(seed, BLOCK))
            self.fsync(number, where)
            self.replace(actor, file, None)
        if touched:
            self.read(number, (block * BLOCK, touched * PAGE))
        if swapped:
            self.swap_out(number, where, swapped, block)
        frames = self.cached_frames(file)
        if bad is not None and frames[first + bad] > 0:
            self.machine.mem.poison.poison(int(frames[first + bad]), seed % 64)
        return True

    @invariant()
    def adds_up(self) -> None:
        """The audit holds, every byte is what it should be, and files live as long as they must."""
        Steps.taken += 1
        self.machine.audit()
        assert self.machine.mem.panic is None
        self.forget_files()
        cached = {file: check_file(self.machine, file) for file in self.files}
        for actor in self.actors:
            check_mappings(self.machine, actor.process, actor.shadow, cached)
        self.check_processes()

    def forget_files(self) -> None:
        """A file without a name goes with its last user; nobody else's does."""
        for file in list(self.files):
            used = file.linked or any(
                file in actor.opened or (actor.shadow.file == file).any() for actor in self.actors
            )
            alive = file.inode in self.machine.mem.inodes
            if self.paused():
                used = alive
            assert used == alive, file.name
            if not used:
                self.files.remove(file)

    def check_processes(self) -> None:
        assert len(self.machine.mem.mms) == len(self.actors)

    def teardown(self) -> None:
        """Everybody reads all there is, then leaves, and nothing is left but what disks cache."""
        try:
            for number, actor in enumerate(self.actors):
                changes = np.diff(actor.shadow.readable(), prepend=False)
                for page in np.flatnonzero(changes).tolist():
                    self.read(number, (page * PAGE, (NR_PAGES - page) * PAGE))
            for held in self.held:
                held.release()
                self.machine.audit()
            for file in self.files:
                if file.tmpfs is not None and file.linked:
                    self.actors[0].process.unlink(file.name, tmpfs=file.tmpfs)
            for actor in self.actors:
                actor.process.exit()
                self.machine.audit()
            self.check_nothing_left()
        finally:
            shutil.rmtree(self.folder)

    def check_nothing_left(self) -> None:
        self.machine.finish_io()
        self.machine.drop_caches()
        self.machine.audit()
        mem = self.machine.mem
        disks = [file.inode for file in self.files if file.path is not None]
        assert [inode for inode in mem.inodes if inode in disks] == mem.inodes, "a file has leaked"
        free = sum(node[0] for node in mem.vmstat.node)
        kept = 1 + 512 * (mem.huge_zero_pfn is not None)
        kept += sum(inode.i_mapping.nrpages for inode in disks)
        assert free == mem.nr_pages - kept, "pages have leaked"
        assert not mem.swap.swap_map, "swap slots have leaked"
        assert len(mem.mappings) == len(disks), "anon_vmas have leaked"
        assert mem.vm_committed_as == 0
        assert not any(mount.used_blocks for mount in self.mounts)
        for inode in disks:
            assert inode.i_count == inode.i_writecount == 0


class PausedFileCollapses(FileOperations):
    """The same, while collapses and opens for writing stand still wherever they can lose it."""

    STEPS_AN_EXAMPLE = 30
    WANTED: ClassVar = {"SCAN_SUCCEED"}

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Task[Any]] = []
        self.leaving: list[Task[Any]] = []
        self.openers: dict[Task[Any], tuple[Actor, ShadowFile]] = {}
        self.emptying: set[Task[Any]] = set()

    def paused(self) -> bool:
        """Whether some task stands still."""
        return bool(self.tasks or self.leaving)

    @rule(number=who, block=block_numbers, is_khugepaged=st.booleans(), steps=st.integers(1, 12))
    def start_collapse(self, number: int, block: int, is_khugepaged: bool, steps: int) -> None:
        """A collapse begins, and gets some way."""
        process = self.actor(number).process
        generator = self.machine.collapse.steps(
            process, BASE + block * BLOCK, is_khugepaged=is_khugepaged
        )
        self.begin(generator, "khugepaged", steps)

    @rule(number=who, first=block_numbers, steps=st.integers(1, 16))
    def start_madvise(self, number: int, first: int, steps: int) -> None:
        """MADV_COLLAPSE of the blocks from `first` on, and gets some way."""
        process = self.actor(number).process
        generator = process.madvise.steps(
            BASE + first * BLOCK, (NR_BLOCKS - first) * BLOCK, Advice.MADV_COLLAPSE
        )
        self.begin(generator, "madvise", steps)

    @rule(
        number=who,
        where=which,
        block=block_numbers,
        file_block=st.integers(0, 2),
        holes=st.sampled_from([0, 0, 1, 400]),
        bad=st.sampled_from([None, None, 0, 100]),
        touched=st.integers(0, 512),
        swapped=st.sampled_from([0, 0, 1, 30]),
        is_khugepaged=st.booleans(),
        stop=st.sampled_from(STOPS),
        then=st.sampled_from(["nothing", "write", "truncate", "punch", "open"]),
        seed=seeds,
    )
    def fill_and_start(
        self,
        number: int,
        where: int,
        block: int,
        file_block: int,
        holes: int,
        bad: int | None,
        touched: int,
        swapped: int,
        is_khugepaged: bool,
        stop: str,
        then: str,
        seed: int,
    ) -> None:
        """A collapse that is likely to get somewhere begins, and somebody comes in between."""
        if self.prepare(number, where, block, file_block, holes, bad, touched, swapped, seed):
            with self.allowed():
                self.start_collapse(number, block, is_khugepaged, 0)
                self.go_to(stop)
        part = max(0, file_block * BLOCK - seed % 3 * PAGE), BLOCK
        if then == "write":
            self.pwrite(number + 1, where, part, seed)
        elif then == "truncate":
            self.ftruncate(number + 1, where, file_block * BLOCK + seed % BLOCK)
        elif then == "punch":
            self.punch_hole(number + 1, where, part)
        elif then == "open":
            self.open_for_writing(number + 1, where)

    def go_to(self, stop: str) -> None:
        """The task begun last goes on up to a step, which it may not come to."""
        for _ in range(20):
            if not self.tasks or str(self.tasks[-1].pending) == stop:
                break
            self.go_on(len(self.tasks) - 1, 1)

    @rule(number=who, where=which, steps=st.integers(1, 4))
    def start_open(self, number: int, where: int, steps: int) -> None:
        """A disk file is being opened for writing."""
        actor, file = self.actor(number), self.file(where)
        if file is not None and file.path is not None:
            generator = actor.process.open.steps(str(file.path), os.O_RDWR)
            task = self.begin(generator, "open", 0)
            if task is not None:
                self.openers[task] = (actor, file)
                self.go_on(len(self.tasks) - 1, steps)

    def begin(self, generator: Any, comm: str, steps: int) -> Task[Any] | None:
        if len(self.tasks) == 3:
            return None
        task = self.machine.spawn(generator, comm)
        self.tasks.append(task)
        self.go_on(len(self.tasks) - 1, steps)
        return task

    @rule(number=st.integers(0, 2), steps=st.integers(1, 8))
    def go_on(self, number: int, steps: int) -> None:
        """A paused task goes on, with an audit at each pause."""
        if self.tasks:
            task = self.tasks[number % len(self.tasks)]
            for _ in range(steps):
                if not self.step(task):
                    break
                self.check_end(task)
                self.adds_up()

    def step(self, task: Task[Any]) -> bool:
        """One step; an open that has met huge pages empties the cache in as many as it needs."""
        if task not in self.openers:
            return task.step()
        file = self.openers[task][1]
        if file.inode.i_mapping.nr_thps:
            self.emptying.add(task)
        with emptied_by_open(file) if task in self.emptying else nullcontext():
            return task.step()

    def check_end(self, task: Task[Any]) -> None:
        if not task.done:
            return
        self.tasks.remove(task)
        if task in self.openers:
            actor, file = self.openers.pop(task)
            self.replace(actor, file, task.result)
        elif isinstance(task.error, CollapseError):
            Steps.met[task.error.scan_result.name] += 1
        elif task.error is None:
            Steps.met[(task.result or ScanResult.SCAN_SUCCEED).name] += 1
        elif not isinstance(task.error, OSError) or isinstance(task.error, WouldBlock):
            raise task.error

    @rule(number=who)
    def exit(self, number: int) -> None:
        """A process ends, as soon as it gets the lock."""
        actor = self.actor(number)
        if len(self.actors) > 1 and all(actor is not each for each, _ in self.openers.values()):
            self.actors.remove(actor)
            task = self.machine.spawn(actor.process.exit.steps(), "exit")
            task.step()
            self.leaving.append(task)

    def adds_up(self) -> None:
        """Those that leave go on whenever they can."""
        for task in self.leaving:
            while task.step():
                pass
            if task.error:
                raise task.error
        self.leaving = [task for task in self.leaving if not task.done]
        super().adds_up()

    adds_up = invariant()(adds_up)

    def check_processes(self) -> None:
        gone = sum(task.pending is not None for task in self.leaving)
        assert len(self.actors) <= len(self.machine.mem.mms) <= len(self.actors) + gone

    def finish_all(self) -> None:
        while self.tasks or self.leaving:
            moved = False
            for task in list(self.tasks):
                moved |= self.step(task)
                self.check_end(task)
            self.adds_up()
            assert moved or not self.tasks, "deadlock"

    def teardown(self) -> None:
        """All tasks end first."""
        self.finish_all()
        super().teardown()


@pytest.mark.parametrize("kind", [FileOperations, PausedFileCollapses])
def test_files_hold_what_was_written_whatever_happens(
    kind: type[FileOperations], model_steps: int
) -> None:
    """Any sequence of operations leaves every byte, count, lock and reference as it must be."""
    run_machine(kind, model_steps)
