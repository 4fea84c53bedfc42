"""Layouts of a memfd of two 2 MiB blocks and of its mapping, here and in the model.

Run as a program, with the name of a layout, it makes the layout in its own address space, calls
MADV_COLLAPSE on the first block and prints what became of it as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kernel.layouts import (
    BLOCK,
    DONTNEED,
    NR,
    PAGE,
    PAGEOUT,
    PROT_READ,
    PROT_WRITE,
    Host,
    contents,
)

KEEP_SIZE, PUNCH_HOLE = 1, 2


class FileSide(Protocol):
    """A process with an empty memfd of two blocks, mapped shared; all numbers are pages."""

    def write(self, first: int, nr: int) -> None: ...
    def read(self, first: int, nr: int) -> None: ...
    def madvise(self, first: int, nr: int, advice: int) -> None: ...
    def mprotect(self, first: int, nr: int, prot: int) -> None: ...
    def pwrite(self, first: int, nr: int) -> None: ...
    def ftruncate(self, nr: int) -> None: ...
    def fallocate(self, first: int, nr: int) -> None: ...
    def punch(self, first: int, nr: int) -> None: ...
    def map(self, offset: int, *, shared: bool) -> None:
        """Replace the mapping."""

    def map_again(self, offset: int) -> None:
        """Map the file from `offset` on somewhere else too, and read all there is."""

    def child_reads(self, first: int, nr: int) -> None:
        """A forked child reads pages through the mapping, and stays."""

    def collapse(self) -> int: ...


def full(side: FileSide) -> None:
    side.write(0, NR)


def both_blocks_full(side: FileSide) -> None:
    side.write(0, 2 * NR)


def read_only(side: FileSide) -> None:
    side.write(0, NR)
    side.mprotect(0, 2 * NR, PROT_READ)


def holes(side: FileSide) -> None:
    for page in range(3, NR - 3, 7):
        side.write(page, 5)


def first_and_last(side: FileSide) -> None:
    side.write(0, 1)
    side.write(NR - 1, 1)


def single_page(side: FileSide) -> None:
    side.write(300, 1)


def cached_but_not_all_mapped(side: FileSide) -> None:
    side.pwrite(0, NR)
    side.write(40, 1)


def unmapped_in_part(side: FileSide) -> None:
    side.write(0, NR)
    side.madvise(100, 200, DONTNEED)


def empty_extent(side: FileSide) -> None:
    side.write(NR, 1)


def untouched(side: FileSide) -> None:
    """No page, no page table."""


def two_processes(side: FileSide) -> None:
    side.write(0, NR)
    side.child_reads(0, NR)


def mapped_at_another_offset(side: FileSide) -> None:
    side.write(0, 2 * NR)
    side.map_again(1)


def mapped_everywhere(side: FileSide) -> None:
    side.write(0, NR)
    side.write(NR, NR)
    side.map_again(0)
    side.map_again(NR // 2)
    side.child_reads(0, NR)


def huge_already(side: FileSide) -> None:
    side.write(0, NR)
    assert side.collapse() == 0


def mapped_from_an_odd_page(side: FileSide) -> None:
    side.pwrite(0, 2 * NR)
    side.map(1, shared=True)
    side.write(0, NR)


def truncated(side: FileSide) -> None:
    side.write(0, 2 * NR)
    side.ftruncate(300)


def truncated_and_longer_again(side: FileSide) -> None:
    side.write(0, 2 * NR)
    side.ftruncate(300)
    side.ftruncate(2 * NR)


def truncated_to_nothing(side: FileSide) -> None:
    side.write(0, 2 * NR)
    side.ftruncate(0)


def punched(side: FileSide) -> None:
    side.write(0, NR)
    side.punch(0, 1)
    side.punch(200, 77)


def fallocated(side: FileSide) -> None:
    side.fallocate(0, NR)
    side.write(10, 1)


def fallocated_in_part(side: FileSide) -> None:
    side.write(0, 100)
    side.fallocate(50, 300)


def private_with_a_copy_in_the_block(side: FileSide) -> None:
    side.pwrite(0, NR)
    side.map(0, shared=False)
    side.read(0, NR)
    side.write(77, 1)


def private_and_read(side: FileSide) -> None:
    side.pwrite(0, NR)
    side.map(0, shared=False)
    side.read(0, NR)


def no_page_table(side: FileSide) -> None:
    side.pwrite(0, NR)


def private_with_a_copy_elsewhere(side: FileSide) -> None:
    side.pwrite(0, 2 * NR)
    side.map(0, shared=False)
    side.read(0, NR)
    side.write(NR, 1)


def swapped_out(side: FileSide) -> None:
    side.write(0, NR)
    side.madvise(64, 64, PAGEOUT)


def named(*layouts: Callable[[FileSide], None]) -> dict[str, Callable[[FileSide], None]]:
    return {layout.__name__: layout for layout in layouts}


SAME = named(
    full,
    both_blocks_full,
    read_only,
    holes,
    first_and_last,
    single_page,
    cached_but_not_all_mapped,
    unmapped_in_part,
    empty_extent,
    untouched,
    two_processes,
    mapped_at_another_offset,
    mapped_everywhere,
    huge_already,
    mapped_from_an_odd_page,
    truncated,
    truncated_and_longer_again,
    truncated_to_nothing,
    punched,
    fallocated,
    fallocated_in_part,
    private_with_a_copy_in_the_block,
    private_and_read,
)
DIFFERENT = named(no_page_table, private_with_a_copy_elsewhere, swapped_out)


class FileHost(Host):
    """The layout in this very process."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("layout")
        os.ftruncate(self.fd, 2 * BLOCK)
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        self.map(0, shared=True)

    def pwrite(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            os.pwrite(self.fd, contents(page), page * PAGE)

    def ftruncate(self, nr: int) -> None:
        os.ftruncate(self.fd, nr * PAGE)

    def _fallocate(self, mode: int, first: int, nr: int) -> None:
        self._checked(self._libc.fallocate(self.fd, mode, first * PAGE, nr * PAGE))

    def fallocate(self, first: int, nr: int) -> None:
        self._fallocate(0, first, nr)

    def punch(self, first: int, nr: int) -> None:
        self._fallocate(PUNCH_HOLE | KEEP_SIZE, first, nr)

    def map(self, offset: int, *, shared: bool) -> None:
        map_fixed, both = 0x10, PROT_READ | PROT_WRITE
        flags = map_fixed | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        at = offset * PAGE
        self._checked(self._libc.mmap(self.base, 2 * BLOCK, both, flags, self.fd, at))

    def map_again(self, offset: int) -> None:
        length = 2 * BLOCK - offset * PAGE
        args = (None, length, PROT_READ, mmap.MAP_SHARED, self.fd, offset * PAGE)
        ctypes.string_at(self._checked(self._libc.mmap(*args)), length)

    def child_reads(self, first: int, nr: int) -> None:
        ready, done = os.pipe()
        child = os.fork()
        if not child:
            self.read(first, nr)
            os.write(done, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        self.children.append(child)

    def huge_kilobytes(self) -> int:
        """ShmemPmdMapped of the mapping at the base."""
        total, inside = 0, False
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                    start, end = (int(part, 16) for part in found.groups())
                    inside = start < self.base + 2 * BLOCK and end > self.base
                elif inside and line.startswith("ShmemPmdMapped:"):
                    total += int(line.split()[1])
        return total

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def blocks(self) -> int:
        return os.fstat(self.fd).st_blocks

    def mapped_bytes(self, length: int) -> bytes:
        return ctypes.string_at(self.base, length)

    def file_bytes(self) -> bytes:
        return os.pread(self.fd, 2 * BLOCK, 0)


def outcome(side: Any, layout: str) -> dict[str, Any]:
    """Make a layout, collapse it, and say what can be seen of it."""
    try:
        (SAME | DIFFERENT)[layout](side)
        before = side.present()
        seen = {
            "blocks_before": side.blocks(),
            "errno": side.collapse(),
            "huge_kilobytes": side.huge_kilobytes(),
            "blocks_after": side.blocks(),
            "size": side.size(),
            "present_before": before,
            "present_after": side.present(),
        }
        # What is mapped of an odd page on ends a page early in the file.
        length = min(side.size(), BLOCK)
        seen["mapping"] = hashlib.sha256(side.mapped_bytes(length)).hexdigest()
        seen["file"] = hashlib.sha256(side.file_bytes()).hexdigest()
        return seen
    finally:
        with contextlib.suppress(ProcessLookupError):
            side.end()


if __name__ == "__main__":
    host = FileHost()
    head = {"pid": os.getpid(), "base": host.base}
    json.dump(head | outcome(host, sys.argv[1]), sys.stdout)
