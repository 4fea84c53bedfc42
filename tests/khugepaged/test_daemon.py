"""The daemon: whom it visits, how far a visit goes, when it sleeps, and what wakes it."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from collapse_kit import HPAGE, NR, PAGE, MakeMachine, advised, fill
from file_kit import memfd, register, shmem_block

from pykhuge import Advice, Machine, Process, WouldBlock
from pykhuge.hw.memory import PAGE_SHIFT
from pykhuge.kernel.locking import READ, WRITE
from pykhuge.kernel.sched import Task
from pykhuge.khugepaged.scan_result import ScanResult as S

SCAN_SLEEP, ALLOC_SLEEP = 10_000, 60_000


def unregistered(machine: Machine, nr_blocks: int = 1, pages: Iterable[int] = range(NR)) -> Process:
    """A process with blocks that the daemon would collapse if it knew of them."""
    process = machine.process("busy")
    addr = advised(process, nr_blocks * HPAGE)
    pages = list(pages)
    for number in range(nr_blocks):
        fill(process, addr + number * HPAGE, pages)
    return process


def register_blocks(process: Process) -> None:
    """Ask for huge pages once more, now that there are small ones."""
    vma = process.mm.vmas[0]
    process.madvise(vma.vm_start, vma.vm_end - vma.vm_start, Advice.MADV_HUGEPAGE)


def busy(machine: Machine, nr_blocks: int = 1, pages: Iterable[int] = range(NR)) -> Process:
    """A registered process with blocks that the daemon would collapse."""
    process = unregistered(machine, nr_blocks, pages)
    register_blocks(process)
    return process


def start_of(process: Process) -> int:
    """Where its first VMA begins."""
    return process.mm.vmas[0].vm_start


def registered(process: Process) -> bool:
    """Whether it is in the daemon's list."""
    return process.mm in [slot.mm for slot in process.mem.khugepaged_scan.mm_head]


def cursor(machine: Machine) -> tuple[object, int]:
    """The mm the daemon is at, and the address where it goes on."""
    scan = machine.mem.khugepaged_scan
    return scan.mm_slot and scan.mm_slot.mm, scan.address


def results(machine: Machine) -> list[str]:
    """The status of every block scanned since the last call."""
    events = [record.event for record in machine.trace if "scan_" in record.event.name]
    machine.trace.clear()
    return [(getattr(event, "status", None) or event.result).text for event in events]


# Who is registered.


def test_untouched_memory_registers_nobody(process: Process) -> None:
    """Anonymous memory is eligible once it has an anon_vma; MADV_HUGEPAGE alone is not enough."""
    addr = advised(process)
    assert not registered(process)
    fill(process, addr, [0])
    assert not registered(process)  # `enabled` was never at that fault
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    assert registered(process)


def test_a_fault_in_an_empty_eligible_block_registers(process: Process) -> None:
    """do_huge_pmd_anonymous_page: before it knows whether there is a huge page."""
    addr = advised(process, 2 * HPAGE)
    process.write(addr, b"x")
    assert registered(process)


def test_a_fault_in_a_block_with_a_page_table_does_not_register(process: Process) -> None:
    """The PTE path never looks."""
    addr = advised(process)
    fill(process, addr, [0])
    process.write(addr + PAGE, b"x")
    assert not registered(process)


@pytest.mark.parametrize("enabled", ["madvise", "never"])
def test_memory_that_may_not_be_huge_registers_nobody(
    machine: Machine, process: Process, enabled: str
) -> None:
    """`enabled` is asked at every place."""
    machine.thp.enabled = enabled
    addr = process.mmap(HPAGE)
    process.write(addr, b"x")
    if enabled == "never":
        process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    assert not registered(process)


def test_mapping_shmem_registers_at_once(machine: Machine, process: Process) -> None:
    """mmap_region: shmem is eligible without a page."""
    machine.thp.shmem_enabled = "always"
    process.mmap(HPAGE, file=memfd(process, range(0), size=HPAGE), shared=True)
    assert registered(process)


