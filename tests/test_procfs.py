"""machine.procfs: the files of /proc and the numbers in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, advised, faults

from pykhuge import Advice, KernelVersion, Machine, Process
from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.mm.page import PG_hwpoison, PG_referenced, PG_young
from pykhuge.mm.page_table import (
    SWP_HWPOISON,
    SWP_MIGRATION_READ,
    make_swap_pte,
    pte_index,
    pte_pfn,
)
from pykhuge.mm.rmap import pmd_of
from pykhuge.procfs import Kpf, Smaps

PRESENT, SWAP, FILE, UFFD_WP, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 57, 1 << 56
PFN = (1 << 55) - 1
RX = 5


def entry(machine: Machine, process: Process, addr: int) -> Smaps:
    """Smaps of the VMA at `addr`."""
    return next(each for each in machine.procfs.smaps(process) if each.start <= addr < each.end)


def some(fields: dict[str, int], *names: str) -> tuple[int, ...]:
    return tuple(fields[name] for name in names)


def word(machine: Machine, process: Process, addr: int) -> int:
    return int(machine.procfs.pagemap(process, addr, PAGE)[0])


def flags(machine: Machine, pfn: int) -> Kpf:
    return Kpf(int(machine.procfs.kpageflags(pfn, 1)[0]))


def set_pte(machine: Machine, process: Process, addr: int, pte: int) -> int:
    """Write a page-table entry; returns what was there."""
    table = pte_pfn(pmd_of(machine.mem, process.mm, addr) or 0)
    old = int(machine.mem.ram.words[table, pte_index(addr)])
    machine.mem.ram.words[table, pte_index(addr)] = pte
    return old


# Files and their names


def test_the_files_are_those_of_the_machine_and_of_every_process(make_machine: MakeMachine) -> None:
    """Iteration lists what can be read; a child has files of its own."""
    machine = make_machine()
    parent = machine.process()
    child = parent.fork()
    views = ("maps", "smaps", "smaps_rollup", "status")
    names = [f"{process.pid}/{view}" for process in (parent, child) for view in views]
    assert list(machine.procfs) == ["meminfo", "swaps", "vmstat", *names]
    assert len(machine.procfs) == 11
    assert all(isinstance(text, str) for text in machine.procfs.values())


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("name", ["nothing", "1/nothing", "99/smaps", "smaps", "", "x/smaps"])
def test_a_name_that_is_not_there_is_an_error_that_says_what_is(
    machine: Machine, name: str
) -> None:
    """FileNotFoundError, and not in the mapping."""
    assert name not in machine.procfs
    with pytest.raises(FileNotFoundError, match=f"{name}: allowed meminfo, swaps, vmstat, "):
        machine.procfs[name]


def test_a_process_that_has_exited_has_no_files(machine: Machine, process: Process) -> None:
    """Neither text nor numbers."""
    process.exit()
    with pytest.raises(
        FileNotFoundError, match=f"{process.pid}/smaps: allowed meminfo, swaps, vmstat"
    ):
        machine.procfs[f"{process.pid}/smaps"]
    for read in (machine.procfs.smaps, lambda dead: machine.procfs.pagemap(dead, 0, PAGE)):
        with pytest.raises(FileNotFoundError, match=f"{process.pid}: allowed"):
            read(process)


def test_a_process_on_its_way_out_has_no_files(machine: Machine, process: Process) -> None:
    """Its mm is still there, and is nobody's."""
    process.mm.mm_users = 0
    assert list(machine.procfs) == ["meminfo", "swaps", "vmstat"]
    process.mm.mm_users = 1


def test_the_files_are_read_only(machine: Machine) -> None:
    """There is no way to write one."""
    with pytest.raises(TypeError):
        machine.procfs["meminfo"] = "x"  # type: ignore[index]


def test_another_machines_process_is_refused(machine: Machine, make_machine: MakeMachine) -> None:
    """It is named in the error."""
    stranger = make_machine().process("stranger")
    with pytest.raises(ValueError, match=r"process=.*: allowed a process of this machine"):
        machine.procfs.smaps(stranger)


def test_looking_changes_nothing(machine: Machine, process: Process, block: int) -> None:
    """All views, read twice, read the same."""
    process.write(block, b"x" * HPAGE)
    first = dict(machine.procfs)
    assert dict(machine.procfs) == first


# vmstat and meminfo


def test_vmstat_prints_name_and_number(machine: Machine, process: Process, block: int) -> None:
    """A line each, as `vmstat()` has them."""
    process.write(block, b"x")
    lines = machine.procfs["vmstat"].splitlines()
    assert {name: int(number) for name, number in map(str.split, lines)} == machine.vmstat()
    assert machine.procfs.vmstat()["nr_anon_transparent_hugepages"] == 1


