"""soft_offline_page: the contents move, the frame does not come back, nobody notices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collapse_kit import (
    HPAGE,
    PAGE,
    MakeMachine,
    advised,
    block_bytes,
    page_bytes,
    pageout,
    refused,
)
from file_kit import memfd

from pykhuge import Advice, KernelPanic, KernelVersion, Machine, Process
from pykhuge.kernel.sched import BoundSteps, Task
from pykhuge.mm.gup import LockedPage
from pykhuge.mm.page import PG_hwpoison, PG_lru
from pykhuge.mm.swap import isolate_lru_pages, putback_lru_pages

OFFLINE = Advice.MADV_SOFT_OFFLINE


def anonymous(process: Process) -> int:
    addr = process.mmap(2 * PAGE)
    process.write(addr, block_bytes(0, 2))
    return addr


def forked(process: Process) -> int:
    addr = anonymous(process)
    process.fork("child")
    return addr


def mlocked(process: Process) -> int:
    addr = anonymous(process)
    process.mlock(addr, 2 * PAGE)
    return addr


def in_swap_cache(process: Process) -> int:
    addr = anonymous(process)
    pageout(process, addr, [0, 1])
    process.read(addr, 2 * PAGE)
    return addr


def shmem(process: Process) -> int:
    file = memfd(process, range(2), size=2 * PAGE)
    addr = process.mmap(2 * PAGE, file=file, shared=True)
    process.write(addr, block_bytes(0, 2))
    return addr


def huge(process: Process) -> int:
    addr = advised(process)
    process.write(addr, block_bytes())
    assert process.is_huge(addr)
    return addr


def texts(machine: Machine) -> list[str]:
    """The log without times."""
    return [line.partition("] ")[2] for line in machine.log]


KINDS = [anonymous, forked, mlocked, in_swap_cache, shmem, huge]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_page_moves_and_its_frame_is_out_of_use(
    make_machine: MakeMachine, kind: Callable[[Process], int], nodes: int
) -> None:
    """Contents, counters and LRU lists are as they were, but for one frame less that is free."""
    machine = make_machine("64M", swap="8M", nodes=nodes)
    process = machine.process("app")
    addr = kind(process)
    machine.lru_add_drain_all()
    old, before = process.pfn(addr + PAGE), machine.vmstat()
    assert old is not None
    process.madvise(addr + PAGE, PAGE, OFFLINE)
    assert process.pfn(addr + PAGE) not in (None, old)
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)
    process.write(addr + PAGE, b"still writable")
    assert machine.mem.pages.flags[old] == PG_hwpoison
    assert machine.mem.num_poisoned_pages == 1
    assert process.signals == []
    machine.lru_add_drain_all()
    changed = {k: v - before[k] for k, v in machine.vmstat().items() if v != before[k]}
    if kind in (anonymous, mlocked, shmem):
        assert changed == {"nr_free_pages": -1, "pgmigrate_success": 1}
    assert changed["pgmigrate_success"] == 1
    machine.audit()
    process.exit()
    assert machine.mem.pages.flags[old] == PG_hwpoison


@pytest.mark.parametrize("mapped", [False, True])
def test_a_clean_page_of_a_disk_file_is_dropped_or_moved(
    machine: Machine, process: Process, tmp_path: Path, mapped: bool
) -> None:
    """Dropped if only the cache has it; a mapped one moves."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 4))
    file = process.open(str(path))
    addr = process.mmap(4 * PAGE, file=file, prot=1)
    process.pread(file, 0, 4 * PAGE)
    if mapped:
        process.read(addr, 4 * PAGE)
    machine.lru_add_drain_all()
    pfn = process.cached_pfn(file, 2)
    assert pfn is not None
    machine.soft_offline_page(pfn)
    assert file.f_mapping.nrpages == 3 + mapped
    assert machine.vmstat()["pgmigrate_success"] == mapped
    assert any("invalidated" in line for line in machine.log) is not mapped
    assert process.read(addr, 4 * PAGE) == block_bytes(0, 4)


def test_a_dirty_page_of_a_disk_file_moves_and_is_written_later(
    machine: Machine, process: Process, tmp_path: Path
) -> None:
    """Dirty there as here."""
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 1))
    file = process.open(str(path), os.O_RDWR)
    process.pwrite(file, 0, b"new")
    machine.lru_add_drain_all()
    pfn = process.cached_pfn(file, 0)
    assert pfn is not None
    machine.soft_offline_page(pfn)
    assert machine.vmstat()["nr_dirty"] == 1
    process.fsync(file)
    assert path.read_bytes()[:3] == b"new"


