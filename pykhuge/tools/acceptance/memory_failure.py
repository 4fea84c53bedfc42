"""The kernel's memory-failure selftest, userfaultfd's poison test, and collapses behind them.

Kernel: tools/testing/selftests/mm/memory-failure.c (Linux 7.0), whose tests lose a page by
MADV_HWPOISON or give one up by MADV_SOFT_OFFLINE; the test "poison" of uffd-unit-tests.c (6.6).
What a collapse meets then is no selftest: it is what the kernel's code does with such pages.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.errors import BUS_MCEERR_AR, BusError, UserFault
from pykhuge.process import Advice, Process
from pykhuge.tools.acceptance.scan_kit import (
    Block,
    Case,
    anon_block,
    disk_block,
    play,
    shmem_block,
)
from pykhuge.tools.acceptance.scenario import Mismatch, Scenario, check

__all__ = ["scenarios"]

GROUP = "memory failure"
CONTENT = b"\xce" * PAGE_SIZE
KPF_HWPOISON = 1 << 19
PM_SWAP = 1 << 62
INJECT = {"madv_hard": Advice.MADV_HWPOISON, "madv_soft": Advice.MADV_SOFT_OFFLINE}
LOST, KEPT = "SIGBUS, entry swapped", "content kept, pfn changed"


class Page(NamedTuple):
    """A page that is going to fail, and what was counted before. kilobytes: HardwareCorrupted."""

    machine: Machine
    process: Process
    addr: int
    pfn: int
    kilobytes: int

    def check_poisoned(self, poisoned: bool) -> None:
        """Raises: Mismatch unless HardwareCorrupted and the page's flag say so."""
        kilobytes = self.kilobytes + (PAGE_SIZE >> 10) * poisoned
        found = hardware_corrupted(self.machine)
        check(found == kilobytes, f"HardwareCorrupted: {found} kB, expected {kilobytes} kB")
        flags = int(self.machine.procfs.kpageflags(self.pfn, 1)[0])
        check(bool(flags & KPF_HWPOISON) is poisoned, f"KPF_HWPOISON of pfn {self.pfn:#x}")


def hardware_corrupted(machine: Machine) -> int:
    """A line of meminfo, in kB."""
    match = re.search(r"^HardwareCorrupted: +(\d+) kB$", machine.procfs["meminfo"], re.MULTILINE)
    check(match is not None, "HardwareCorrupted in meminfo")
    assert match is not None
    return int(match[1])


def memory_failure(kind: str, variant: str) -> str:
    """Inject the error, touch the page, look at all that tells of it, and undo it."""
    machine = Machine("1G")
    process = machine.process("memory-failure")
    addr = MAPPED[kind](process)
    pfn = process.pfn(addr)
    assert pfn is not None
    page = Page(machine, process, addr, pfn, hardware_corrupted(machine))
    process.madvise(addr, PAGE_SIZE, INJECT[variant])
    try:
        got = process.read(addr, PAGE_SIZE)
    except BusError as error:
        outcome = _signalled(page, error)
    else:
        check(got == CONTENT, "content")
        check(process.pfn(addr) != pfn, "another frame behind the address")
        outcome = KEPT
    page.check_poisoned(True)
    machine.unpoison_memory(pfn)
    page.check_poisoned(False)
    process.munmap(addr, PAGE_SIZE)
    machine.audit()
    return outcome


def _signalled(page: Page, error: BusError) -> str:
    told = (error.address, error.code, 1 << error.lsb)
    check(told == (page.addr, BUS_MCEERR_AR, PAGE_SIZE), f"siginfo: {error}")
    (entry,) = page.machine.procfs.pagemap(page.process, page.addr, PAGE_SIZE).tolist()
    check(bool(entry & PM_SWAP), f"pagemap: {entry:#x}")
    return LOST


def map_anon(process: Process) -> int:
    """A written page."""
    addr = process.mmap(PAGE_SIZE)
    process.write(addr, CONTENT)
    return addr


def map_dirty(process: Process) -> int:
    """A page of a file, mapped shared and written."""
    with tempfile.TemporaryDirectory(prefix="pykhuge-") as folder:
        file = process.open(str(Path(folder) / "page-cache-test-file"), os.O_RDWR | os.O_CREAT)
    process.ftruncate(file, PAGE_SIZE)
    addr = process.mmap(PAGE_SIZE, file=file, shared=True)
    process.write(addr, CONTENT)
    return addr


def map_clean(process: Process) -> int:
    """The same, and it has reached the disk."""
    addr = map_dirty(process)
    process.fsync(process.mm.files[0])
    return addr


