"""Faults: zero page, new pages, copy on write and its reuse rules, huge pages, signals."""

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advised,
    changes,
    counters,
    discard,
    faults,
    fill,
    flags_of,
    page_bytes,
    pfn_of,
    ptes_of,
    rss,
)

from pykhuge import (
    PROT_NONE,
    PROT_READ,
    Advice,
    BusError,
    Machine,
    OutOfMemory,
    Process,
    SegmentationFault,
    UserFault,
)
from pykhuge.mm.page import PG_anon_exclusive
from pykhuge.mm.page_table import PAGE_DIRTY, PAGE_RW


def test_read_maps_the_zero_page(machine: Machine, process: Process) -> None:
    """A read of what nobody wrote costs a page table, but no page."""
    addr = process.mmap(4 * PAGE)
    before = counters(machine, process)
    assert process.read(addr, 4 * PAGE) == bytes(4 * PAGE)
    assert changes(before, counters(machine, process)) == {
        "pgfault": 4,
        "nr_page_table_pages": 2,
        "pgtables": 2,
        "nr_free_pages": -2,
    }
    assert process.pfn(addr) == machine.mem.zero_pfn


def test_write_allocates_a_zeroed_page(machine: Machine, process: Process) -> None:
    """The rest of the page is zero, even where a freed page with contents is taken."""
    addr = process.mmap(PAGE)
    process.write(addr, page_bytes(1))
    discard(process, addr, [0])
    machine.lru_add_drain_all()
    process.write(addr, b"x")
    assert process.read(addr, PAGE) == b"x" + bytes(PAGE - 1)
    assert rss(process)["MM_ANONPAGES"] == 1


def test_write_after_a_read_replaces_the_zero_page(process: Process) -> None:
    """The zero page is never written to."""
    addr = process.mmap(2 * PAGE)
    process.read(addr, 2 * PAGE)
    process.write(addr, b"x")
    assert process.read(addr, 2) == b"x\0"
    assert process.read(addr + PAGE, PAGE) == bytes(PAGE)
    assert rss(process)["MM_ANONPAGES"] == 1


@pytest.mark.parametrize(
    ("prot", "write"), [(PROT_NONE, False), (PROT_NONE, True), (PROT_READ, True)]
)
def test_access_against_the_protection_is_a_segmentation_fault(
    process: Process, prot: int, write: bool
) -> None:
    """SIGSEGV carries the address; nothing was mapped by it."""
    addr = process.mmap(2 * PAGE, prot=prot)
    with pytest.raises(SegmentationFault) as raised:
        process.write(addr + 5000, b"x") if write else process.read(addr + 5000, 1)
    assert raised.value.address == addr + 5000
    assert rss(process)["MM_ANONPAGES"] == 0


def test_access_to_nothing_is_a_segmentation_fault(process: Process) -> None:
    """Below, above and between mappings."""
    addr = process.mmap(PAGE)
    for where in (0, addr - 1, addr + PAGE, 1 << 46):
        with pytest.raises(SegmentationFault):
            process.read(where, 1)


def test_access_that_runs_out_of_its_mapping_stops_there(process: Process) -> None:
    """The fault's address is the first byte beyond."""
    addr = process.mmap(PAGE)
    with pytest.raises(SegmentationFault) as raised:
        process.read(addr, PAGE + 1)
    assert raised.value.address == addr + PAGE


# Copy on write.


def test_write_to_a_shared_page_copies_it(process: Process) -> None:
    """Both keep their bytes; the one who wrote has a new page."""
    addr = process.mmap(PAGE)
    process.write(addr, page_bytes(3))
    child = process.fork()
    old = process.pfn(addr)
    child.write(addr, b"child")
    assert process.pfn(addr) == old
    assert child.pfn(addr) != old
    assert process.read(addr, PAGE) == page_bytes(3)
    assert child.read(addr, PAGE) == b"child" + page_bytes(3)[5:]


def test_last_user_reuses_the_page(machine: Machine, process: Process) -> None:
    """After the child has gone the parent writes in place, and is exclusive again."""
    addr = process.mmap(PAGE)
    process.write(addr, b"a")
    child = process.fork()
    pfn = process.pfn(addr)
    assert pfn is not None
    assert not flags_of(process, pfn) & PG_anon_exclusive
    child.exit()
    process.write(addr, b"b")
    assert process.pfn(addr) == pfn
    assert flags_of(process, pfn) & PG_anon_exclusive
    assert machine.vmstat()["nr_anon_pages"] == 1


