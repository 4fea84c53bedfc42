"""A 2 MiB block that is collapsed once, and what is said of it: for the table of scan results."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.kernel.sched import Steps
from pykhuge.khugepaged.scan_result import CollapseError, ScanResult
from pykhuge.khugepaged.trace_events import mm_khugepaged_scan_file, mm_khugepaged_scan_pmd
from pykhuge.machine import Machine
from pykhuge.mm.mm_types import File, MemCgroup
from pykhuge.process import PROT_EXEC, PROT_READ, Advice, Process
from pykhuge.tools.acceptance.scenario import check

__all__ = [
    "ALL",
    "UNTRACED",
    "Block",
    "Case",
    "anon_block",
    "content",
    "disk_block",
    "new_machine",
    "play",
    "shmem_block",
]

ALL = range(HPAGE_PMD_NR)
# What no event of the trace tells: the caller learns it by errno alone.
UNTRACED = ", untraced"


def content(pages: range) -> bytes:
    """Pages in which every 8-byte word differs from every other."""
    words = np.arange(pages.start * 512 + 1, pages.stop * 512 + 1, dtype=np.uint64)
    return (words * np.uint64(0x9E3779B97F4A7C15)).tobytes()


def new_machine(memory: str = "1G", **options: Any) -> Machine:
    """A machine on which all that was advised so may be collapsed."""
    machine = Machine(memory, swap="16M", **options)
    machine.thp.enabled = "madvise"
    machine.thp.shmem_enabled = "advise"
    return machine


class Block:
    """`nr_blocks` blocks at `addr` of `process`; the first of them is to be collapsed.

    file: what is mapped there; None is anonymous memory.
    at_end: puts back what was done by hand, and lets go of what is held, before the audit.
    """

    def __init__(self, machine: Machine, process: Process, addr: int, nr_blocks: int = 1) -> None:
        self.machine = machine
        self.process = process
        self.addr = addr
        self.length = nr_blocks * HPAGE_PMD_SIZE
        self.file: File | None = None
        self.at_end = ExitStack()

    def fill(self, pages: range = ALL) -> None:
        """Write pages of a block that has a page table, or is not advised huge: as small pages."""
        self.process.write(self.addr + pages.start * PAGE_SIZE, content(pages))

    def advise(self, advice: Advice, pages: range = ALL) -> None:
        """madvise()."""
        start = self.addr + pages.start * PAGE_SIZE
        self.process.madvise(start, len(pages) * PAGE_SIZE, advice)

    def page(self, number: int) -> int:
        """The address of one page."""
        return self.addr + number * PAGE_SIZE

    def pfn(self, number: int) -> int:
        """The frame of one page, mapped or only cached."""
        process = self.process
        cached = None if self.file is None else process.cached_pfn(self.file, number)
        pfn = process.pfn(self.page(number)) if cached is None else cached
        assert pfn is not None
        return pfn

    def set_flag(self, number: int, flag: int, *, on: bool) -> None:
        """Change a flag of a page behind the model's back; the other way again at the end."""
        flags, pfn = self.machine.mem.pages.flags, self.pfn(number)

        def change(to: bool) -> None:
            flags[pfn] = flags[pfn] | np.uint32(flag) if to else flags[pfn] & ~np.uint32(flag)

        change(on)
        self.at_end.callback(change, not on)


