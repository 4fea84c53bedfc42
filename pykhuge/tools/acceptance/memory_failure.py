"""Userfaultfd's poison test, and collapses behind it.

Kernel: the test "poison" of tools/testing/selftests/mm/uffd-unit-tests.c (Linux 6.6).
What a collapse meets then is no selftest: it is what the kernel's code does with such pages.
"""

from __future__ import annotations

from functools import partial

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.errors import BUS_MCEERR_AR, BusError, UserFault
from pykhuge.tools.acceptance.scan_kit import (
    Block,
    Case,
    anon_block,
    play,
)
from pykhuge.tools.acceptance.scenario import Mismatch, Scenario, check

__all__ = ["scenarios"]

GROUP = "memory failure"

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


def poisoned_by_uffd() -> Block:
    """A userfaultfd has answered the fault on the one missing page by UFFDIO_POISON."""
    block = anon_block(pages=range(1, 512))
    uffd = block.process.userfaultfd()
    uffd.register(block.addr, HPAGE_PMD_SIZE)
    uffd.poison(block.addr, PAGE_SIZE)
    return block


BOTH = ("khugepaged", "madvise")
KNOWN = (("collapse_uffd_poison", "anon", Case(ScanResult.SCAN_FAIL, poisoned_by_uffd, BOTH)),)
TOLD = {ScanResult.SCAN_FAIL: ("failed", "EINVAL")}


def scenarios() -> list[Scenario]:
    """All of them."""
    found = []
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
