"""/proc/pid/status, what of it is about memory (task_mem, fs/proc/task_mmu.c); /proc/swaps."""

from __future__ import annotations

from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.mm.mm_types import MMF_DISABLE_THP, VM_EXEC, VM_LOCKED, VM_SHARED, VM_WRITE, Mm
from pykhuge.mm.mmzone import Memory

__all__ = ["show_status", "show_swaps", "status"]

PAGES_TO_KB = PAGE_SHIFT - 10


def status(mm: Mm) -> dict[str, int]:
    """The Vm* and Rss* lines in kB. No high-water marks are kept: VmPeak and VmHWM are not shown.

    A process has no program of its own: what is executable is a library (VmLib).
    """
    files, anon, swapped, shmem = (nr << PAGES_TO_KB for nr in mm.rss_stat)
    return {
        "VmSize": _kilobytes(mm, 0, 0),
        "VmLck": _kilobytes(mm, VM_LOCKED, VM_LOCKED),
        "VmRSS": files + anon + shmem,
        "RssAnon": anon,
        "RssFile": files,
        "RssShmem": shmem,
        "VmData": _kilobytes(mm, VM_WRITE | VM_SHARED, VM_WRITE),
        "VmLib": _kilobytes(mm, VM_EXEC | VM_WRITE, VM_EXEC),
        "VmPTE": mm.pgtables_bytes >> 10,
        "VmSwap": swapped,
    }


def _kilobytes(mm: Mm, mask: int, flags: int) -> int:
    """Size of the VMAs whose vm_flags are `flags` in the bits of `mask`."""
    found = (vma for vma in mm.vmas if vma.vm_flags & mask == flags)
    return sum(vma.vm_end - vma.vm_start for vma in found) >> 10


def show_status(_: Memory, mm: Mm) -> str:
    """The text of /proc/pid/status, from the line VmSize on."""
    lines = [f"{name}:\t{value:8} kB\n" for name, value in status(mm).items()]
    thp = not mm.flags & MMF_DISABLE_THP
    return "".join(lines) + f"THP_enabled:\t{int(thp)}\n"


def show_swaps(mem: Memory) -> str:
    """The text of /proc/swaps. The device has no name on a machine: it is called /dev/zram0."""
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    if not mem.swap.nr_slots:
        return head
    size = (mem.swap.nr_slots - 1) << PAGES_TO_KB
    used = len(mem.swap.swap_map) << PAGES_TO_KB
    # swap_show(): a name shorter than 40 letters is filled up to there, a number of less than
    # eight digits has another tab behind it.
    fields = "".join(
        f"\t{number}{'' if number >= 10_000_000 else chr(9)}" for number in (size, used)
    )
    return f"{head}{'/dev/zram0':40}partition{fields}\t-2\n"
