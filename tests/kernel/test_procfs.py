"""What /proc says of a layout and of its pages: this kernel's, and the model's."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from collapse_kit import small_machine
from kernel import proc_views
from kernel.layouts import BLOCK, NR, PAGE, PROT_READ
from kernel.test_collapse import Model
from kernel.test_file_collapse import FileModel

from pykhuge.procfs import Kpf

COLLAPSED = ("full", "holes", "zero_pages_mixed", "lazily_freed", "mlocked")
FILES_COLLAPSED = ("full", "holes", "two_processes", "mapped_everywhere")
KINDS = [
    *[("anon", layout) for layout in proc_views.ANON],
    *[("anon", f"{layout}+collapse") for layout in COLLAPSED],
    *[("memfd", layout) for layout in proc_views.MEMFD],
    *[("memfd", f"{layout}+collapse") for layout in FILES_COLLAPSED],
]

# Lines of smaps that v6.4 has not: KSM is of 6.6, ProtectionKey of CPUs that have such keys.
LATER_LINES = {"KSM", "ProtectionKey"}
PM_MMAP_EXCLUSIVE, PM_UFFD_WP = 1 << 56, 1 << 57
PM_FILE, PM_SWAP, PM_PRESENT = 1 << 61, 1 << 62, 1 << 63
PM_FLAGS = PM_MMAP_EXCLUSIVE | PM_UFFD_WP | PM_FILE | PM_SWAP | PM_PRESENT
# What depends on what reclaim has seen of a page.
HISTORY = Kpf.KPF_ACTIVE | Kpf.KPF_REFERENCED | (1 << 25)  # KPF_IDLE
# Since 6.10 a tail shows its folio's flags; these it shows at v6.4 too.
OF_TAILS = Kpf.KPF_COMPOUND_TAIL | Kpf.KPF_THP | Kpf.KPF_MMAP | Kpf.KPF_ANON
Views = dict[str, Any]


def here(kind: str, layout: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(proc_views.__file__)), kind, layout]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def in_model(kind: str, layout: str) -> dict[str, Any]:
    machine = small_machine("64M", swap="8M")
    side = Model(machine) if kind == "anon" else FileModel(machine)
    name, _, collapse = layout.partition("+")
    (proc_views.ANON if kind == "anon" else proc_views.MEMFD)[name](side)
    if collapse:
        assert side.collapse() == 0
    machine.lru_add_drain_all()
    machine.audit()
    procfs, pid, end = machine.procfs, side.process.pid, side.base + 2 * BLOCK
    seen: dict[str, Any] = {
        view: proc_views.mappings(procfs[f"{pid}/{view}"], side.base, end)
        for view in ("maps", "smaps")
    }
    seen["base"] = side.base
    seen["pagemap"] = procfs.pagemap(side.process, side.base, 2 * BLOCK).tolist()
    for view, read in (("kpageflags", procfs.kpageflags), ("kpagecount", procfs.kpagecount)):
        seen[view] = [
            int(read(word & proc_views.PFN, 1)[0]) if word & PM_PRESENT else None
            for word in seen["pagemap"]
        ]
    blocks = (side.process.is_huge(side.base), side.process.is_huge(side.base + BLOCK))
    other = kind == "memfd" or layout == "huge_zero_page"
    seen["huge_not_anon"] = [other and blocks[page // NR] for page in range(2 * NR)]
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


def fields(part: str, *, aligned: bool = False) -> list[tuple[str, str]]:
    """Names and text of the lines of a VMA in smaps; THPeligible `aligned`, as since 6.6."""
    pairs = [line.partition(":")[::2] for line in part.splitlines()[1:]]
    return [
        (name, f"{text.strip():>12}" if aligned and name == "THPeligible" else text)
        for name, text in pairs
        if name not in LATER_LINES
    ]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, str], tuple[Views, Views]]:
    return {}


@pytest.fixture(params=KINDS, ids="-".join)
def both(
    request: pytest.FixtureRequest, seen: dict[tuple[str, str], tuple[Views, Views]]
) -> tuple[Views, Views]:
    """The views of a layout: the running kernel's, the model's."""
    kind, layout = request.param
    request.getfixturevalue("thp")
    if "swapped" in layout:
        request.getfixturevalue("swap")
    if request.param not in seen:
        seen[request.param] = here(kind, layout), in_model(kind, layout)
    return seen[request.param]


def test_maps_reads_as_in_the_running_kernel(both: tuple[Views, Views]) -> None:
    """VMAs, permissions, offsets, devices and paths, each in its column."""
    host, model = both
    assert relative(model["maps"], model["base"]) == relative(host["maps"], host["base"])


def test_smaps_reads_as_in_the_running_kernel(
    both: tuple[Views, Views], kernel_version: tuple[int, int]
) -> None:
    """Names, order, columns and values of all lines of v6.4."""
    host, model = both
    for expected, got in zip(host["smaps"], model["smaps"], strict=True):
        assert fields(got, aligned=kernel_version >= (6, 6)) == fields(expected)


def test_smaps_rollup_has_the_lines_of_the_running_kernel(both: tuple[Views, Views]) -> None:
    """The same names in the same order under a line of the same form."""
    host, model = (side["smaps_rollup"] for side in both)
    assert [name for name, _ in fields(model)] == [name for name, _ in fields(host)]
    assert re.sub("^.*? ", "", model.splitlines()[0]) == re.sub("^.*? ", "", host.splitlines()[0])


def test_pagemap_flags_are_those_of_the_running_kernel(
    both: tuple[Views, Views], kernel_version: tuple[int, int]
) -> None:
    """Present, swapped, of a file, mapped once, page by page."""
    host, model = ([word & PM_FLAGS for word in side["pagemap"]] for side in both)
    if kernel_version >= (6, 11):
        # Since then PM_FILE is set for what a PMD maps too, and so for the huge zero page.
        model = [
            word | PM_FILE if huge else word
            for word, huge in zip(model, both[1]["huge_not_anon"], strict=True)
        ]
    assert model == host


def test_kpageflags_and_kpagecount_are_those_of_the_running_kernel(
    both: tuple[Views, Views], kernel_version: tuple[int, int]
) -> None:
    """What depends on a page's history is left out."""
    host, model = ([shown(word, kernel_version) for word in side["kpageflags"]] for side in both)
    assert model == host
    assert both[1]["kpagecount"] == both[0]["kpagecount"]