def test_the_whole_vma_is_judged_before_madvise_cuts_it(machine: Machine, process: Process) -> None:
    """MADV_HUGEPAGE of one page of a block: the mm is registered, though no part is eligible."""
    addr = process.mmap(HPAGE)
    fill(process, addr, [0])
    process.madvise(addr, PAGE, Advice.MADV_HUGEPAGE)
    assert registered(process)
    machine.khugepaged.step()
    assert results(machine) == []


def test_a_child_of_a_registered_process_is_registered(machine: Machine) -> None:
    """khugepaged_fork: last in the list; and a child of another is not."""
    parent = busy(machine)
    child = parent.fork()
    assert [slot.mm for slot in machine.mem.khugepaged_scan.mm_head] == [parent.mm, child.mm]
    assert not registered(machine.process("other").fork())


def test_a_process_that_ends_leaves_the_list(machine: Machine) -> None:
    """khugepaged_exit; the daemon never comes to it."""
    first, second = busy(machine), busy(machine)
    first.exit()
    assert [slot.mm for slot in machine.mem.khugepaged_scan.mm_head] == [second.mm]


def test_a_failed_exit_leaves_the_process_registered(machine: Machine) -> None:
    """A plain call that would have to wait has changed nothing."""
    process = busy(machine)
    holder: Task[None] = Task(machine.mem.sched, "holder", 99)
    holder.start(iter(()))  # type: ignore[arg-type]
    assert process.mm.mmap_lock.trylock(holder, READ)
    with pytest.raises(WouldBlock, match="mmap_lock"):
        process.exit()
    assert registered(process)
    process.mm.mmap_lock.unlock(holder)


# How far one scan goes.


def test_one_scan_visits_pages_to_scan_pages_and_the_next_goes_on(machine: Machine) -> None:
    """512 for each block and one for the mm: the visit ends behind the block that fills it up."""
    process = busy(machine, 5, [0])
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = 2 * NR
    start = start_of(process)
    for blocks, stop in ((2, 2), (2, 4)):
        assert machine.khugepaged.step() == SCAN_SLEEP
        assert results(machine) == ["exceed_none_pte"] * blocks
        assert cursor(machine) == (process.mm, start + stop * HPAGE)
    # The list's head is met for the first time in this scan: there is budget for a block of it.
    machine.khugepaged.step()
    assert results(machine) == ["exceed_none_pte"] * 2
    assert cursor(machine) == (process.mm, start + HPAGE)
    assert machine.khugepaged_settings.full_scans == 1


def test_the_mm_itself_counts_as_one_page(machine: Machine) -> None:
    """With 513 pages to scan, one block and the mm are all; with 514, a second block."""
    busy(machine, 3, [0])
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = NR + 1
    machine.khugepaged.step()
    assert results(machine) == ["exceed_none_pte"]
    machine.khugepaged_settings.pages_to_scan = NR + 2
    machine.khugepaged.step()
    assert results(machine) == ["exceed_none_pte"] * 2


def test_each_vma_passed_over_counts_as_one_page(machine: Machine, process: Process) -> None:
    """Three ineligible VMAs and the mm are four pages: the fifth is worth a look at a block."""
    for number in range(3):
        process.mmap(PAGE, addr=0x10000 + 2 * number * PAGE, fixed=True)
    addr = advised(process)
    fill(process, addr, [0])
    process.madvise(addr, HPAGE, Advice.MADV_HUGEPAGE)
    machine.khugepaged_settings.max_ptes_none = 0
    other = busy(machine, 1, [0])
    machine.khugepaged_settings.pages_to_scan = 4 + NR
    machine.khugepaged.step()
    assert results(machine) == ["exceed_none_pte"]
    assert cursor(machine)[0] is process.mm
    machine.khugepaged_settings.pages_to_scan = 4 + NR + 1
    machine.mem.khugepaged_scan.mm_slot = None
    machine.khugepaged.step()
    # The budget is looked at between blocks and mms alone: the rest of it lets the next mm in.
    assert results(machine) == ["exceed_none_pte"] * 2
    assert cursor(machine) == (other.mm, start_of(other) + HPAGE)


