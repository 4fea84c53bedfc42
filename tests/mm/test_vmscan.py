"""Swapping out and in, and lazily freed pages."""

import errno

import pytest
from collapse_kit import (
    HPAGE,
    NR,
    PAGE,
    MakeMachine,
    advise,
    advised,
    block_bytes,
    changes,
    counters,
    faults,
    fill,
    flags_of,
    madv_collapse,
    page_bytes,
    pageout,
    paused,
    pfn_of,
    rss,
)

from pykhuge import (
    PROT_READ,
    PROT_WRITE,
    Advice,
    BusError,
    KernelVersion,
    Machine,
    Process,
    ScanResult,
)
from pykhuge.mm.page import PG_anon_exclusive, PG_head, PG_swapbacked, PG_swapcache

S = ScanResult


@pytest.fixture
def eight(machine: Machine, process: Process) -> int:
    """Eight written pages, on the LRU."""
    addr = process.mmap(8 * PAGE)
    process.write(addr, block_bytes(0, 8))
    machine.lru_add_drain_all()
    return addr


def test_pageout_and_swap_in(machine: Machine, process: Process, eight: int) -> None:
    """Pages leave memory for the device and come back as they were, exclusive."""
    before = counters(machine, process)
    pageout(process, eight, [2, 3])
    machine.lru_add_drain_all()
    gone = changes(before, counters(machine, process))
    assert gone == {
        "pswpout": 2,
        "MM_ANONPAGES": -2,
        "MM_SWAPENTS": 2,
        "nr_anon_pages": -2,
        "nr_inactive_anon": -2,
        "nr_free_pages": 2,
    }
    assert process.pfn(eight + 2 * PAGE) is None
    assert process.read(eight, 8 * PAGE) == block_bytes(0, 8)
    assert rss(process)["MM_SWAPENTS"] == 0
    assert machine.vmstat()["pswpin"] == 2
    process.write(eight + 2 * PAGE, b"x")
    assert process.read(eight + 2 * PAGE, 2) == b"x" + page_bytes(2)[1:2]


def test_page_read_back_stays_in_the_swap_cache(
    machine: Machine, process: Process, eight: int
) -> None:
    """A read keeps the slot, so that going out again needs no write; a write gives it up."""
    pageout(process, eight, [1])
    process.read(eight + PAGE, 1)
    pfn = pfn_of(process, eight, 1)
    assert flags_of(process, pfn) & PG_swapcache
    assert machine.vmstat()["nr_swapcached"] == 1
    machine.lru_add_drain_all()
    pageout(process, eight, [1])
    assert machine.vmstat()["pswpout"] == 1
    process.write(eight + PAGE, b"x")
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_swapcached"] == 0
    assert len(machine.mem.swap.swap_map) == 0


def test_cached_page_collapses_and_gives_its_slot_up(
    machine: Machine, process: Process, block: int
) -> None:
    """The swap cache's reference is expected by the collapse, and dropped with the page."""
    fill(process, block)
    machine.lru_add_drain_all()
    pageout(process, block, range(10))
    process.read(block, 10 * PAGE)
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_swapcached"] == 10
    assert machine.collapse(process, block) is S.SCAN_SUCCEED
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_swapcached"] == 0
    assert machine.mem.swap.swap_map == {}
    assert process.read(block, HPAGE) == block_bytes()


def test_unreadable_slot_is_a_bus_error(machine: Machine, process: Process, eight: int) -> None:
    """SIGBUS BUS_ADRERR to the task, again and again; the entry stays, other pages are fine."""
    pageout(process, eight, [4])
    process.fail_swap_reads(eight + 4 * PAGE)
    for _ in range(2):
        with pytest.raises(BusError) as raised:
            process.read(eight + 4 * PAGE + 7, 1)
        assert raised.value.code == 2
        assert raised.value.lsb == 0
        machine.audit()
    assert rss(process)["MM_SWAPENTS"] == 1
    assert process.read(eight, 4 * PAGE) == block_bytes(0, 4)
    process.munmap(eight, 8 * PAGE)
    machine.lru_add_drain_all()
    assert machine.mem.swap.swap_map == {}
    assert machine.mem.swap.bad == set()


