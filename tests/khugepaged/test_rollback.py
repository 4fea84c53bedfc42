"""What a poisoned page does to a collapse, and what the collapse does about it."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    collapses,
    compound_block,
    discard,
    faults,
    fill,
    flags_of,
    madv_collapse,
    page_bytes,
    paused,
    pfn_of,
    scans,
    snapshot,
    touch,
)

from pykhuge import (
    Advice,
    BusError,
    CollapseError,
    KernelPanic,
    Machine,
    Process,
    ScanResult,
    WouldBlock,
)
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Acquire, Release, Steps
from pykhuge.khugepaged import anon
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.scan import hpage_collapse_scan_pmd
from pykhuge.mm.page import PG_locked, PG_lru
from pykhuge.mm.swap import lru_pages, putback_lru_pages
from pykhuge.mm.vmstat import NR_INACTIVE_ANON

S = ScanResult


@pytest.mark.parametrize("line", [0, 1, 31, 63])
@pytest.mark.parametrize("page", [0, 1, 255, 510, 511])
def test_poison_anywhere_undoes_the_collapse(
    machine: Machine, process: Process, block: int, page: int, line: int
) -> None:
    """Any page, any line: COPY_MC, page tables and bytes as they were, the machine check logged."""
    fill(process, block)
    touch(process, block, [])
    before = snapshot(process, block)
    pfn = process.poison(block + page * PAGE, line)
    assert machine.collapse(process, block) is S.SCAN_COPY_MC
    assert snapshot(process, block) == before
    (mce,) = machine.mem.poison.log
    assert (mce.pfn, mce.line) == (pfn, line)
    assert mce.addr == pfn * PAGE + line * 64
    assert mce.recovered
    assert mce.consumer == "__collapse_huge_page_copy"
    assert mce.cpu == 0


def test_kernel_log_tells_of_the_machine_check(
    machine: Machine, process: Process, block: int
) -> None:
    """That there was one: a copy that recovers counts as handled, so its record is not printed."""
    fill(process, block)
    process.poison(block + 5 * PAGE, 2)
    machine.collapse(process, block)
    lines = [line.partition("] ")[2] for line in machine.log]
    assert lines == ["mce: [Hardware Error]: Machine check events logged"]
    machine.check_alive()


def test_kernel_log_tells_of_two_machine_checks_a_minute(
    machine: Machine, process: Process, block: int
) -> None:
    """mce_notify_irq is rate limited; how many it passed over is told in the next minute."""
    fill(process, block)
    process.poison(block + 5 * PAGE, 2)
    for _ in range(5):
        machine.collapse(process, block)
    machine.clock.sleep(61_000_000_000)
    machine.collapse(process, block)
    logged = "mce: [Hardware Error]: Machine check events logged"
    assert [line.partition("] ")[2] for line in machine.log] == [
        logged,
        logged,
        "mce_notify_irq: 3 callbacks suppressed",
        logged,
    ]


def test_panic_prints_the_record_of_the_machine_check(old: Machine) -> None:
    """As print_mce has it, with the physical address of the bad line; then why, and the end."""
    process = old.process()
    addr = advised(process)
    fill(process, addr)
    pfn = process.poison(addr + 5 * PAGE, 2)
    with pytest.raises(KernelPanic):
        old.collapse(process, addr)
    error = "mce: [Hardware Error]: "
    assert [line.partition("] ")[2] for line in old.log] == [
        f"{error}CPU 0: Machine Check Exception: 7 Bank 1: bd80000000100134",
        f"{error}TSC {old.mem.poison.log[0].now_ns:x} ADDR {pfn * PAGE + 128:x} MISC 86 ",
        f"{error}PROCESSOR 0:0 TIME 0 SOCKET 0 APIC 0 microcode 0",
        f"{error}Run the above through 'mcelog --ascii'",
        f"{error}Machine check: Data load in unrecoverable area of kernel",
        "Kernel panic - not syncing: Fatal local machine check",
    ]


def test_first_bad_page_in_order_of_the_block_is_met(
    machine: Machine, process: Process, block: int
) -> None:
    """Of several bad lines the lowest entry's first one stops the copy; the rest is not met."""
    with faults(machine, "never"):
        for page in range(NR - 1, -1, -1):  # frames run against addresses
            process.write(block + page * PAGE, page_bytes(page))
    assert pfn_of(process, block, 0) > pfn_of(process, block, 511)
    for page, line in ((400, 0), (300, 9), (300, 4), (511, 1)):
        process.poison(block + page * PAGE, line)
    assert machine.collapse(process, block) is S.SCAN_COPY_MC
    assert [(mce.pfn, mce.line) for mce in machine.mem.poison.log] == [
        (pfn_of(process, block, 300), 4)
    ]