def test_a_block_that_reaches_allocation_ends_the_visit_not_the_scan(machine: Machine) -> None:
    """mmap_lock was dropped: the mm is entered anew for the next block, and counts again."""
    process = busy(machine, 3)
    machine.khugepaged_settings.pages_to_scan = 2 * NR
    machine.khugepaged.step()
    assert [process.is_huge(start_of(process) + n * HPAGE) for n in range(3)] == [True, True, False]
    assert machine.khugepaged_settings.pages_collapsed == 2
    machine.khugepaged.step()
    assert process.is_huge(start_of(process) + 2 * HPAGE)


def test_processes_are_visited_in_the_order_of_registration(machine: Machine) -> None:
    """One scan goes round the list once, however much it is allowed."""
    processes = [busy(machine, 1, [number]) for number in range(3)]
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = 1 << 20
    assert machine.khugepaged.step() == SCAN_SLEEP
    mms = [record.event.mm for record in machine.trace]  # type: ignore[attr-defined]
    assert mms == [process.mm.hashed_ptr for process in processes]
    assert machine.khugepaged_settings.full_scans == 1


def test_a_busy_mm_is_passed_over_without_progress(machine: Machine) -> None:
    """mmap_read_trylock: the daemon does not wait."""
    first, second = busy(machine), busy(machine)
    holder: Task[None] = Task(machine.mem.sched, "holder", 99)
    holder.start(iter(()))  # type: ignore[arg-type]
    assert first.mm.mmap_lock.trylock(holder, WRITE)
    machine.khugepaged_settings.pages_to_scan = NR
    machine.khugepaged.step()
    assert second.is_huge(start_of(second))
    assert not first.is_huge(start_of(first))
    first.mm.mmap_lock.unlock(holder)
    machine.khugepaged.step()
    assert first.is_huge(start_of(first))


def test_a_process_that_ends_under_the_cursor_is_freed_by_the_daemon(machine: Machine) -> None:
    """Its slot stays until the daemon moves on."""
    process = busy(machine, 3, [0])
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = NR
    machine.khugepaged.step()
    process.exit()
    assert [slot.mm for slot in machine.mem.khugepaged_scan.mm_head] == [process.mm]
    machine.audit()
    assert machine.khugepaged.step() == math.inf
    assert machine.mem.khugepaged_scan.mm_head == []
    assert machine.khugepaged_settings.full_scans == 1


def test_an_exit_in_the_middle_of_a_collapse_ends_it(machine: Machine) -> None:
    """The exiting task waits for the page tables; the daemon finds no user and frees the slot."""
    process = busy(machine)
    daemon = machine.spawn(machine.khugepaged.step.steps(), "khugepaged")
    daemon.run_until("acquire mmap_lock for read")
    leaving = machine.spawn(process.exit.steps(), "app")
    while leaving.step():
        pass
    assert daemon.finish() == math.inf
    assert results(machine) == ["no_process_for_page"]
    assert machine.mem.khugepaged_scan.mm_head == []


def test_pte_mapped_blocks_come_first_and_are_forgotten_whatever_becomes_of_them(
    machine: Machine,
) -> None:
    """khugepaged_collapse_pte_mapped_thps, before the visit proper."""
    block = shmem_block(machine, others=[range(NR)])
    other = block.maps[1]
    register(other)
    block.process.madvise(block.addr, HPAGE, Advice.MADV_COLLAPSE)
    slot = other.process.mm.mm_slot
    assert slot is not None
    assert slot.pte_mapped_thp == [other.addr]
    slot.pte_mapped_thp.append(other.addr + 64 * HPAGE)
    machine.khugepaged.step()
    assert slot.pte_mapped_thp == []
    assert machine.vmstat()["nr_shmem_hugepages"] == 1
    assert other.process.read(other.addr, HPAGE) == block.content()
    assert other.process.is_huge(other.addr)


def test_counts_are_unsigned_and_of_32_bits(machine: Machine) -> None:
    """They wrap as the kernel's do."""
    machine.khugepaged_settings.count("pages_collapsed", (1 << 32) - 1)
    machine.khugepaged_settings.count("full_scans", (1 << 32) - 1)
    busy(machine)
    machine.khugepaged.step()
    assert machine.khugepaged_settings.pages_collapsed == 0
    assert machine.khugepaged_settings.full_scans == 0


