"""The daemon at work on memory that cannot collapse: page-table entries looked at a second.

Beside it, on the same page tables, what one would write instead: numpy masks over a table, and a
plain loop. Both look at the entries alone, the daemon at the struct pages behind them, too, and it
prints its trace.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pykhuge import Advice, Machine, Process
from pykhuge.mm.page_table import PAGE_ACCESSED, PAGE_PRESENT, PAGE_RW, PAGE_UFFD_WP, pte_pfn
from pykhuge.mm.rmap import pmd_of

HPAGE_PMD_SIZE = 2 << 20
PAGE_SIZE = 4096
NR_BLOCKS = 256
ROUNDS = 20

Scene = tuple[Machine, Process, int]


def scene(fill: Callable[[Process, int], None], **knobs: int) -> Scene:
    """`NR_BLOCKS` blocks, each filled by `fill`; one turn of the daemon scans them all."""
    machine = Machine("2G")
    process = machine.process("app")
    addr = process.mmap(NR_BLOCKS * HPAGE_PMD_SIZE)
    machine.thp.enabled = "never"
    for block in range(NR_BLOCKS):
        fill(process, addr + block * HPAGE_PMD_SIZE)
    machine.thp.enabled = "madvise"
    process.madvise(addr, NR_BLOCKS * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    for name, value in knobs.items():
        setattr(machine.khugepaged_settings, name, value)
    machine.khugepaged_settings.pages_to_scan = NR_BLOCKS * 512
    return machine, process, addr


def sparse() -> Scene:
    """One page in each block: too many holes."""
    return scene(lambda process, addr: process.write(addr, b"x"), max_ptes_none=500)


def pinned() -> Scene:
    """Full blocks, whose last page is pinned: every entry and page is looked at."""

    def fill(process: Process, addr: int) -> None:
        process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_POPULATE_WRITE)
        process.pin(addr + HPAGE_PMD_SIZE - PAGE_SIZE, PAGE_SIZE)

    return scene(fill)


def shared() -> Scene:
    """Full blocks that a child shares, one page more than max_ptes_shared allows."""
    machine, process, addr = scene(
        lambda process, addr: process.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_POPULATE_WRITE)
    )
    process.fork()
    return machine, process, addr


@pytest.mark.parametrize("make", [sparse, pinned, shared], ids=lambda make: make.__name__)
@pytest.mark.benchmark(group="scan: 256 blocks that cannot collapse")
def test_daemon_scans(benchmark, make: Callable[[], Scene]) -> None:  # type: ignore[no-untyped-def]
    """One turn over all of them; PTEs a second in extra_info."""
    machine, _, _ = make()
    machine.khugepaged.step()
    machine.trace.clear()
    benchmark.pedantic(machine.khugepaged.step, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.enabled:
        speed = NR_BLOCKS * 512 / benchmark.stats.stats.median / 1e6
        benchmark.extra_info["million PTEs a second"] = round(speed, 1)
    assert machine.khugepaged_settings.pages_collapsed == 0
    assert len(machine.trace) >= NR_BLOCKS
    machine.audit()


def tables(scene: Scene) -> list[int]:
    """The frames of the page tables."""
    _, process, addr = scene
    pmds = [pmd_of(process.mem, process.mm, addr + n * HPAGE_PMD_SIZE) for n in range(NR_BLOCKS)]
    return [pte_pfn(pmd) for pmd in pmds if pmd]


@pytest.mark.benchmark(group="scan: 256 blocks that cannot collapse")
def test_numpy_masks(benchmark) -> None:  # type: ignore[no-untyped-def]
    """Four masks a table and their counts."""
    made = pinned()
    words, frames = made[0].mem.ram.words, tables(made)
    bits = [np.uint64(bit) for bit in (PAGE_PRESENT, PAGE_RW, PAGE_ACCESSED, PAGE_UFFD_WP)]

    def masks() -> int:
        return sum(int(np.count_nonzero(words[pfn] & bit)) for pfn in frames for bit in bits)

    assert benchmark.pedantic(masks, rounds=ROUNDS, warmup_rounds=2) == 3 * NR_BLOCKS * 512


@pytest.mark.benchmark(group="scan: 256 blocks that cannot collapse")
def test_python_loop(benchmark) -> None:  # type: ignore[no-untyped-def]
    """The same counts, entry by entry."""
    made = pinned()
    words, frames = made[0].mem.ram.words, tables(made)

    def loop() -> int:
        found = 0
        for pfn in frames:
            for pte in words[pfn].tolist():
                found += (pte & 1) + (pte >> 1 & 1) + (pte >> 5 & 1) + (pte >> 10 & 1)
        return found

    assert benchmark.pedantic(loop, rounds=3) == 3 * NR_BLOCKS * 512