def test_extra_reference_forces_a_copy(process: Process) -> None:
    """Somebody may still read the page (vmsplice): not exclusive, so it is copied."""
    addr = process.mmap(PAGE)
    process.write(addr, b"a")
    child = process.fork()
    held = process.get(addr, 1)
    child.exit()
    pfn = process.pfn(addr)
    process.write(addr, b"b")
    assert process.pfn(addr) != pfn
    assert held.pfns.tolist() == [pfn]
    held.release()


def test_exclusive_page_is_written_whatever_refers_to_it(process: Process) -> None:
    """A reference taken on an exclusive page does not make mprotect + write copy it."""
    addr = process.mmap(PAGE)
    process.write(addr, b"a")
    held = process.get(addr, 1)
    process.mprotect(addr, PAGE, PROT_READ)
    process.mprotect(addr, PAGE, 3)
    pfn = process.pfn(addr)
    process.write(addr, b"b")
    assert process.pfn(addr) == pfn
    held.release()


def test_copy_on_write_of_poison_kills_the_task_only(machine: Machine, process: Process) -> None:
    """SIGBUS BUS_MCEERR_AR to the writer; soon after, nobody has the page any more."""
    addr = process.mmap(PAGE)
    process.write(addr, page_bytes(1))
    child = process.fork()
    process.poison(addr, 40)
    child.read(addr, 1)
    before = counters(machine, child)
    with pytest.raises(BusError) as raised:
        child.write(addr, b"x")
    assert (raised.value.address, raised.value.code, raised.value.lsb) == (addr, 4, 12)
    assert child.pfn(addr) is process.pfn(addr) is None
    (mce,) = machine.mem.poison.log
    assert rss(child)["MM_ANONPAGES"] == 0
    assert process.signals == []
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_free_pages"] == before["nr_free_pages"]
    assert machine.mem.num_poisoned_pages == 1
    assert [line.partition("] ")[2] for line in machine.log] == [
        "mce: [Hardware Error]: Machine check events logged",
        f"MCE: Killing {child.task.comm}:{child.pid} due to hardware memory corruption fault"
        f" at {addr:x}",
        f"Memory failure: {mce.pfn:#x}: recovery action for dirty LRU page: Recovered",
    ]


@pytest.mark.parametrize("written", [0, 3, 4])
def test_memory_that_runs_out_is_an_error_of_the_task(
    make_machine: MakeMachine, written: int
) -> None:
    """A cgroup at its limit: MemoryError; what came in before stays, up to the last page.

    Two page tables are charged besides.
    """
    machine = make_machine("8M")
    process = machine.process(memcg=machine.memcg((4 + 2) * PAGE))
    addr = process.mmap(16 * PAGE)
    process.write(addr, bytes(written * PAGE))
    with pytest.raises(OutOfMemory):
        process.write(addr + written * PAGE, bytes(5 * PAGE))
    assert rss(process)["MM_ANONPAGES"] == 4
    assert machine.mem.memcgs[1].usage == 4 + 2


# Huge pages at fault.


def test_huge_page_at_fault(machine: Machine, process: Process) -> None:
    """enabled=always: the first write brings in 512 pages, with a deposited table."""
    machine.thp.enabled = "always"
    addr = process.mmap(HPAGE)
    before = counters(machine, process)
    process.write(addr + 5 * PAGE, b"x")
    assert process.is_huge(addr)
    assert changes(before, counters(machine, process)) == {
        "pgfault": 1,
        "thp_fault_alloc": 1,
        "MM_ANONPAGES": NR,
        "nr_anon_pages": NR,
        "nr_anon_transparent_hugepages": 1,
        "nr_inactive_anon": NR,
        "nr_page_table_pages": 2,
        "pgtables": 2,
        "nr_free_pages": -NR - 2,
    }
    assert process.read(addr, HPAGE) == bytes(5 * PAGE) + b"x" + bytes(HPAGE - 5 * PAGE - 1)


@pytest.mark.parametrize(
    ("enabled", "advice", "huge"),
    [
        ("always", None, True),
        ("always", Advice.MADV_NOHUGEPAGE, False),
        ("madvise", None, False),
        ("madvise", Advice.MADV_HUGEPAGE, True),
        ("never", Advice.MADV_HUGEPAGE, False),
    ],
)
def test_enabled_and_advice_decide_about_huge_faults(
    machine: Machine, process: Process, enabled: str, advice: Advice | None, huge: bool
) -> None:
    """The sysfs knob and the VMA's flags, as the kernel combines them."""
    machine.thp.enabled = enabled
    addr = process.mmap(HPAGE)
    if advice is not None:
        process.madvise(addr, HPAGE, advice)
    process.write(addr, b"x")
    assert process.is_huge(addr) is huge