# Sleeping and waking.


def test_without_anybody_to_visit_it_sleeps_until_woken(machine: Machine) -> None:
    """The first process to register wakes it; the second does not."""
    woken: list[int] = []
    processes = [unregistered(machine) for _ in range(2)]
    machine.khugepaged.on_wakeup = lambda: woken.append(1)
    assert machine.khugepaged.step() == math.inf
    assert not machine.khugepaged.run(lambda: False)
    for process in processes:
        register_blocks(process)
        assert woken == [1]


def test_the_sleep_after_a_scan_is_ended_by_the_two_sleep_knobs_alone(machine: Machine) -> None:
    """khugepaged_sleep_expire: other knobs and other processes do not matter."""
    busy(machine)
    other = unregistered(machine)
    machine.khugepaged.step()
    woken: list[int] = []
    machine.khugepaged.on_wakeup = lambda: woken.append(1)
    machine.khugepaged_settings.pages_to_scan = 512
    machine.thp.enabled = "always"
    register_blocks(other)
    assert woken == []
    machine.khugepaged_settings.alloc_sleep_millisecs = 5
    assert woken == [1]
    machine.khugepaged_settings.scan_sleep_millisecs = 5
    assert woken == [1, 1]


def test_no_sleep_between_scans_if_the_knob_says_so(machine: Machine) -> None:
    """scan_sleep_millisecs 0; and without work it waits all the same."""
    process = busy(machine)
    machine.khugepaged_settings.scan_sleep_millisecs = 0
    assert machine.khugepaged.step() == 0
    process.exit()
    assert machine.khugepaged.step() == math.inf


def no_huge_pages(machine: Machine) -> None:
    """Let small pages take a frame of every block, so that no huge page can be had."""
    hog = machine.process("hog")
    free = machine.vmstat()["nr_free_pages"]
    addr = hog.mmap(free << PAGE_SHIFT)
    with pytest.raises(MemoryError):
        fill(hog, addr, range(free))
    for page in range(0, free, 4):
        hog.munmap(addr + page * PAGE, PAGE)


def test_a_failed_allocation_lets_it_sleep_once_and_ends_the_scan_the_second_time(
    make_machine: MakeMachine,
) -> None:
    """alloc_sleep_millisecs within the scan, then the sleep after it; events count each."""
    machine = make_machine("16M")
    busy(machine, 3, range(4))
    no_huge_pages(machine)
    machine.trace.clear()
    assert machine.khugepaged.step() == ALLOC_SLEEP
    assert results(machine) == ["alloc_huge_page_failed"]
    assert machine.khugepaged.step() == SCAN_SLEEP
    assert results(machine) == ["alloc_huge_page_failed"]
    assert machine.vmstat()["thp_collapse_alloc_failed"] == 2
    assert machine.khugepaged.step() == ALLOC_SLEEP


@pytest.mark.parametrize(
    "wake",
    [
        lambda machine: setattr(machine.khugepaged_settings, "scan_sleep_millisecs", 7),
        lambda machine: setattr(machine.khugepaged_settings, "alloc_sleep_millisecs", 7),
        lambda machine: setattr(machine.thp, "enabled", "always"),
    ],
)
def test_the_sleep_for_memory_is_ended_by_whoever_wakes_it(
    make_machine: MakeMachine, wake: Callable[[Machine], None]
) -> None:
    """It is a plain interruptible sleep."""
    machine = make_machine("16M")
    busy(machine, 3, range(4))
    no_huge_pages(machine)
    machine.khugepaged.step()
    asleep_at = machine.clock.now_ns
    wake(machine)
    machine.trace.clear()
    machine.khugepaged.run(lambda: bool(len(machine.trace)))
    assert machine.clock.now_ns < asleep_at + 1_000_000