def test_vmstat_has_the_counters_of_zones_before_those_of_nodes(machine: Machine) -> None:
    """nr_mlock is one of them."""
    names = list(machine.vmstat())
    assert names[:3] == ["nr_free_pages", "nr_mlock", "nr_inactive_anon"]


def test_meminfo_prints_kilobytes_in_columns(machine: Machine) -> None:
    """HardwareCorrupted has a column of its own, as in the kernel."""
    machine.mem.num_poisoned_pages = 3
    text = machine.procfs["meminfo"]
    machine.mem.num_poisoned_pages = 0
    assert text.startswith("MemTotal:          65532 kB\nMemFree:           65532 kB\nCached:  ")
    assert "Active(anon):          0 kB\n" in text
    assert "HardwareCorrupted:    12 kB\n" in text
    assert text.endswith("FilePmdMapped:         0 kB\nHugepagesize:       2048 kB\n")


def test_meminfo_counts_each_kind_of_memory(machine: Machine, process: Process, block: int) -> None:
    """Huge, small, shared, cached, mlocked and page tables."""
    process.write(block, b"x")
    shared = process.mmap(8 * PAGE, shared=True)
    process.write(shared, b"x" * (3 * PAGE))
    process.mlock(shared, PAGE)
    machine.lru_add_drain_all()
    found = machine.procfs.meminfo()
    names = ("AnonPages", "AnonHugePages", "Mapped", "Shmem", "Cached", "Mlocked", "Committed_AS")
    assert some(found, *names) == (2048, 2048, 12, 12, 12, 4, 32)
    assert found["MemTotal"] - found["MemFree"] == 2048 + 12 + found["PageTables"]
    assert found["Active"] + found["Inactive"] + found["Unevictable"] == 2048 + 12
    assert found["Unevictable"] == 4


def test_meminfo_counts_swap(make_machine: MakeMachine) -> None:
    """The header's slot is not for use; what is read in again stays in the swap cache."""
    machine = make_machine(swap="1M")
    process = machine.process()
    where = process.mmap(64 * PAGE)
    process.write(where, b"x" * (64 * PAGE))
    process.madvise(where, 10 * PAGE, Advice.MADV_PAGEOUT)
    process.read(where, 1)
    found = machine.procfs.meminfo()
    cached = machine.vmstat()["nr_swapcached"] * 4
    assert some(found, "SwapTotal", "SwapFree", "SwapCached") == (1020, 980, cached)
    assert found["AnonPages"] == 220
    assert found["Cached"] == 0


def test_commit_limit_is_the_machines_or_half_of_memory(make_machine: MakeMachine) -> None:
    """vm.overcommit_ratio is 50 per cent, and swap is added."""
    assert make_machine(commit_limit="3M").procfs.meminfo()["CommitLimit"] == 3072
    assert make_machine(swap="1M").procfs.meminfo()["CommitLimit"] == 65532 // 2 // 4 * 4 + 1020


# maps


def test_maps_shows_permissions_offset_device_and_path(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """A line for each VMA; the path begins in column 73."""
    file = tmp_path / "a\nb"
    file.write_bytes(b"x" * (2 * PAGE))
    opened = process.open(str(file))
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, PAGE)
    mount = machine.tmpfs()
    named = process.open("n", os.O_RDWR | os.O_CREAT, tmpfs=mount)
    process.mmap(PAGE, addr=0x10000, prot=0)
    process.mmap(PAGE, addr=0x20000, prot=RX, file=opened, offset=PAGE)
    process.mmap(PAGE, addr=0x30000, file=memfd, shared=True)
    process.mmap(PAGE, addr=0x40000, file=named)
    process.mmap(PAGE, addr=0x50000, shared=True)
    lines = machine.procfs[f"{process.pid}/maps"].splitlines()
    stat = file.stat()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    assert lines[0] == "00010000-00011000 ---p 00000000 00:00 0 "
    assert lines[1].startswith(f"00020000-00021000 r-xp 00001000 {device} {stat.st_ino} ")
    paths = [str(tmp_path) + "/a\\012b", "/memfd:m (deleted)", "/n", "/dev/zero (deleted)"]
    assert [line[73:] for line in lines[1:]] == paths
    shown = [line.split()[1:4] for line in lines[2:]]
    assert shown == [
        ["rw-s", "00000000", "00:01"],
        ["rw-p", "00000000", "00:02"],
        ["rw-s", "00000000", "00:01"],
    ]
    assert len({line.split()[4] for line in lines}) == 5
    process.unlink("n", tmpfs=mount)
    assert "/n (deleted)\n" in machine.procfs[f"{process.pid}/maps"]


