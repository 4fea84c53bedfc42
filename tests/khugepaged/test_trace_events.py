"""The huge_memory events: which, in what order, with what fields, printed as trace_pipe prints."""

import re
from collections.abc import Callable

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    advised,
    discard,
    events,
    fill,
    isolates,
    madv_collapse,
    pageout,
    paused,
    pfn_of,
    scans,
    small_machine,
    swapins,
    touch,
)

from pykhuge import Machine, Process, ScanResult
from pykhuge.kernel.trace import TraceEvent
from pykhuge.khugepaged.trace_events import (
    mm_collapse_huge_page,
    mm_collapse_huge_page_isolate,
    mm_collapse_huge_page_swapin,
    mm_khugepaged_scan_pmd,
)

S = ScanResult
SCAN = "mm_khugepaged_scan_pmd"
COLLAPSE = "mm_collapse_huge_page"
ISOLATE = "mm_collapse_huge_page_isolate"
SWAPIN = "mm_collapse_huge_page_swapin"
NO_PAGE = "0xffffffffffffffff"


def bodies(machine: Machine) -> list[str]:
    """Event name and body of each line, without the common fields and with mm=P."""
    lines = machine.trace.text().splitlines()
    return [re.sub(r"mm=[0-9a-f]{16}", "mm=P", line.split(": ", 1)[1]) for line in lines]


def test_success(machine: Machine, process: Process, block: int) -> None:
    """isolate, collapse, scan: the page is the last one looked at, the zero pages are counted."""
    fill(process, block, range(500))
    touch(process, block, range(500, 503))
    last = pfn_of(process, block, 499)
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert bodies(machine) == [
        f"{ISOLATE}: scan_pfn={last:#x}, none_or_zero=12, referenced=500, writable=1,"
        " status=succeeded",
        f"{COLLAPSE}: mm=P, isolated=1, status=succeeded",
        f"{SCAN}: mm=P, scan_pfn={last:#x}, writable=1, referenced=500, none_or_zero=12,"
        " status=succeeded, unmapped=0",
    ]


def test_madv_collapse_does_not_count_references(process: Process, block: int) -> None:
    """Only the daemon asks whether pages are young."""
    fill(process, block)
    last = pfn_of(process, block, 511)
    process.mem.trace.clear()
    assert madv_collapse(process, block) is None
    assert isolates_text(process) == (
        f"scan_pfn={last:#x}, none_or_zero=0, referenced=0, writable=1, status=succeeded"
    )


def isolates_text(process: Process) -> str:
    (body,) = [record.event.body() for record in process.mem.trace if record.event.name == ISOLATE]
    return str(body)


def test_copy_mc(machine: Machine, process: Process, block: int) -> None:
    """Isolation succeeded, then isolated=0, and copy_poisoned_page twice."""
    fill(process, block)
    process.poison(block)
    last = pfn_of(process, block, 511)
    assert machine.collapse(process, block) is S.SCAN_COPY_MC
    assert bodies(machine) == [
        f"{ISOLATE}: scan_pfn={last:#x}, none_or_zero=0, referenced=512, writable=1,"
        " status=succeeded",
        f"{COLLAPSE}: mm=P, isolated=0, status=copy_poisoned_page",
        f"{SCAN}: mm=P, scan_pfn={last:#x}, writable=1, referenced=512, none_or_zero=0,"
        " status=copy_poisoned_page, unmapped=0",
    ]


def test_isolation_failure(machine: Machine, process: Process, block: int) -> None:
    """The isolate event counts as far as it came; the scan's event keeps what the scan saw."""
    fill(process, block)
    discard(process, block, [3])
    task = paused(machine, process, block, "prepared")
    held = process.get(block + 200 * PAGE, 1)
    at, last = pfn_of(process, block, 200), pfn_of(process, block, 511)
    assert task.finish() is S.SCAN_PAGE_COUNT
    assert bodies(machine) == [
        f"{ISOLATE}: scan_pfn={at:#x}, none_or_zero=1, referenced=199, writable=1,"
        " status=not_suitable_page_count",
        f"{COLLAPSE}: mm=P, isolated=0, status=not_suitable_page_count",
        f"{SCAN}: mm=P, scan_pfn={last:#x}, writable=1, referenced=511, none_or_zero=1,"
        " status=not_suitable_page_count, unmapped=0",
    ]
    held.release()


def test_swap_in_comes_first(machine: Machine, process: Process, block: int) -> None:
    """swapin, isolate, collapse, scan; the pages swapped in are young at isolation."""
    fill(process, block)
    machine.lru_add_drain_all()
    pageout(process, block, [0, 100, 511])
    last = pfn_of(process, block, 510)
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    assert isolates(machine)[0].scan_pfn != last
    assert bodies(machine) == [
        f"{SWAPIN}: mm=P, swapped_in=3, referenced=509, ret=1",
        f"{ISOLATE}: scan_pfn={isolates(machine)[0].scan_pfn:#x}, none_or_zero=0, referenced=512,"
        " writable=1, status=succeeded",
        f"{COLLAPSE}: mm=P, isolated=1, status=succeeded",
        f"{SCAN}: mm=P, scan_pfn={last:#x}, writable=1, referenced=509, none_or_zero=0,"
        " status=succeeded, unmapped=3",
    ]


def test_failed_swap_in_ends_the_collapse(machine: Machine, process: Process, block: int) -> None:
    """Swapin with ret=0, no isolate, then failed twice."""
    fill(process, block)
    machine.lru_add_drain_all()
    pageout(process, block, [7, 8])
    process.fail_swap_reads(block + 8 * PAGE)
    assert machine.collapse(process, block) is S.SCAN_FAIL
    assert [type(event) for event in events(machine)] == [
        mm_collapse_huge_page_swapin,
        mm_collapse_huge_page,
        mm_khugepaged_scan_pmd,
    ]
    (swapin,) = swapins(machine)
    assert (swapin.swapped_in, swapin.referenced, swapin.ret) == (1, 510, 0)
    assert bodies(machine)[1] == f"{COLLAPSE}: mm=P, isolated=0, status=failed"


