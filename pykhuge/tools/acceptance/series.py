"""The manual tests of the patch series, in virtual time and over many seeds.

Two tasks have a buffer each, anonymous or of a tmpfs, in small pages. Four random cache lines go
bad unnoticed, two in each buffer. Then the tasks make the buffers collapsible, and khugepaged comes
by. It must survive, skip the blocks with a bad line at every pass, and collapse all others; the
tasks check every byte. Before the series, the host panics.

A seed says where the lines are. A host that survives is used for a few seeds, one after the other.

From the cover letters of "Memory poison recovery in khugepaged".
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT
from pykhuge.kernel.panic import KernelPanic
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.khugepaged.trace_events import mm_khugepaged_scan_file, mm_khugepaged_scan_pmd
from pykhuge.machine import Machine
from pykhuge.mm.errors import BUS_MCEERR_AR, BusError
from pykhuge.mm.mm_types import File
from pykhuge.process import Advice
from pykhuge.tools.acceptance.scenario import Mismatch, Scenario, check

__all__ = ["scenarios"]

GROUP = "series"
LINES = 2
LINE = 1 << LINE_SHIFT
PASSES = 3
SEEDS_A_HOST = 10
# What a further pass says of a block that it has collapsed.
HUGE_ALREADY = {
    "anon": ScanResult.SCAN_PMD_MAPPED,
    "tmpfs": ScanResult.SCAN_PTE_MAPPED_HUGEPAGE,
}


@cache
def _pool() -> bytes:
    """8 MiB, in which no 8-byte word comes twice."""
    words = np.arange(1, (8 << 20) // 8 + 1, dtype=np.uint64)
    return (words * np.uint64(0x9E3779B97F4A7C15)).tobytes()


def _content(number: int) -> bytes:
    """A block of the pool, another one for each of many numbers.

    Memory that is used again still holds what the last seeds wrote there: it must not pass.
    """
    start = 8 * (number * 4999 % ((6 << 20) // 8))
    return _pool()[start : start + HPAGE_PMD_SIZE]


class Buffer:
    """One task and its buffer.

    file: of a tmpfs, that is mapped there; None is anonymous memory.
    bad_lines: offsets of its poisoned lines, in order.
    """

    def __init__(self, machine: Machine, number: int, memory: str, content: list[bytes]) -> None:
        self.process = machine.process(f"task{number}", cpu=number)
        self.content = content
        self.size = len(content) * HPAGE_PMD_SIZE
        self.bad_lines: list[int] = []
        self.file: File | None = None
        if memory == "tmpfs":
            mount = machine.mem.mounts[0]
            self.file = self.process.open(f"buffer{number}", os.O_RDWR | os.O_CREAT, tmpfs=mount)
            self.process.ftruncate(self.file, self.size)
        shared = self.file is not None
        self.addr = self.process.mmap(self.size, file=self.file, shared=shared)
        for block, data in enumerate(self.content):
            self.process.write(self.addr + block * HPAGE_PMD_SIZE, data)

    def leave(self, machine: Machine) -> None:
        """The task exits, and its file goes. Nobody gets the frames that were bad again."""
        if self.file is not None:
            self.process.unlink(self.file.inode.name, tmpfs=machine.mem.mounts[0])
        self.process.exit()

    @property
    def bad_blocks(self) -> set[int]:
        """Blocks with a poisoned line."""
        return {offset // HPAGE_PMD_SIZE for offset in self.bad_lines}

    def poison(self, rng: random.Random) -> None:
        """Two random lines go bad."""
        lines = rng.sample(range(self.size // LINE), LINES)
        self.bad_lines = sorted(line * LINE for line in lines)
        for offset in self.bad_lines:
            self.process.poison(self.addr + offset)

    def make_collapsible(self) -> None:
        """MADV_HUGEPAGE."""
        self.process.madvise(self.addr, self.size, Advice.MADV_HUGEPAGE)

    def check_blocks(self) -> None:
        """Exactly the blocks with poison are small; of a file, others are huge once touched."""
        for block in range(len(self.content)):
            addr, bad = self.addr + block * HPAGE_PMD_SIZE, block in self.bad_blocks
            if self.file is not None and not bad:
                self.process.read(addr, 1)
            check(self.process.is_huge(addr) is not bad, f"block {block}: huge is {bad}")

    def check_bytes(self) -> None:
        """Every byte is what was written; a load from a poisoned line gets its own SIGBUS."""
        for block, data in enumerate(self.content):
            base = block * HPAGE_PMD_SIZE
            # A rollback leaves the pages of a file unmapped.
            self.process.madvise(self.addr + base, HPAGE_PMD_SIZE, Advice.MADV_POPULATE_WRITE)
            for low, high in self._healthy(base):
                got = self.process.read(self.addr + low, high - low)
                check(got == data[low - base : high - base], f"bytes [{low:#x}, {high:#x})")
        lost: set[int] = set()
        for offset in self.bad_lines:
            page = offset & -PAGE_SIZE
            self._check_signal(self.addr + offset, self.addr + (offset if page in lost else page))
            lost.add(page)

    def _healthy(self, base: int) -> Iterator[tuple[int, int]]:
        """The runs of good lines of the block at offset `base`."""
        low, end = base, base + HPAGE_PMD_SIZE
        for offset in self.bad_lines:
            if low <= offset < end:
                yield low, offset
                low = offset + LINE
        yield low, end

    def _check_signal(self, addr: int, si_addr: int) -> None:
        """The machine check tells of the page, which is taken away then; a fault, of the address.

        Raises: Mismatch.
        """
        try:
            self.process.read(addr, LINE)
        except BusError as error:
            told = (error.address, error.code, error.lsb)
            check(told == (si_addr, BUS_MCEERR_AR, 12), f"SIGBUS at {addr:#x}: {error}")
        else:
            raise Mismatch(f"a load from the poisoned line at {addr:#x} gets bytes")


def _host(*, recovery: bool) -> Machine:
    machine = Machine("1G", cpus=2, recovery=recovery)
    machine.sysfs["enabled"] = "madvise\n"
    machine.tmpfs(huge="advise")
    return machine


def _set_up(machine: Machine, memory: str, seed: int, nr_blocks: int) -> list[Buffer]:
    """Two tasks whose buffers are poisoned, and have just been made collapsible."""
    rng = random.Random(seed)
    buffers = []
    for number in range(2):
        first = (2 * seed + number) * nr_blocks
        content = [_content(first + block) for block in range(nr_blocks)]
        buffers.append(Buffer(machine, number, memory, content))
    for buffer in buffers:
        buffer.poison(rng)
        buffer.make_collapsible()
    machine.lru_add_drain_all()
    return buffers


def _recovers(memory: str, seeds: range) -> None:
    """A host after the series."""
    machine = _host(recovery=True)
    for seed in seeds:
        with _told(seed):
            buffers = _set_up(machine, memory, seed, 2)
            _passes(machine, memory, buffers)
            for buffer in buffers:
                buffer.check_blocks()
                buffer.check_bytes()
                buffer.leave(machine)
    check(all(mce.recovered for mce in machine.mem.poison.log), "a machine check not recovered")
    machine.audit()


def _passes(machine: Machine, memory: str, buffers: list[Buffer]) -> None:
    """Let khugepaged come by, again and again, and look at what it says and counts."""
    before, collapsed = machine.vmstat(), int(machine.sysfs["khugepaged/pages_collapsed"])
    mces = len(machine.mem.poison.log)
    nr_bad = sum(len(each.bad_blocks) for each in buffers)
    nr_good = sum(len(each.content) for each in buffers) - nr_bad
    for number in range(PASSES):
        met = _full_scan(machine)
        good = HUGE_ALREADY[memory] if number else ScanResult.SCAN_SUCCEED
        expected = Counter({ScanResult.SCAN_COPY_MC: nr_bad, good: nr_good})
        check(met == expected, f"pass {number}: {dict(met)}")
    mces = len(machine.mem.poison.log) - mces
    check(mces == PASSES * nr_bad, f"{mces} machine checks in {PASSES} passes, {nr_bad} bad blocks")
    machine.lru_add_drain_all()
    moved, due = _moved(before, machine.vmstat()), _counters(memory, nr_good, nr_bad)
    check(moved == due, f"counters: {moved}, expected {due}")
    collapsed = int(machine.sysfs["khugepaged/pages_collapsed"]) - collapsed
    check(collapsed == nr_good, f"pages_collapsed: {collapsed} more, {nr_good} blocks are huge")


def _full_scan(machine: Machine) -> Counter[ScanResult]:
    """One round of khugepaged through all there is. Returns: how often it met each result."""
    machine.trace.clear()
    scans = int(machine.sysfs["khugepaged/full_scans"])
    machine.khugepaged.run(until=lambda: int(machine.sysfs["khugepaged/full_scans"]) > scans)
    met: Counter[ScanResult] = Counter()
    for record in machine.trace:
        if isinstance(record.event, mm_khugepaged_scan_pmd):
            met[record.event.status] += 1
        elif isinstance(record.event, mm_khugepaged_scan_file):
            met[record.event.result] += 1
    return met


def _moved(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What has changed, by how much."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def _counters(memory: str, nr_good: int, nr_bad: int) -> dict[str, int]:
    """What the reference's tables say of so many collapsed blocks, and PASSES rollbacks of others.

    No page is gained or lost: 512 small ones become a huge one. The page tables of anonymous memory
    are kept in deposit, those of a file freed, and all its pages unmapped, on failure too.
    """
    moved = {"thp_collapse_alloc": nr_good + PASSES * nr_bad}
    if memory == "anon":
        moved |= {"nr_anon_transparent_hugepages": nr_good}
    else:
        moved |= {
            "nr_shmem_hugepages": nr_good,
            "nr_page_table_pages": -nr_good,
            "nr_free_pages": nr_good,
            "nr_mapped": -HPAGE_PMD_NR * (nr_good + nr_bad),
        }
    return {name: change for name, change in moved.items() if change}


def _panics(memory: str, seeds: range) -> None:
    """Hosts before the series; each lives for one seed."""
    for seed in seeds:
        machine = _host(recovery=False)
        with _told(seed):
            _set_up(machine, memory, seed, 1)
            _check_panic(machine)


def _check_panic(machine: Machine) -> None:
    try:
        _full_scan(machine)
    except KernelPanic as panic:
        (mce,) = machine.mem.poison.log
        check(not mce.recovered, "a machine check that was recovered")
        check("Kernel panic" in machine.log[-1], f"the last line of the log: {machine.log[-1]}")
        panic.__traceback__ = None  # it keeps the machine, and a thousand of them are too many
    else:
        raise Mismatch("the host survives")


@contextmanager
def _told(seed: int) -> Iterator[None]:
    """A mismatch names its seed."""
    try:
        yield
    except Mismatch as mismatch:
        raise Mismatch(f"seed {seed}: {mismatch}") from mismatch


def scenarios(seeds: int) -> list[Scenario]:
    """Each kind of memory, with the series and without, for seeds 0 to `seeds` - 1."""
    kinds = {
        "two tasks": (_recovers, "poisoned blocks skipped at every pass, all others huge"),
        "two tasks, before the series": (_panics, "kernel panic"),
    }
    return [
        Scenario(GROUP, name, memory, "khugepaged", f"{seeds} seeds: {outcome}", play)
        for name, (on_hosts, outcome) in kinds.items()
        for memory in ("anon", "tmpfs")
        for play in [partial(_all_seeds, on_hosts, memory, seeds, outcome)]
    ]


def _all_seeds(
    on_hosts: Callable[[str, range], None], memory: str, seeds: int, outcome: str
) -> str:
    for first in range(0, seeds, SEEDS_A_HOST):
        on_hosts(memory, range(first, min(first + SEEDS_A_HOST, seeds)))
    return f"{seeds} seeds: {outcome}"
