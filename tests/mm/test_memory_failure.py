"""memory_failure: whom the page is taken from, who is told, what is left, what the log says."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    fill,
    page_bytes,
    pageout,
    refused,
    rss,
)
from file_kit import memfd, shmem_block
from hypothesis import given, settings
from hypothesis import strategies as st

from pykhuge import (
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    Advice,
    BusError,
    KernelPanic,
    KernelVersion,
    Machine,
    Process,
    ScanResult,
    WouldBlock,
)
from pykhuge.mm.errors import BUS_MCEERR_AO, BUS_MCEERR_AR, EHWPOISON, Signal
from pykhuge.mm.page import PG_has_hwpoisoned, PG_hwpoison, PG_lru
from pykhuge.mm.page_table import SWP_HWPOISON, swp_offset, swp_type
from pykhuge.mm.rmap import ptes_of
from pykhuge.mm.swap import isolate_lru_pages, putback_lru_pages
from pykhuge.procfs import Kpf

S = ScanResult
HWPOISON = Advice.MADV_HWPOISON


def texts(machine: Machine) -> list[str]:
    """The log without times."""
    return [line.partition("] ")[2] for line in machine.log]


def failures(machine: Machine) -> list[str]:
    """What the log says of memory failures, without times and frames."""
    return [
        text.removeprefix("Memory failure: ").partition(": ")[2]
        for text in texts(machine)
        if text.startswith("Memory failure: ")
    ]


def touched(process: Process, addr: int, *, write: bool = False) -> tuple[int, int, int] | None:
    """The SIGBUS of a touch: address, code, lsb; None if there is none."""
    try:
        process.write(addr, b"x") if write else process.read(addr, 1)
    except BusError as error:
        return error.address, error.code, error.lsb
    return None


def entry(process: Process, addr: int) -> tuple[int, int]:
    """Type and offset of the swap-type entry at `addr`."""
    word = int(ptes_of(process.mem, process.mm, addr, addr + PAGE)[0])
    return swp_type(word), swp_offset(word)


@pytest.fixture
def page(process: Process) -> int:
    """An anonymous page of the process's own, on its LRU list."""
    addr = process.mmap(PAGE)
    process.write(addr, page_bytes(1))
    process.mem.sched.current = process.task
    return addr


# Anonymous pages.


def test_an_anonymous_page_becomes_an_entry_that_kills(
    machine: Machine, process: Process, page: int
) -> None:
    """Injected, late kill: nobody is told; the next touch is SIGBUS at its very address."""
    pfn = process.pfn(page)
    process.madvise(page, PAGE, HWPOISON)
    assert failures(machine) == ["recovery action for dirty LRU page: Recovered"]
    assert entry(process, page) == (SWP_HWPOISON, pfn)
    assert process.signals == []
    assert rss(process)["MM_ANONPAGES"] == rss(process)["MM_SWAPENTS"] == 0
    assert machine.mem.num_poisoned_pages == 1
    assert machine.mem.nodes[0].memory_failure["recovered"] == 1
    for write in (False, True):
        assert touched(process, page + 99, write=write) == (page + 99, BUS_MCEERR_AR, 12)
    assert machine.mem.poison.log == []  # no machine check at all


@pytest.mark.parametrize("version", [(6, 10), (6, 11)])
def test_who_injects_a_failure_is_told_at_once_since_6_11(
    make_machine: MakeMachine, version: tuple[int, int]
) -> None:
    """Action required, whatever it asked for; late kill for the others, as ever."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process("app")
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    process.mce_kill, child = "late", process.fork("child")
    process.madvise(addr + PAGE, PAGE, HWPOISON)
    told = version >= (6, 11)
    required = Signal(signal.SIGBUS, BUS_MCEERR_AR, addr + PAGE, 12)
    assert process.signals == [required] * told
    assert child.signals == []
    sending = f"Sending SIGBUS to app:{process.pid} due to hardware memory corruption"
    assert failures(machine) == [sending] * told + ["recovery action for dirty LRU page: Recovered"]
    process.poison(addr)
    assert touched(process, addr) == (addr, BUS_MCEERR_AR, 12)
    assert process.signals == [required] * told  # that of the touch is another one


def test_a_thread_that_injects_failures_of_many_pages_gets_one_signal(
    make_machine: MakeMachine,
) -> None:
    """SIGBUS is not queued twice; the log names the thread each time."""
    machine = make_machine(kernel=KernelVersion.V6_18)
    process = machine.process("app")
    addr = process.mmap(3 * PAGE)
    process.write(addr, block_bytes(0, 3))
    thread = machine.spawn(process.madvise.steps(addr, 3 * PAGE, HWPOISON), "thread")
    thread.finish()
    assert process.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AR, addr, 12)]
    sending = f"Sending SIGBUS to thread:{thread.pid} due to hardware memory corruption"
    assert failures(machine).count(sending) == 3


def test_who_injects_a_failure_of_a_clean_page_is_not_told(
    make_machine: MakeMachine, disk: Path
) -> None:
    """Nothing is lost."""
    machine = make_machine(kernel=KernelVersion.V6_18)
    process = machine.process("app")
    addr = process.mmap(HPAGE, file=process.open(str(disk)), prot=PROT_READ)
    process.read(addr, PAGE)
    process.madvise(addr, PAGE, HWPOISON)
    assert process.signals == []
    assert process.read(addr, PAGE) == page_bytes(0)


def kpf(machine: Machine, pfn: int) -> Kpf:
    """/proc/kpageflags of one frame."""
    return Kpf(int(machine.procfs.kpageflags(pfn, 1)[0]))


def killings(machine: Machine) -> list[str]:
    """What the log says of tasks that have touched known poison, without times."""
    return [text for text in texts(machine) if text.startswith("MCE: Killing ")]


@pytest.mark.parametrize("write", [False, True])
def test_every_touch_of_known_poison_is_in_the_log(
    machine: Machine, process: Process, page: int, write: bool
) -> None:
    """x86's do_sigbus: by name, pid and the very address, each time; of a thread by its own."""
    process.madvise(page, PAGE, HWPOISON)
    line = "due to hardware memory corruption fault at"
    for _ in range(2):
        touched(process, page + 99, write=write)
    assert killings(machine) == [f"MCE: Killing app:{process.pid} {line} {page + 99:x}"] * 2
    call = process.write.steps(page, b"x") if write else process.read.steps(page, 1)
    thread = machine.spawn(call, "thread")
    with pytest.raises(BusError):
        thread.finish()
    assert killings(machine)[2:] == [f"MCE: Killing thread:{thread.pid} {line} {page:x}"]