# smaps


def test_smaps_reads_as_v6_4_prints_it(machine: Machine, process: Process) -> None:
    """Letter for letter."""
    where = process.mmap(16 * PAGE, addr=0x7F0000000000)
    process.write(where, b"x" * (3 * PAGE))
    assert machine.procfs[f"{process.pid}/smaps"] == (
        "7f0000000000-7f0000010000 rw-p 00000000 00:00 0 \n"
        "Size:                 64 kB\n"
        "KernelPageSize:        4 kB\n"
        "MMUPageSize:           4 kB\n"
        "Rss:                  12 kB\n"
        "Pss:                  12 kB\n"
        "Pss_Dirty:            12 kB\n"
        "Shared_Clean:          0 kB\n"
        "Shared_Dirty:          0 kB\n"
        "Private_Clean:         0 kB\n"
        "Private_Dirty:        12 kB\n"
        "Referenced:           12 kB\n"
        "Anonymous:            12 kB\n"
        "LazyFree:              0 kB\n"
        "AnonHugePages:         0 kB\n"
        "ShmemPmdMapped:        0 kB\n"
        "FilePmdMapped:         0 kB\n"
        "Shared_Hugetlb:        0 kB\n"
        "Private_Hugetlb:       0 kB\n"
        "Swap:                  0 kB\n"
        "SwapPss:               0 kB\n"
        "Locked:                0 kB\n"
        "THPeligible:    0\n"
        "VmFlags: rd wr mr mw me ac \n"
    )


def test_smaps_rollup_is_the_sum_of_all_mappings(machine: Machine, process: Process) -> None:
    """Divided shares are added before they are rounded; Pss is told by kind."""
    private, shared = process.mmap(4 * PAGE), process.mmap(4 * PAGE, shared=True)
    process.write(private, b"x" * (3 * PAGE))
    process.write(shared, b"x" * (2 * PAGE))
    children = [process.fork(), process.fork()]
    for child in children:
        child.read(shared, 2 * PAGE)
    text = machine.procfs[f"{process.pid}/smaps_rollup"]
    assert text.splitlines()[0] == (
        f"{private:08x}-{shared + 4 * PAGE:08x} ---p 00000000 00:00 0".ljust(73) + "[rollup]"
    )
    found = {name: int(number) for name, number in re.findall(r"(\w+): +(\d+) kB", text)}
    assert some(found, "Rss", "Pss", "Pss_Anon", "Pss_File", "Pss_Shmem") == (20, 6, 3, 0, 2)
    apart = [each.fields for each in machine.procfs.smaps(process)]
    assert [each["Pss"] for each in apart] == [3, 2]
    assert sum(each["Rss"] for each in apart) == 20


def test_smaps_rollup_of_an_empty_address_space_is_all_zeros(
    machine: Machine, process: Process
) -> None:
    """From 0 to 0."""
    lines = machine.procfs[f"{process.pid}/smaps_rollup"].splitlines()
    assert lines[0].startswith("00000000-00000000 ---p ")
    assert all(line.endswith(" 0 kB") for line in lines[1:])
    assert machine.procfs[f"{process.pid}/smaps"] == machine.procfs[f"{process.pid}/maps"] == ""


def test_smaps_tells_huge_pages_by_kind(machine: Machine, process: Process, tmp_path: Path) -> None:
    """Anonymous, shmem and file, as far as a PMD maps them."""
    huge = advised(process)
    process.write(huge, b"x")
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, HPAGE)
    shmem = process.mmap(HPAGE, file=memfd, shared=True)
    process.write(shmem, b"x" * HPAGE)
    process.madvise(shmem, HPAGE, Advice.MADV_COLLAPSE)
    path = tmp_path / "text"
    path.write_bytes(b"x" * HPAGE)
    text = process.mmap(HPAGE, file=process.open(str(path)), prot=RX)
    process.read(text, HPAGE)
    process.madvise(text, HPAGE, Advice.MADV_COLLAPSE)
    names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Rss")
    found = [some(entry(machine, process, at).fields, *names) for at in (huge, shmem, text)]
    assert found == [(2048, 0, 0, 2048), (0, 2048, 0, 2048), (0, 0, 2048, 2048)]
    assert "hg" in entry(machine, process, huge).flags


