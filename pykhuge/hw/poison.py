"""Poisoned cache lines, which nobody has noticed yet, and the log of those who did.

A word of 64 bits stands for each page frame, a bit for each 64-byte line: bit 3 of `lines[pfn]` set
means that reading bytes 192..255 of the frame raises a machine check. Software cannot see the word;
it learns of a bad line by touching it. A line stays bad until `unpoison`: writing does not mend it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pykhuge.hw.memory import PAGE_SHIFT, lazy_zeros
from pykhuge.kernel.clock import Clock

__all__ = ["LINES_PER_PAGE", "LINE_SHIFT", "Mce", "Poison"]

LINE_SHIFT = 6
LINES_PER_PAGE = 64
# An uncorrected error met by a data load, recoverable by software (SRAR, data load), as a processor
# with RIPV, EIPV and MCIP set reports it from the bank of its data cache; a physical address, with
# LINE_SHIFT bits that do not count.
MCG_STATUS = 0x7
BANK = 1
MCI_STATUS = 0xBD80_0000_0010_0134
MCI_MISC = 0x80 | LINE_SHIFT


class Mce(NamedTuple):
    """One machine check, as its error record holds it (struct mce).

    addr: physical address of the line. `recovered` is False where it killed the host.
    """

    now_ns: int
    cpu: int
    addr: int
    consumer: str
    recovered: bool

    @property
    def pfn(self) -> int:
        """The frame it happened in."""
        return self.addr >> PAGE_SHIFT

    @property
    def line(self) -> int:
        """Which of the frame's 64 lines is bad."""
        return (self.addr >> LINE_SHIFT) % LINES_PER_PAGE

    def lines(self) -> list[str]:
        """What __print_mce() logs of it."""
        error = "mce: [Hardware Error]: "
        seconds = self.now_ns // 1_000_000_000
        return [
            f"{error}CPU {self.cpu}: Machine Check Exception: {MCG_STATUS:x}"
            f" Bank {BANK}: {MCI_STATUS:016x}",
            f"{error}TSC {self.now_ns:x} ADDR {self.addr:x} MISC {MCI_MISC:x} ",
            f"{error}PROCESSOR 0:0 TIME {seconds} SOCKET 0 APIC {self.cpu:x} microcode 0",
        ]


class Poison:
    """All poisoned lines of a machine, and every machine check they caused."""

    def __init__(self, nr_pages: int, clock: Clock) -> None:
        self.clock = clock
        self.lines = lazy_zeros(nr_pages, np.uint64)
        self.log: list[Mce] = []
        self.address: int = self.lines.ctypes.data

    def poison(self, pfn: int, line: int) -> None:
        """Make line `line` (0..63) of frame `pfn` unreadable."""
        self._check(pfn, line)
        self.lines[pfn] |= np.uint64(1 << line)

    def unpoison(self, pfn: int, line: int | None = None) -> None:
        """Make one line, or all lines of the frame, good again."""
        self._check(pfn, line or 0)
        self.lines[pfn] &= (
            np.uint64(~(1 << line) & (1 << LINES_PER_PAGE) - 1)
            if line is not None
            else np.uint64(0)
        )

    def machine_check(
        self, pfn: int, line: int, *, cpu: int, consumer: str, recovered: bool
    ) -> Mce:
        """Log that `consumer` met the bad line."""
        addr = (pfn << PAGE_SHIFT) + (line << LINE_SHIFT)
        check = Mce(self.clock.tick(), cpu, addr, consumer, recovered)
        self.log.append(check)
        return check

    def _check(self, pfn: int, line: int) -> None:
        if not 0 <= pfn < len(self.lines):
            raise ValueError(f"pfn={pfn}: allowed 0..{len(self.lines) - 1}")
        if not 0 <= line < LINES_PER_PAGE:
            raise ValueError(f"line={line}: allowed 0..{LINES_PER_PAGE - 1}")