def test_the_kernel_s_own_way_to_known_poison_kills_nobody(
    machine: Machine, process: Process, page: int
) -> None:
    """get_user_pages: EFAULT, as nobody there asks for FOLL_HWPOISON; MADV_POPULATE_* does."""
    process.madvise(page, PAGE, HWPOISON)
    for call in (
        lambda: process.get(page, 1),
        lambda: process.pin(page, 1),
        lambda: process.madvise(page, PAGE, HWPOISON),
        lambda: process.madvise(page, PAGE, Advice.MADV_SOFT_OFFLINE),
    ):
        assert refused(call) == errno.EFAULT
    for advice in (Advice.MADV_POPULATE_READ, Advice.MADV_POPULATE_WRITE):
        assert refused(lambda advice=advice: process.madvise(page, PAGE, advice)) == EHWPOISON
    assert refused(lambda: process.mlock(page, PAGE)) == errno.ENOMEM
    assert killings(machine) == []


def test_a_touch_that_ends_at_a_bad_line_before_is_not_killed_for_poison_behind(
    machine: Machine, process: Process
) -> None:
    """The program has not come as far as the page that is known to be bad."""
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    process.madvise(addr + PAGE, PAGE, HWPOISON)
    process.poison(addr + 64)
    with pytest.raises(BusError):
        process.read(addr, 2 * PAGE)
    assert killings(machine) == []


@pytest.mark.parametrize("policy", ["early", "late", "default"])
def test_a_child_inherits_what_it_wants_to_be_told(process: Process, policy: str) -> None:
    """PR_MCE_KILL is kept in the flags of the task, which fork copies."""
    process.mce_kill = policy
    assert process.fork().mce_kill == policy


def test_a_dirty_page_that_is_lost_is_marked_as_an_error(
    make_machine: MakeMachine, machine: Machine, process: Process, page: int
) -> None:
    """KPF_ERROR, also of an anonymous page, until PG_error was taken out in 6.12."""
    pfn = process.pfn(page)
    assert pfn is not None
    process.madvise(page, PAGE, HWPOISON)
    assert Kpf.KPF_ERROR in kpf(machine, pfn)
    machine.unpoison_memory(pfn)
    assert kpf(machine, pfn) == Kpf.KPF_BUDDY
    later = make_machine(kernel=KernelVersion.at(6, 12))
    addr = (other := later.process()).mmap(PAGE)
    other.write(addr, b"x")
    (lost,) = (held := other.get(addr, 1)).pfns.tolist()
    other.madvise(addr, PAGE, HWPOISON)
    held.release()
    assert kpf(later, lost) & (Kpf.KPF_ERROR | Kpf.KPF_HWPOISON) == Kpf.KPF_HWPOISON


def test_the_frame_is_never_allocated_again(machine: Machine, process: Process, page: int) -> None:
    """Not when the process ends, nor by anybody who takes all there is."""
    pfn = process.pfn(page)
    process.madvise(page, PAGE, HWPOISON)
    process.exit()
    hog = machine.process("hog")
    free = machine.vmstat()["nr_free_pages"]
    addr = hog.mmap(free * PAGE)
    with pytest.raises(MemoryError):
        hog.write(addr, bytes(free * PAGE))
    assert pfn not in {hog.pfn(addr + number * PAGE) for number in range(free)}
    assert machine.mem.pages.refcount[pfn] == 1


def test_a_load_of_a_poisoned_line_is_told_at_once_and_the_page_goes(
    machine: Machine, process: Process, page: int
) -> None:
    """Action required: SIGBUS for the page's address; the child that shares it is not told."""
    child = process.fork("child")
    process.poison(page + 130)
    assert touched(process, page + 140) == (page, BUS_MCEERR_AR, 12)
    assert failures(machine) == [
        f"Sending SIGBUS to app:{process.pid} due to hardware memory corruption",
        "recovery action for dirty LRU page: Recovered",
    ]
    assert process.signals == child.signals == []
    assert touched(child, page + 7) == (page + 7, BUS_MCEERR_AR, 12)
    (mce,) = machine.mem.poison.log
    assert texts(machine)[:5] == [
        f"mce: Uncorrected hardware memory error in user-access at {mce.addr:x}",
        "mce: [Hardware Error]: Machine check events logged",
        *mce.lines(),
    ]


