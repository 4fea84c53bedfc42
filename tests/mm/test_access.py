"""What being touched by a system call leaves: referenced, active and copied pages."""

from __future__ import annotations

import errno

import pytest
from collapse_kit import HPAGE, NR, PAGE, faults, fill, flags_of, page_bytes, pfn_of, refused

from pykhuge import PROT_READ, PROT_WRITE, Advice, Machine, Process, UserFault
from pykhuge.mm.page import PG_active, PG_referenced
from pykhuge.mm.page_table import PAGE_ACCESSED
from pykhuge.mm.rmap import pmd_of

NINE = 9 * PAGE


@pytest.fixture
def nine(machine: Machine, process: Process) -> int:
    """Nine pages that were stored to, on an LRU list."""
    addr = process.mmap(HPAGE)
    fill(process, addr, range(9))
    machine.lru_add_drain_all()
    return addr


def marks(process: Process, addr: int) -> set[int]:
    """PG_referenced and PG_active, as far as each of the nine pages has them."""
    both = PG_referenced | PG_active
    return {flags_of(process, pfn_of(process, addr, page)) & both for page in range(9)}


def test_a_store_of_the_program_marks_no_page(process: Process, nine: int) -> None:
    """Its entry is young instead."""
    assert marks(process, nine) == {0}


def test_mlock_marks_pages_referenced_and_never_active(process: Process, nine: int) -> None:
    """They are unevictable by then."""
    process.mlock(nine, NINE)
    assert marks(process, nine) == {PG_referenced}
    process.mlock(nine, NINE)
    assert marks(process, nine) == {PG_referenced}


def test_populating_twice_makes_pages_active(machine: Machine, process: Process, nine: int) -> None:
    """They change lists: nr_active_anon counts them."""
    before = machine.vmstat()
    process.madvise(nine, NINE, Advice.MADV_POPULATE_READ)
    assert marks(process, nine) == {PG_referenced}
    process.madvise(nine, NINE, Advice.MADV_POPULATE_READ)
    assert marks(process, nine) == {PG_active}
    after = machine.vmstat()
    assert after["nr_active_anon"] - before["nr_active_anon"] == 9
    assert after["nr_inactive_anon"] - before["nr_inactive_anon"] == -9


def test_a_device_that_holds_a_page_marks_it_referenced(process: Process, nine: int) -> None:
    """The daemon heeds that in a child, whose entries are old."""
    held = process.get(nine, NINE)
    assert marks(process, nine) == {PG_referenced}
    held.release()


def test_populating_a_huge_page_makes_its_pmd_young(machine: Machine, process: Process) -> None:
    """And marks no page."""
    addr = process.mmap(HPAGE)
    fill(process, addr)
    process.madvise(addr, HPAGE, Advice.MADV_COLLAPSE)
    process.madvise(addr, HPAGE, Advice.MADV_FREE)
    pmd = pmd_of(machine.mem, process.mm, addr)
    assert pmd is not None
    assert not pmd & PAGE_ACCESSED
    process.madvise(addr, HPAGE, Advice.MADV_POPULATE_WRITE)
    pmd = pmd_of(machine.mem, process.mm, addr)
    assert pmd is not None
    assert pmd & PAGE_ACCESSED


def test_populating_for_writing_keeps_lazily_freed_pages(
    machine: Machine, process: Process, nine: int
) -> None:
    """They are dirty again, though their entries are not."""
    process.madvise(nine, NINE, Advice.MADV_FREE)
    process.madvise(nine, NINE, Advice.MADV_POPULATE_WRITE)
    machine.lru_add_drain_all()
    process.madvise(nine, NINE, Advice.MADV_PAGEOUT)
    assert process.read(nine, PAGE) == page_bytes(0)


def test_mlocked_private_pages_are_copied_when_they_become_writable(
    machine: Machine, process: Process, nine: int
) -> None:
    """So that no store has to wait for it."""
    process.mlock(nine, NINE)
    child = process.fork()
    process.mprotect(nine, NINE, PROT_READ)
    assert pfn_of(process, nine, 3) == pfn_of(child, nine, 3)
    process.mprotect(nine, NINE, PROT_READ | PROT_WRITE)
    assert pfn_of(process, nine, 3) != pfn_of(child, nine, 3)
    assert process.read(nine, PAGE) == child.read(nine, PAGE)
    machine.audit()


def test_a_child_has_tables_where_its_parent_has_them(machine: Machine, process: Process) -> None:
    """Empty as they may be."""
    addr = process.mmap(HPAGE)
    with faults(machine, "never"):
        process.write(addr, b"!")
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    child = process.fork()
    assert pmd_of(machine.mem, child.mm, addr)
    child.exit()
    machine.audit()


# --- userfaultfd


def test_a_range_with_gaps_is_watched_where_it_is_mapped(process: Process) -> None:
    """Nothing at all is EINVAL."""
    addr = process.mmap(HPAGE)
    process.munmap(addr + PAGE, PAGE)
    uffd = process.userfaultfd()
    uffd.register(addr, 3 * PAGE)
    with pytest.raises(UserFault):
        process.read(addr + 2 * PAGE, 1)
    assert refused(lambda: uffd.register(addr + PAGE, PAGE)) == errno.EINVAL


def test_pages_are_filled_within_one_mapping(process: Process) -> None:
    """ENOENT across two; EAGAIN says that some of them are in."""
    addr = process.mmap(HPAGE)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * PAGE)
    assert refused(lambda: uffd.zeropage(addr, 3 * PAGE)) == errno.ENOENT
    uffd.zeropage(addr + PAGE, PAGE)
    assert refused(lambda: uffd.copy(addr, page_bytes(1) + page_bytes(2))) == errno.EAGAIN
    assert process.read(addr, 2 * PAGE) == page_bytes(1) + bytes(PAGE)
    assert refused(lambda: uffd.zeropage(addr, PAGE)) == errno.EEXIST


def test_protection_goes_up_to_a_mapping_that_is_not_registered_for_it(process: Process) -> None:
    """ENOENT, and what lies below it is protected."""
    addr = process.mmap(HPAGE)
    fill(process, addr, range(3))
    uffd = process.userfaultfd()
    uffd.register(addr, PAGE, missing=False, wp=True)
    assert refused(lambda: uffd.writeprotect(addr, 3 * PAGE)) == errno.ENOENT
    with pytest.raises(UserFault):
        process.write(addr, b"!")
    process.write(addr + PAGE, b"!")


def test_a_marker_of_a_registration_that_is_gone_stops_nobody(process: Process) -> None:
    """It stood for a page of a file that was not mapped."""
    file = process.memfd_create("f")
    process.pwrite(file, 0, page_bytes(7))
    addr = process.mmap(PAGE, file=file, shared=True)
    uffd = process.userfaultfd()
    uffd.register(addr, PAGE, missing=False, wp=True)
    uffd.writeprotect(addr, PAGE)
    uffd.register(addr, PAGE)
    assert process.read(addr, PAGE) == page_bytes(7)
    process.write(addr, page_bytes(8))
    assert process.read(addr, PAGE) == page_bytes(8)


def test_a_watched_mapping_that_moves_takes_its_neighbour_out_of_the_watch(
    process: Process,
) -> None:
    """They are one in the new place before userfaultfd lets go of what has moved."""
    addr = process.mmap(NR * PAGE)
    uffd = process.userfaultfd()
    uffd.register(addr + 100 * PAGE, 412 * PAGE)
    process.mremap(addr + 400 * PAGE, 112 * PAGE, addr)
    assert process.read(addr + 200 * PAGE, 1) == b"\0"