def test_destination_holds_what_was_copied_before_the_bad_line(
    machine: Machine, process: Process, block: int
) -> None:
    """The copy stops at the very line: nothing from there on has been written."""
    fill(process, block)
    process.poison(block + 20 * PAGE, 3)
    free = machine.mem.nodes[0].high * NR
    machine.mem.ram.pages[free : free + NR] = 0xA5
    assert machine.collapse(process, block) is S.SCAN_COPY_MC
    written = machine.mem.ram.pages[free : free + NR].tobytes()
    stop = 20 * PAGE + 3 * 64
    assert written == block_bytes()[:stop] + b"\xa5" * (HPAGE - stop)


def test_poison_under_holes_and_zero_pages_is_not_met(
    machine: Machine, process: Process, block: int
) -> None:
    """The zero page is never read: its place is cleared, even if its frame has gone bad."""
    fill(process, block)
    bad = process.poison(block + 3 * PAGE)
    discard(process, block, [3, 4])
    touch(process, block, [4])
    machine.mem.poison.poison(machine.mem.zero_pfn, 0)
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert machine.mem.poison.log == []
    assert pfn_of(process, block, 0) != bad // NR * NR
    expected = block_bytes(0, 3) + bytes(2 * PAGE) + block_bytes(5, NR - 5)
    assert process.read(block, HPAGE) == expected


@pytest.mark.parametrize("is_khugepaged", [True, False])
def test_every_later_scan_repeats_the_failure(
    machine: Machine, process: Process, block: int, is_khugepaged: bool
) -> None:
    """The page is not marked and stays mapped: each full scan meets it again, until mended."""
    fill(process, block)
    pfn = process.poison(block + 8 * PAGE)
    before = snapshot(process, block)
    for times in (1, 2, 3):
        result = machine.collapse(process, block, is_khugepaged=is_khugepaged)
        assert result is S.SCAN_COPY_MC
        assert len(machine.mem.poison.log) == times
    assert snapshot(process, block) == before
    assert machine.mem.pages.mapcount[pfn] == 1
    machine.mem.poison.unpoison(pfn)
    assert machine.collapse(process, block, is_khugepaged=is_khugepaged) is S.SCAN_SUCCEED
    assert process.read(block, HPAGE) == block_bytes()


def test_only_blocks_with_poison_fail(machine: Machine, process: Process) -> None:
    """Acceptance of the series: four bad pages, exactly their blocks fail, nothing is lost."""
    addr = advised(process, 6 * HPAGE)
    for block in range(6):
        fill(process, addr + block * HPAGE)
    bad = {1: 17, 2: 511, 4: 0, 5: 300}
    for block, page in bad.items():
        process.poison(addr + block * HPAGE + page * PAGE, 40)
    for block in range(6):
        where = addr + block * HPAGE
        expected = S.SCAN_COPY_MC if block in bad else S.SCAN_SUCCEED
        assert machine.collapse(process, where) is expected
        assert process.is_huge(where) is (block not in bad)
        for page in range(NR):
            if bad.get(block) != page:
                assert process.read(where + page * PAGE, PAGE) == page_bytes(page)


def test_user_meets_the_poison_for_itself(machine: Machine, process: Process, block: int) -> None:
    """After the rollback a load of the bad line is SIGBUS to the task: page address, AR, lsb 12."""
    fill(process, block)
    process.poison(block + 8 * PAGE, 10)
    machine.collapse(process, block)
    with pytest.raises(BusError) as raised:
        process.read(block + 8 * PAGE + 640, 8)
    error = raised.value
    assert (error.address, error.code, error.lsb) == (block + 8 * PAGE, 4, 12)
    assert len(machine.mem.poison.log) == 2
    # The page is gone then, with its good lines; its neighbours are not.
    with pytest.raises(BusError) as raised:
        process.read(block + 8 * PAGE + 3, 1)
    assert raised.value.address == block + 8 * PAGE + 3
    assert len(machine.mem.poison.log) == 2
    assert process.read(block, 8 * PAGE) == block_bytes(0, 8)
    assert machine.mem.num_poisoned_pages == 1
    machine.check_alive()


