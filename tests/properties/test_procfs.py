"""What /proc says after random calls: its views agree with one another and with the counters."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt
from collapse_kit import HPAGE, NR, PAGE, small_machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykhuge import Advice, Machine, Process
from pykhuge.mm.errors import SegmentationFault
from pykhuge.mm.vmstat import MM_SWAPENTS

# Two blocks of anonymous memory, and behind them one of a memfd, shared and private.
ANON, SHARED, PRIVATE, END = (0x4000_0000 + block * HPAGE for block in (0, 2, 3, 4))
PFN = np.uint64((1 << 55) - 1)
PRESENT, EXCLUSIVE = np.uint64(1 << 63), np.uint64(1 << 56)
ADVICE = (
    Advice.MADV_DONTNEED,
    Advice.MADV_FREE,
    Advice.MADV_HUGEPAGE,
    Advice.MADV_NOHUGEPAGE,
    Advice.MADV_PAGEOUT,
    Advice.MADV_COLLAPSE,
)

ranges = st.tuples(
    st.integers(0, 4 * NR - 1), st.one_of(st.integers(1, 9), st.sampled_from((NR, 2 * NR)))
).map(lambda at: (ANON + at[0] * PAGE, min(at[1], 4 * NR - at[0]) * PAGE))
blocks = st.sampled_from(range(4)).map(lambda block: (ANON + block * HPAGE, HPAGE))
calls = st.tuples(
    st.integers(0, 7),
    st.one_of(
        st.tuples(st.sampled_from(("write", "write", "read", "munmap", "mlock")), ranges),
        st.tuples(st.sampled_from(("write", "read", *ADVICE)), blocks),
        st.tuples(st.sampled_from(ADVICE), ranges),
        st.tuples(st.sampled_from(("fork", "exit")), ranges),
    ),
)


def first_process(machine: Machine) -> Process:
    process = machine.process()
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, HPAGE)
    process.mmap(2 * HPAGE, addr=ANON, fixed=True)
    process.mmap(HPAGE, addr=SHARED, fixed=True, file=memfd, shared=True)
    process.mmap(HPAGE, addr=PRIVATE, fixed=True, file=memfd)
    return process


def call(processes: list[Process], which: int, what: str | Advice, at: tuple[int, int]) -> None:
    process, (addr, length) = processes[which % len(processes)], at
    if isinstance(what, Advice):
        process.madvise(addr, length, what)
    elif what == "write":
        process.write(addr, b"x" * length)
    elif what == "fork":
        if len(processes) < 4:
            processes.append(process.fork())
    elif what == "exit":
        if len(processes) > 1:
            processes.remove(process)
            process.exit()
    else:
        getattr(process, what)(addr, length)


def check_smaps(machine: Machine, process: Process) -> None:
    entries = [each.fields for each in machine.procfs.smaps(process)]
    for fields in entries:
        assert fields["Rss"] == sum(
            fields[f"{share}_{state}"]
            for share in ("Shared", "Private")
            for state in ("Clean", "Dirty")
        )
        assert fields["Pss_Dirty"] <= fields["Pss"] <= fields["Rss"] <= fields["Size"]
    rss = process.mm.rss_stat
    resident = sum(rss) - rss[MM_SWAPENTS]
    assert sum(fields["Rss"] for fields in entries) == resident * 4
    huge = {at: process.is_huge(at) for at in range(ANON, END, HPAGE)}
    words = {at: machine.procfs.pagemap(process, at, PAGE)[0] & PFN for at in huge if huge[at]}
    zero = sum(int(word) == machine.mem.huge_zero_pfn for word in words.values())
    names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    found = sum(fields[name] for fields in entries for name in names)
    assert found == 2048 * (sum(huge.values()) - zero)
    rollup = machine.procfs[f"{process.pid}/smaps_rollup"]
    assert f"\nRss:            {resident * 4:8} kB\n" in rollup


def check_pagemap(machine: Machine, process: Process) -> npt.NDArray[np.int64]:
    """Returns: frames of what is mapped, the zero pages not among them."""
    words = machine.procfs.pagemap(process, ANON, END - ANON)
    for page in range(0, len(words), 97):
        pfn = process.pfn(ANON + page * PAGE)
        assert pfn == (int(words[page] & PFN) if words[page] & PRESENT else None)
    pfns = (words[words & PRESENT != 0] & PFN).astype(np.int64)
    start = machine.mem.huge_zero_pfn
    zero = (pfns == machine.mem.zero_pfn) | (
        (pfns >= start) & (pfns < start + NR) if start is not None else False
    )
    assert not (words[words & PRESENT != 0][zero] & EXCLUSIVE).any()
    return pfns[~zero]


@given(st.lists(calls, max_size=25), st.sampled_from(("always", "madvise")))
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_the_views_agree_with_one_another_and_with_the_counters(
    steps: list[tuple[int, tuple[str | Advice, tuple[int, int]]]],
    enabled: str,
) -> None:
    """Parts of Rss, shares of all sharers, rss_stat, process.pfn and mapcounts."""
    machine = small_machine("64M", swap="16M")
    machine.thp.enabled = enabled
    processes = [first_process(machine)]
    for which, (what, at) in steps:
        with suppress(OSError, SegmentationFault):
            call(processes, which, what, at)
    mapped = np.concatenate([check_pagemap(machine, process) for process in processes])
    counts = np.bincount(mapped, minlength=machine.mem.pages.nr_pages)
    assert (machine.procfs.kpagecount(0, machine.mem.pages.nr_pages) == counts).all()
    for process in processes:
        check_smaps(machine, process)
    # What all sharers have of a page is the page; each VMA's sum is rounded down to a kB.
    entries = [each.fields for process in processes for each in machine.procfs.smaps(process)]
    lost = 4 * np.count_nonzero(counts) - sum(fields["Pss"] for fields in entries)
    assert 0 <= lost <= len(entries)
    machine.audit()