@pytest.mark.parametrize("policy", ["early", "late", "default"])
@pytest.mark.parametrize("sysctl", [False, True])
def test_who_has_asked_for_it_is_told_early(
    machine: Machine, process: Process, page: int, policy: str, sysctl: bool
) -> None:
    """prctl(PR_MCE_KILL) goes before sysctl; the signal is one of action optional."""
    machine.memory_failure_early_kill = sysctl
    child = process.fork("child")
    child.mce_kill = policy
    process.mce_kill = "late"
    process.madvise(page, PAGE, HWPOISON)
    early = policy == "early" or (policy == "default" and sysctl)
    expected = [Signal(signal.SIGBUS, BUS_MCEERR_AO, page, 12)] if early else []
    assert child.signals == expected
    assert process.signals == []


def test_a_clean_page_that_nobody_has_dirtied_kills_nobody_early(
    machine: Machine, process: Process, page: int
) -> None:
    """MADV_FREE: not dirty, so the signal waits for the next touch."""
    machine.memory_failure_early_kill = True
    process.madvise(page, PAGE, Advice.MADV_FREE)
    machine.mem.pages.flags[process.pfn(page)] &= np.uint32(0xFFFFFFF7)
    process.madvise(page, PAGE, HWPOISON)
    assert process.signals == []
    assert failures(machine) == ["recovery action for clean LRU page: Recovered"]
    assert touched(process, page) == (page, BUS_MCEERR_AR, 12)


def test_known_poison_is_ehwpoison(machine: Machine, process: Process, page: int) -> None:
    """The second report changes nothing."""
    pfn = process.pfn(page)
    assert pfn is not None
    machine.memory_failure(pfn)
    assert refused(lambda: machine.memory_failure(pfn)) == EHWPOISON
    assert failures(machine)[-1] == "already hardware poisoned"
    assert machine.mem.num_poisoned_pages == 1
    assert touched(process, page) == (page, BUS_MCEERR_AR, 12)