@pytest.mark.parametrize("page", [0, 7])
def test_fail_swap_reads_wants_a_swapped_out_page(process: Process, eight: int, page: int) -> None:
    """Only where something is swapped out; the message says so."""
    with pytest.raises(ValueError, match=r"allowed where a page is swapped out"):
        process.fail_swap_reads(eight + page * PAGE)
    with pytest.raises(ValueError, match=r"addr=0x1000"):
        process.fail_swap_reads(0x1000)


def test_full_device_keeps_pages_in(make_machine: MakeMachine) -> None:
    """When the slots have run out the rest stays; slot 0 is the header's."""
    machine = make_machine(swap=4 * PAGE)
    process = machine.process()
    addr = process.mmap(8 * PAGE)
    process.write(addr, block_bytes(0, 8))
    machine.lru_add_drain_all()
    pageout(process, addr, range(8))
    assert rss(process)["MM_SWAPENTS"] == 3
    assert process.read(addr, 8 * PAGE) == block_bytes(0, 8)


def test_without_a_device_nothing_goes(make_machine: MakeMachine) -> None:
    """MADV_PAGEOUT is advice."""
    machine = make_machine()
    process = machine.process()
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    pageout(process, addr, [0])
    assert rss(process)["MM_SWAPENTS"] == 0


def test_poisoned_page_stays_in_the_swap_cache(
    machine: Machine, process: Process, eight: int
) -> None:
    """The device cannot read it: unmapped, but kept, dirty; other bytes are still to be had."""
    pfn = process.poison(eight + 3 * PAGE, 9)
    pageout(process, eight, [3])
    assert machine.vmstat()["nr_swapcached"] == 1
    assert machine.vmstat()["pswpout"] == 0
    assert process.read(eight + 3 * PAGE, 9 * 64) == page_bytes(3)[: 9 * 64]
    assert process.pfn(eight + 3 * PAGE) == pfn


@pytest.mark.parametrize("hold", ["pin", "shared", "lock"])
def test_pages_in_use_are_not_paged_out(
    machine: Machine, process: Process, eight: int, hold: str
) -> None:
    """Pinned, shared and locked pages stay mapped."""
    held = None
    if hold == "pin":
        held = process.pin(eight, PAGE)
    elif hold == "lock":
        held = process.lock_page(eight)
    else:
        process.fork()
    machine.lru_add_drain_all()
    pageout(process, eight, [0])
    assert process.pfn(eight) is not None
    if held is not None:
        held.release()


def test_paging_out_a_huge_page_splits_it(machine: Machine, process: Process) -> None:
    """512 base pages first, of which the range's are written."""
    addr = advised(process)
    process.write(addr, block_bytes())
    pageout(process, addr, range(100))
    assert machine.vmstat()["thp_split_page"] == 1
    assert rss(process) == {
        "MM_FILEPAGES": 0,
        "MM_ANONPAGES": NR - 100,
        "MM_SWAPENTS": 100,
        "MM_SHMEMPAGES": 0,
        "pgtables": 2,
    }
    with faults(machine, "never"):
        assert process.read(addr, HPAGE) == block_bytes()


