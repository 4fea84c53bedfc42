"""/proc/vmstat and /proc/meminfo."""

from __future__ import annotations

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.vmstat import (
    EVENTS,
    NODE_STATS,
    NR_ACTIVE_ANON,
    NR_ACTIVE_FILE,
    NR_ANON_MAPPED,
    NR_ANON_THPS,
    NR_FILE_DIRTY,
    NR_FILE_MAPPED,
    NR_FILE_PAGES,
    NR_FILE_PMDMAPPED,
    NR_FILE_THPS,
    NR_FREE_PAGES,
    NR_INACTIVE_ANON,
    NR_INACTIVE_FILE,
    NR_MLOCK,
    NR_PAGETABLE,
    NR_SHMEM,
    NR_SHMEM_PMDMAPPED,
    NR_SHMEM_THPS,
    NR_SWAPCACHE,
    NR_UNEVICTABLE,
    NR_WRITEBACK,
    PRINTED_IN_THP,
)

__all__ = ["meminfo", "show_meminfo", "show_vmstat", "vmstat"]

PAGES_TO_KB = PAGE_SHIFT - 10
OVERCOMMIT_RATIO = 50  # sysctl vm.overcommit_ratio, per cent


def vmstat(mem: Memory) -> dict[str, int]:
    """/proc/vmstat: NR_* over all nodes, then events. Huge-page counters are in huge pages."""
    shown = {
        name: mem.vmstat.total(item) // (HPAGE_PMD_NR if item in PRINTED_IN_THP else 1)
        for item, name in enumerate(NODE_STATS)
    }
    return shown | dict(zip(EVENTS, mem.vmstat.event, strict=True))


def show_vmstat(mem: Memory) -> str:
    """The text of /proc/vmstat."""
    return "".join(f"{name} {value}\n" for name, value in vmstat(mem).items())


def meminfo(mem: Memory) -> dict[str, int]:
    """/proc/meminfo in kB: the lines that the model has a basis for, in the kernel's order.

    Kernel: meminfo_proc_show (fs/proc/meminfo.c).
    """
    nr = mem.vmstat.total
    # What is reserved for good, the zero page, is not managed.
    total = mem.nr_pages - 1
    swap = max(mem.swap.nr_slots - 1, 0)
    pages = {
        "MemTotal": total,
        "MemFree": nr(NR_FREE_PAGES),
        "Cached": max(nr(NR_FILE_PAGES) - nr(NR_SWAPCACHE), 0),
        "SwapCached": nr(NR_SWAPCACHE),
        "Active": nr(NR_ACTIVE_ANON) + nr(NR_ACTIVE_FILE),
        "Inactive": nr(NR_INACTIVE_ANON) + nr(NR_INACTIVE_FILE),
        "Active(anon)": nr(NR_ACTIVE_ANON),
        "Inactive(anon)": nr(NR_INACTIVE_ANON),
        "Active(file)": nr(NR_ACTIVE_FILE),
        "Inactive(file)": nr(NR_INACTIVE_FILE),
        "Unevictable": nr(NR_UNEVICTABLE),
        "Mlocked": nr(NR_MLOCK),
        "SwapTotal": swap,
        "SwapFree": swap - len(mem.swap.swap_map),
        "Dirty": nr(NR_FILE_DIRTY),
        "Writeback": nr(NR_WRITEBACK),
        "AnonPages": nr(NR_ANON_MAPPED),
        "Mapped": nr(NR_FILE_MAPPED),
        "Shmem": nr(NR_SHMEM),
        "PageTables": nr(NR_PAGETABLE),
        "CommitLimit": _commit_limit(mem, total, swap),
        "Committed_AS": mem.vm_committed_as,
        "HardwareCorrupted": mem.num_poisoned_pages,
        "AnonHugePages": nr(NR_ANON_THPS),
        "ShmemHugePages": nr(NR_SHMEM_THPS),
        "ShmemPmdMapped": nr(NR_SHMEM_PMDMAPPED),
        "FileHugePages": nr(NR_FILE_THPS),
        "FilePmdMapped": nr(NR_FILE_PMDMAPPED),
        "Hugepagesize": HPAGE_PMD_SIZE >> PAGE_SHIFT,
    }
    return {name: value << PAGES_TO_KB for name, value in pages.items()}


def _commit_limit(mem: Memory, total: int, swap: int) -> int:
    if mem.commit_limit is not None:
        return mem.commit_limit
    return total * OVERCOMMIT_RATIO // 100 + swap


def show_meminfo(mem: Memory) -> str:
    """The text of /proc/meminfo."""
    return "".join(_line(name, value) for name, value in meminfo(mem).items())


def _line(name: str, kilobytes: int) -> str:
    # Its name leaves room for five digits only.
    if name == "HardwareCorrupted":
        return f"{name}: {kilobytes:5} kB\n"
    return f"{name + ':':16}{kilobytes:8} kB\n"
