"""UFFDIO_POISON (Linux 6.6): memory that is to look lost, by way of a marker in the page table."""

import errno

import pytest
from collapse_kit import HPAGE, NR, PAGE, fill, madv_collapse, page_bytes, ptes_of, rss, scans

from pykhuge import Advice, BusError, Machine, Process, ScanResult, UserFault
from pykhuge.mm.errors import BUS_MCEERR_AR
from pykhuge.process import UserFaultFd


def area(process: Process, shared: bool, nr: int = 4) -> tuple[int, UserFaultFd]:
    """Memory that a userfaultfd watches for missing pages."""
    addr = process.mmap(nr * PAGE, shared=shared)
    uffd = process.userfaultfd()
    uffd.register(addr, nr * PAGE)
    return addr, uffd


def signal(process: Process, addr: int, *, write: bool = False) -> tuple[int, int, int]:
    """What SIGBUS a touch gets."""
    with pytest.raises(BusError) as raised:
        process.write(addr, b"x") if write else process.read(addr, 1)
    return raised.value.address, raised.value.code, raised.value.lsb


@pytest.mark.parametrize("shared", [False, True])
def test_touch_of_a_poisoned_page_is_sigbus_every_time(process: Process, shared: bool) -> None:
    """BUS_MCEERR_AR with the address touched, for loads and stores; its neighbours still wait."""
    addr, uffd = area(process, shared)
    uffd.poison(addr + PAGE, 2 * PAGE)
    for touched, write in ((addr + PAGE, False), (addr + 2 * PAGE + 17, True), (addr + PAGE, True)):
        assert signal(process, touched, write=write) == (touched, BUS_MCEERR_AR, 12)
    for page in (addr, addr + 3 * PAGE):
        with pytest.raises(UserFault):
            process.read(page, 1)
    assert sum(rss(process)[name] for name in ("MM_ANONPAGES", "MM_SHMEMPAGES", "MM_SWAPENTS")) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_overwritten_but_copy_overwrites_it(process: Process, shared: bool) -> None:
    """EEXIST where a page or a marker is; UFFDIO_COPY mends what was poisoned."""
    addr, uffd = area(process, shared)
    uffd.copy(addr, page_bytes(1))
    uffd.poison(addr + PAGE, PAGE)
    for page in (addr, addr + PAGE):
        with pytest.raises(OSError, match="is mapped") as raised:
            uffd.poison(page, PAGE)
        assert raised.value.errno == errno.EEXIST
    assert process.read(addr, PAGE) == page_bytes(1)
    uffd.copy(addr + PAGE, page_bytes(2))
    process.write(addr + PAGE, b"written")
    assert process.read(addr + PAGE, PAGE) == b"written" + page_bytes(2)[7:]


def test_zeropage_does_not_overwrite_it(process: Process) -> None:
    """In private memory it wants an entry that is none."""
    addr, uffd = area(process, shared=False)
    uffd.poison(addr, PAGE)
    with pytest.raises(OSError, match="marker") as raised:
        uffd.zeropage(addr, PAGE)
    assert raised.value.errno == errno.EEXIST


def test_range_must_be_watched(process: Process) -> None:
    """ENOENT, with nothing changed."""
    addr = process.mmap(PAGE)
    with pytest.raises(OSError, match="not registered") as raised:
        process.userfaultfd().poison(addr, PAGE)
    assert raised.value.errno == errno.ENOENT
    process.write(addr, b"x")


@pytest.mark.parametrize("shared", [True, False])
def test_range_must_lie_within_the_file(process: Process, shared: bool) -> None:
    """EFAULT behind the end of a memfd."""
    file = process.memfd_create("short")
    process.ftruncate(file, PAGE)
    addr = process.mmap(2 * PAGE, file=file, shared=shared)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * PAGE)
    uffd.poison(addr, PAGE)
    with pytest.raises(OSError, match="behind the end") as raised:
        uffd.poison(addr + PAGE, PAGE)
    assert raised.value.errno == errno.EFAULT


@pytest.mark.parametrize("shared", [False, True])
def test_dontneed_forgets_it(process: Process, shared: bool) -> None:
    """The page is missing then, as before."""
    addr, uffd = area(process, shared)
    uffd.poison(addr, PAGE)
    process.madvise(addr, PAGE, Advice.MADV_DONTNEED)
    with pytest.raises(UserFault):
        process.read(addr, 1)


def test_lifting_write_protection_leaves_it(process: Process) -> None:
    """It goes for markers of its own kind alone."""
    addr = process.mmap(2 * PAGE, shared=True)
    uffd = process.userfaultfd()
    uffd.register(addr, 2 * PAGE, missing=True, wp=True)
    uffd.poison(addr, PAGE)
    uffd.writeprotect(addr, 2 * PAGE)
    uffd.writeprotect(addr, 2 * PAGE, protect=False)
    assert signal(process, addr) == (addr, BUS_MCEERR_AR, 12)
    assert list(ptes_of(process, addr)[:2] != 0) == [True, False]


def test_a_child_inherits_it(process: Process) -> None:
    """Of private memory; the child is watched by nobody."""
    addr, uffd = area(process, shared=False)
    uffd.copy(addr, page_bytes(0))
    uffd.poison(addr + PAGE, PAGE)
    child = process.fork()
    assert child.read(addr, PAGE) == page_bytes(0)
    assert signal(child, addr + PAGE) == (addr + PAGE, BUS_MCEERR_AR, 12)
    assert child.read(addr + 2 * PAGE, PAGE) == bytes(PAGE)


def test_collapse_counts_it_as_swap_and_fails_at_swap_in(
    machine: Machine, process: Process, block: int
) -> None:
    """As it does with the entry of a page that memory_failure has taken away."""
    fill(process, block, set(range(NR)) - {9})
    uffd = process.userfaultfd()
    uffd.register(block, HPAGE)
    uffd.poison(block + 9 * PAGE, PAGE)
    machine.trace.clear()
    assert madv_collapse(process, block) is ScanResult.SCAN_FAIL
    assert scans(machine)[-1].unmapped == 1
    assert machine.vmstat()["thp_collapse_alloc"] == 1
    assert signal(process, block + 9 * PAGE) == (block + 9 * PAGE, BUS_MCEERR_AR, 12)
