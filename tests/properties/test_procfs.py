"""What /proc shows of a machine agrees with itself, whatever happened before."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant
from properties.machines import run_machine
from properties.shadow import BASE, NR_PAGES, PAGE
from properties.test_file_states import FileOperations, PausedFileCollapses
from properties.test_machine_states import Operations, PausedCollapses

from pykhuge import Machine, Process
from pykhuge.procfs import Kpf, Smaps

PRESENT, SWAPPED, EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 62, 56))
PFN = np.uint64((1 << 55) - 1)
PAGE_KB, HUGE_KB = 4, 2048
# A prime: all places in a block come up in the pages that are looked at one by one.
STRIDE = 61


class HasMachine(Protocol):
    machine: Machine
    actors: list[Any]


class Watched(RuleBasedStateMachine):
    """After each step all views are read and held against each other."""

    @invariant()
    def views_agree(self: HasMachine) -> None:
        """Frames with meminfo, and each process's views with its counters."""
        if self.machine.mem.panic is not None:
            return
        check_frames(self.machine)
        processes = [actor.process for actor in self.actors]
        entries = [check_process(self.machine, process) for process in processes]
        mms = self.machine.mem.mms
        # A page table that a collapse holds apart, or an address space on its way out, maps pages
        # where no view looks.
        if len(mms) == len(processes) and not any(mm.detached for mm in mms):
            check_sharing(self.machine, processes, [each for part in entries for each in part])


def check_frames(machine: Machine) -> None:
    """What kpageflags and kpagecount add up to stands in meminfo too."""
    nr = machine.mem.pages.nr_pages
    flags = machine.procfs.kpageflags(0, nr)
    mapped = machine.procfs.kpagecount(0, nr) > 0
    meminfo = machine.procfs.meminfo()

    def has(bit: Kpf) -> Any:
        return flags & np.uint64(bit) != 0

    def kilobytes(on_lru: Any) -> int:
        huge = has(Kpf.KPF_COMPOUND_HEAD)
        return int(np.count_nonzero(on_lru) + 511 * np.count_nonzero(on_lru & huge)) * PAGE_KB

    anon, backed, active = has(Kpf.KPF_ANON), has(Kpf.KPF_SWAPBACKED), has(Kpf.KPF_ACTIVE)
    lru = has(Kpf.KPF_LRU) & ~has(Kpf.KPF_COMPOUND_TAIL)
    evictable = lru & ~has(Kpf.KPF_UNEVICTABLE)
    assert meminfo["MemFree"] == np.count_nonzero(has(Kpf.KPF_BUDDY)) * PAGE_KB
    assert meminfo["AnonPages"] == np.count_nonzero(mapped & anon) * PAGE_KB
    assert meminfo["Mapped"] == np.count_nonzero(mapped & ~anon) * PAGE_KB
    assert meminfo["PageTables"] == np.count_nonzero(has(Kpf.KPF_PGTABLE)) * PAGE_KB
    assert meminfo["Active(anon)"] == kilobytes(evictable & backed & active)
    assert meminfo["Inactive(anon)"] == kilobytes(evictable & backed & ~active)
    assert meminfo["Active(file)"] == kilobytes(evictable & ~backed & active)
    assert meminfo["Inactive(file)"] == kilobytes(evictable & ~backed & ~active)
    assert meminfo["Unevictable"] == kilobytes(lru & has(Kpf.KPF_UNEVICTABLE))


def check_process(machine: Machine, process: Process) -> list[Smaps]:
    """The sums of smaps are the counters of the mm; pagemap says what the page tables hold."""
    entries = machine.procfs.smaps(process)
    for entry in entries:
        fields = entry.fields
        clean, dirty = (fields[f"Shared_{way}"] + fields[f"Private_{way}"] for way in WAYS)
        assert fields["Rss"] == clean + dirty, entry
        assert fields["Pss_Dirty"] <= fields["Pss"] <= fields["Rss"] <= fields["Size"], entry
        assert all(fields[name] % HUGE_KB == 0 for name in HUGE), entry
        assert fields["Anonymous"] >= fields["AnonHugePages"], entry
    if not process.mm.detached:
        files, anon, _, shmem = process.mm.rss_stat
        assert sum(entry.fields["Rss"] for entry in entries) == (files + anon + shmem) * PAGE_KB
        assert sum(entry.fields["Anonymous"] for entry in entries) == anon * PAGE_KB
    words = machine.procfs.pagemap(process, BASE, NR_PAGES * PAGE)
    for page in range(0, NR_PAGES, STRIDE):
        word = words[page]
        pfn = int(word & PFN) if word & PRESENT else None
        assert pfn == process.pfn(BASE + page * PAGE), hex(page)
        assert not (word & PRESENT and word & SWAPPED)
    return entries


WAYS = ("Clean", "Dirty")
HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


def check_sharing(machine: Machine, processes: list[Process], entries: list[Smaps]) -> None:
    """The shares of all sharers of a page make up the page, and kpagecount knows how many."""
    shown = []
    for process in processes:
        for vma in process.mm.vmas:
            words = machine.procfs.pagemap(process, vma.vm_start, vma.vm_end - vma.vm_start)
            shown.append((words[words & PRESENT != 0] & PFN).astype(np.int64))
    frames = np.concatenate([*shown, np.zeros(0, np.int64)])
    nr = machine.mem.pages.nr_pages
    flags = machine.procfs.kpageflags(0, nr)
    frames = frames[flags[frames] & np.uint64(Kpf.KPF_ZERO_PAGE | Kpf.KPF_NOPAGE) == 0]
    times = np.bincount(frames, minlength=nr)
    known = flags & np.uint64(Kpf.KPF_NOPAGE) == 0
    assert (machine.procfs.kpagecount(0, nr)[known] == times[known]).all()
    # Shares are rounded down, a page's by less than a byte, a VMA's by less than a kilobyte.
    whole = np.count_nonzero(times) * PAGE_KB
    shares = sum(entry.fields["Pss"] for entry in entries)
    assert whole - len(entries) - 1 <= shares <= whole


class WatchedMemory(Watched, Operations):
    """Anonymous memory."""


class WatchedCollapses(Watched, PausedCollapses):
    """Collapses that stop on the way."""


class WatchedFiles(Watched, FileOperations):
    """Files."""


class WatchedFileCollapses(Watched, PausedFileCollapses):
    """Files, and collapses of them that stop on the way."""


@pytest.mark.parametrize(
    "kind", [WatchedMemory, WatchedCollapses, WatchedFiles, WatchedFileCollapses]
)
def test_views_of_proc_agree_whatever_happens(kind: Any, model_steps: int) -> None:
    """Frames, meminfo, smaps, pagemap and the mm's counters tell one story."""
    run_machine(kind, model_steps // 2)