def anon_block(
    machine: Machine | None = None,
    *,
    pages: range = ALL,
    nr_blocks: int = 1,
    addr: int | None = None,
    memcg: MemCgroup | None = None,
) -> Block:
    """Private anonymous memory with small pages, those of `pages` in each block; advised huge."""
    machine = machine or new_machine()
    process = machine.process("app", memcg=memcg)
    where = process.mmap(nr_blocks * HPAGE_PMD_SIZE, addr=addr, fixed=addr is not None)
    for number in range(nr_blocks):
        start = where + number * HPAGE_PMD_SIZE + pages.start * PAGE_SIZE
        process.write(start, content(pages))
    process.madvise(where, nr_blocks * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    machine.lru_add_drain_all()
    return Block(machine, process, where, nr_blocks)


def shmem_block(
    machine: Machine | None = None,
    *,
    pages: range = ALL,
    nr_blocks: int = 1,
    touched: bool = True,
    addr: int | None = None,
    memcg: MemCgroup | None = None,
    shared: bool = True,
) -> Block:
    """A memfd that has `pages` of each block, mapped and advised huge.

    touched: whether the process has mapped pages; else it has no page table there.
    """
    machine = machine or new_machine()
    process = machine.process("app", memcg=memcg)
    length = nr_blocks * HPAGE_PMD_SIZE
    file = process.memfd_create("block")
    process.ftruncate(file, length)
    for number in range(nr_blocks):
        start = number * HPAGE_PMD_SIZE + pages.start * PAGE_SIZE
        process.pwrite(file, start, content(pages))
    where = process.mmap(length, addr=addr, fixed=addr is not None, file=file, shared=shared)
    if touched:
        for number in range(nr_blocks):
            start = where + number * HPAGE_PMD_SIZE + pages.start * PAGE_SIZE
            process.read(start, len(pages) * PAGE_SIZE)
    process.madvise(where, length, Advice.MADV_HUGEPAGE)
    machine.lru_add_drain_all()
    block = Block(machine, process, where, nr_blocks)
    block.file = file
    return block


def disk_block(machine: Machine | None = None) -> Block:
    """A file of the host, all of it cached, mapped to be read and executed, advised huge."""
    machine = machine or new_machine()
    process = machine.process("app")
    with tempfile.TemporaryDirectory(prefix="pykhuge-") as folder:
        path = Path(folder) / "block"
        path.write_bytes(content(ALL))
        process.close(process.open(str(path), os.O_RDWR))  # it had a writer once
        file = process.open(str(path))
    where = process.mmap(HPAGE_PMD_SIZE, file=file, prot=PROT_READ | PROT_EXEC)
    process.read(where, HPAGE_PMD_SIZE)
    process.madvise(where, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    machine.lru_add_drain_all()
    block = Block(machine, process, where)
    block.file = file
    return block


class Case(NamedTuple):
    """One way to one result.

    make: brings about the block. paths: what it is collapsed by, and its memory, "madvise anon".
    during: what another task does while the collapse is paused, at the last of the steps `where`.
    note: tells a second way to a result from the first.
    """

    result: ScanResult
    make: Callable[[], Block]
    paths: tuple[str, ...]
    during: Callable[[Block], object] | None = None
    where: tuple[str, ...] = ()
    note: str = ""


def play(case: Case, context: str) -> str:
    """Collapse the block as `context` does.

    Returns: khugepaged's result as the trace has it, or that of MADV_COLLAPSE with errno's name.
    """
    block = case.make()
    machine, process = block.machine, block.process
    was_huge = process.is_huge(block.addr)
    machine.trace.clear()
    task = machine.spawn(_collapse(block, context), context)
    if case.during is not None:
        if context != "khugepaged":
            task.run_until("acquire mmap_lock for read")  # where madvise() begins
        for where in case.where:
            task.run_until(where)
        case.during(block)
    error = None
    try:
        task.finish()
    except CollapseError as raised:
        error = raised
    traced = [*_traced(machine, process)]
    check(len(traced) > 0, "nothing in the trace")
    block.at_end.close()
    machine.audit()
    if context == "khugepaged":
        return traced[0].text
    result = traced[-1] if error is None else error.scan_result
    if context == "pte-mapped":
        check(traced == [ScanResult.SCAN_PTE_MAPPED_HUGEPAGE], f"the trace has {traced}")
        if error is None:
            check(process.is_huge(block.addr), "a PMD that maps the huge page")
            result = ScanResult.SCAN_PMD_MAPPED if was_huge else ScanResult.SCAN_SUCCEED
    name = "0" if error is None else errno.errorcode[error.errno or 0]
    return f"{result.text}, {name}" + UNTRACED * (result not in traced)


def _collapse(block: Block, context: str) -> Steps[object]:
    """A turn of khugepaged, which comes to the block first; or the system call."""
    if context == "khugepaged":
        return block.machine.khugepaged.step.steps()
    return block.process.madvise.steps(block.addr, block.length, Advice.MADV_COLLAPSE)


def _traced(machine: Machine, process: Process) -> Iterator[ScanResult]:
    """What the scans of the process ended with."""
    for record in machine.trace:
        event = record.event
        if isinstance(event, mm_khugepaged_scan_pmd) and event.mm == process.mm.hashed_ptr:
            yield event.status
        if isinstance(event, mm_khugepaged_scan_file) and event.mm == process.mm.hashed_ptr:
            yield event.result
