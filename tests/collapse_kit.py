"""What the tests of the model build blocks with, and look at them by."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from pykhuge import Advice, CollapseError, Machine, Process, ScanResult
from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.kernel.sched import Task
from pykhuge.khugepaged.trace_events import (
    mm_collapse_huge_page,
    mm_collapse_huge_page_isolate,
    mm_collapse_huge_page_swapin,
    mm_khugepaged_scan_pmd,
)
from pykhuge.mm.page_table import pmd_trans_huge, pte_index, pte_pfn
from pykhuge.mm.rmap import pmd_of
from pykhuge.mm.vmstat import MM_COUNTERS

PAGE, HPAGE, NR = PAGE_SIZE, HPAGE_PMD_SIZE, 512
MakeMachine = Callable[..., Machine]
READ_LOCK = "acquire mmap_lock for read"
WRITE_LOCK = "acquire mmap_lock for write"


def small_machine(memory: str | None = None, **options: Any) -> Machine:
    """A machine that is soon audited, and yet boots with the knobs of one of 512 MiB and more."""
    machine = Machine(**options) if memory is None else Machine(memory, **options)
    machine.thp.enabled = machine.thp.defrag = "madvise"
    machine.thp.use_zero_page = True
    machine.khugepaged_settings.defrag = 1
    return machine


def advised(process: Process, length: int = HPAGE, addr: int | None = None) -> int:
    """Map `length` bytes with VM_HUGEPAGE; `small` says how pages come in."""
    where = process.mmap(length, addr=addr, fixed=addr is not None)
    process.madvise(where, length, Advice.MADV_HUGEPAGE)
    return where


@contextmanager
def faults(machine: Process | Machine, enabled: str) -> Iterator[None]:
    """Let `enabled` stand meanwhile: "never" for small pages at fault, "always" for huge ones."""
    thp = machine.mem.thp
    before, thp.enabled = thp.enabled, enabled
    try:
        yield
    finally:
        thp.enabled = before


def refused(call: Callable[[], object]) -> int | None:
    """The errno of a call; None if it went well."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def page_bytes(number: int) -> bytes:
    """A page in which every 8-byte word differs from every other, in this page and in others."""
    words = np.arange(number * NR + 1, (number + 1) * NR + 1, dtype=np.uint64)
    return (words * np.uint64(0x9E3779B97F4A7C15)).tobytes()


def block_bytes(first: int = 0, nr: int = NR) -> bytes:
    """`nr` pages of `page_bytes`, one behind the other."""
    return b"".join(page_bytes(first + number) for number in range(nr))


def fill(process: Process, addr: int, pages: Iterable[int] = range(NR)) -> None:
    """Write page i of the block at `addr` with `page_bytes(i)`, as small pages."""
    with faults(process, "never"):
        for first, last in runs(pages):
            process.write(addr + first * PAGE, block_bytes(first, last - first))


def touch(process: Process, addr: int, pages: Iterable[int]) -> None:
    """Read pages, so that holes map the zero page."""
    with faults(process, "never"):
        for page in pages:
            process.read(addr + page * PAGE, 1)


def discard(process: Process, addr: int, pages: Iterable[int]) -> None:
    """Make holes (MADV_DONTNEED)."""
    advise(process, addr, pages, Advice.MADV_DONTNEED)


def pageout(process: Process, addr: int, pages: Iterable[int]) -> None:
    """Swap pages out (MADV_PAGEOUT)."""
    advise(process, addr, pages, Advice.MADV_PAGEOUT)


def advise(process: Process, addr: int, pages: Iterable[int], advice: Advice) -> None:
    """One madvise for each run of pages."""
    for first, last in runs(pages):
        process.madvise(addr + first * PAGE, (last - first) * PAGE, advice)


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pages as half-open runs of neighbours."""
    found = sorted(pages)
    while found:
        first = last = found[0]
        while last in found:
            last += 1
        yield first, last
        found = [page for page in found if page > last]


def compound_block(process: Process) -> int:
    """A block mapped by 512 PTEs to the subpages of one huge page, filled; VM_HUGEPAGE."""
    addr = advised(process, 2 * HPAGE)
    with faults(process, "always"):
        process.write(addr, block_bytes())
    assert process.is_huge(addr)
    # Cutting the VMA inside the block splits the PMD; the page stays compound.
    process.mprotect(addr + PAGE, PAGE, 1)
    process.mprotect(addr + PAGE, PAGE, 3)
    process.write(addr + PAGE, page_bytes(1))
    assert not process.is_huge(addr)
    return addr


class Snapshot(NamedTuple):
    """What a rollback must leave as it was: the PMD word, the table's words, the bytes."""

    pmd: int | None
    ptes: bytes
    content: bytes