def test_a_free_frame_is_taken_out_of_use(machine: Machine) -> None:
    """Without a word in the log; only the second time is worth one."""
    free = machine.vmstat()["nr_free_pages"]
    machine.soft_offline_page(machine.mem.nr_pages - 3)
    assert machine.vmstat()["nr_free_pages"] == free - 1
    assert machine.log == []
    machine.soft_offline_page(machine.mem.nr_pages - 3)  # twice is no error
    already = f"soft_offline_page: {machine.mem.nr_pages - 3:#x} page already poisoned"
    assert texts(machine) == [already]
    assert machine.mem.num_poisoned_pages == 1


@pytest.mark.parametrize("is_huge", [False, True])
def test_a_page_that_somebody_holds_stays(
    machine: Machine, process: Process, is_huge: bool
) -> None:
    """EBUSY; it is not marked, and goes on being used."""
    addr = huge(process) if is_huge else anonymous(process)
    pins = process.pin(addr, 1)
    machine.lru_add_drain_all()
    before = machine.vmstat()
    assert refused(lambda: process.madvise(addr, 1, OFFLINE)) == errno.EBUSY
    why = "thp split failed" if is_huge else "page migration failed 1"
    assert texts(machine)[-1] == f"soft offline: {pins.pfns[0]:#x}: {why}"
    assert machine.mem.num_poisoned_pages == 0
    assert process.pfn(addr) == pins.pfns[0]
    machine.lru_add_drain_all()
    failed = "thp_split_page_failed" if is_huge else "pgmigrate_fail"
    assert machine.vmstat() == before | {failed: 1}
    pins.release()
    process.madvise(addr, 1, OFFLINE)
    assert process.read(addr, PAGE) == page_bytes(0)


def test_without_memory_to_move_to_it_stays(make_machine: MakeMachine) -> None:
    """ENOMEM, also for a page that somebody holds: a place is looked for before."""
    machine = make_machine("8M")
    process = machine.process()
    addr = anonymous(process)
    hog = process.mmap(16 << 20)
    with pytest.raises(MemoryError):
        process.write(hog, bytes(16 << 20))
    held = process.get(addr + PAGE, 1)
    for number in range(2):
        page = addr + number * PAGE
        assert refused(lambda page=page: process.madvise(page, PAGE, OFFLINE)) == errno.ENOMEM
        failed = f"soft offline: {process.pfn(page):#x}: page migration failed -12"
        assert texts(machine)[-1] == failed
    assert machine.vmstat()["pgmigrate_fail"] == 2
    assert process.read(addr, 2 * PAGE) == block_bytes(0, 2)
    held.release()


