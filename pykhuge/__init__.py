"""Linux's khugepaged and its machine-check safe page copy, as a library."""

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

__all__ = [
    "DestinationFault",
    "MachineCheck",
    "copy_highpage",
    "copy_mc",
    "copy_mc_highpage",
    "copy_mc_huge_page",
    "copy_mc_user_highpage",
    "machine_check",
]