@pytest.mark.parametrize(
    ("version", "said", "counted"),
    [
        ((6, 10), ["already hardware poisoned"], 1),
        ((6, 11), ["already hardware poisoned", "recovery action for already poisoned: Failed"], 2),
        ((6, 17), ["recovery action for already poisoned page: Failed"], 1),
    ],
)
def test_known_poison_has_a_result_since_6_11_and_counts_once_since_6_17(
    make_machine: MakeMachine, version: tuple[int, int], said: list[str], counted: int
) -> None:
    """EHWPOISON each time; what was counted twice stays when one is taken back."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    pfn = machine.mem.nr_pages - 5
    machine.memory_failure(pfn, injected=True)
    machine.log.clear()
    assert refused(lambda: machine.memory_failure(pfn, injected=True)) == EHWPOISON
    assert failures(machine) == said
    assert machine.procfs.meminfo()["HardwareCorrupted"] == 4 * counted
    counts = machine.mem.nodes[0].memory_failure
    assert (counts["recovered"], counts["failed"], counts["total"]) == (1, counted - 1, counted)
    machine.audit()
    machine.unpoison_memory(pfn)
    assert machine.mem.num_poisoned_pages == counted - 1


def test_a_failure_that_is_injected_again_is_told_its_caller_again(
    make_machine: MakeMachine,
) -> None:
    """A huge page that could not be split is still mapped: of the page alone, by its entry."""
    machine = make_machine(kernel=KernelVersion.V6_18)
    process = machine.process("app")
    process.write(addr := advised(process), block_bytes())
    held, bad = process.get(addr, 1), addr + 7 * PAGE
    for _ in range(2):
        assert refused(lambda: process.madvise(bad, PAGE, HWPOISON)) == EHWPOISON
    assert process.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AR, bad, lsb) for lsb in (21, 12)]
    assert failures(machine)[-2:] == [
        f"Sending SIGBUS to app:{process.pid} due to hardware memory corruption",
        "recovery action for already poisoned page: Failed",
    ]
    held.release()


def test_an_mlocked_page_goes_all_the_same(machine: Machine, process: Process, page: int) -> None:
    """TTU_IGNORE_MLOCK."""
    process.mlock(page, PAGE)
    process.madvise(page, PAGE, HWPOISON)
    assert machine.vmstat()["nr_mlock"] == machine.vmstat()["nr_unevictable"] == 0
    assert failures(machine) == ["recovery action for dirty LRU page: Recovered"]


def test_a_pinned_page_is_unmapped_but_not_recovered(
    machine: Machine, process: Process, page: int
) -> None:
    """A device may still write to it: anonymous pages are called recovered nevertheless."""
    pins = process.pin(page, 1)
    process.madvise(page, PAGE, HWPOISON)
    assert touched(process, page) == (page, BUS_MCEERR_AR, 12)
    assert failures(machine) == ["recovery action for dirty LRU page: Recovered"]
    pins.release()


def test_the_charge_of_a_lost_page_is_returned(make_machine: MakeMachine) -> None:
    """Its references never end, so its cgroup is uncharged by hand."""
    machine = make_machine("64M")
    group = machine.memcg("1M")
    process = machine.process(memcg=group)
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    usage = group.usage
    process.madvise(addr, PAGE, HWPOISON)
    assert group.usage == usage - 1


@pytest.mark.parametrize("dirty", [False, True])
def test_a_page_in_the_swap_cache(machine: Machine, process: Process, dirty: bool) -> None:
    """Clean: dropped, and read again from the device. Dirty: kept, to kill who comes for it."""
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    pageout(process, addr, [0])
    process.read(addr, 1)
    pfn = process.pfn(addr)
    assert pfn is not None
    if dirty:
        machine.mem.pages.flags[pfn] |= np.uint32(8)
    machine.memory_failure(pfn)
    kind, result = ("dirty", "Delayed") if dirty else ("clean", "Recovered")
    assert failures(machine) == [
        "keeping poisoned page in swap cache",
        f"recovery action for {kind} swapcache page: {result}",
    ]
    assert rss(process)["MM_SWAPENTS"] == 1
    if dirty:
        assert touched(process, addr + 3) == (addr + 3, BUS_MCEERR_AR, 12)
    else:
        assert process.read(addr, PAGE) == page_bytes(0)
        assert process.pfn(addr) != pfn


# Files.


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of the host of one block."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes())
    return path


def test_a_clean_page_of_a_disk_file_is_read_again(
    machine: Machine, process: Process, disk: Path
) -> None:
    """Nobody notices, not even the task that loads the bad line."""
    file = process.open(str(disk))
    addr = process.mmap(HPAGE, file=file, prot=PROT_READ)
    process.read(addr, 16 * PAGE)
    pfn = process.poison(addr + PAGE, 3)
    assert process.read(addr, 16 * PAGE) == block_bytes(0, 16)
    assert process.signals == []
    assert process.pfn(addr + PAGE) not in (None, pfn)
    assert failures(machine) == [
        "corrupted page was clean: dropped without side effects",
        "recovery action for clean LRU page: Recovered",
    ]
    assert machine.mem.num_poisoned_pages == 1


def test_a_dirty_page_of_a_disk_file_is_lost_and_fsync_says_so(
    machine: Machine, process: Process, disk: Path
) -> None:
    """EIO once; the page is read again as the disk has it; other pages are written."""
    file = process.open(str(disk), os.O_RDWR)
    addr = process.mmap(HPAGE, file=file, shared=True)
    process.write(addr, b"new" * 2000)
    pfn = process.pfn(addr)
    assert pfn is not None
    machine.memory_failure(pfn)
    assert failures(machine) == ["recovery action for dirty LRU page: Recovered"]
    assert touched(process, addr) == (addr, BUS_MCEERR_AR, 12)
    assert refused(lambda: process.fsync(file)) == errno.EIO
    assert refused(lambda: process.fsync(file)) is None
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    assert process.read(addr, PAGE) == page_bytes(0)
    assert disk.read_bytes()[PAGE:6000] == (b"new" * 2000)[PAGE:6000]


def test_a_page_of_shmem_stays_in_the_cache_as_the_proof(
    machine: Machine, process: Process
) -> None:
    """Off the LRU, a reference more; mapping, read and write of it fail until it is cut off."""
    file = memfd(process, range(4), size=4 * PAGE)
    addr = process.mmap(4 * PAGE, file=file, shared=True)
    process.read(addr, 4 * PAGE)
    pfn = process.cached_pfn(file, 1)
    assert pfn is not None
    machine.memory_failure(pfn)
    pages = machine.mem.pages
    assert process.cached_pfn(file, 1) == pfn
    assert pages.refcount[pfn] == 2
    assert not pages.flags[pfn] & PG_lru
    assert touched(process, addr + PAGE) == (addr + PAGE, BUS_MCEERR_AR, 12)
    late = machine.process("late")
    theirs = late.mmap(4 * PAGE, file=late.receive(file), shared=True)
    assert touched(late, theirs + PAGE, write=True) == (theirs + PAGE, BUS_MCEERR_AR, 12)
    assert refused(lambda: process.pread(file, PAGE, 1)) == errno.EIO
    assert refused(lambda: process.pwrite(file, PAGE, b"x")) == errno.EIO
    assert process.pread(file, 0, 2 * PAGE) == page_bytes(0)
    assert late.read(theirs, PAGE) == page_bytes(0)
    process.fallocate(file, PAGE, PAGE, punch_hole=True, keep_size=True)
    assert process.pread(file, PAGE, PAGE) == bytes(PAGE)
    assert late.read(theirs + PAGE, PAGE) == bytes(PAGE)
    assert pages.refcount[pfn] == 1


def test_early_kill_tells_all_who_map_that_part_of_a_file(
    machine: Machine, process: Process
) -> None:
    """Whether or not they have ever touched it."""
    file = memfd(process, range(2), size=2 * PAGE)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.write(addr, b"x")
    idle = machine.process("idle")
    theirs = idle.mmap(2 * PAGE, file=idle.receive(file), shared=True)
    machine.memory_failure_early_kill = True
    process.madvise(addr, PAGE, HWPOISON)
    assert process.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AO, addr, 12)]
    assert idle.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AO, theirs, 12)]


# Huge pages.


@pytest.mark.parametrize("shmem", [False, True])
def test_a_huge_page_is_split_and_loses_one_page(
    machine: Machine, process: Process, shmem: bool
) -> None:
    """The other 511 keep their contents."""
    if shmem:
        block = shmem_block(machine)
        process, addr = block.process, block.addr
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    else:
        addr = advised(process)
        process.write(addr, block_bytes())
    assert process.is_huge(addr)
    machine.log.clear()
    process.madvise(addr + 7 * PAGE, PAGE, HWPOISON)
    assert not process.is_huge(addr)
    assert failures(machine) == ["recovery action for dirty LRU page: Recovered"]
    assert touched(process, addr + 7 * PAGE) == (addr + 7 * PAGE, BUS_MCEERR_AR, 12)
    assert process.read(addr, 7 * PAGE) == block_bytes(0, 7)
    assert process.read(addr + 8 * PAGE, 504 * PAGE) == block_bytes(8, 504)
    assert machine.vmstat()["thp_split_page"] == 1


def test_a_huge_page_that_is_held_is_not_split(machine: Machine, process: Process) -> None:
    """EBUSY; the page is marked, and stays where it is; once free, that frame is out of use."""
    addr = advised(process)
    process.write(addr, block_bytes())
    head = process.pfn(addr)
    assert head is not None
    pins = process.pin(addr, 1)
    assert refused(lambda: process.madvise(addr + 7 * PAGE, PAGE, HWPOISON)) == errno.EBUSY
    assert failures(machine) == ["recovery action for unsplit thp: Ignored"]
    assert process.is_huge(addr)
    assert process.read(addr, HPAGE) == block_bytes()
    pins.release()
    free = machine.vmstat()["nr_free_pages"]
    process.munmap(addr, HPAGE)
    assert machine.mem.pages.flags[head + 7] == PG_hwpoison
    # 511 of it, and the deposited page table, its PMD table
    assert machine.vmstat()["nr_free_pages"] == free + NR - 1 + 2


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("shmem", [False, True])
def test_a_huge_page_that_cannot_be_split_tells_who_maps_it_since_6_11(
    make_machine: MakeMachine, shmem: bool, early: bool
) -> None:
    """EHWPOISON, failed: all of 2 MiB is said to be lost, at the address of the bad page."""
    machine = make_machine(kernel=KernelVersion.at(6, 11))
    if shmem:
        block = shmem_block(machine)
        process, addr = block.process, block.addr
        process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    else:
        process = machine.process("app")
        process.write(addr := advised(process), block_bytes())
    child, other, held = process.fork("child"), process.fork("other"), process.get(addr, 1)
    child.munmap(addr, PAGE)  # of anonymous memory, maps the rest by a table
    child.mce_kill = "early" if early else "late"
    other.munmap(addr, HPAGE)
    other.mce_kill = "early"
    machine.log.clear()
    bad = addr + 7 * PAGE
    assert refused(lambda: process.madvise(bad, PAGE, HWPOISON)) == EHWPOISON
    assert process.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AR, bad, 21)]
    assert child.signals == [Signal(signal.SIGBUS, BUS_MCEERR_AO, bad, 21)] * early
    assert other.signals == []
    told = [process, child] if early else [process]
    assert failures(machine) == [
        *(
            f"Sending SIGBUS to {each.task.comm}:{each.pid} due to hardware memory corruption"
            for each in told
        ),
        "recovery action for unsplit thp: Failed",
    ]
    counts = machine.mem.nodes[0].memory_failure
    assert (counts["failed"], counts["ignored"], counts["total"]) == (1, 0, 1)
    assert process.read(addr, HPAGE) == block_bytes()
    held.release()


def test_a_scrubber_that_finds_a_held_huge_page_bad_kills_nobody_late(
    make_machine: MakeMachine,
) -> None:
    """Nobody has touched it; who does, later, is told of the page alone."""
    machine = make_machine(kernel=KernelVersion.at(6, 11))
    process = machine.process("app")
    process.write(addr := advised(process), block_bytes())
    held, pfn = process.get(addr, 1), process.poison(addr + 3 * PAGE)
    assert refused(lambda: machine.memory_failure(pfn)) == EHWPOISON
    assert process.signals == []
    bad = addr + 3 * PAGE
    assert touched(process, bad) == (bad, BUS_MCEERR_AR, 12)
    held.release()


def test_a_file_block_with_a_bad_page_is_not_mapped_by_a_pmd(
    machine: Machine,
) -> None:
    """PG_has_hwpoisoned, of a huge page that could not be split: do_set_pmd refuses."""
    block = shmem_block(machine)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_COLLAPSE)
    held = block.process.get(block.addr, 1)
    assert refused(lambda: block.process.madvise(block.addr, 1, HWPOISON)) == errno.EBUSY
    other = machine.process("other")
    theirs = other.mmap(HPAGE, file=other.receive(block.file), shared=True)
    assert other.read(theirs + PAGE, 1) == page_bytes(1)[:1]
    assert not other.is_huge(theirs)
    held.release()


def test_a_piece_with_a_bad_page_still_says_so(make_machine: MakeMachine) -> None:
    """PG_has_hwpoisoned stays with that one of the pieces, until the bad page is alone."""
    machine = make_machine(kernel=KernelVersion.V6_18)
    block = shmem_block(machine)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_COLLAPSE)
    head, held = block.pfn(0), block.process.get(block.addr, 1)
    bad = block.addr + 9 * PAGE
    assert refused(lambda: block.process.madvise(bad, 1, HWPOISON)) == EHWPOISON
    held.release()
    for cut, marked in ((256, [0]), (12, [8]), (8, [])):
        block.process.fallocate(block.file, cut * PAGE, PAGE, punch_hole=True, keep_size=True)
        flags = machine.mem.pages.flags[head : head + NR]
        assert np.flatnonzero(flags & PG_has_hwpoisoned).tolist() == marked
        assert flags[9] & PG_hwpoison
    machine.audit()


# Pages of other kinds.


def test_a_free_frame_is_taken_off_the_allocator(machine: Machine) -> None:
    """And put back by unpoison, if it was only injected."""
    free = machine.vmstat()["nr_free_pages"]
    pfn = machine.mem.nr_pages - 5
    machine.memory_failure(pfn, injected=True)
    assert failures(machine) == ["recovery action for free buddy page: Recovered"]
    assert machine.vmstat()["nr_free_pages"] == free - 1
    machine.audit()
    machine.unpoison_memory(pfn)
    assert machine.vmstat()["nr_free_pages"] == free
    assert machine.log[-1].endswith(f"Unpoison: Software-unpoisoned page {pfn:#x}")


@pytest.mark.parametrize(
    ("version", "kind"), [((6, 10), "unknown page"), ((6, 11), "get hwpoison page")]
)
def test_a_page_table_and_the_zero_page_cannot_be_dealt_with(
    make_machine: MakeMachine, version: tuple[int, int], kind: str
) -> None:
    """EBUSY, and they go on being used."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process("app")
    process.write(page := process.mmap(PAGE), page_bytes(1))
    table = process.mm.pmd_tables[page >> 30]
    assert refused(lambda: machine.memory_failure(table)) == errno.EBUSY
    assert failures(machine) == ["unhandlable page.", f"recovery action for {kind}: Ignored"]
    assert process.read(page, PAGE) == page_bytes(1)
    zero = process.mmap(PAGE)
    assert refused(lambda: process.madvise(zero, PAGE, HWPOISON)) == errno.EBUSY
    assert failures(machine)[-1] == "recovery action for reserved kernel page: Ignored"


