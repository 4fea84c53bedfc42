"""MADV_COLLAPSE of anonymous layouts: this kernel's, and the model's."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from collapse_kit import small_machine
from kernel import layouts
from kernel.layouts import BLOCK, LAYOUTS, NR, PAGE

from pykhuge.khugepaged.scan_result import CollapseError
from pykhuge.machine import Machine
from pykhuge.process import Process

Events = list[tuple[str, dict[str, str]]]


class Model:
    """The layout in a process of the model."""

    def __init__(self, machine: Machine) -> None:
        self.process: Process = machine.process("model")
        self.base = self.process.mmap(2 * BLOCK)
        self.children: list[Process] = []

    def _at(self, page: int) -> int:
        return self.base + page * PAGE

    def write(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            self.process.write(self._at(page), layouts.contents(page))

    def read(self, first: int, nr: int) -> None:
        for page in range(first, first + nr):
            self.process.read(self._at(page), 1)

    def madvise(self, first: int, nr: int, advice: int) -> None:
        self.process.madvise(self._at(first), nr * PAGE, advice)

    def mprotect(self, first: int, nr: int, prot: int) -> None:
        self.process.mprotect(self._at(first), nr * PAGE, prot)

    def mlock(self, first: int, nr: int) -> None:
        self.process.mlock(self._at(first), nr * PAGE)

    def fork(self) -> None:
        self.children.append(self.process.fork())

    def hold(self, page: int) -> None:
        self.process.get(self._at(page), PAGE)

    def present(self) -> list[bool]:
        return [self.process.pfn(self._at(page)) is not None for page in range(2 * NR)]

    def collapse(self) -> int:
        try:
            self.process.madvise(self.base, BLOCK, layouts.COLLAPSE)
        except CollapseError as error:
            return int(error.errno or 0)
        return 0

    def anon_huge_kilobytes(self) -> int:
        return sum(2048 for block in (0, NR) if self.process.is_huge(self._at(block)))

    def digest(self) -> str:
        return hashlib.sha256(self.process.read(self.base, 2 * BLOCK)).hexdigest()

    def end(self) -> None: ...


class Difference(NamedTuple):
    """Where a later kernel is known to differ from the series: since when, and what it says."""

    since: tuple[int, int]
    row: str
    errno: int


# Rows of the table of later kernels: 6.18 has no SCAN_PAGE_RO.
NO_PAGE_RO = Difference((6, 18), "table present, no writable PTE (or only none/zero)", 0)
KNOWN = {
    "read_only": NO_PAGE_RO,
    "zero_pages_only": NO_PAGE_RO,
    "empty_page_table": NO_PAGE_RO,
    "forked": NO_PAGE_RO,
}


def parse(name: str, body: str) -> tuple[str, dict[str, str]]:
    """An event without what differs from host to host: mm, the frame (but for -1), `writable`."""
    fields = dict(re.findall(r"(\w+)=([^,\s]+)", body))
    fields.pop("mm", None)
    fields.pop("writable", None)
    if "scan_pfn" in fields:
        fields["scan_pfn"] = "none" if fields["scan_pfn"] == f"{(1 << 64) - 1:#x}" else "some"
    return name, fields


def host_events(trace: Path, pid: int) -> Events:
    """The events that `pid` caused."""
    line = re.compile(rf"-{pid}\s.*?: (mm_\w+): (.*)")
    lines = trace.read_text().splitlines()
    return [parse(*found.groups()) for found in map(line.search, lines) if found]


def model_events(machine: Machine) -> Events:
    return [parse(record.event.name, record.event.body()) for record in machine.trace]


def collapse_here(layout: str, trace: Path) -> tuple[dict[str, Any], Events]:
    """What this kernel makes of a layout."""
    command = [sys.executable, str(Path(layouts.__file__)), layout]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return seen, host_events(trace, seen.pop("pid"))


def collapse_in_model(layout: str) -> tuple[dict[str, Any], Events]:
    """What the model makes of it."""
    machine = small_machine("64M", swap="8M")
    seen = layouts.outcome(Model(machine), layout)
    machine.audit()
    return seen, model_events(machine)


@pytest.mark.usefixtures("thp")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_collapse_of_a_layout_ends_as_in_the_running_kernel(
    layout: str,
    huge_memory_trace: Path,
    kernel_version: tuple[int, int],
    request: pytest.FixtureRequest,
) -> None:
    """Errno, AnonHugePages, present bits, bytes and trace events are this kernel's."""
    if "swapped" in layout:
        request.getfixturevalue("swap")
    host, host_trace = collapse_here(layout, huge_memory_trace)
    model, model_trace = collapse_in_model(layout)
    assert model["digest"] == host["digest"]
    assert model["present_before"] == host["present_before"]
    known = KNOWN.get(layout)
    if known is not None and kernel_version >= known.since:
        assert (model["errno"], host["errno"]) == (errno.EINVAL, known.errno), known.row
        assert model["present_after"] == model["present_before"]
        assert model["anon_huge_kilobytes"] == 0
        assert model_trace[-1][1]["status"] == "no_writable_page"
        assert host_trace[-1][1]["status"] == "succeeded"
        # The loop itself has met the same.
        for field in ("scan_pfn", "referenced", "none_or_zero", "unmapped"):
            assert model_trace[-1][1][field] == host_trace[-1][1][field]
        return
    assert model == host
    assert model_trace == host_trace