def test_run_sleeps_by_the_clock(machine: Machine) -> None:
    """One scan at 0 s, one every 10 s; a run that stops in a sleep leaves the rest of it."""
    busy(machine)
    settings = machine.khugepaged_settings
    assert machine.khugepaged.run(until=5)
    assert settings.full_scans == 1
    assert machine.clock.now_ns == 5_000_000_000
    machine.khugepaged.run(until=9.9)
    assert settings.full_scans == 1
    machine.khugepaged.run(until=10.1)
    assert settings.full_scans == 2
    machine.khugepaged.run(until=3600)
    assert settings.full_scans == 360
    assert machine.khugepaged.run(lambda: settings.full_scans == 361)
    assert 3600 <= machine.clock.now_ns / 1e9 < 3601


def test_run_refuses_a_time_that_has_passed(machine: Machine) -> None:
    """Naming the time it is."""
    machine.khugepaged.run(until=2)
    with pytest.raises(ValueError, match=r"until=1: allowed 2.0 s and later"):
        machine.khugepaged.run(until=1)
    assert machine.clock.now_ns == 2_000_000_000
    for no_time in ("3", math.inf, math.nan, None, True):
        with pytest.raises(ValueError, match=rf"until={no_time!r}: allowed a number of seconds"):
            machine.khugepaged.run(no_time)  # type: ignore[arg-type]


def test_run_takes_any_kind_of_number(machine: Machine) -> None:
    """Those of numpy, as a plot or a table of results would hand in."""
    machine.khugepaged.run(until=np.int64(2))  # type: ignore[arg-type]
    machine.khugepaged.run(until=np.float32(2.5))  # type: ignore[arg-type]
    assert machine.clock.now_ns == 2_500_000_000


