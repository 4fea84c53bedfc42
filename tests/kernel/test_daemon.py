"""The daemon held against the running khugepaged: which blocks of a process it collapses."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel.conftest import THP, turned

from pykhuge import Advice, Machine

PAGE, BLOCK = 4096, 2 << 20
KNOBS = {"max_ptes_none": 255, "scan_sleep_millisecs": 10, "alloc_sleep_millisecs": 10}
NR = 6  # blocks, of which these pages are written
WRITTEN = [range(512), range(1), range(257), range(256), range(255, 512), range(0)]
Advise = Callable[[int, int], None]


@pytest.fixture
def knobs(thp: None) -> Iterator[None]:  # noqa: ARG001 (the lock against other runs)
    """Khugepaged without a pause, and half of a block allowed to be empty, less one page."""
    with contextlib.ExitStack() as stack:
        for name, value in KNOBS.items():
            stack.enter_context(turned(THP / "khugepaged" / name, str(value)))
        yield


def full_scans() -> int:
    """How often the running daemon has been round."""
    return int((THP / "khugepaged/full_scans").read_text())


def huge_blocks(start: int) -> list[bool]:
    """Which of the blocks from `start` on are huge, by MADV_NOHUGEPAGE'd pieces of smaps."""
    found = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-", line):
            addr = int(head[1], 16)
        elif line.startswith("AnonHugePages:"):
            found[addr] = int(line.split()[1]) > 0
    return [found[start + number * 2 * BLOCK] for number in range(NR)]


def here() -> list[bool]:
    """The layout in this process; a block apart from each other, so that smaps tells them apart."""
    area = mmap.mmap(-1, (2 * NR + 1) * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    start = -(-base // BLOCK) * BLOCK
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for number, pages in enumerate(WRITTEN):
        offset = start - base + number * 2 * BLOCK
        for page in pages:
            area[offset + page * PAGE] = 1
        area.madvise(mmap.MADV_HUGEPAGE, offset, BLOCK)
    # The daemon has the least right to a CPU of all: on a busy machine a round takes its time.
    before, stop = full_scans(), time.monotonic() + 120
    while full_scans() < before + 3 and time.monotonic() < stop:
        time.sleep(0.02)
    assert full_scans() >= before + 3
    return huge_blocks(start)


def model() -> list[bool]:
    """The same in the model."""
    machine = Machine("1G")
    for name, value in KNOBS.items():
        machine.sysfs[f"khugepaged/{name}"] = f"{value}\n"
    process = machine.process("app")
    start = process.mmap(2 * NR * BLOCK)
    process.madvise(start, 2 * NR * BLOCK, Advice.MADV_NOHUGEPAGE)
    for number, pages in enumerate(WRITTEN):
        for page in pages:
            process.write(start + number * 2 * BLOCK + page * PAGE, b"\1")
        process.madvise(start + number * 2 * BLOCK, BLOCK, Advice.MADV_HUGEPAGE)
    machine.khugepaged.run(lambda: machine.khugepaged_settings.full_scans >= 3)
    machine.audit()
    return [process.is_huge(start + number * 2 * BLOCK) for number in range(NR)]


@pytest.mark.usefixtures("knobs")
def test_khugepaged_collapses_the_blocks_that_the_running_one_does() -> None:
    """Up to max_ptes_none empty pages, inclusive, and no block that was never touched."""
    expected = [True, False, True, False, True, False]
    assert model() == expected
    assert here() == expected
