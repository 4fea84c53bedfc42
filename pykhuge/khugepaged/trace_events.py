"""The trace events of group huge_memory, printed as the kernel prints them.

Linux: include/trace/events/huge_memory.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from pykhuge.khugepaged.scan_result import ScanResult

__all__ = [
    "mm_collapse_huge_page",
    "mm_collapse_huge_page_isolate",
    "mm_collapse_huge_page_swapin",
    "mm_khugepaged_collapse_file",
    "mm_khugepaged_scan_file",
    "mm_khugepaged_scan_pmd",
]


def _pointer(hashed: int) -> str:
    """%p: the 32-bit hash of a pointer, in the width of a pointer."""
    return f"{hashed:016x}"


def _pfn(pfn: int) -> str:
    """0x%lx, with -1 for a page that is not there."""
    return f"{pfn & (1 << 64) - 1:#x}"


def _writable(writable: bool | None) -> str:
    return "" if writable is None else f", writable={writable:d}"


class Event:
    """What all of them have in common: the class is called as the event is."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The event's name in tracefs."""
        return type(self).__name__

    @property
    def preempt_depth(self) -> int:
        """How many spinlocks are held where it is told of."""
        return 0


@dataclass(slots=True)
class mm_khugepaged_scan_pmd(Event):  # noqa: N801
    """One block scanned. mm: hashed pointer; scan_pfn: the last page looked at, -1 if none.

    writable: None for a kernel that has no such field.
    """

    mm: int
    scan_pfn: int
    writable: bool | None
    referenced: int
    none_or_zero: int
    status: ScanResult
    unmapped: int

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        return (
            f"mm={_pointer(self.mm)}, scan_pfn={_pfn(self.scan_pfn)}{_writable(self.writable)},"
            f" referenced={self.referenced}, none_or_zero={self.none_or_zero},"
            f" status={self.status.text}, unmapped={self.unmapped}"
        )


@dataclass(slots=True)
class mm_collapse_huge_page(Event):  # noqa: N801
    """One collapse ended; isolated is 1 only on success."""

    mm: int
    isolated: bool
    status: ScanResult

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        return f"mm={_pointer(self.mm)}, isolated={self.isolated:d}, status={self.status.text}"


@dataclass(slots=True)
class mm_collapse_huge_page_isolate(Event):  # noqa: N801
    """The pages of one block were isolated, or not. writable: None as above."""

    scan_pfn: int
    none_or_zero: int
    referenced: int
    writable: bool | None
    status: ScanResult

    @property
    def preempt_depth(self) -> int:
        """The lock of the page table is held."""
        return 1

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        return (
            f"scan_pfn={_pfn(self.scan_pfn)}, none_or_zero={self.none_or_zero},"
            f" referenced={self.referenced}{_writable(self.writable)}, status={self.status.text}"
        )


@dataclass(slots=True)
class mm_collapse_huge_page_swapin(Event):  # noqa: N801
    """Swapped-out pages of one block were brought in.

    ret: 1 if all of them were, else 0; since 6.5 the number of the scan_result.
    """

    mm: int
    swapped_in: int
    referenced: int
    ret: int

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        return (
            f"mm={_pointer(self.mm)}, swapped_in={self.swapped_in},"
            f" referenced={self.referenced}, ret={self.ret}"
        )


@dataclass(slots=True)
class mm_khugepaged_scan_file(Event):  # noqa: N801
    """One block of a file scanned. scan_pfn: the page that stopped the scan, -1 if none did."""

    mm: int
    scan_pfn: int
    filename: str
    present: int
    swap: int
    result: ScanResult

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        return (
            f"mm={_pointer(self.mm)}, scan_pfn={_pfn(self.scan_pfn)}, filename={self.filename},"
            f" present={self.present}, swap={self.swap}, result={self.result.text}"
        )


@dataclass(slots=True)
class mm_khugepaged_collapse_file(Event):  # noqa: N801
    """One collapse of a file's block ended. index: how far it came; nr: pages of the huge page.

    addr_in_hex: as it is printed since 6.12.
    """

    mm: int
    hpage_pfn: int
    index: int
    addr: int
    is_shmem: bool
    filename: str
    nr: int
    result: ScanResult
    addr_in_hex: bool = False

    def body(self) -> str:
        """What TP_printk makes of the fields."""
        addr = f"{self.addr:x}" if self.addr_in_hex else f"{self.addr}"
        return (
            f"mm={_pointer(self.mm)}, hpage_pfn={_pfn(self.hpage_pfn)}, index={self.index},"
            f" addr={addr}, is_shmem={self.is_shmem:d}, filename={self.filename},"
            f" nr={self.nr}, result={self.result.text}"
        )