def test_allocation_failure_has_no_isolate(machine: Machine) -> None:
    """A charge refused: collapse, scan, nothing else."""
    process = machine.process(memcg=machine.memcg(600 * PAGE))
    addr = advised(process)
    fill(process, addr)
    assert machine.collapse(process, addr) is S.SCAN_CGROUP_CHARGE_FAIL
    assert [event.name for event in events(machine)] == [COLLAPSE, SCAN]


def empty(process: Process, addr: int) -> None:
    """A page table without an entry."""
    fill(process, addr, [0])
    discard(process, addr, [0])


def no_table(process: Process, addr: int) -> None:
    """No page table, in a VMA with pages elsewhere."""
    fill(process, addr + HPAGE, [0])


@pytest.mark.parametrize(
    ("prepare", "body"),
    [
        (
            empty,
            f"scan_pfn={NO_PAGE}, writable=0, referenced=0, none_or_zero=512,"
            " status=no_writable_page, unmapped=0",
        ),
        (
            no_table,
            f"scan_pfn={NO_PAGE}, writable=0, referenced=0, none_or_zero=0,"
            " status=pmd_none, unmapped=0",
        ),
    ],
)
def test_missing_page_is_minus_one(
    machine: Machine, process: Process, prepare: Callable[[Process, int], None], body: str
) -> None:
    """Where no page was looked at the frame number is -1."""
    addr = advised(process, 2 * HPAGE)
    prepare(process, addr)
    machine.khugepaged_settings.max_ptes_none = 511
    if prepare is empty:
        assert madv_collapse(process, addr) is S.SCAN_PAGE_RO
    else:
        machine.collapse(process, addr)
    assert bodies(machine) == [f"{SCAN}: mm=P, {body}"]


def test_compound_page_is_named_by_its_head(machine: Machine, process: Process) -> None:
    """scan_pfn is the head's frame: the loop has gone over to it."""
    from collapse_kit import compound_block

    addr = compound_block(process)
    head = pfn_of(process, addr, 0)
    held = process.get(addr + 30 * PAGE, 1)
    assert machine.collapse(process, addr) is S.SCAN_PAGE_COUNT
    assert scans(machine)[0].scan_pfn == head
    held.release()
    task = paused(machine, process, addr, "copied")
    assert isolates(machine)[-1].scan_pfn == head
    task.finish()


def test_line_reads_as_trace_pipe_prints_it(machine: Machine, process: Process) -> None:
    """Task, pid, CPU, flags, time, event, body: in the kernel's columns."""
    events_: list[TraceEvent] = [
        mm_khugepaged_scan_pmd(0x1234ABCD, -1, True, 3, 4, S.SCAN_PAGE_LRU, 5),
        mm_collapse_huge_page(0x1234ABCD, False, S.SCAN_CGROUP_CHARGE_FAIL),
        mm_collapse_huge_page_isolate(0x2A, 1, 2, False, S.SCAN_FAIL),
        mm_collapse_huge_page_swapin(0x1234ABCD, 6, 7, 0),
    ]
    machine.mem.clock.sleep(12_345_678_901)
    machine.mem.sched.current = process.task
    for event in events_:
        machine.mem.emit(event)
    pid = f"{process.pid:<7}"
    assert machine.trace.text() == (
        f"             app-{pid} [000] .....    12.345678: mm_khugepaged_scan_pmd:"
        " mm=000000001234abcd, scan_pfn=0xffffffffffffffff, writable=1, referenced=3,"
        " none_or_zero=4, status=page_not_in_lru, unmapped=5\n"
        f"             app-{pid} [000] .....    12.345679: mm_collapse_huge_page:"
        " mm=000000001234abcd, isolated=0, status=ccgroup_charge_failed\n"
        f"             app-{pid} [000] ...1.    12.345680: mm_collapse_huge_page_isolate:"
        " scan_pfn=0x2a, none_or_zero=1, referenced=2, writable=0, status=failed\n"
        f"             app-{pid} [000] .....    12.345681: mm_collapse_huge_page_swapin:"
        " mm=000000001234abcd, swapped_in=6, referenced=7, ret=0\n"
    )


def test_events_are_told_in_the_name_of_who_runs(machine: Machine, process: Process) -> None:
    """The daemon's line says khugepaged, MADV_COLLAPSE's the process."""
    addr = advised(process, 2 * HPAGE)
    fill(process, addr)
    fill(process, addr + HPAGE)
    machine.collapse(process, addr)
    assert {record.comm for record in machine.trace} == {"khugepaged"}
    machine.trace.clear()
    madv_collapse(process, addr + HPAGE)
    assert {(record.comm, record.pid) for record in machine.trace} == {("app", process.pid)}


def test_equal_machines_give_equal_traces() -> None:
    """Time and hashed pointers come from the machine's seed: byte for byte the same."""
    texts = []
    for _ in range(2):
        machine = small_machine("16M", seed=7)
        process = machine.process("app")
        addr = advised(process)
        fill(process, addr, range(0, NR, 3))
        process.poison(addr + 9 * PAGE)
        machine.collapse(process, addr)
        machine.audit()
        texts.append(machine.trace.text())
    assert texts[0] == texts[1]
    other = small_machine("16M", seed=8).process("app").mm.hashed_ptr
    assert f"{other:016x}" not in texts[0]