def test_cgroup_limit_stops_swap_in(machine: Machine) -> None:
    """A charge refused at swap-in is a MemoryError of the task, and fails a collapse.

    Three page tables are charged besides.
    """
    group = machine.memcg((1200 + 3) * PAGE)
    process = machine.process(memcg=group)
    addr = advised(process)
    fill(process, addr)
    machine.lru_add_drain_all()
    pageout(process, addr, [0])
    machine.lru_add_drain_all()
    other = process.mmap(HPAGE)
    with faults(machine, "never"):
        process.write(other, bytes((1200 - 511 - NR) * PAGE))
    assert group.usage == 1200 + 3 - NR
    assert madv_collapse(process, addr) is S.SCAN_FAIL
    assert group.usage == 1200 + 3 - NR
    assert rss(process)["MM_SWAPENTS"] == 1


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_a_page_that_one_entry_names_skips_the_cache_of_a_device_that_is_memory(
    make_machine: MakeMachine, synchronous: bool, others: bool
) -> None:
    """It is its task's own then; what more entries name goes by way of the cache."""
    machine = make_machine(swap="16M", swap_synchronous_io=synchronous)
    process = machine.process()
    addr = process.mmap(PAGE)
    process.write(addr, page_bytes(1))
    machine.lru_add_drain_all()
    pageout(process, addr, [0])
    child = process.fork()  # from here on the entry is nobody's own
    if not others:
        child.munmap(addr, PAGE)
    assert process.read(addr, PAGE) == page_bytes(1)
    flags = flags_of(process, pfn_of(process, addr, 0))
    skipped = synchronous and not others
    assert bool(flags & PG_swapcache) is not skipped
    assert bool(flags & PG_anon_exclusive) is skipped
    assert machine.vmstat()["pswpin"] == 1


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_bad_swap_synchronous_io_is_named(make_machine: MakeMachine, value: object) -> None:
    """With what is allowed."""
    with pytest.raises(ValueError, match=f"swap_synchronous_io={value!r}: allowed False and True"):
        make_machine(swap_synchronous_io=value)


# MADV_FREE.


def lazyfree(process: Process, addr: int, pages: list[int]) -> None:
    advise(process, addr, pages, Advice.MADV_FREE)


def test_lazily_freed_pages_move_to_the_file_list(
    machine: Machine, process: Process, eight: int
) -> None:
    """No longer swap-backed, clean, counted as inactive file; still readable."""
    lazyfree(process, eight, [0, 1, 2])
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_inactive_file"] == 3
    assert machine.vmstat()["nr_inactive_anon"] == 5
    assert not flags_of(process, pfn_of(process, eight, 0)) & PG_swapbacked
    assert process.read(eight, 8 * PAGE) == block_bytes(0, 8)


def test_lazily_freed_pages_are_dropped_not_written(
    machine: Machine, process: Process, eight: int
) -> None:
    """Reclaim drops clean ones, which read as zero then; one written to since is kept."""
    lazyfree(process, eight, [0, 1])
    process.write(eight + PAGE, b"again")
    machine.lru_add_drain_all()
    pageout(process, eight, [0, 1])
    assert machine.vmstat()["pswpout"] == 0
    assert process.read(eight, PAGE) == bytes(PAGE)
    assert process.read(eight + PAGE, 5) == b"again"
    assert flags_of(process, pfn_of(process, eight, 1)) & PG_swapbacked


def test_madv_free_makes_entries_clean_again(process: Process, eight: int) -> None:
    """What was written to since the first time is given up by the second."""
    lazyfree(process, eight, [0, 1])
    process.write(eight, b"again")
    lazyfree(process, eight, [0, 1])
    pageout(process, eight, [0, 1])
    assert process.read(eight, 2 * PAGE) == bytes(2 * PAGE)


def test_madv_free_takes_pages_out_of_the_swap_cache(
    machine: Machine, process: Process, eight: int
) -> None:
    """Read back from swap, a page still has its slot; it loses it, and is dropped later."""
    pageout(process, eight, [0, 1])
    process.read(eight, PAGE)
    machine.lru_add_drain_all()
    lazyfree(process, eight, [0, 1])
    assert machine.mem.swap.swap_map == {}
    assert not flags_of(process, pfn_of(process, eight, 0)) & (PG_swapcache | PG_swapbacked)
    pageout(process, eight, [0])
    assert process.read(eight, 2 * PAGE) == bytes(2 * PAGE)
    assert process.read(eight + 2 * PAGE, 6 * PAGE) == block_bytes(2, 6)