def test_a_page_of_several_processes_is_shared_among_them(
    machine: Machine, process: Process
) -> None:
    """Each has its part of it; an exit gives it back."""
    where = process.mmap(4 * PAGE)
    process.write(where, b"x" * (4 * PAGE))
    child = process.fork()
    child.write(where, b"y")
    names = ("Rss", "Pss", "Shared_Dirty", "Private_Dirty", "Pss_Dirty")
    assert some(entry(machine, process, where).fields, *names) == (16, 10, 12, 4, 10)
    assert some(entry(machine, child, where).fields, *names) == (16, 10, 12, 4, 10)
    child.exit()
    assert some(entry(machine, process, where).fields, *names) == (16, 16, 0, 16, 16)


def test_zero_pages_are_no_part_of_rss(machine: Machine, process: Process, block: int) -> None:
    """Neither the small one nor the huge one."""
    process.read(block, 1)
    assert process.is_huge(block)
    small = process.mmap(4 * PAGE)
    process.read(small, 4 * PAGE)
    for at in (block, small):
        assert some(entry(machine, process, at).fields, "Rss", "Pss", "AnonHugePages") == (0, 0, 0)


def test_swap_is_shared_like_pages(machine: Machine, process: Process) -> None:
    """Swap counts entries, SwapPss divides a slot among them."""
    where = process.mmap(8 * PAGE)
    process.write(where, b"x" * (8 * PAGE))
    process.madvise(where, 8 * PAGE, Advice.MADV_PAGEOUT)
    fields = entry(machine, process, where).fields
    assert some(fields, "Rss", "Swap", "SwapPss") == (0, 32, 32)
    child = process.fork()
    child.munmap(where, 4 * PAGE)
    fields = entry(machine, process, where).fields
    assert some(fields, "Rss", "Swap", "SwapPss") == (0, 32, 24)


def test_swap_of_shmem_is_found_in_the_file(machine: Machine, process: Process) -> None:
    """Shared: what the file has on swap in the range. Private, writable: under holes alone."""
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, 8 * PAGE)
    shared = process.mmap(8 * PAGE, file=memfd, shared=True)
    process.write(shared, b"x" * (8 * PAGE))
    private = process.mmap(8 * PAGE, file=memfd)
    process.write(private + PAGE, b"y")
    part = process.mmap(2 * PAGE, file=memfd, offset=6 * PAGE, shared=True)
    process.madvise(shared, 8 * PAGE, Advice.MADV_PAGEOUT)
    swapped = memfd.inode.swapped * 4
    assert swapped == 32
    for at, swap in ((shared, 32), (private, 28), (part, 8)):
        assert some(entry(machine, process, at).fields, "Swap", "SwapPss") == (swap, 0)


def test_swap_of_shmem_counts_whole_where_a_mapping_has_nothing_of_its_own(
    machine: Machine, process: Process
) -> None:
    """Under a marker of a shared mapping, and in a private one that may not be written to."""
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, 8 * PAGE)
    shared = process.mmap(8 * PAGE, file=memfd, shared=True)
    process.write(shared, b"x" * (8 * PAGE))
    private = process.mmap(8 * PAGE, file=memfd)
    process.write(private + PAGE, b"y")
    process.mprotect(private, 8 * PAGE, 1)
    uffd = process.userfaultfd()
    uffd.register(shared, 8 * PAGE, missing=False, wp=True)
    uffd.writeprotect(shared, 2 * PAGE)
    process.madvise(shared, 8 * PAGE, Advice.MADV_PAGEOUT)
    assert entry(machine, process, shared).fields["Swap"] == 32
    assert entry(machine, process, private).fields["Swap"] == 32


def test_a_huge_page_on_swap_counts_whole_at_every_look(make_machine: MakeMachine) -> None:
    """Each part of a mapping has all of it, and each hole of a private one's table again."""
    machine = make_machine(kernel=KernelVersion.V6_18, swap="16M")
    process = machine.process()
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, HPAGE)
    shared = process.mmap(HPAGE, file=memfd, shared=True)
    process.write(shared, b"x" * HPAGE)
    process.madvise(shared, HPAGE, Advice.MADV_COLLAPSE)
    private = process.mmap(HPAGE, file=memfd)
    untouched = process.mmap(HPAGE, file=memfd)
    process.write(private + PAGE, b"y")
    part = process.mmap(2 * PAGE, file=memfd, offset=6 * PAGE, shared=True)
    machine.lru_add_drain_all()
    process.madvise(shared, HPAGE, Advice.MADV_PAGEOUT)
    assert memfd.inode.swapped == 512
    for at, looks in ((shared, 1), (part, 1), (untouched, 1), (private, 511)):
        assert entry(machine, process, at).fields["Swap"] == looks * 2048


