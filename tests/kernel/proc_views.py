"""What /proc of the running kernel says of a layout.

Run as a program, with a kind and the name of a layout, it makes the layout in its own address
space and prints what stands in /proc of it as JSON. "+collapse" behind the name collapses its
first block before.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kernel import file_layouts
from kernel.layouts import BLOCK, COLLAPSE, DONTNEED, HUGEPAGE, LAYOUTS, NR, PAGE, Host, Side

PFN = (1 << 55) - 1
PRESENT = 1 << 63


def huge_and_forked(side: Side) -> None:
    side.madvise(0, 2 * NR, HUGEPAGE)
    side.write(0, NR)
    side.fork()


def huge_zero_page(side: Side) -> None:
    side.madvise(0, 2 * NR, HUGEPAGE)
    side.read(0, 1)


def huge_forked_and_split(side: Side) -> None:
    huge_and_forked(side)
    side.madvise(5, 1, DONTNEED)


ANON: dict[str, Callable[..., None]] = LAYOUTS | {
    layout.__name__: layout for layout in (huge_and_forked, huge_zero_page, huge_forked_and_split)
}
MEMFD: dict[str, Callable[..., None]] = file_layouts.SAME | file_layouts.DIFFERENT


def words(path: str, first: int, nr: int) -> tuple[int, ...]:
    with open(path, "rb") as file:
        file.seek(first * 8)
        return struct.unpack(f"{nr}Q", file.read(nr * 8))


def mappings(text: str, start: int, end: int) -> list[str]:
    """The parts of maps or smaps, a VMA each, that lie in [start, end)."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]
    return [part for part in parts if start <= int(part.partition("-")[0], 16) < end]


def drain_batches() -> None:
    """MADV_COLLAPSE first drains the LRU batches of all CPUs."""
    scratch = mmap.mmap(-1, 2 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for block in (0, BLOCK):
        scratch[block] = 1
    with contextlib.suppress(OSError):
        scratch.madvise(COLLAPSE)
    scratch.close()


def views(base: int) -> dict[str, object]:
    """Of the two blocks at `base`."""
    seen: dict[str, object] = {"base": base}
    for name in ("maps", "smaps"):
        with open(f"/proc/self/{name}") as file:
            seen[name] = mappings(file.read(), base, base + 2 * BLOCK)
    seen["pagemap"] = pagemap = words("/proc/self/pagemap", base // PAGE, 2 * NR)
    for name in ("kpageflags", "kpagecount"):
        present = (word & PFN if word & PRESENT else None for word in pagemap)
        seen[name] = [None if pfn is None else words(f"/proc/{name}", pfn, 1)[0] for pfn in present]
    with open("/proc/meminfo") as file:
        seen["meminfo"] = file.read()
    with open("/proc/self/smaps_rollup") as file:
        seen["smaps_rollup"] = file.read()
    return seen


def main(kind: str, layout: str) -> None:
    side: Host = Host() if kind == "anon" else file_layouts.FileHost()
    name, _, collapse = layout.partition("+")
    try:
        (ANON if kind == "anon" else MEMFD)[name](side)
        if collapse:
            assert side.collapse() == 0
        drain_batches()
        json.dump(views(side.base), sys.stdout)
    finally:
        side.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