def test_write_to_the_bad_line_is_a_bus_error_too(process: Process, block: int) -> None:
    """A store stops at the bad line; what lies below it is written, and lost with the page."""
    fill(process, block)
    pfn = process.poison(block + PAGE, 1)
    with pytest.raises(BusError) as raised:
        process.write(block, b"x" * (PAGE + 256))
    assert raised.value.address == block + PAGE
    assert process.read(block, PAGE) == b"x" * PAGE
    assert process.mem.ram.pages[pfn, :64].tobytes() == b"x" * 64


def test_pmd_is_back_before_any_page_is_released(
    machine: Machine, process: Process, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first page is unlocked, the page table can already be found by a walk."""
    fill(process, block)
    process.poison(block + 100 * PAGE)
    task = paused(machine, process, block, "copied")
    assert process.pfn(block) is None
    pfns = [int(each) for each in machine.mem.pages.flags.nonzero()[0]]
    isolated = [pfn for pfn in pfns if flags_of(process, pfn) & PG_locked]
    assert len(isolated) == NR
    seen: list[tuple[bool, int]] = []
    put_back = putback_lru_pages

    def spy(*args: Any) -> None:
        still_locked = sum(bool(flags_of(process, pfn) & PG_locked) for pfn in isolated)
        seen.append((process.pfn(block) is not None, still_locked))
        put_back(*args)

    monkeypatch.setattr(anon, "putback_lru_pages", spy)
    assert task.finish() is S.SCAN_COPY_MC
    assert seen
    assert seen[0] == (True, NR)


def test_pages_go_back_to_the_lru_from_the_last_entry_to_the_first(
    machine: Machine, process: Process, block: int
) -> None:
    """Rollback puts pages down in reverse: that is the LRU's order afterwards."""
    fill(process, block)
    pfns = [pfn_of(process, block, page) for page in range(NR)]
    machine.lru_add_drain_all()
    assert lru_pages(machine.mem, NR_INACTIVE_ANON).tolist() == pfns
    process.poison(block)
    machine.collapse(process, block)
    machine.lru_add_drain_all()
    assert lru_pages(machine.mem, NR_INACTIVE_ANON).tolist() == pfns[::-1]


def test_compound_pages_go_back_behind_base_pages(machine: Machine, process: Process) -> None:
    """Base pages in reverse, then the compound page, which flushes the batch it joins."""
    addr = compound_block(process)
    head = pfn_of(process, addr, 0)
    discard(process, addr, range(5, 8))
    fill(process, addr, range(5, 8))
    process.poison(addr)
    base = [pfn_of(process, addr, page) for page in (7, 6, 5)]
    assert machine.collapse(process, addr) is S.SCAN_COPY_MC
    assert machine.mem.lru_batches == [[]]
    assert lru_pages(machine.mem, NR_INACTIVE_ANON).tolist() == [*base, head]


def test_last_pages_wait_in_the_batch_off_the_lru(
    machine: Machine, process: Process, block: int
) -> None:
    """512 is 34 batches of 15 and 2 more: these two are off the LRU, referenced, until drained."""
    fill(process, block)
    machine.lru_add_drain_all()
    process.poison(block + 300 * PAGE)
    machine.collapse(process, block)
    pages = machine.mem.pages
    waiting = [pfn_of(process, block, page) for page in (1, 0)]
    assert machine.mem.lru_batches == [waiting]
    for page in range(NR):
        pfn = pfn_of(process, block, page)
        late = pfn in waiting
        assert bool(flags_of(process, pfn) & PG_lru) is not late
        assert pages.refcount[pfn] == 1 + late
    machine.lru_add_drain_all()
    assert {int(pages.refcount[pfn]) for pfn in waiting} == {1}


def scan_undrained(machine: Machine, process: Process, addr: int) -> ScanResult:
    """One block as the daemon comes to it a second time within one scan: nothing is drained."""
    cc = CollapseControl(is_khugepaged=True, settings=machine.khugepaged_settings)

    def run() -> Steps[ScanResult]:
        yield Acquire(process.mm.mmap_lock, READ)
        result, mmap_locked = yield from hpage_collapse_scan_pmd(
            machine.mem, process.mm.vmas[0], addr, cc
        )
        if mmap_locked:
            yield Release(process.mm.mmap_lock)
        return result

    result = machine.spawn(run()).finish()
    assert isinstance(result, ScanResult)
    return result


def test_rescan_without_a_drain_is_page_not_in_lru(
    machine: Machine, process: Process, block: int
) -> None:
    """Pages that wait in the batch stop a second scan; after a drain it meets the poison again."""
    fill(process, block)
    process.poison(block + 300 * PAGE)
    assert machine.collapse(process, block) is S.SCAN_COPY_MC
    assert scan_undrained(machine, process, block) is S.SCAN_PAGE_LRU
    assert scans(machine)[-1].scan_pfn == pfn_of(process, block, 0)
    machine.lru_add_drain_all()
    assert scan_undrained(machine, process, block) is S.SCAN_COPY_MC


def test_page_faulted_in_between_two_blocks_is_not_in_the_lru(make_machine: MakeMachine) -> None:
    """MADV_COLLAPSE drains once: a page that came in on another CPU since then is EAGAIN."""
    machine = make_machine(cpus=2)
    process = machine.process()
    addr = advised(process, 2 * HPAGE)
    fill(process, addr)
    fill(process, addr + HPAGE, range(1, NR))
    task = machine.spawn(process.madvise.steps(addr, 2 * HPAGE, Advice.MADV_COLLAPSE))
    task.run_until("acquire mmap_lock for write")
    machine.spawn(process.write.steps(addr + HPAGE, b"late"), cpu=1).finish()
    with pytest.raises(CollapseError) as failed:
        task.finish()
    assert failed.value.scan_result is S.SCAN_PAGE_LRU
    assert failed.value.errno == errno.EAGAIN
    assert process.is_huge(addr)


def test_huge_page_is_free_again_after_each_failure(
    machine: Machine, process: Process, block: int
) -> None:
    """A hundred failed collapses leave as much memory free as before."""
    fill(process, block)
    process.poison(block + PAGE)
    machine.lru_add_drain_all()
    free = machine.vmstat()["nr_free_pages"]
    for _ in range(100):
        assert machine.collapse(process, block) is S.SCAN_COPY_MC
    assert machine.vmstat()["nr_free_pages"] == free
    assert machine.vmstat()["thp_collapse_alloc"] == 100


def test_poisoned_pages_partner_sees_nothing(machine: Machine, process: Process) -> None:
    """A page shared with a child fails the parent's collapse; the child's view is unchanged."""
    addr = advised(process)
    fill(process, addr, [1])
    child = process.fork("child")
    fill(process, addr, set(range(NR)) - {1})
    process.poison(addr + PAGE, 7)
    assert machine.collapse(process, addr) is S.SCAN_COPY_MC
    assert child.read(addr + PAGE, 7 * 64) == page_bytes(1)[: 7 * 64]
    with pytest.raises(BusError):
        child.read(addr + PAGE, PAGE)


# The kernel before the series.


@pytest.fixture
def old(make_machine: MakeMachine) -> Machine:
    """A machine whose copies have no recovery."""
    return make_machine("32M", swap="4M", device_memory="2M", recovery=False)


def test_without_recovery_the_first_machine_check_is_a_panic(old: Machine) -> None:
    """The host dies with the kernel's words, in the kernel log too."""
    process = old.process()
    addr = advised(process)
    fill(process, addr)
    process.poison(addr + 511 * PAGE, 63)
    with pytest.raises(KernelPanic) as died:
        old.collapse(process, addr)
    assert died.value.reason == "Fatal local machine check"
    assert str(died.value).startswith("Kernel panic - not syncing: ")
    assert str(died.value) in old.log[-1]
    assert "[Hardware Error]" in old.log[-2]
    (mce,) = old.mem.poison.log
    assert not mce.recovered
    assert collapses(old) == []
    assert scans(old) == []


def test_without_recovery_a_clean_block_collapses(old: Machine) -> None:
    """The old kernel is wrong only about poison."""
    process = old.process()
    addr = advised(process)
    fill(process, addr)
    assert madv_collapse(process, addr) is None
    assert process.read(addr, HPAGE) == block_bytes()


def test_dead_machine_refuses_every_call(old: Machine) -> None:
    """Each public method of the machine and of its processes raises the panic, and does nothing."""
    process = old.process()
    addr = advised(process)
    fill(process, addr)
    held = process.get(addr, 1)
    held.release()
    uffd = process.userfaultfd()
    task = paused(old, process, addr, "prepared")
    process.poison(addr)
    with pytest.raises(KernelPanic):
        task.finish()
    calls: dict[str, Callable[[], object]] = {
        "process": old.process,
        "memcg": lambda: old.memcg("1M"),
        "collapse": lambda: old.collapse(process, addr),
        "collapse.steps": lambda: old.collapse.steps(process, addr),
        "spawn": lambda: old.spawn(iter(())),  # type: ignore[arg-type]
        "drain": old.lru_add_drain_all,
        "mmap": lambda: process.mmap(PAGE),
        "mmap.steps": lambda: process.mmap.steps(PAGE),
        "munmap": lambda: process.munmap(addr, PAGE),
        "mprotect": lambda: process.mprotect(addr, PAGE, 1),
        "mremap": lambda: process.mremap(addr, PAGE, addr + HPAGE),
        "mlock": lambda: process.mlock(addr, PAGE),
        "munlock": lambda: process.munlock(addr, PAGE),
        "madvise": lambda: process.madvise(addr, PAGE, Advice.MADV_DONTNEED),
        "fork": process.fork,
        "exit": process.exit,
        "read": lambda: process.read(addr, 1),
        "write": lambda: process.write(addr, b"x"),
        "pin": lambda: process.pin(addr, 1),
        "get": lambda: process.get(addr, 1),
        "lock_page": lambda: process.lock_page(addr),
        "migrate_to_device": lambda: process.migrate_to_device(addr),
        "fail_swap_reads": lambda: process.fail_swap_reads(addr),
        "userfaultfd": process.userfaultfd,
        "poison": lambda: process.poison(addr),
        "register_mmu_notifier": lambda: process.register_mmu_notifier(None),  # type: ignore[arg-type]
        "uffd.register": lambda: uffd.register(addr, PAGE),
        "uffd.unregister": lambda: uffd.unregister(addr, PAGE),
        "uffd.copy": lambda: uffd.copy(addr, bytes(PAGE)),
        "uffd.zeropage": lambda: uffd.zeropage(addr, PAGE),
        "uffd.writeprotect": lambda: uffd.writeprotect(addr, PAGE),
    }
    served = []
    before = old.mem.pages.flags.tobytes(), len(old.mem.mms), len(old.log)
    for name, call in calls.items():
        try:
            call()
        except KernelPanic:
            continue
        served.append(name)
    assert served == []
    assert (old.mem.pages.flags.tobytes(), len(old.mem.mms), len(old.log)) == before


def test_paused_task_of_a_dead_machine_does_not_run_on(old: Machine) -> None:
    """A task paused when the host died raises the panic at its next step."""
    process, other = old.process(), old.process()
    addr, there = advised(process), advised(other)
    fill(process, addr)
    fill(other, there)
    task = paused(old, other, there, "prepared")
    process.poison(addr)
    with pytest.raises(KernelPanic):
        old.collapse(process, addr)
    with pytest.raises(KernelPanic):
        task.finish()
    assert not task.done or task.error is not None


def test_user_access_to_poison_does_not_kill_the_old_host(old: Machine) -> None:
    """A load by a program was recoverable before the series as well."""
    process = old.process()
    addr = advised(process)
    fill(process, addr, [0])
    process.poison(addr)
    with pytest.raises(BusError):
        process.read(addr, 1)
    with pytest.raises(BusError):
        process.fork().write(addr, b"copy on write is recoverable too")
    old.check_alive()


def test_collapse_of_a_block_being_collapsed_waits(
    machine: Machine, process: Process, block: int
) -> None:
    """A second collapse of the same block cannot get mmap_lock before the first has ended."""
    fill(process, block)
    process.poison(block + 9 * PAGE)
    task = paused(machine, process, block, "copied")
    with pytest.raises(WouldBlock):
        machine.collapse(process, block)
    assert task.finish() is S.SCAN_COPY_MC