@pytest.mark.parametrize("kind", [anonymous, mlocked], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("version", [(6, 4), (6, 7)])
def test_what_was_mapped_is_on_its_list_at_once(
    make_machine: MakeMachine, kind: Callable[[Process], int], version: tuple[int, int]
) -> None:
    """The batch is drained before entries are put back; since 6.7 only for an mlocked page."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process()
    addr = kind(process)
    machine.lru_add_drain_all()
    process.madvise(addr, PAGE, OFFLINE)
    new = process.pfn(addr)
    assert new is not None
    on_list = version < (6, 7) or kind is mlocked
    assert bool(machine.mem.pages.flags[new] & PG_lru) is on_list
    assert any(new in batch for batch in machine.mem.lru_batches) is not on_list


def locked_page(machine: Machine, process: Process) -> tuple[int, LockedPage]:
    """The frame of a page on its LRU list, and the lock that somebody has of it."""
    addr = anonymous(process)
    machine.lru_add_drain_all()
    pfn = process.pfn(addr)
    assert pfn is not None
    return pfn, process.lock_page(addr)


def waiting(machine: Machine, call: BoundSteps[..., Any], pfn: int) -> Task[Any]:
    """A task in the middle of `call`, where it waits for the page lock with a reference."""
    task = machine.spawn(call.steps(pfn))
    while task.step():
        pass
    assert not task.done
    return task


def test_a_page_that_leaves_its_list_meanwhile_stays(machine: Machine, process: Process) -> None:
    """EBUSY; the references told of are those of others."""
    pfn, lock = locked_page(machine, process)
    offline = waiting(machine, machine.soft_offline_page, pfn)
    isolate_lru_pages(machine.mem, np.array([pfn]))
    lock.release()
    assert refused(offline.finish) == errno.EBUSY
    assert texts(machine) == [f"soft offline: {pfn:#x}: page isolation failed, page count 2"]
    putback_lru_pages(machine.mem, np.array([pfn]))


def test_a_page_that_goes_bad_meanwhile_is_no_error(machine: Machine, process: Process) -> None:
    """Whoever holds the lock has it: nothing is left to be done, and the reference is dropped."""
    pfn, lock = locked_page(machine, process)
    calls = [
        waiting(machine, call, pfn) for call in (machine.soft_offline_page, machine.memory_failure)
    ]
    lock.release()
    for call in reversed(calls):
        call.finish()
    assert texts(machine)[-1] == f"soft offline: {pfn:#x} page already poisoned"
    assert machine.mem.num_poisoned_pages == 1


@pytest.mark.parametrize("version", [(6, 10), (6, 11)])
def test_the_log_has_one_form_since_6_11(
    make_machine: MakeMachine, tmp_path: Path, version: tuple[int, int]
) -> None:
    """Until then each line was put together by itself."""
    machine = make_machine(kernel=KernelVersion.at(*version))
    process = machine.process("app")
    path = tmp_path / "disk"
    path.write_bytes(block_bytes(0, 1))
    file = process.open(str(path))
    process.pread(file, 0, PAGE)
    held = process.get(huge(process), 1)
    machine.lru_add_drain_all()
    cached, head = process.cached_pfn(file, 0), int(held.pfns[0])
    assert cached is not None
    for pfn in (cached, cached, head):
        refused(lambda pfn=pfn: machine.soft_offline_page(pfn))
    held.release()
    bad, lock = locked_page(machine, process)
    offline = waiting(machine, machine.soft_offline_page, bad)
    machine.mem.pages.flags[bad] |= np.uint32(PG_hwpoison)
    lock.release()
    offline.finish()
    machine.mem.pages.flags[bad] &= np.uint32(~PG_hwpoison & 0xFFFFFFFF)
    assert texts(machine) == (
        [
            f"Soft offline: {cached:#x}: invalidated",
            f"Soft offline: {cached:#x}: page already poisoned",
            f"Soft offline: {head:#x}: thp split failed",
            f"Soft offline: {bad:#x}: page already poisoned",
        ]
        if version >= (6, 11)
        else [
            f"soft_offline: {cached:#x}: invalidated",
            f"soft_offline_page: {cached:#x} page already poisoned",
            f"soft offline: {head:#x}: thp split failed",
            f"soft offline: {bad:#x} page already poisoned",
        ]
    )


def test_what_is_no_page_that_moves(machine: Machine, process: Process) -> None:
    """EIO: page tables, device memory."""
    addr = anonymous(process)
    assert refused(lambda: machine.soft_offline_page(process.mm.pmd_tables[addr >> 30])) == 5
    device = process.migrate_to_device(addr)
    assert refused(lambda: machine.soft_offline_page(device)) == errno.EIO
    assert machine.mem.num_poisoned_pages == 0


def test_a_page_that_is_poisoned_already_kills_the_host(process: Process) -> None:
    """The copy of a migration is not machine-check safe."""
    addr = anonymous(process)
    process.poison(addr)
    with pytest.raises(KernelPanic):
        process.madvise(addr, PAGE, OFFLINE)


def test_every_page_of_a_range_is_offlined(machine: Machine, process: Process) -> None:
    """A huge page counts as one until it is split: its first page goes, then those behind it."""
    addr = anonymous(process)
    old = [process.pfn(addr), process.pfn(addr + PAGE)]
    process.madvise(addr, 2 * PAGE, OFFLINE)
    assert set(old).isdisjoint({process.pfn(addr), process.pfn(addr + PAGE)})
    whole = huge(process)
    process.madvise(whole, HPAGE, OFFLINE)
    assert machine.mem.num_poisoned_pages == 3
    assert process.read(whole, HPAGE) == block_bytes()
    assert any("Soft offlining pfn" in line for line in machine.log)
