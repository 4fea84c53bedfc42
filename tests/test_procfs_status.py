"""The files of /proc: which there are, and how they read."""

from __future__ import annotations

import re

import numpy as np
import pytest
from collapse_kit import MakeMachine

from pykhuge import Machine, Process
from pykhuge.process import PROT_EXEC, PROT_READ, PROT_WRITE

PAGE, BLOCK = 4096, 2 << 20


def values(text: str) -> dict[str, int]:
    """Numbers of lines such as "VmRSS:       8 kB"."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+)", text, re.M)}


def test_every_file_listed_can_be_read(machine: Machine, process: Process) -> None:
    """Those of the machine, and of each process."""
    names = list(machine.procfs)
    assert {"meminfo", "swaps", "vmstat", f"{process.pid}/smaps"} <= set(names)
    assert len(machine.procfs) == len(names)
    assert all(machine.procfs[name] or name.endswith(("/maps", "/smaps")) for name in names)


@pytest.mark.parametrize("name", ["zoneinfo", "999/maps", "1/comm", "", "maps"])
def test_a_name_that_is_not_there_is_refused_naming_those_that_are(
    machine: Machine, process: Process, name: str
) -> None:
    """ENOENT, as open(2) says."""
    with pytest.raises(FileNotFoundError, match=rf"allowed .*meminfo.*{process.pid}/maps"):
        machine.procfs[name]
    assert name not in machine.procfs


def test_the_files_of_a_process_go_with_it(machine: Machine, process: Process) -> None:
    """Text and numbers alike."""
    process.exit()
    assert not [name for name in machine.procfs if "/" in name]
    for read in (machine.procfs.smaps, lambda who: machine.procfs.pagemap(who, 0, PAGE)):
        with pytest.raises(FileNotFoundError, match=str(process.pid)):
            read(process)


def test_another_machines_process_is_refused(machine: Machine, make_machine: MakeMachine) -> None:
    """Its addresses mean nothing here."""
    stranger = make_machine().process()
    with pytest.raises(ValueError, match="allowed a process of this machine"):
        machine.procfs.smaps(stranger)


@pytest.mark.parametrize(("pfn", "nr"), [(-1, 1), (1 << 40, 1), (0, -1), (0, 1 << 40)])
def test_frames_that_are_not_there_are_refused(machine: Machine, pfn: int, nr: int) -> None:
    """The error says which are."""
    for read in (machine.procfs.kpageflags, machine.procfs.kpagecount):
        with pytest.raises(ValueError, match=r"allowed 0\.\."):
            read(pfn, nr)


@pytest.mark.parametrize(("addr", "length"), [(1, PAGE), (-PAGE, PAGE), (0, 1), (1 << 47, PAGE)])
def test_pagemap_takes_whole_pages_of_user_space(
    machine: Machine, process: Process, addr: int, length: int
) -> None:
    """The error names what was given."""
    with pytest.raises(ValueError, match="allowed"):
        machine.procfs.pagemap(process, addr, length)


def test_pagemap_shows_frames_and_holes(machine: Machine, process: Process) -> None:
    """Present and mapped once: bits 63 and 56."""
    addr = process.mmap(4 * PAGE)
    process.write(addr + PAGE, b"x")
    words = machine.procfs.pagemap(process, addr, 4 * PAGE)
    pfn = process.pfn(addr + PAGE)
    assert pfn is not None
    assert words.tolist() == [0, 1 << 63 | 1 << 56 | pfn, 0, 0]
    assert machine.procfs.kpagecount(pfn, 1).tolist() == [1]
    assert words.dtype == np.uint64


def test_status_counts_what_is_mapped_and_what_is_there(machine: Machine, process: Process) -> None:
    """Sizes by permission, pages by kind, in kB."""
    addr = process.mmap(BLOCK)
    process.write(addr, b"x" * 3 * PAGE)
    process.mmap(4 * PAGE, prot=PROT_READ | PROT_EXEC)
    shared = process.mmap(8 * PAGE, shared=True, prot=PROT_READ | PROT_WRITE)
    process.write(shared, b"x")
    process.mlock(addr, PAGE)
    text = machine.procfs[f"{process.pid}/status"]
    shown = values(text)
    assert "\nVmRSS:\t      16 kB\n" in text
    assert (shown["RssAnon"], shown["RssFile"], shown["RssShmem"]) == (12, 0, 4)
    assert shown["VmSize"] == 2048 + 16 + 32
    assert (shown["VmData"], shown["VmLib"], shown["VmLck"]) == (2048, 16, 4)
    assert shown["VmPTE"] == process.mm.pgtables_bytes // 1024
    assert (shown["VmSwap"], shown["THP_enabled"]) == (0, 1)


def test_swaps_reads_as_the_kernels_file(make_machine: MakeMachine) -> None:
    """The header alone where there is no swap device."""
    header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    assert make_machine().procfs["swaps"] == header
    line = make_machine(swap="16M").procfs["swaps"].removeprefix(header)
    assert re.fullmatch(r"/dev/zram0 {30}partition\t16380\t\t0\t\t-2\n", line)


def test_sharers_of_a_page_divide_its_size(machine: Machine, process: Process) -> None:
    """Pss of parent and child is half of Rss each."""
    process.write(process.mmap(8 * PAGE), b"x" * 8 * PAGE)
    child = process.fork()
    for sharer in (process, child):
        (entry,) = machine.procfs.smaps(sharer)
        assert (entry.fields["Rss"], entry.fields["Pss"]) == (32, 16)
        assert entry.fields["Shared_Dirty"] == 32
