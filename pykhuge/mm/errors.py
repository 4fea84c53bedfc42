"""What a task gets instead of a page: an errno, a signal, or a wait. The host lives on."""

from __future__ import annotations

import operator
import os
from typing import NamedTuple

from pykhuge.kernel.sched import WouldBlock

__all__ = [
    "BUS_ADRERR",
    "BUS_MCEERR_AO",
    "BUS_MCEERR_AR",
    "EHWPOISON",
    "SI_KERNEL",
    "BusError",
    "PageLocked",
    "SegmentationFault",
    "Signal",
    "UserFault",
    "check_int",
    "os_error",
]


def os_error(number: int, text: str) -> OSError:
    """An OSError with errno `number`, its usual words, and what was wrong."""
    return OSError(number, f"{os.strerror(number)}: {text}")


BUS_ADRERR = 2
BUS_MCEERR_AR = 4
BUS_MCEERR_AO = 5
SI_KERNEL = 128
EHWPOISON = 133  # the errno module has no name for it
_SI_CODES = {
    BUS_ADRERR: "BUS_ADRERR",
    BUS_MCEERR_AR: "BUS_MCEERR_AR",
    BUS_MCEERR_AO: "BUS_MCEERR_AO",
    SI_KERNEL: "SI_KERNEL",
}


class Signal(NamedTuple):
    """A signal that waits for a process, with the fields of its siginfo."""

    signo: int
    si_code: int
    si_addr: int
    si_addr_lsb: int


def check_int(**values: object) -> None:
    """Raises: TypeError naming the first of `values` that is no integer."""
    for name, value in values.items():
        try:
            operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}={value!r}: allowed integers") from None


class BusError(Exception):
    """SIGBUS to a task: si_addr `address`, si_code `code`, si_addr_lsb `lsb` (0 if it has none)."""

    def __init__(self, address: int, code: int, lsb: int = 0) -> None:
        self.address = address
        self.code = code
        self.lsb = lsb
        super().__init__(f"SIGBUS {_SI_CODES[code]} at {address:#x}, lsb {lsb}")


class SegmentationFault(Exception):
    """SIGSEGV to a task that touched `address` with no right to."""

    def __init__(self, address: int, access: str) -> None:
        self.address = address
        super().__init__(f"SIGSEGV at {address:#x}: no VMA there allows to {access}")


class UserFault(WouldBlock):
    """The task sleeps in handle_userfault() until its userfaultfd resolves `address`."""

    def __init__(self, address: int, kind: str) -> None:
        self.address = address
        self.kind = kind
        super().__init__(f"fault at {address:#x} waits for userfaultfd ({kind})")


class PageLocked(Exception):
    """A page must be waited for (folio_lock): the caller drops its locks, waits, and looks anew."""

    def __init__(self, pfn: int) -> None:
        self.pfn = pfn
        super().__init__(f"page {pfn:#x} is locked")