@pytest.mark.parametrize(("version", "result"), [((6, 10), "Failed"), ((6, 11), "Ignored")])
def test_a_page_that_leaves_its_list_before_its_lock_is_had_is_unknown(
    make_machine: MakeMachine, version: tuple[int, int], result: str
) -> None:
    """EBUSY either way; it is counted as what it is called."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process("app")
    process.write(addr := process.mmap(PAGE), b"x")
    machine.lru_add_drain_all()
    pfn, lock = process.pfn(addr), process.lock_page(addr)
    assert pfn is not None
    task = machine.spawn(machine.memory_failure.steps(pfn))
    while task.step():
        pass
    isolate_lru_pages(machine.mem, np.array([pfn]))
    lock.release()
    assert refused(task.finish) == errno.EBUSY
    assert failures(machine) == [
        "Unknown page state",
        f"recovery action for unknown page: {result}",
    ]
    assert machine.mem.nodes[0].memory_failure[result.lower()] == 1
    putback_lru_pages(machine.mem, np.array([pfn]))


def test_device_memory_is_the_drivers_affair(machine: Machine, process: Process, page: int) -> None:
    """ENXIO."""
    pfn = process.migrate_to_device(page)
    assert refused(lambda: machine.memory_failure(pfn)) == errno.ENXIO
    assert failures(machine) == ["recovery action for dax page: Failed"]
    assert refused(lambda: machine.memory_failure(pfn + 1)) == errno.ENXIO  # a free one
    assert process.read(page, PAGE) == page_bytes(1)


def test_memory_failure_waits_for_a_collapse_that_holds_the_page(
    machine: Machine, process: Process
) -> None:
    """The reference taken meanwhile does not stop the collapse, which has looked already."""
    addr = advised(process)
    fill(process, addr)
    machine.lru_add_drain_all()
    pfn = process.pfn(addr)
    collapse = machine.spawn(machine.collapse.steps(process, addr))
    collapse.run_until("copied")
    with pytest.raises(WouldBlock):
        process.madvise(addr, PAGE, HWPOISON)
    assert machine.mem.num_poisoned_pages == 0
    assert collapse.finish() is S.SCAN_SUCCEED
    assert pfn is not None
    machine.memory_failure(pfn)
    assert failures(machine) == ["recovery action for free buddy page: Recovered"]
    assert process.read(addr, HPAGE) == block_bytes()


@pytest.mark.parametrize("soft", [False, True])
def test_a_page_that_a_collapse_has_isolated_is_given_up_at_once(
    machine: Machine, process: Process, soft: bool
) -> None:
    """PG_lru is asked for before the lock: the plain call has the same end as the task."""
    addr = advised(process)
    fill(process, addr)
    machine.lru_add_drain_all()
    pfn, other = process.pfn(addr + 7 * PAGE), process.pfn(addr + 8 * PAGE)
    assert pfn is not None
    assert other is not None
    collapse = machine.spawn(machine.collapse.steps(process, addr))
    collapse.run_until("copied")
    call = machine.soft_offline_page if soft else machine.memory_failure
    number = errno.EIO if soft else errno.EBUSY
    assert refused(lambda: call(pfn)) == number
    assert refused(lambda: machine.spawn(call.steps(other)).finish()) == number
    assert failures(machine).count("unhandlable page.") == 2
    assert machine.mem.num_poisoned_pages == (0 if soft else 2)
    assert collapse.finish() is S.SCAN_SUCCEED


@pytest.mark.parametrize("soft", [False, True])
def test_a_locked_page_on_its_way_to_a_list_is_waited_for(
    machine: Machine, process: Process, page: int, soft: bool
) -> None:
    """It is drained to its list first, and then its lock is needed."""
    pfn, held = process.pfn(page), process.lock_page(page)
    assert pfn is not None
    assert not machine.mem.pages.flags[pfn] & PG_lru
    call = machine.soft_offline_page if soft else machine.memory_failure
    with pytest.raises(WouldBlock):
        call(pfn)
    assert machine.log == []
    held.release()


def test_the_huge_zero_page_is_refused_before_it_counts(machine: Machine, process: Process) -> None:
    """EBUSY; thp_split_page_failed is of pages that could have been split."""
    addr = advised(process)
    process.read(addr, 1)
    assert process.pfn(addr) == machine.mem.huge_zero_pfn
    assert refused(lambda: process.madvise(addr, PAGE, HWPOISON)) == errno.EBUSY
    assert failures(machine) == ["recovery action for unsplit thp: Ignored"]
    assert machine.vmstat()["thp_split_page_failed"] == 0


@pytest.mark.parametrize(
    ("kernel", "splitter"),
    [(KernelVersion.REF, "split_huge_page_to_list"), (KernelVersion.V6_18, "__folio_split")],
    ids=["REF", "6.18"],
)
def test_a_split_of_the_huge_zero_page_is_warned_of_ten_times(
    make_machine: MakeMachine, kernel: KernelVersion, splitter: str
) -> None:
    """In five seconds; then the log tells how often it was asked for besides, and by its name."""
    machine = make_machine(kernel=kernel)
    process = machine.process("app")
    addr = advised(process)
    process.read(addr, 1)

    def fail(page: int) -> None:
        assert refused(lambda: process.madvise(addr + page * PAGE, PAGE, HWPOISON)) is not None

    for page in range(11):
        fail(page)
    warning = "huge_memory: Called split_huge_page for huge zero page"
    assert texts(machine).count(warning) == 10
    machine.clock.advance_to(machine.clock.now_ns + 5_000_000_000)
    machine.log.clear()
    fail(11)
    assert texts(machine)[1:3] == [f"{splitter}: 1 callbacks suppressed", warning]


def test_without_recovery_a_memory_failure_is_a_panic(
    make_machine: MakeMachine,
) -> None:
    """vm.memory_failure_recovery=0."""
    machine = make_machine("64M")
    machine.memory_failure_recovery = False
    with pytest.raises(KernelPanic, match="Memory failure on page 64"):
        machine.memory_failure(100)


# After it.


def test_entries_are_handed_on_moved_and_dropped(machine: Machine, process: Process) -> None:
    """Fork copies them, mremap moves them, munmap and MADV_DONTNEED drop them."""
    addr = process.mmap(4 * PAGE)
    process.write(addr, block_bytes(0, 4))
    process.madvise(addr, 2 * PAGE, HWPOISON)
    child = process.fork()
    assert touched(child, addr) == (addr, BUS_MCEERR_AR, 12)
    new = 0x600000000000
    process.mremap(addr, 4 * PAGE, new)
    assert touched(process, new + PAGE + 1) == (new + PAGE + 1, BUS_MCEERR_AR, 12)
    process.madvise(new, PAGE, Advice.MADV_DONTNEED)
    assert process.read(new, PAGE) == bytes(PAGE)
    assert process.read(new + 2 * PAGE, 2 * PAGE) == block_bytes(2, 2)
    child.munmap(addr, 4 * PAGE)
    machine.audit()
    assert machine.mem.num_poisoned_pages == 2


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_known_poison_of_anonymous_memory_fails_the_swap_in_of_a_collapse(
    machine: Machine, process: Process, is_khugepaged: bool
) -> None:
    """Counted as swapped out, found after the allocation: FAIL, again and again."""
    addr = advised(process)
    fill(process, addr)
    process.madvise(addr + 9 * PAGE, PAGE, HWPOISON)
    for number in (1, 2):
        assert machine.collapse(process, addr, is_khugepaged=is_khugepaged) is S.SCAN_FAIL
        assert machine.vmstat()["thp_collapse_alloc"] == number
    assert refused(lambda: process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)) == errno.EINVAL


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_known_poison_of_shmem_is_not_on_the_lru(machine: Machine, is_khugepaged: bool) -> None:
    """PAGE_LRU, EAGAIN."""
    block = shmem_block(machine)
    block.process.madvise(block.addr + 9 * PAGE, PAGE, HWPOISON)
    result = machine.collapse(block.process, block.addr, is_khugepaged=is_khugepaged)
    assert result is S.SCAN_PAGE_LRU
    with pytest.raises(OSError, match="SCAN_PAGE_LRU") as refusal:
        block.process.madvise(block.addr, HPAGE, Advice.MADV_COLLAPSE)
    assert refusal.value.errno == errno.EAGAIN


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_known_poison_of_a_clean_disk_file_is_read_again_and_collapses(
    machine: Machine, process: Process, disk: Path, is_khugepaged: bool
) -> None:
    """A hole, that readahead fills."""
    file = process.open(str(disk))
    addr = process.mmap(HPAGE, file=file, prot=PROT_READ | PROT_EXEC)
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    process.read(addr, HPAGE)
    pfn = process.cached_pfn(file, 9)
    assert pfn is not None
    machine.memory_failure(pfn)
    assert file.f_mapping.nrpages == NR - 1
    machine.collapse(process, addr, is_khugepaged=is_khugepaged)
    assert machine.vmstat()["nr_file_hugepages"] == 1
    assert process.read(addr, HPAGE) == block_bytes()


def test_unpoison_undoes_an_injection_and_nothing_else(
    machine: Machine, process: Process, page: int
) -> None:
    """The frame is free, the entry stays; refused for a good page, and after a real failure."""
    pfn = process.pfn(page)
    assert pfn is not None
    assert refused(lambda: machine.unpoison_memory(pfn)) == errno.EBUSY
    process.madvise(page, PAGE, HWPOISON)
    free = machine.vmstat()["nr_free_pages"]
    machine.unpoison_memory(pfn)
    assert machine.vmstat()["nr_free_pages"] == free + 1
    assert machine.mem.num_poisoned_pages == 0
    assert touched(process, page) == (page, BUS_MCEERR_AR, 12)
    machine.memory_failure(pfn)
    assert refused(lambda: machine.unpoison_memory(pfn)) == errno.EOPNOTSUPP
    assert "Unpoison: Disabled after HW memory failure" in machine.log[-1]


def test_unpoison_refuses_what_somebody_still_has(machine: Machine, process: Process) -> None:
    """A page of shmem, which the cache keeps."""
    file = memfd(process, range(1), size=PAGE)
    addr = process.mmap(PAGE, file=file, shared=True)
    process.write(addr, b"x")
    pfn = process.pfn(addr)
    assert pfn is not None
    process.madvise(addr, PAGE, HWPOISON)
    assert refused(lambda: machine.unpoison_memory(pfn)) == errno.EBUSY
    process.ftruncate(file, 0)
    machine.unpoison_memory(pfn)
    assert machine.mem.num_poisoned_pages == 0


@pytest.mark.parametrize("version", [(6, 10), (6, 11)])
def test_unpoison_logs_the_frame_first_since_6_11(
    make_machine: MakeMachine, version: tuple[int, int]
) -> None:
    """And goes on in lower case."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    file = memfd(machine.process("app"), range(1), size=PAGE)
    free, cached = machine.mem.nr_pages - 5, file.f_mapping.i_pages.load(0)

    def unpoisoned(pfn: int) -> str:
        refused(lambda: machine.unpoison_memory(pfn))
        return texts(machine)[-1].removeprefix("Unpoison: ")

    lines = [(unpoisoned(free), free, "Page was already unpoisoned")]
    machine.memory_failure(free, injected=True)
    lines.append((unpoisoned(free), free, "Software-unpoisoned page"))
    machine.memory_failure(cached, injected=True)
    lines.append((unpoisoned(cached), cached, "Someone grabs the hwpoison page"))
    machine.memory_failure(free)
    lines.append((unpoisoned(free), free, "Disabled after HW memory failure"))
    for line, pfn, text in lines:
        later = f"{pfn:#x}: {text[0].lower()}{text[1:]}"
        assert line == (later if version >= (6, 11) else f"{text} {pfn:#x}")