@pytest.mark.parametrize("millisecs", [(1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_sleep_that_is_negative_as_an_int_never_ends_by_itself(
    machine: Machine, millisecs: int
) -> None:
    """msecs_to_jiffies gives MAX_JIFFY_OFFSET: writing a sleep wakes it, time does not."""
    busy(machine)
    settings = machine.khugepaged_settings
    settings.scan_sleep_millisecs = millisecs
    endless = millisecs >> 31 != 0
    assert machine.khugepaged.step() == (math.inf if endless else millisecs)
    if endless:
        assert not machine.khugepaged.run(lambda: False)
        settings.scan_sleep_millisecs = SCAN_SLEEP
    assert machine.khugepaged.run(lambda: settings.full_scans >= 2)
    assert (machine.clock.now_ns >= millisecs * 1_000_000) is not endless


def test_a_sleep_for_memory_may_never_end_by_itself_either(make_machine: MakeMachine) -> None:
    """alloc_sleep_millisecs goes the same way; who registers wakes it."""
    machine = make_machine("4M")
    machine.thp.enabled = "madvise"
    busy(machine)
    machine.khugepaged_settings.alloc_sleep_millisecs = 1 << 31
    assert machine.khugepaged.step() == math.inf
    woken: list[int] = []
    machine.khugepaged.on_wakeup = lambda: woken.append(1)
    machine.khugepaged_settings.alloc_sleep_millisecs = 5
    assert woken == [1]


def test_a_daemon_that_never_sleeps_lets_time_pass(machine: Machine) -> None:
    """Else a run would never end."""
    machine.khugepaged_settings.scan_sleep_millisecs = 0
    busy(machine)
    assert machine.khugepaged.run(until=0.001)


def test_delays_are_the_sleeps_one_after_the_other(machine: Machine) -> None:
    """The caller sleeps; the clock is the caller's affair."""
    process = busy(machine)
    delays = machine.khugepaged.delays()
    assert next(delays) == SCAN_SLEEP
    assert next(delays) == SCAN_SLEEP
    assert machine.khugepaged_settings.full_scans == 2
    process.exit()
    assert next(delays) == math.inf


# Starting and stopping.


def test_never_stops_the_thread_and_another_value_starts_a_new_one(machine: Machine) -> None:
    """The cursor is given up; the new thread has another pid and begins at the head."""
    processes = [busy(machine, 2, [0]) for _ in range(2)]
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = 3 * NR
    machine.khugepaged.step()
    assert cursor(machine)[0] is processes[1].mm
    pid = machine.khugepaged.task.pid
    machine.thp.enabled = "never"
    assert cursor(machine)[0] is None
    assert machine.khugepaged.step() == math.inf
    assert all(registered(process) for process in processes)
    machine.trace.clear()
    machine.thp.enabled = "madvise"
    assert machine.khugepaged.step() == SCAN_SLEEP
    assert machine.khugepaged.task.pid != pid
    first = next(iter(machine.trace))
    assert (first.pid, first.event.mm) == (  # type: ignore[attr-defined]
        machine.khugepaged.task.pid,
        processes[0].mm.hashed_ptr,
    )


def test_a_new_thread_is_run_at_once_by_who_hosts_the_daemon(machine: Machine) -> None:
    """on_wakeup comes when `enabled` is on again, however long the last sleep was to be."""
    busy(machine)
    woken: list[str] = []
    machine.khugepaged.on_wakeup = lambda: woken.append(machine.thp.enabled)
    delays = machine.khugepaged.delays()
    assert next(delays) == SCAN_SLEEP
    machine.thp.enabled = "never"
    machine.thp.enabled = "always"  # off and on within one sleep
    assert woken == ["always"]
    assert next(delays) == SCAN_SLEEP
    assert machine.khugepaged_settings.full_scans == 2
    machine.thp.enabled = "never"
    assert next(delays) == math.inf
    machine.sysfs["enabled"] = "madvise\n"
    assert woken == ["always", "madvise"]
    assert next(delays) == SCAN_SLEEP
    assert machine.khugepaged_settings.full_scans == 3


def test_a_stop_frees_the_slot_of_a_process_that_ended_under_the_cursor(machine: Machine) -> None:
    """As the thread does on its way out."""
    process = busy(machine, 3, [0])
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = NR
    machine.khugepaged.step()
    process.exit()
    machine.thp.enabled = "never"
    assert machine.mem.khugepaged_scan.mm_head == []


def test_a_stop_in_the_middle_of_a_turn_would_have_to_wait(machine: Machine) -> None:
    """kthread_stop waits for the thread: refused, and nothing is changed."""
    process = busy(machine)
    daemon = machine.spawn(machine.khugepaged.step.steps(), "khugepaged")
    daemon.run_until("copied")
    with pytest.raises(WouldBlock, match="middle of a turn"):
        machine.thp.enabled = "never"
    with pytest.raises(WouldBlock, match="middle of a turn"):
        machine.khugepaged.step()
    assert machine.thp.enabled == "madvise"
    assert daemon.finish() == SCAN_SLEEP
    assert process.is_huge(start_of(process))
    machine.thp.enabled = "never"


def test_a_small_machine_boots_with_huge_pages_off() -> None:
    """hugepage_init: below 512 MiB all flags are 0, and there is no daemon until they are set."""
    small, large = Machine("510M"), Machine("512M")
    assert (small.thp.enabled, small.thp.defrag, small.thp.use_zero_page) == (
        "never",
        "never",
        False,
    )
    assert small.khugepaged_settings.defrag == 0
    assert (large.thp.enabled, large.thp.use_zero_page) == ("madvise", True)
    assert small.khugepaged.step() == math.inf
    small.thp.enabled = "always"
    process = small.process("app")
    process.write(process.mmap(HPAGE), b"x")
    assert small.khugepaged.step() == SCAN_SLEEP
    small.audit()
    large.audit()


# What it must not be told apart by.


def test_a_file_block_ends_the_visit_whatever_its_result(machine: Machine) -> None:
    """mmap_lock is dropped for every file block, also for one that is not even worth a try."""
    block = shmem_block(machine, held=range(1), mapped=range(1))
    machine.khugepaged_settings.max_ptes_none = 0
    machine.khugepaged_settings.pages_to_scan = 1
    machine.khugepaged.step()
    assert results(machine) == ["exceed_none_pte"]
    assert cursor(machine)[0] is block.process.mm
    assert S.SCAN_EXCEED_NONE_PTE.text == "exceed_none_pte"