def test_read_maps_the_huge_zero_page(machine: Machine, process: Process) -> None:
    """A huge read fault needs no memory but the huge zero page, made once; a write splits it."""
    addr = advised(process, 2 * HPAGE)
    assert process.read(addr, 2 * HPAGE) == bytes(2 * HPAGE)
    assert machine.vmstat()["thp_zero_page_alloc"] == 1
    assert rss(process)["MM_ANONPAGES"] == 0
    assert process.is_huge(addr)
    process.write(addr + PAGE, b"x")
    assert rss(process)["MM_ANONPAGES"] in (1, NR)
    assert process.read(addr, PAGE + 2) == bytes(PAGE) + b"x\0"
    assert process.is_huge(addr + HPAGE)


def test_use_zero_page_off_allocates_on_read(machine: Machine, process: Process) -> None:
    """Without the huge zero page a read brings in a real huge page."""
    machine.thp.use_zero_page = False
    addr = advised(process)
    process.read(addr, 1)
    assert rss(process)["MM_ANONPAGES"] == NR


def test_unaligned_mapping_gets_small_pages(machine: Machine, process: Process) -> None:
    """A block that is not wholly inside the VMA cannot be huge."""
    machine.thp.enabled = "always"
    addr = process.mmap(HPAGE - PAGE)
    process.write(addr, b"x")
    assert not process.is_huge(addr)


def test_huge_fault_falls_back_when_charge_fails(machine: Machine) -> None:
    """A cgroup too small for 512 pages gets one page and two events."""
    process = machine.process(memcg=machine.memcg("1M"))
    addr = advised(process)
    process.write(addr, b"x")
    assert not process.is_huge(addr)
    assert machine.vmstat()["thp_fault_fallback"] == 1
    assert machine.vmstat()["thp_fault_fallback_charge"] == 1


def test_write_to_a_shared_huge_page_splits_the_pmd(machine: Machine, process: Process) -> None:
    """The child's PMD is split and one page copied; the parent's stays huge."""
    with faults(machine, "always"):
        addr = advised(process)
        process.write(addr, page_bytes(1))
        child = process.fork()
        child.write(addr, b"child")
    assert process.is_huge(addr)
    assert not child.is_huge(addr)
    assert machine.vmstat()["thp_split_pmd"] == 1
    assert process.read(addr, PAGE) == page_bytes(1)
    assert child.pfn(addr + PAGE) == process.pfn(addr + PAGE)


def test_huge_page_left_alone_is_reused(machine: Machine, process: Process) -> None:
    """When the child has gone the huge PMD becomes writable again."""
    addr = advised(process)
    process.write(addr, b"a")
    process.fork().exit()
    process.write(addr, b"b")
    assert process.is_huge(addr)
    assert machine.vmstat()["thp_split_pmd"] == 0


# userfaultfd.


def test_missing_page_waits_for_userfaultfd(process: Process) -> None:
    """The task sleeps until UFFDIO_COPY or UFFDIO_ZEROPAGE fills the page."""
    addr = process.mmap(4 * PAGE)
    uffd = process.userfaultfd()
    uffd.register(addr, 4 * PAGE)
    for write in (False, True):
        with pytest.raises(UserFault) as raised:
            process.write(addr + 10, b"x") if write else process.read(addr + 10, 1)
        assert (raised.value.address, raised.value.kind) == (addr, "missing")
    uffd.copy(addr, page_bytes(5))
    uffd.zeropage(addr + PAGE, PAGE)
    assert process.read(addr, 2 * PAGE) == page_bytes(5) + bytes(PAGE)
    with pytest.raises(OSError, match="is mapped"):
        uffd.copy(addr, page_bytes(6))
    uffd.unregister(addr, 4 * PAGE)
    assert process.read(addr + 2 * PAGE, PAGE) == bytes(PAGE)


def test_a_missing_block_waits_for_userfaultfd_with_the_huge_zero_page_in_hand(
    machine: Machine,
) -> None:
    """It is asked for before anybody looks who watches; nothing is mapped."""
    machine.thp.enabled = "always"
    process = machine.process()
    addr = process.mmap(2 * HPAGE)
    addr += -addr % HPAGE
    process.userfaultfd().register(addr, HPAGE)
    free, before = machine.vmstat()["nr_free_pages"], machine.vmstat()["thp_zero_page_alloc"]
    with pytest.raises(UserFault):
        process.read(addr, 1)
    assert machine.vmstat()["thp_zero_page_alloc"] == before + 1
    pmd_table = 1
    assert machine.vmstat()["nr_free_pages"] == free - NR - pmd_table
    with pytest.raises(UserFault):
        process.write(addr, b"x")
    assert machine.vmstat()["nr_free_pages"] == free - NR - pmd_table
    assert process.pfn(addr) is None