def test_madv_free_leaves_alone_what_others_have_on_swap_too(
    machine: Machine, process: Process, eight: int
) -> None:
    """The slot, and so the content, is the child's as well."""
    pageout(process, eight, [0])
    child = process.fork()
    process.read(eight, PAGE)
    machine.lru_add_drain_all()
    lazyfree(process, eight, [0])
    assert flags_of(process, pfn_of(process, eight, 0)) & PG_swapcache
    assert child.read(eight, PAGE) == process.read(eight, PAGE) == page_bytes(0)


@pytest.mark.parametrize("kernel", [KernelVersion.REF, KernelVersion.V6_18])
@pytest.mark.parametrize("use", ["none", "written", "held"])
def test_a_lazily_freed_huge_page_is_dropped_whole_or_not_at_all(
    make_machine: MakeMachine, kernel: KernelVersion, use: str
) -> None:
    """In use, it stays one compound page, mapped by entries of a table, and swap-backed."""
    machine = make_machine(kernel=kernel, swap="16M")
    process = machine.process()
    addr = advised(process)
    process.write(addr, block_bytes())
    head = pfn_of(process, addr, 0)
    machine.lru_add_drain_all()
    process.madvise(addr, HPAGE, Advice.MADV_FREE)
    if use == "written":
        process.write(addr + 3 * PAGE, page_bytes(3))
    elif use == "held":
        process.get(addr + 3 * PAGE, PAGE)
    before = machine.vmstat()["nr_free_pages"]
    process.madvise(addr, HPAGE, Advice.MADV_PAGEOUT)
    assert not process.is_huge(addr)
    if use == "none":
        assert machine.vmstat()["nr_free_pages"] == before + NR
        assert process.read(addr, HPAGE) == bytes(HPAGE)
    else:
        assert flags_of(process, head) & PG_head
        assert flags_of(process, head) & PG_swapbacked
        assert process.read(addr, HPAGE) == block_bytes()


@pytest.mark.parametrize("advice", [Advice.MADV_FREE, Advice.MADV_PAGEOUT])
@pytest.mark.parametrize("held", [False, True])
def test_later_kernels_take_a_huge_page_mapped_by_entries_whole(
    make_machine: MakeMachine, advice: Advice, held: bool
) -> None:
    """Nothing is split to free it; one in use is not tried to be split for swap."""
    machine = make_machine(kernel=KernelVersion.V6_18, swap="16M")
    process = machine.process()
    addr = advised(process)
    process.write(addr, block_bytes())
    head = pfn_of(process, addr, 0)
    machine.lru_add_drain_all()
    process.mprotect(addr, PAGE, PROT_READ)
    process.mprotect(addr, PAGE, PROT_READ | PROT_WRITE)
    assert not process.is_huge(addr)
    if held:
        process.get(addr + 3 * PAGE, PAGE)
    before = counters(machine, process)
    process.madvise(addr, HPAGE, advice)
    moved = changes(before, counters(machine, process))
    assert "thp_split_page" not in moved
    assert "thp_split_page_failed" not in moved
    if advice is Advice.MADV_FREE or held:
        assert flags_of(process, head) & PG_head
        assert bool(flags_of(process, head) & PG_swapbacked) is (advice is Advice.MADV_PAGEOUT)
    else:
        assert rss(process)["MM_SWAPENTS"] == NR


def test_part_of_a_huge_page_in_use_is_tried_once(make_machine: MakeMachine) -> None:
    """The batch of entries is passed over then."""
    machine = make_machine(kernel=KernelVersion.V6_18, swap="16M")
    process = machine.process()
    addr = advised(process)
    process.write(addr, block_bytes())
    machine.lru_add_drain_all()
    process.mprotect(addr, PAGE, PROT_READ)
    process.get(addr + 3 * PAGE, PAGE)
    process.madvise(addr + PAGE, 300 * PAGE, Advice.MADV_PAGEOUT)
    assert machine.vmstat()["thp_split_page_failed"] == 1
    assert rss(process)["MM_ANONPAGES"] == NR


