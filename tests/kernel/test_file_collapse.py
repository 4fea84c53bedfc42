"""MADV_COLLAPSE of a memfd's layouts: this kernel's, and the model's."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from collapse_kit import small_machine
from kernel import file_layouts, layouts
from kernel.file_layouts import DIFFERENT, SAME
from kernel.layouts import BLOCK, NR, PAGE
from kernel.test_collapse import Events, Model, parse

from pykhuge.machine import Machine


class FileModel(Model):
    """The layout in a process of the model."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.file = self.process.memfd_create("layout")
        self.process.ftruncate(self.file, 2 * BLOCK)
        self.map(0, shared=True)

    def pwrite(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            self.process.pwrite(self.file, page * PAGE, layouts.contents(page))

    def ftruncate(self, nr: int) -> None:
        self.process.ftruncate(self.file, nr * PAGE)

    def fallocate(self, first: int, nr: int) -> None:
        self.process.fallocate(self.file, first * PAGE, nr * PAGE)

    def punch(self, first: int, nr: int) -> None:
        where = (first * PAGE, nr * PAGE)
        self.process.fallocate(self.file, *where, punch_hole=True, keep_size=True)

    def map(self, offset: int, *, shared: bool) -> None:
        self.process.mmap(
            2 * BLOCK,
            addr=self.base,
            fixed=True,
            file=self.file,
            offset=offset * PAGE,
            shared=shared,
        )

    def map_again(self, offset: int) -> None:
        length = 2 * BLOCK - offset * PAGE
        args = {"file": self.file, "offset": offset * PAGE, "shared": True}
        self.process.read(self.process.mmap(length, **args), length)

    def child_reads(self, first: int, nr: int) -> None:
        self.children.append(self.process.fork())
        self.children[-1].read(self._at(first), nr * PAGE)

    def huge_kilobytes(self) -> int:
        return self.anon_huge_kilobytes()

    def size(self) -> int:
        return int(self.file.inode.i_size)

    def blocks(self) -> int:
        return int(self.file.inode.i_blocks)

    def mapped_bytes(self, length: int) -> bytes:
        return self.process.read(self.base, length)

    def file_bytes(self) -> bytes:
        return self.process.pread(self.file, 0, 2 * BLOCK)


def comparable(name: str, body: str, base: int, digits: int) -> tuple[str, dict[str, str]]:
    """An event without what is a host's own; `addr`, in base 10 or 16, from the mapping's start.

    `hpage_pfn` and `nr` are filled in elsewhere since 6.4.
    """
    name, fields = parse(name, body)
    if name == "mm_khugepaged_collapse_file":
        del fields["hpage_pfn"], fields["nr"]
        fields["addr"] = str(int(fields["addr"], digits) - base)
    return name, fields


def collapse_here(layout: str, trace: Path) -> tuple[dict[str, Any], Events]:
    """What this kernel makes of a layout."""
    command = [sys.executable, str(Path(file_layouts.__file__)), layout]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    line = re.compile(rf"-{seen.pop('pid')}\s.*?: (mm_\w+): (.*)")
    found = [match for match in map(line.search, trace.read_text().splitlines()) if match]
    base = seen.pop("base")
    return seen, [comparable(match[1], match[2], base, 16) for match in found]


def collapse_in_model(layout: str) -> tuple[dict[str, Any], Events]:
    """What the model makes of it."""
    machine = small_machine("64M", swap="8M")
    side = FileModel(machine)
    seen = file_layouts.outcome(side, layout)
    machine.audit()
    records = [(record.event.name, record.event.body()) for record in machine.trace]
    return seen, [comparable(name, body, side.base, 10) for name, body in records]


def as_since_6_6(events: Events) -> Events:
    """What a cache that has become huge reads like where retract_page_tables returns nothing.

    MADV_COLLAPSE installs the PMD afterwards, whatever became of the page tables: both events of
    the collapse then end in SCAN_PTE_MAPPED_HUGEPAGE.
    """
    seen: Events = []
    huge = False
    for name, fields in events:
        if name == "mm_khugepaged_collapse_file":
            huge = fields["index"] == str(NR)
        seen.append((name, fields | {"result": "pte_mapped_hugepage"} if huge else fields))
    return seen


@pytest.mark.usefixtures("thp")
@pytest.mark.parametrize("layout", SAME)
def test_collapse_of_a_memfd_ends_as_in_the_running_kernel(
    layout: str, huge_memory_trace: Path, kernel_version: tuple[int, int]
) -> None:
    """Errno, ShmemPmdMapped, st_blocks, present bits, all bytes and the trace are this kernel's."""
    host, host_trace = collapse_here(layout, huge_memory_trace)
    model, model_trace = collapse_in_model(layout)
    assert model == host
    if kernel_version >= (6, 6):
        model_trace = as_since_6_6(model_trace)
    assert model_trace == host_trace


class Difference(NamedTuple):
    """A row of the table of later kernels: since when, what it says, and how the series ends."""

    since: tuple[int, int]
    row: str
    errno: int
    pages_unmapped: int
    result: str


KNOWN = {
    "no_page_table": Difference(
        (6, 6), "shmem populated, this mm has no page table there", errno.EINVAL, 0, "pmd_null"
    ),
    "private_with_a_copy_elsewhere": Difference(
        (6, 6),
        "private file VMA with anon_vma, no CoW page in the block",
        errno.EINVAL,
        NR,
        "failed",
    ),
    # The series unmaps the 64 pages before the first one swapped in, and leaves them unmapped.
    "swapped_out": Difference(
        (6, 4), "shmem page swapped out", errno.EAGAIN, 64, "could_not_delete_page_from_lru"
    ),
}


@pytest.mark.usefixtures("thp")
@pytest.mark.parametrize("layout", DIFFERENT)
def test_collapse_of_a_memfd_fails_where_later_kernels_map_a_huge_page(
    layout: str,
    huge_memory_trace: Path,
    kernel_version: tuple[int, int],
    request: pytest.FixtureRequest,
) -> None:
    """The known rows, and no other way: later kernels have all 512 pages mapped, the series fails.

    No byte, no block of the file and no event but for its index and result differs.
    """
    known = KNOWN[layout]
    if kernel_version < known.since:
        pytest.skip(f"this kernel is older than Linux {known.since}, where the difference begins")
    if "swapped" in layout:
        request.getfixturevalue("swap")
    host, host_trace = collapse_here(layout, huge_memory_trace)
    model, model_trace = collapse_in_model(layout)
    assert (model.pop("errno"), host.pop("errno")) == (known.errno, 0), known.row
    assert (model.pop("huge_kilobytes"), host.pop("huge_kilobytes")) == (0, 2048)
    before, after = model["present_before"], model.pop("present_after")
    assert sum(before[:NR]) - sum(after[:NR]) == known.pages_unmapped
    assert after[NR:] == before[NR:]
    assert host.pop("present_after") == [True] * NR + before[NR:]
    assert model == host
    results = [fields.pop("result") for _, fields in model_trace + host_trace]
    assert results == [known.result] * 2 + ["pte_mapped_hugepage"] * 2
    index, there = model_trace[0][1].pop("index"), host_trace[0][1].pop("index")
    assert (index, there) == ("64" if layout == "swapped_out" else str(NR), str(NR))
    assert model_trace == host_trace