def test_a_fault_counts_whatever_becomes_of_it(machine: Machine) -> None:
    """Behind the end of a file, a slot that cannot be read, memory that has run out."""
    process = machine.process(memcg=machine.memcg(8 * PAGE))
    file = process.memfd_create("short")
    behind = process.mmap(PAGE, file=file, shared=True)
    addr = process.mmap(16 * PAGE)
    process.write(addr, b"x")
    process.madvise(addr, PAGE, Advice.MADV_PAGEOUT)
    process.fail_swap_reads(addr)
    for touched in (behind, addr):
        before = machine.vmstat()["pgfault"]
        with pytest.raises(BusError):
            process.read(touched, 1)
        assert machine.vmstat()["pgfault"] == before + 1
    before, charged = machine.vmstat()["pgfault"], process.mm.memcg.usage
    with pytest.raises(OutOfMemory):
        process.write(addr + PAGE, bytes(9 * PAGE))
    assert machine.vmstat()["pgfault"] == before + process.mm.memcg.usage - charged + 1


def test_swap_slots_that_cannot_be_read_are_logged_ten_times_in_five_seconds(
    machine: Machine, process: Process
) -> None:
    """The sector is the slot's; what was kept back is counted later."""
    addr = process.mmap(16 * PAGE)
    process.write(addr, bytes(range(1, 17)) * PAGE)
    process.madvise(addr, 16 * PAGE, Advice.MADV_PAGEOUT)
    for page in range(16):
        process.fail_swap_reads(addr + page * PAGE)
    for page in range(12):
        with pytest.raises(BusError):
            process.read(addr + page * PAGE, 1)
    lines = [line.partition("] ")[2] for line in machine.log]
    assert lines[0] == "Read-error on swap-device (253:0:8)"
    assert len(lines) == 10
    machine.clock.sleep(6 * 10**9)
    with pytest.raises(BusError):
        process.read(addr + 15 * PAGE, 1)
    assert machine.log[-2].endswith("end_swap_bio_read: 2 callbacks suppressed")


def test_write_protected_page_waits_for_userfaultfd(process: Process) -> None:
    """Reads pass, a write waits until the protection is lifted; others are not touched."""
    addr = process.mmap(4 * PAGE)
    process.write(addr, bytes(4 * PAGE))
    uffd = process.userfaultfd()
    uffd.register(addr, 4 * PAGE, missing=False, wp=True)
    uffd.writeprotect(addr + PAGE, PAGE)
    process.write(addr, b"x")
    assert process.read(addr + PAGE, 1) == b"\0"
    with pytest.raises(UserFault) as raised:
        process.write(addr + PAGE, b"x")
    assert (raised.value.address, raised.value.kind) == (addr + PAGE, "wp")
    uffd.writeprotect(addr + PAGE, PAGE, protect=False)
    process.write(addr + PAGE, b"x")
    assert process.read(addr + PAGE, 1) == b"x"


@pytest.mark.parametrize("page", [0, 100, 511])
def test_new_pages_are_dirty_and_writable(process: Process, block: int, page: int) -> None:
    """A written page's entry has the dirty and the write bit; a read one neither."""
    fill(process, block, [page])
    word = int(ptes_of(process, block)[page])
    assert word & (PAGE_DIRTY | PAGE_RW) == PAGE_DIRTY | PAGE_RW
    other = (page + 1) % NR
    with faults(process, "never"):
        process.read(block + other * PAGE, 1)
    assert int(ptes_of(process, block)[other]) & (PAGE_DIRTY | PAGE_RW) == 0


def test_faults_prefer_the_process_node(make_machine: MakeMachine) -> None:
    """Pages come from the preferred node, and from the next one when it is full."""
    machine = make_machine(nodes=["2M", "4M"])
    process = machine.process()
    addr = advised(process)
    process.node = 1
    fill(process, addr, [0])
    process.node = 0
    fill(process, addr, range(1, NR))
    nids = [machine.mem.nid_of(pfn_of(process, addr, page)) for page in range(NR)]
    assert nids[0] == 1
    assert nids[1] == 0
    assert nids[-1] == 1  # node 0 has 511 pages, of which page tables took some