@pytest.mark.parametrize("poisoned", [False, True])
def test_lazily_freed_pages_isolate_as_file_pages(
    machine: Machine, process: Process, block: int, poisoned: bool
) -> None:
    """nr_isolated_file counts them during a collapse, nr_isolated_anon the others."""
    fill(process, block)
    machine.lru_add_drain_all()
    lazyfree(process, block, list(range(100)))
    if poisoned:
        process.poison(block)
    task = paused(machine, process, block, "copied")
    assert machine.vmstat()["nr_isolated_file"] == 100
    assert machine.vmstat()["nr_isolated_anon"] == NR - 100
    result = task.finish()
    assert result is (S.SCAN_COPY_MC if poisoned else S.SCAN_SUCCEED)
    assert machine.vmstat()["nr_isolated_file"] == 0
    assert machine.vmstat()["nr_isolated_anon"] == 0
    machine.lru_add_drain_all()
    assert machine.vmstat()["nr_inactive_file"] == 100 * poisoned


def test_madv_free_drops_swapped_out_pages(machine: Machine, process: Process, eight: int) -> None:
    """What is swapped out is freed at once."""
    pageout(process, eight, [5])
    lazyfree(process, eight, [5])
    assert rss(process)["MM_SWAPENTS"] == 0
    machine.lru_add_drain_all()
    assert machine.mem.swap.swap_map == {}
    assert process.read(eight + 5 * PAGE, PAGE) == bytes(PAGE)


# Device memory.


def test_migrating_to_a_device_changes_no_counter(
    machine: Machine, process: Process, eight: int
) -> None:
    """The page is as anonymous there: only its LRU place and its old frame are given up."""
    before = counters(machine, process)
    old = process.pfn(eight)
    new = process.migrate_to_device(eight)
    assert new >= machine.mem.device_start
    assert process.pfn(eight) == new != old
    assert changes(before, counters(machine, process)) == {
        "nr_inactive_anon": -1,
        "nr_free_pages": 1,
    }
    process.write(eight + 8, b"y")
    assert process.read(eight, PAGE) == page_bytes(0)[:8] + b"y" + page_bytes(0)[9:]
    pageout(process, eight, [0])
    assert process.pfn(eight) == new
    process.munmap(eight, 8 * PAGE)
    machine.audit()
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    machine.lru_add_drain_all()
    assert process.migrate_to_device(addr) == new  # the frame is free again


@pytest.mark.parametrize("use", ["pin", "shared", "lock", "hole", "huge"])
def test_only_a_page_of_ones_own_migrates(process: Process, eight: int, use: str) -> None:
    """EBUSY or EFAULT, and nothing changes."""
    held, addr = None, eight
    if use == "pin":
        held = process.pin(addr, 1)
    elif use == "lock":
        held = process.lock_page(addr)
    elif use == "shared":
        process.fork()
    elif use == "hole":
        addr = process.mmap(PAGE)
    else:
        addr = advised(process)
        process.write(addr, b"x")
    pfn = process.pfn(addr)
    expected = "EFAULT" if use == "hole" else "EBUSY"
    with pytest.raises(OSError, match=rf"{addr:#x}") as failed:
        process.migrate_to_device(addr)
    assert errno.errorcode[failed.value.errno or 0] == expected
    assert process.pfn(addr) == pfn
    if held is not None:
        held.release()


def test_device_memory_runs_out(make_machine: MakeMachine) -> None:
    """ENOMEM without a device, and after its last frame."""
    machine = make_machine()
    process = machine.process()
    addr = process.mmap(PAGE)
    process.write(addr, b"x")
    with pytest.raises(OSError, match=r"device_memory="):
        process.migrate_to_device(addr)
    assert process.read(addr, 1) == b"x"