def test_unpoison_logs_ten_lines_in_five_seconds(machine: Machine) -> None:
    """Whatever they say; the first behind them tells how many were left out."""
    first = machine.mem.nr_pages - 20
    machine.memory_failure(first, injected=True)
    machine.log.clear()
    machine.unpoison_memory(first)
    for pfn in range(first, first + 12):
        assert refused(lambda pfn=pfn: machine.unpoison_memory(pfn)) == errno.EBUSY
    refusals = [f"Unpoison: Page was already unpoisoned {first + nr:#x}" for nr in range(9)]
    assert texts(machine) == [f"Unpoison: Software-unpoisoned page {first:#x}", *refusals]
    machine.log.clear()
    machine.clock.advance_to(machine.clock.now_ns + 5_000_000_000)
    assert refused(lambda: machine.unpoison_memory(first)) == errno.EBUSY
    assert texts(machine) == ["unpoison_memory: 3 callbacks suppressed", refusals[0]]


def test_arguments_are_checked(machine: Machine, process: Process, page: int) -> None:
    """Frames that are none, policies that are none; nothing has happened then."""
    for call in (machine.memory_failure, machine.soft_offline_page, machine.unpoison_memory):
        with pytest.raises(ValueError, match=r"pfn=-1: allowed 0\.\."):
            call(-1)
        with pytest.raises(TypeError, match="pfn='x': allowed integers"):
            call("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mce_kill='now': allowed early, late, default"):
        process.mce_kill = "now"
    with pytest.raises(ValueError, match="memory_failure_early_kill=1: allowed False and True"):
        machine.memory_failure_early_kill = 1  # type: ignore[assignment]
    assert refused(lambda: process.madvise(page + 1, PAGE, HWPOISON)) == errno.EINVAL
    assert refused(lambda: process.madvise(0x1000, PAGE, HWPOISON)) == errno.EFAULT
    assert machine.mem.num_poisoned_pages == 0


