"""Layouts of two 2 MiB blocks, made by the same calls on this kernel and in the model.

Run as a program, with the name of a layout, it makes the layout in its own address space, calls
MADV_COLLAPSE on it and prints what became of it as JSON.
"""

from __future__ import annotations

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

PAGE, NR, BLOCK = 4096, 512, 2 << 20
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, PAGEOUT, COLLAPSE = 4, 8, 14, 15, 21, 25


class Side(Protocol):
    """A process with two blocks mapped for reading and writing; all numbers are pages."""

    def write(self, first: int, nr: int) -> None: ...
    def read(self, first: int, nr: int) -> None: ...
    def madvise(self, first: int, nr: int, advice: int) -> None: ...
    def mprotect(self, first: int, nr: int, prot: int) -> None: ...
    def mlock(self, first: int, nr: int) -> None: ...
    def fork(self) -> None: ...
    def hold(self, page: int) -> None: ...
    def present(self) -> list[bool]: ...


def contents(page: int) -> bytes:
    """What `write` stores in a page: no two are alike."""
    return (page * 65537 + 1).to_bytes(8, "little") * (PAGE // 8)


def full(side: Side) -> None:
    side.write(0, NR)


def holes(side: Side) -> None:
    side.write(0, NR)
    side.madvise(100, 50, DONTNEED)
    side.madvise(511, 1, DONTNEED)


def untouched(side: Side) -> None:
    """No page, no anon_vma."""


def single_page(side: Side) -> None:
    side.write(7, 1)


def zero_pages_mixed(side: Side) -> None:
    side.read(0, NR)
    for page in range(0, NR, 5):
        side.write(page, 1)


def zero_pages_only(side: Side) -> None:
    side.write(NR, 1)  # the second block: the VMA has an anon_vma
    side.read(0, NR)


def read_only(side: Side) -> None:
    side.write(0, NR)
    side.mprotect(0, 2 * NR, PROT_READ)


def one_writable_page(side: Side) -> None:
    side.write(0, NR)
    side.mprotect(0, 2 * NR, PROT_READ)
    side.mprotect(0, 2 * NR, PROT_READ | PROT_WRITE)
    side.write(300, 1)


def forked(side: Side) -> None:
    side.write(0, NR)
    side.fork()


def forked_and_written(side: Side) -> None:
    side.write(0, NR)
    side.fork()
    side.write(200, 1)


def held_by_a_pipe(side: Side) -> None:
    side.write(0, NR)
    side.hold(9)


def first_held_by_a_pipe(side: Side) -> None:
    side.write(0, NR)
    side.hold(0)


def lazily_freed(side: Side) -> None:
    side.write(0, NR)
    side.madvise(0, 300, FREE)


def mlocked(side: Side) -> None:
    side.write(0, NR)
    side.mlock(0, 2 * NR)


def swapped_out(side: Side) -> None:
    side.write(0, NR)
    side.madvise(64, 64, PAGEOUT)


def mostly_swapped_out(side: Side) -> None:
    side.write(0, NR)
    side.madvise(0, 511, PAGEOUT)


def subpages_of_a_split_pmd(side: Side) -> None:
    side.madvise(0, 2 * NR, HUGEPAGE)
    side.write(0, NR)
    side.mprotect(5, 1, PROT_READ)
    side.mprotect(5, 1, PROT_READ | PROT_WRITE)


def subpages_with_a_hole(side: Side) -> None:
    side.madvise(0, 2 * NR, HUGEPAGE)
    side.write(0, NR)
    side.madvise(5, 1, DONTNEED)


def held_subpage(side: Side) -> None:
    subpages_with_a_hole(side)
    side.hold(77)


def huge_already(side: Side) -> None:
    side.madvise(0, 2 * NR, HUGEPAGE)
    side.write(0, NR)


def two_vmas_in_the_block(side: Side) -> None:
    side.write(0, NR)
    side.mprotect(100, 1, PROT_READ)


def refused_by_advice(side: Side) -> None:
    side.write(0, NR)
    side.madvise(0, 2 * NR, NOHUGEPAGE)


def empty_page_table(side: Side) -> None:
    side.write(0, NR)
    # In halves: since 6.14 a range that covers the block takes the page table along.
    side.madvise(0, NR // 2, DONTNEED)
    side.madvise(NR // 2, NR // 2, DONTNEED)


def emptied_by_its_block(side: Side) -> None:
    """Only the second block was ever touched."""
    side.write(NR, 1)


LAYOUTS: dict[str, Callable[[Side], None]] = {
    layout.__name__: layout
    for layout in (
        full,
        holes,
        untouched,
        single_page,
        zero_pages_mixed,
        zero_pages_only,
        read_only,
        one_writable_page,
        forked,
        forked_and_written,
        held_by_a_pipe,
        first_held_by_a_pipe,
        lazily_freed,
        mlocked,
        swapped_out,
        mostly_swapped_out,
        subpages_of_a_split_pmd,
        subpages_with_a_hole,
        held_subpage,
        huge_already,
        two_vmas_in_the_block,
        refused_by_advice,
        empty_page_table,
        emptied_by_its_block,
    )
}


class Host:
    """The layout in this very process."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._libc = libc
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for name in ("madvise", "mprotect"):
            getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        # Neighbours that nothing merges with.
        around = self._checked(libc.mmap(None, 4 * BLOCK, PROT_NONE, private, -1, 0))
        self.base = (around + BLOCK) & -BLOCK
        map_fixed = 0x10
        both = PROT_READ | PROT_WRITE
        self._checked(libc.mmap(self.base, 2 * BLOCK, both, private | map_fixed, -1, 0))
        self.children: list[int] = []

    def _checked(self, result: int) -> int:
        if result in (-1, ctypes.c_size_t(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def write(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            ctypes.memmove(self.base + page * PAGE, contents(page), PAGE)

    def read(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            ctypes.string_at(self.base + page * PAGE, 1)

    def madvise(self, first: int, nr: int, advice: int) -> None:
        self._checked(self._libc.madvise(self.base + first * PAGE, nr * PAGE, advice))

    def mprotect(self, first: int, nr: int, prot: int) -> None:
        self._checked(self._libc.mprotect(self.base + first * PAGE, nr * PAGE, prot))

    def mlock(self, first: int, nr: int) -> None:
        self._checked(self._libc.mlock(self.base + first * PAGE, nr * PAGE))

    def fork(self) -> None:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        self.children.append(child)

    def hold(self, page: int) -> None:
        _, end = self.pipe = os.pipe()
        vector = (ctypes.c_size_t * 2)(self.base + page * PAGE, PAGE)
        self._checked(self._libc.vmsplice(end, vector, 1, 0))

    def present(self) -> list[bool]:
        """Bit 63 of /proc/self/pagemap."""
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(self.base // PAGE * 8)
            words = pagemap.read(2 * NR * 8)
        return [bool(words[i * 8 + 7] & 0x80) for i in range(2 * NR)]

    def collapse(self) -> int:
        """MADV_COLLAPSE of the first block: errno."""
        if self._libc.madvise(self.base, BLOCK, COLLAPSE):
            return ctypes.get_errno()
        return 0

    def anon_huge_kilobytes(self) -> int:
        """AnonHugePages of the mappings that hold the blocks."""
        total, inside = 0, False
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                    start, end = (int(part, 16) for part in found.groups())
                    inside = start < self.base + 2 * BLOCK and end > self.base
                elif inside and line.startswith("AnonHugePages:"):
                    total += int(line.split()[1])
        return total

    def digest(self) -> str:
        """Of every byte; reads all pages in."""
        return hashlib.sha256(ctypes.string_at(self.base, 2 * BLOCK)).hexdigest()

    def end(self) -> None:
        """Let the children go."""
        for child in self.children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def outcome(side: Any, layout: str) -> dict[str, Any]:
    """Make a layout, collapse it, and say what can be seen of it."""
    LAYOUTS[layout](side)
    before = side.present()
    result = side.collapse()
    seen = {
        "errno": result,
        "anon_huge_kilobytes": side.anon_huge_kilobytes(),
        "present_before": before,
        "present_after": side.present(),
        "digest": side.digest(),
    }
    side.end()
    return seen


if __name__ == "__main__":
    json.dump({"pid": os.getpid()} | outcome(Host(), sys.argv[1]), sys.stdout)