def test_holes_of_one_table_find_swap_on_both_sides_of_a_huge_page(
    make_machine: MakeMachine,
) -> None:
    """A mapping out of step with the file: 256 looks at one swapped whole, 255 at small ones."""
    machine = make_machine(kernel=KernelVersion.V6_18, swap="16M")
    process = machine.process()
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, 2 * HPAGE)
    shared = process.mmap(2 * HPAGE, file=memfd, shared=True)
    process.write(shared, b"x" * (2 * HPAGE))
    process.madvise(shared, HPAGE, Advice.MADV_COLLAPSE)
    private = process.mmap(HPAGE, addr=1 << 40, fixed=True, file=memfd, offset=HPAGE // 2)
    process.write(private + HPAGE - PAGE, b"y")
    machine.lru_add_drain_all()
    process.madvise(shared, 2 * HPAGE, Advice.MADV_PAGEOUT)
    assert memfd.inode.swapped == 1024
    assert entry(machine, process, private).fields["Swap"] == 256 * 2048 + 255 * 4


def test_referenced_is_what_the_entry_or_the_page_remembers(
    machine: Machine, process: Process
) -> None:
    """A child's entries are old, until it or anybody else is known to have used the page."""
    where = process.mmap(4 * PAGE)
    process.write(where, b"x" * (4 * PAGE))
    child = process.fork()
    assert entry(machine, process, where).fields["Referenced"] == 16
    assert entry(machine, child, where).fields["Referenced"] == 0
    machine.mem.pages.flags[process.pfn(where) or 0] |= np.uint32(PG_young)
    machine.mem.pages.flags[process.pfn(where + PAGE) or 0] |= np.uint32(PG_referenced)
    assert entry(machine, child, where).fields["Referenced"] == 8


def test_mlocked_and_lazily_freed_memory_show(machine: Machine, process: Process) -> None:
    """Locked is a share of Pss, LazyFree what reclaim may drop."""
    locked, lazy = process.mmap(4 * PAGE, addr=0x10000), process.mmap(4 * PAGE, addr=0x20000)
    process.mlock(locked, 4 * PAGE)
    process.write(lazy, b"x" * (4 * PAGE))
    process.madvise(lazy, 2 * PAGE, Advice.MADV_FREE)
    found = entry(machine, process, locked)
    assert some(found.fields, "Locked", "LazyFree") == (16, 0)
    assert "lo" in found.flags
    assert some(entry(machine, process, lazy).fields, "Locked", "LazyFree") == (0, 8)
    process.write(lazy, b"y")
    assert some(entry(machine, process, lazy).fields, "Locked", "LazyFree") == (0, 4)


def test_thp_eligible_asks_the_knobs_and_the_mapping(
    machine: Machine, process: Process, block: int
) -> None:
    """Size, advice and `enabled`; no page need ever have been touched."""

    def eligible(addr: int) -> int:
        return entry(machine, process, addr).fields["THPeligible"]

    plain = process.mmap(HPAGE, addr=block + (1 << 30))
    short = process.mmap(PAGE, addr=block + (2 << 30))
    assert (eligible(block), eligible(plain), eligible(short)) == (1, 0, 0)
    with faults(machine, "always"):
        assert (eligible(block), eligible(plain), eligible(short)) == (1, 1, 0)
    with faults(machine, "never"):
        assert eligible(block) == 0


@pytest.mark.parametrize(
    ("prot", "shared", "names"),
    [
        (3, False, "rd wr mr mw me ac"),
        (1, False, "rd mr mw me"),
        (0, False, "mr mw me"),
        (7, False, "rd wr ex mr mw me ac"),
        (3, True, "rd wr sh mr mw me ms"),
    ],
)
def test_vm_flags_have_the_kernels_letters(
    machine: Machine, process: Process, prot: int, shared: bool, names: str
) -> None:
    """In the order of their bits."""
    where = process.mmap(PAGE, prot=prot, shared=shared)
    assert " ".join(entry(machine, process, where).flags) == names


def test_vm_flags_of_advice_and_of_read_only_files(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """A shared mapping of what may not be written to is no `sh`, and never `mw`."""
    path = tmp_path / "f"
    path.write_bytes(b"x")
    shared = process.mmap(PAGE, file=process.open(str(path)), shared=True, prot=1)
    assert entry(machine, process, shared).flags == ("rd", "mr", "me", "ms")
    where = process.mmap(PAGE)
    process.write(where, b"x")
    process.mprotect(where, PAGE, 1)
    assert entry(machine, process, where).flags == ("rd", "mr", "mw", "me", "ac")
    for advice, name in ((14, "hg"), (15, "nh"), (10, "dc"), (18, "wf")):
        process.madvise(where, PAGE, advice)
        assert name in entry(machine, process, where).flags
    quiet = process.mmap(PAGE, shared=True, noreserve=True)
    assert entry(machine, process, quiet).flags[-1] == "nr"


# pagemap


def test_pagemap_tells_frames_and_how_they_are_mapped(
    machine: Machine, process: Process, block: int
) -> None:
    """Nothing, one's own, of a file, the zero page, shared."""
    where = process.mmap(8 * PAGE)
    process.write(where, b"x")
    process.read(where + PAGE, 1)
    shared = process.mmap(PAGE, shared=True)
    process.write(shared, b"x")
    assert word(machine, process, where) == (process.pfn(where) or 0) | PRESENT | EXCLUSIVE
    assert word(machine, process, where + PAGE) == machine.mem.zero_pfn | PRESENT
    assert word(machine, process, where + 2 * PAGE) == 0
    assert word(machine, process, block - PAGE) == 0
    assert word(machine, process, shared) & ~PFN == PRESENT | EXCLUSIVE | FILE
    process.fork()
    assert word(machine, process, where) & ~PFN == PRESENT


def test_pagemap_of_a_huge_page_counts_frames_on(
    machine: Machine, process: Process, block: int
) -> None:
    """Any part of it; PM_FILE is not set for what a PMD maps, as at v6.4."""
    process.write(block, b"x")
    head = process.pfn(block) or 0
    words = machine.procfs.pagemap(process, block + 5 * PAGE, 20 * PAGE)
    assert words.dtype == np.uint64
    assert (words & PFN).tolist() == list(range(head + 5, head + 25))
    assert set((words & ~np.uint64(PFN)).tolist()) == {PRESENT | EXCLUSIVE}
    around = machine.procfs.pagemap(process, block - PAGE, HPAGE + 2 * PAGE)
    assert (around[0], around[-1]) == (0, 0)
    assert np.count_nonzero(around) == NR
    shared = process.mmap(HPAGE, shared=True)
    process.write(shared, b"x" * HPAGE)
    process.madvise(shared, HPAGE, Advice.MADV_COLLAPSE)
    assert word(machine, process, shared) & ~PFN == PRESENT | EXCLUSIVE


def test_pagemap_of_the_huge_zero_page_is_nobodys_own(
    machine: Machine, process: Process, block: int
) -> None:
    """Present, and no more."""
    process.read(block, 1)
    assert word(machine, process, block + PAGE) == (machine.mem.huge_zero_pfn or 0) + 1 | PRESENT


def test_pagemap_tells_swap_slots(machine: Machine, process: Process) -> None:
    """Type in bits 0..4, offset from bit 5 on."""
    where = process.mmap(4 * PAGE)
    process.write(where, b"x" * (4 * PAGE))
    process.madvise(where, 4 * PAGE, Advice.MADV_PAGEOUT)
    words = machine.procfs.pagemap(process, where, 4 * PAGE).tolist()
    assert {value & ~PFN for value in words} == {SWAP}
    assert {value & 31 for value in words} == {0}
    assert {(value & PFN) >> 5 for value in words} == set(machine.mem.swap.swap_map)


def test_pagemap_tells_userfaultfd_protection(machine: Machine, process: Process) -> None:
    """Of a page, of a swapped page, and of the marker where a file's page was."""
    where = process.mmap(2 * PAGE)
    process.write(where, b"x" * (2 * PAGE))
    uffd = process.userfaultfd()
    uffd.register(where, 2 * PAGE, missing=False, wp=True)
    uffd.writeprotect(where, 2 * PAGE)
    process.madvise(where, PAGE, Advice.MADV_PAGEOUT)
    assert word(machine, process, where) & ~PFN == SWAP | UFFD_WP
    assert word(machine, process, where + PAGE) & ~PFN == PRESENT | UFFD_WP | EXCLUSIVE
    memfd = process.memfd_create("m")
    process.ftruncate(memfd, PAGE)
    shared = process.mmap(PAGE, file=memfd, shared=True)
    process.write(shared, b"x")
    uffd.register(shared, PAGE, missing=False, wp=True)
    uffd.writeprotect(shared, PAGE)
    process.madvise(shared, PAGE, Advice.MADV_PAGEOUT)
    assert word(machine, process, shared) == SWAP | UFFD_WP | 31 | 1 << 5


def test_pagemap_and_smaps_of_entries_that_name_a_page(machine: Machine, process: Process) -> None:
    """A migration entry counts as mapped by this process alone; a hwpoison entry counts nowhere."""
    where = process.mmap(4 * PAGE)
    process.write(where, b"x")
    pfn = process.pfn(where) or 0
    old = set_pte(machine, process, where, make_swap_pte(SWP_MIGRATION_READ, pfn))
    assert word(machine, process, where) == SWAP | 24 | pfn << 5
    set_pte(machine, process, where, old)
    process.fork()
    old = set_pte(machine, process, where, make_swap_pte(SWP_MIGRATION_READ, pfn))
    found = entry(machine, process, where).fields
    assert some(found, "Rss", "Pss", "Private_Clean", "Swap") == (4, 4, 4, 0)
    set_pte(machine, process, where, make_swap_pte(SWP_HWPOISON, pfn))
    assert word(machine, process, where) == SWAP | 23 | pfn << 5
    assert some(entry(machine, process, where).fields, "Rss", "Swap") == (0, 0)
    set_pte(machine, process, where, old)


def test_device_memory_is_mapped_but_no_page_to_look_at(machine: Machine, process: Process) -> None:
    """Pagemap and smaps know of it, kpageflags and kpagecount do not."""
    where = process.mmap(PAGE)
    process.write(where, b"x")
    pfn = process.migrate_to_device(where)
    assert word(machine, process, where) == pfn | PRESENT | EXCLUSIVE
    assert entry(machine, process, where).fields["Rss"] == 4
    assert flags(machine, pfn) == Kpf.KPF_NOPAGE
    assert machine.procfs.kpagecount(pfn, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("addr", "length", "message"),
    [
        (1, PAGE, "addr=0x1: allowed multiples of 4096 below 0x7ffffffff000"),
        (-PAGE, PAGE, "addr=-0x1000: allowed"),
        (1 << 47, PAGE, "addr=0x800000000000: allowed"),
        (0, 1, "length=0x1: allowed multiples of 4096 up to 0x7ffffffff000"),
        (PAGE, -PAGE, "length=-0x1000: allowed multiples of 4096 up to 0x7fffffffe000"),
        (PAGE, 1 << 47, "length=0x800000000000: allowed"),
    ],
)
def test_pagemap_takes_whole_pages_of_user_space(
    machine: Machine, process: Process, addr: int, length: int, message: str
) -> None:
    """ValueError with the bounds."""
    with pytest.raises(ValueError, match=message):
        machine.procfs.pagemap(process, addr, length)


def test_pagemap_asks_the_head_how_often_a_huge_page_is_mapped(
    machine: Machine, process: Process, block: int
) -> None:
    """As at v6.4: bit 56 of every page of a PMD is the first one's."""
    process.write(block, b"x")
    child = process.fork()
    assert not word(machine, process, block + 5 * PAGE) & EXCLUSIVE
    child.munmap(block, PAGE)
    assert word(machine, process, block + 5 * PAGE) & EXCLUSIVE
    assert not word(machine, child, block + 5 * PAGE) & EXCLUSIVE


# kpageflags and kpagecount


def test_kpageflags_of_small_pages(machine: Machine, process: Process) -> None:
    """Anonymous, of a file, page table, zero page, free."""
    where, shared = process.mmap(PAGE), process.mmap(PAGE, shared=True)
    process.write(where, b"x")
    process.write(shared, b"x")
    process.lock_page(where).release()
    machine.lru_add_drain_all()
    mapped = Kpf.KPF_MMAP | Kpf.KPF_LRU | Kpf.KPF_UPTODATE | Kpf.KPF_SWAPBACKED
    mask = ~(Kpf.KPF_ACTIVE | Kpf.KPF_REFERENCED)
    anon = flags(machine, process.pfn(where) or 0) & mask
    assert anon == mapped | Kpf.KPF_ANON | Kpf.KPF_MAPPEDTODISK
    assert flags(machine, process.pfn(shared) or 0) & mask == mapped | Kpf.KPF_DIRTY
    assert flags(machine, machine.mem.zero_pfn) == Kpf.KPF_RESERVED | Kpf.KPF_ZERO_PAGE
    table = pte_pfn(pmd_of(machine.mem, process.mm, where) or 0)
    assert flags(machine, table) & Kpf.KPF_PGTABLE
    assert flags(machine, machine.mem.nr_pages - 1) == Kpf.KPF_BUDDY


def test_kpageflags_of_a_huge_page(machine: Machine, process: Process, block: int) -> None:
    """The head says most; every tail that it belongs to a mapped anonymous huge page."""
    process.write(block, b"x")
    head = process.pfn(block) or 0
    words = machine.procfs.kpageflags(head, NR)
    tail = Kpf.KPF_COMPOUND_TAIL | Kpf.KPF_THP | Kpf.KPF_ANON | Kpf.KPF_MMAP
    assert set(words[1:].tolist()) == {int(tail)}
    first = Kpf(int(words[0]))
    assert Kpf.KPF_COMPOUND_HEAD | Kpf.KPF_THP | Kpf.KPF_MAPPEDTODISK in first
    assert Kpf.KPF_COMPOUND_TAIL not in first
    # Mapped in part is mapped: the last of it goes with the last mapping.
    process.munmap(block, HPAGE - PAGE)
    assert flags(machine, head + 3) & Kpf.KPF_MMAP
    assert machine.procfs.kpagecount(head, NR).tolist() == [0] * (NR - 1) + [1]


def test_kpageflags_of_the_huge_zero_page(machine: Machine, process: Process, block: int) -> None:
    """All of it is a zero page, and huge."""
    process.read(block, 1)
    words = machine.procfs.kpageflags(machine.mem.huge_zero_pfn or 0, HPAGE_PMD_NR)
    wanted = np.uint64(Kpf.KPF_ZERO_PAGE | Kpf.KPF_THP)
    assert (words & wanted == wanted).all()
    assert not (words & np.uint64(Kpf.KPF_MMAP)).any()


def test_kpageflags_of_states_that_a_page_passes_through(
    machine: Machine, process: Process
) -> None:
    """Locked, mlocked, in the swap cache, known to be bad."""
    where = process.mmap(4 * PAGE)
    process.mlock(where, PAGE)
    process.write(where, b"x" * (4 * PAGE))
    locked = process.lock_page(where + PAGE)
    assert flags(machine, process.pfn(where + PAGE) or 0) & Kpf.KPF_LOCKED
    locked.release()
    mlocked = flags(machine, process.pfn(where) or 0)
    assert Kpf.KPF_MLOCKED | Kpf.KPF_UNEVICTABLE in mlocked
    process.madvise(where + 2 * PAGE, PAGE, Advice.MADV_PAGEOUT)
    process.fork()
    process.read(where + 2 * PAGE, 1)
    assert flags(machine, process.pfn(where + 2 * PAGE) or 0) & Kpf.KPF_SWAPCACHE
    bad = process.pfn(where + 3 * PAGE) or 0
    machine.mem.pages.flags[bad] |= np.uint32(PG_hwpoison)
    assert flags(machine, bad) & Kpf.KPF_HWPOISON
    assert machine.procfs.meminfo()["HardwareCorrupted"] == machine.mem.num_poisoned_pages * 4
    machine.mem.pages.flags[bad] &= np.uint32(~PG_hwpoison & 0xFFFFFFFF)


def test_a_split_pmd_leaves_its_page_dirty(machine: Machine, process: Process, block: int) -> None:
    """Where the PMD was: the PTEs' own dirty bits are as good, but reclaim asks the page."""
    process.write(block, b"x")
    head = process.pfn(block) or 0
    assert not flags(machine, head) & Kpf.KPF_DIRTY
    process.mprotect(block + PAGE, PAGE, 1)
    assert flags(machine, head) & Kpf.KPF_DIRTY


def test_kpagecount_counts_entries(machine: Machine, process: Process, block: int) -> None:
    """PTEs and PMDs, of each very page."""
    process.write(block, b"x")
    head = process.pfn(block) or 0
    process.fork()
    child = process.fork()
    assert set(machine.procfs.kpagecount(head, NR).tolist()) == {3}
    child.munmap(block, PAGE)
    assert machine.procfs.kpagecount(head, 2).tolist() == [2, 3]


@pytest.mark.parametrize("view", ["kpageflags", "kpagecount"])
def test_frames_are_those_of_the_machine(machine: Machine, view: str) -> None:
    """ValueError with the bounds; TypeError for what is no number."""
    read, end = getattr(machine.procfs, view), machine.mem.pages.nr_pages
    assert len(read(end - 1, 1)) == 1
    assert len(read(0, 0)) == 0
    for pfn, nr, message in (
        (-1, 1, f"pfn=-1: allowed 0..{end - 1}"),
        (end, 0, f"pfn={end}: allowed 0..{end - 1}"),
        (10, end, f"nr={end}: allowed 0..{end - 10} from frame 10 on"),
        (0, -1, f"nr=-1: allowed 0..{end} from frame 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            read(pfn, nr)
    with pytest.raises(TypeError, match="pfn='0': allowed integers"):
        read("0", 1)