MAPPED = {"anon": map_anon, "clean_pagecache": map_clean, "dirty_pagecache": map_dirty}
EXPECTED = {
    ("anon", "madv_hard"): LOST,
    ("anon", "madv_soft"): KEPT,
    # The page is read anew from the disk.
    ("clean_pagecache", "madv_hard"): KEPT,
    ("clean_pagecache", "madv_soft"): KEPT,
    ("dirty_pagecache", "madv_hard"): LOST,
    ("dirty_pagecache", "madv_soft"): KEPT,
}


# userfaultfd.

UFFD_PAGES = 4


def uffd_poison(memory: str) -> str:
    """Faults on even pages are answered by UFFDIO_POISON, on odd ones by a page of zeros."""
    machine = Machine("1G")
    process = machine.process("uffd-unit-tests")
    addr = process.mmap(UFFD_PAGES * PAGE_SIZE, shared=memory == "shmem")
    uffd = process.userfaultfd()
    uffd.register(addr, UFFD_PAGES * PAGE_SIZE)
    signals = 0
    for page in range(addr, addr + UFFD_PAGES * PAGE_SIZE, PAGE_SIZE):
        try:
            process.read(page, PAGE_SIZE)
        except UserFault as fault:
            check((fault.address, fault.kind) == (page, "missing"), f"{fault}")
        else:
            raise Mismatch(f"a load from {page:#x} does not wait")
        if (page - addr) // PAGE_SIZE % 2:
            uffd.copy(page, bytes(PAGE_SIZE))
        else:
            uffd.poison(page, PAGE_SIZE)
        try:
            check(process.read(page, PAGE_SIZE) == bytes(PAGE_SIZE), "a page of zeros")
        except BusError as error:
            told = (error.address, error.code, error.lsb)
            check(told == (page, BUS_MCEERR_AR, 12), f"siginfo: {error}")
            signals += 1
    machine.audit()
    return f"{signals} SIGBUS of {UFFD_PAGES} pages"


# What a collapse meets then.


def lost_anon() -> Block:
    """memory_failure has put an entry of its own in the page's place."""
    block = anon_block()
    block.advise(Advice.MADV_HWPOISON, range(9, 10))
    return block


def lost_shmem() -> Block:
    """The page is in the cache still, off the LRU."""
    block = shmem_block()
    block.advise(Advice.MADV_HWPOISON, range(9, 10))
    return block


def lost_file() -> Block:
    """The page was clean, and is gone from the cache."""
    block = disk_block()
    block.advise(Advice.MADV_HWPOISON, range(9, 10))
    return block


def poisoned_by_uffd() -> Block:
    """A userfaultfd has answered the fault on the one missing page by UFFDIO_POISON."""
    block = anon_block(pages=range(1, 512))
    uffd = block.process.userfaultfd()
    uffd.register(block.addr, HPAGE_PMD_SIZE)
    uffd.poison(block.addr, PAGE_SIZE)
    return block


BOTH = ("khugepaged", "madvise")
KNOWN = (
    ("collapse_hwpoison_entry", "anon", Case(ScanResult.SCAN_FAIL, lost_anon, BOTH)),
    ("collapse_hwpoison_page", "shmem", Case(ScanResult.SCAN_PAGE_LRU, lost_shmem, BOTH)),
    ("collapse_hwpoison_truncated", "file", Case(ScanResult.SCAN_SUCCEED, lost_file, BOTH)),
    ("collapse_uffd_poison", "anon", Case(ScanResult.SCAN_FAIL, poisoned_by_uffd, BOTH)),
)
TOLD = {
    ScanResult.SCAN_FAIL: ("failed", "EINVAL"),
    ScanResult.SCAN_PAGE_LRU: ("page_not_in_lru", "EAGAIN"),
    ScanResult.SCAN_SUCCEED: ("succeeded", "0"),
}


def scenarios() -> list[Scenario]:
    """The selftest's six, userfaultfd's two, and the collapses."""
    found = [
        Scenario(
            GROUP,
            kind,
            "anon" if kind == "anon" else "file",
            variant,
            expected,
            partial(memory_failure, kind, variant),
        )
        for (kind, variant), expected in EXPECTED.items()
    ]
    for memory in ("anon", "shmem"):
        play_it = partial(uffd_poison, memory)
        found.append(
            Scenario(GROUP, "poison", memory, "userfaultfd", "2 SIGBUS of 4 pages", play_it)
        )
    for name, memory, case in KNOWN:
        for context in case.paths:
            text, number = TOLD[case.result]
            expected = text if context == "khugepaged" else f"{text}, {number}"
            found.append(
                Scenario(GROUP, name, memory, context, expected, partial(play, case, context))
            )
    return found
