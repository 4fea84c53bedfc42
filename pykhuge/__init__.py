"""Linux's khugepaged and its machine-check safe page copy, as a library.

The copies work on any memory; `Machine` is the model around them.
"""

from pykhuge.kernel.panic import KernelBug, KernelPanic
from pykhuge.kernel.sched import WouldBlock
from pykhuge.kernel.version import KernelVersion
from pykhuge.khugepaged.scan_result import CollapseError, ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.errors import BusError, SegmentationFault, Signal, UserFault
from pykhuge.mm.highmem import (
    DestinationFault,
    MachineCheck,
    copy_highpage,
    copy_mc,
    copy_mc_highpage,
    copy_mc_huge_page,
    copy_mc_user_highpage,
    machine_check,
)
from pykhuge.mm.huge_memory import OutOfMemory
from pykhuge.mm.mm_types import File
from pykhuge.process import PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, Advice, Process

__all__ = [
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "Advice",
    "BusError",
    "CollapseError",
    "DestinationFault",
    "File",
    "KernelBug",
    "KernelPanic",
    "KernelVersion",
    "Machine",
    "MachineCheck",
    "OutOfMemory",
    "Process",
    "ScanResult",
    "SegmentationFault",
    "Signal",
    "UserFault",
    "WouldBlock",
    "copy_highpage",
    "copy_mc",
    "copy_mc_highpage",
    "copy_mc_huge_page",
    "copy_mc_user_highpage",
    "machine_check",
]