def ptes_of(process: Process, addr: int) -> Any:
    """The page table of a block: uint64[512], a view."""
    pmd = pmd_of(process.mem, process.mm, addr)
    assert pmd
    assert not pmd_trans_huge(pmd)
    return process.mem.ram.words[pte_pfn(pmd)]


def snapshot(process: Process, addr: int) -> Snapshot:
    """Page table and bytes of a block, seen without touching any page."""
    words = ptes_of(process, addr)
    pages = [
        process.mem.ram.pages[pte_pfn(int(word))].tobytes() if int(word) & 1 else b""
        for word in words
    ]
    return Snapshot(pmd_of(process.mem, process.mm, addr), words.tobytes(), b"".join(pages))


def rss(process: Process) -> dict[str, int]:
    """The mm's counters by name, and its page-table pages."""
    counters = dict(zip(MM_COUNTERS, process.mm.rss_stat, strict=True))
    return counters | {"pgtables": process.mm.pgtables_bytes // PAGE}


def counters(machine: Machine, process: Process) -> dict[str, int]:
    """Vmstat and the mm's counters in one."""
    return machine.vmstat() | rss(process)


def changes(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What differs, by how much."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def pfn_of(process: Process, addr: int, page: int) -> int:
    """The frame of one page of a block, which must be present."""
    pfn = process.pfn(addr + page * PAGE)
    assert pfn is not None
    return pfn


def flags_of(process: Process, pfn: int) -> int:
    """PG_* of a frame."""
    return int(process.mem.pages.flags[pfn])


def index_of(addr: int) -> int:
    """Which entry of its table maps `addr`."""
    return pte_index(addr)


def collapse_task(machine: Machine, process: Process, addr: int) -> Task[Any]:
    """A daemon's scan of one block, not started yet."""
    return machine.spawn(machine.collapse.steps(process, addr), "khugepaged")


def paused(machine: Machine, process: Process, addr: int, where: str = "scanned") -> Task[Any]:
    """A collapse paused with mmap_lock dropped.

    where: "scanned" (huge page allocated, nothing revalidated yet), "prepared" (revalidated and
    swapped in, about to take the lock for write), or the name of any other step ("copied").
    """
    task = collapse_task(machine, process, addr)
    if where == "scanned":
        task.run_until(READ_LOCK)
        task.run_until(READ_LOCK)
    elif where == "prepared":
        task.run_until(WRITE_LOCK)
    else:
        task.run_until(where)
    return task


def madv_collapse(process: Process, addr: int, length: int = HPAGE) -> ScanResult | None:
    """MADV_COLLAPSE: None, or the scan result of its error."""
    try:
        process.madvise(addr, length, Advice.MADV_COLLAPSE)
    except CollapseError as error:
        return error.scan_result
    return None


def events(machine: Machine) -> list[Any]:
    """The trace events since the last `trace.clear()`."""
    return [record.event for record in machine.trace]


def scans(machine: Machine) -> list[mm_khugepaged_scan_pmd]:
    """Those of mm_khugepaged_scan_pmd."""
    return [event for event in events(machine) if isinstance(event, mm_khugepaged_scan_pmd)]


def isolates(machine: Machine) -> list[mm_collapse_huge_page_isolate]:
    """Those of mm_collapse_huge_page_isolate."""
    return [event for event in events(machine) if isinstance(event, mm_collapse_huge_page_isolate)]


def swapins(machine: Machine) -> list[mm_collapse_huge_page_swapin]:
    """Those of mm_collapse_huge_page_swapin."""
    return [event for event in events(machine) if isinstance(event, mm_collapse_huge_page_swapin)]


def collapses(machine: Machine) -> list[mm_collapse_huge_page]:
    """Those of mm_collapse_huge_page."""
    return [event for event in events(machine) if isinstance(event, mm_collapse_huge_page)]
