"""/proc/pid/{maps,smaps,pagemap} and the pages' flags of layouts: this kernel's, and the model's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import small_machine
from kernel import file_layouts, layouts, proc_views
from kernel.layouts import BLOCK
from kernel.test_collapse import Model
from kernel.test_file_collapse import FileModel

from pykhuge.procfs import Kpf

COLLAPSED = ("full", "holes", "zero_pages_mixed", "lazily_freed", "mlocked")
FILES_COLLAPSED = ("full", "holes", "two_processes", "mapped_everywhere")
KINDS = [
    *[("anon", layout) for layout in layouts.LAYOUTS],
    *[("anon", f"{layout}+collapse") for layout in COLLAPSED],
    *[("memfd", layout) for layout in file_layouts.SAME | file_layouts.DIFFERENT],
    *[("memfd", f"{layout}+collapse") for layout in FILES_COLLAPSED],
]

# Lines of smaps that v6.4 has not: KSM is of 6.6, ProtectionKey of CPUs that have such keys.
LATER_LINES = {"KSM", "ProtectionKey"}
PM_MMAP_EXCLUSIVE, PM_UFFD_WP = 1 << 56, 1 << 57
PM_FILE, PM_SWAP, PM_PRESENT = 1 << 61, 1 << 62, 1 << 63
PM_FLAGS = PM_MMAP_EXCLUSIVE | PM_UFFD_WP | PM_FILE | PM_SWAP | PM_PRESENT
# What depends on which CPU's batch a page is in, and on what reclaim has seen of it.
HISTORY = Kpf.KPF_LRU | Kpf.KPF_ACTIVE | Kpf.KPF_REFERENCED | (1 << 25)


def here(kind: str, layout: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(proc_views.__file__)), kind, layout]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def in_model(kind: str, layout: str) -> dict[str, Any]:
    machine = small_machine("64M", swap="8M")
    side = Model(machine) if kind == "anon" else FileModel(machine)
    name, _, collapse = layout.partition("+")
    named: Any = layouts.LAYOUTS if kind == "anon" else file_layouts.SAME | file_layouts.DIFFERENT
    named[name](side)
    if collapse:
        assert side.collapse() == 0
    machine.audit()
    procfs, pid, end = machine.procfs, side.process.pid, side.base + 2 * BLOCK
    seen: dict[str, Any] = {
        view: proc_views.mappings(procfs[f"{pid}/{view}"], side.base, end)
        for view in ("maps", "smaps")
    }
    seen["base"] = side.base
    seen["pagemap"] = procfs.pagemap(side.process, side.base, 2 * BLOCK).tolist()
    present = [word & PM_PRESENT and word & proc_views.PFN for word in seen["pagemap"]]
    for view, read in (("kpageflags", procfs.kpageflags), ("kpagecount", procfs.kpagecount)):
        seen[view] = [
            int(read(pfn, 1)[0]) if word & PM_PRESENT else None
            for pfn, word in zip(present, seen["pagemap"], strict=True)
        ]
    seen["smaps_rollup"] = procfs[f"{pid}/smaps_rollup"]
    seen["meminfo"] = procfs["meminfo"]
    return seen


def relative(lines: list[str], base: int) -> list[tuple[int, int, str, str]]:
    """Lines of maps: where from `base` on, what follows, and the path where it begins.

    Inode numbers are replaced by blanks; they leave the path where it was.
    """
    found = []
    for line in lines:
        start, end, what, inode, path = re.fullmatch(
            r"(\w+)-(\w+) (.{4} \w{8} [0-9a-f]{2}:[0-9a-f]{2}) (\d+)( .*)\n", line
        ).groups()  # type: ignore[union-attr]
        width = len(path) - len(path.lstrip()) + len(inode) + len(start) + len(end) if path else 0
        found.append((int(start, 16) - base, int(end, 16) - base, what, width, path.strip()))
    return found


def fields(part: str) -> list[tuple[str, str]]:
    """Names and text of the lines of one VMA in smaps."""
    pairs = [line.partition(":")[::2] for line in part.splitlines()[1:]]
    return [(name, text) for name, text in pairs if name not in LATER_LINES]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    return {}


@pytest.fixture(params=KINDS, ids="-".join)
def both(
    request: pytest.FixtureRequest,
    thp: None,
    seen: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """This kernel's views of a layout, and the model's."""
    kind, layout = request.param
    if "swapped" in layout:
        request.getfixturevalue("swap")
    if request.param not in seen:
        seen[request.param] = here(kind, layout), in_model(kind, layout)
    return seen[request.param]


def test_maps_reads_as_in_the_running_kernel(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """VMAs, permissions, offsets, devices and paths, each in its column."""
    host, model = both
    assert relative(model["maps"], model["base"]) == relative(host["maps"], host["base"])


def test_smaps_reads_as_in_the_running_kernel(
    both: tuple[dict[str, Any], dict[str, Any]], kernel_version: tuple[int, int]
) -> None:
    """Names, order, columns and values of all lines of v6.4."""
    host, model = both
    for here, there in zip(host["smaps"], model["smaps"], strict=True):
        expected, got = fields(here), fields(there)
        if kernel_version >= (6, 6):  # aligned since then
            got = [
                (name, f"{text.strip():>16}" if name == "THPeligible" else text)
                for name, text in got
            ]
        assert got == expected


def test_pagemap_flags_are_those_of_the_running_kernel(
    both: tuple[dict[str, Any], dict[str, Any]], kernel_version: tuple[int, int]
) -> None:
    """Present, swapped, of a file, mapped once, page by page."""
    host, model = both
    expected, got = ([word & PM_FLAGS for word in side["pagemap"]] for side in both)
    assert got == expected


def test_kpageflags_and_kpagecount_are_those_of_the_running_kernel(
    both: tuple[dict[str, Any], dict[str, Any]], kernel_version: tuple[int, int]
) -> None:
    """What depends on a page's history is left out."""
    host, model = both
    flags = [
        [None if word is None else Kpf(word & ~HISTORY) for word in side["kpageflags"]]
        for side in both
    ]
    assert flags[1] == flags[0]
    assert model["kpagecount"] == host["kpagecount"]