def shown(word: int | None, kernel_version: tuple[int, int]) -> Kpf | None:
    if word is None:
        return None
    later = kernel_version >= (6, 10) and word & Kpf.KPF_COMPOUND_TAIL
    return Kpf(word & (OF_TAILS if later else ~HISTORY))


def test_maps_of_a_file_reads_as_in_the_running_kernel(tmp_path: Path) -> None:
    """Device, inode number and path, letter for letter."""
    path = tmp_path / "text"
    path.write_bytes(b"x" * (3 * PAGE))
    with path.open("rb") as file:
        args = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ, "offset": PAGE}
        mapping = mmap.mmap(file.fileno(), 2 * PAGE, **args)
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapping.close()
    host = next(line for line in lines if line.endswith(str(path)))
    machine = small_machine("64M")
    process = machine.process()
    start = int(host.partition("-")[0], 16)
    process.mmap(
        2 * PAGE, addr=start, fixed=True, file=process.open(str(path)), offset=PAGE, prot=PROT_READ
    )
    assert machine.procfs[f"{process.pid}/maps"] == host + "\n"
    machine.audit()


@pytest.mark.usefixtures("thp")
def test_meminfo_has_lines_of_the_running_kernel() -> None:
    """Names in the kernel's order, numbers in its columns."""
    host, model = (side("anon", "full")["meminfo"].splitlines() for side in (here, in_model))
    found = {line.partition(":")[0]: line for line in host}
    # A kernel without CONFIG_MEMORY_FAILURE has no line of it.
    if "HardwareCorrupted" not in found:
        model = [line for line in model if not line.startswith("HardwareCorrupted:")]
    names = [line.partition(":")[0] for line in model]
    assert names == [name for name in found if name in names]
    for line in model:
        assert len(line) == len(found[line.partition(":")[0]])