# Anything may fail.


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    bad=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), st.booleans()), max_size=12),
)
def test_whatever_fails_everything_adds_up_and_the_rest_is_unharmed(
    seed: int, bad: list[tuple[int, int, bool]]
) -> None:
    """Pages of all kinds, by hard and soft offlining, in any order; then collapses, then exits."""
    machine = Machine("1G", swap="8M", seed=seed, cpus=2)
    process = machine.process("app")
    small = process.mmap(100 * PAGE)
    process.write(small, block_bytes(0, 100))
    pageout(process, small, range(10, 20))
    process.read(small + 15 * PAGE, 3 * PAGE)
    child = process.fork()
    process.write(small + 40 * PAGE, block_bytes(40, 20))
    huge = advised(process)
    process.write(huge, block_bytes())
    file = memfd(process, range(100), size=100 * PAGE)
    shared = process.mmap(100 * PAGE, file=file, shared=True, prot=PROT_READ | PROT_WRITE)
    process.read(shared, 50 * PAGE)
    places = [small, huge, shared]
    lost: set[int] = set()
    for where, page, soft in bad:
        addr = places[where % 3] + page * PAGE
        victim = child if where == 3 else process
        pfn = victim.pfn(addr) if where < 4 else None
        frame = pfn if pfn is not None else page * 977 % machine.mem.nr_pages
        call = machine.soft_offline_page if soft else machine.memory_failure
        refused(lambda: call(frame))  # noqa: B023
        if pfn is not None and not soft:
            lost.add(addr)
        machine.audit()
    for start, nr in ((small, 100), (huge, 100), (shared, 100)):
        for page in range(nr):
            addr = start + page * PAGE
            try:
                assert process.read(addr, PAGE) == page_bytes(page)
            except BusError:
                assert addr in lost
    machine.collapse(process, huge)
    machine.audit()
    child.exit()
    process.exit()
    machine.audit()
