"""UserAccess: a process loads from and stores to its memory, as its program would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SHIFT, PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT
from pykhuge.kernel.sched import Steps, Task, steps
from pykhuge.mm.errors import BUS_MCEERR_AR, SI_KERNEL, BusError, SegmentationFault, check_int
from pykhuge.mm.fault import access_vma, find_vma, handle_mm_fault
from pykhuge.mm.gup import follow_page
from pykhuge.mm.memory_failure import memory_failure, memory_failure_work
from pykhuge.mm.mm_types import (
    VM_EXEC,
    VM_READ,
    VM_WRITE,
    Mm,
)
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import Pfns
from pykhuge.mm.page_table import (
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    pmd_trans_huge,
    pte_index,
    pte_pfn,
    pte_pfns,
)
from pykhuge.mm.rmap import pmd_of, set_pmd

__all__ = ["UserAccess", "check_access"]


class UserAccess:
    """What `Process` does when its program touches memory: faults, poison, and the bytes."""

    mem: Memory
    mm: Mm
    task: Task[Any]

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead, OSError ESRCH if the process is."""
        raise NotImplementedError

    @steps
    def read(self, addr: int, length: int) -> Steps[bytes]:
        """What a program reads at `addr`.

        Raises: SegmentationFault; BusError for a poisoned line or a swap error; UserFault.
        """
        check_access(addr, length)
        parts: list[bytes] = []
        for low, high in _by_block(addr, addr + length):
            parts.append((yield from self._load(low, high)))
        return b"".join(parts)

    def _load(self, low: int, high: int) -> Steps[bytes]:
        while True:
            try:
                pfns = yield from self._pages_for(low, high, write=False)
            except Exception as error:
                # What faults may have met poison before, in the pages that were there.
                bad = self._first_poison_up_to(low, high)
                self._after_fault(error, met=bad is None)
                if bad is None:
                    raise
            else:
                bad = self._first_poison(pfns, low, high)
                if bad == high:
                    return _gather(self.mem, pfns, low, high)
            yield from self._machine_check(bad)

    @steps
    def write(self, addr: int, data: bytes | bytearray | memoryview) -> Steps[None]:
        """Store `data` at `addr`, as a program would, from low to high.

        Raises: SegmentationFault; BusError for a poisoned line, what is below it is written then;
        UserFault.
        """
        source = np.frombuffer(data, np.uint8)
        check_access(addr, len(source))
        for low, high in _by_block(addr, addr + len(source)):
            yield from self._store(addr, low, high, source)

    def _store(self, addr: int, low: int, high: int, source: npt.NDArray[np.uint8]) -> Steps[None]:
        """Write [low, high), in one block, of what goes to `addr`."""
        while low < high:
            try:
                pfns = yield from self._pages_for(low, high, write=True)
            except BaseException as error:
                # The pages below the one that cannot be had were written before anybody knew; also
                # where the task would have to wait (GeneratorExit).
                stop = self._writable_up_to(low, high)
                pfns = self._writable_pages(low, stop)
                good = self._store_good(pfns, addr, low, stop, source)
                self._after_fault(error, met=good == stop)
                if good == stop or isinstance(error, GeneratorExit):
                    raise
            else:
                good = self._store_good(pfns, addr, low, high, source)
            if good < high:
                yield from self._machine_check(good)
            low = good

    def _writable_pages(self, low: int, high: int) -> Pfns:
        pages = range(low & -PAGE_SIZE, high, PAGE_SIZE) if low < high else ()
        return np.array([follow_page(self.mem, self.mm, page) for page in pages], np.int64)

    def _store_good(
        self, pfns: Pfns, addr: int, low: int, high: int, source: npt.NDArray[np.uint8]
    ) -> int:
        """Write [low, high) of what goes to `addr`, up to the first bad line, which it returns."""
        if low >= high:
            return high
        good = self._first_poison(pfns, low, high)
        nr = (good - 1 >> PAGE_SHIFT) - (low >> PAGE_SHIFT) + 1
        _scatter(self.mem, pfns[:nr], low, good, source[low - addr : good - addr])
        return good

    def _writable_up_to(self, low: int, high: int) -> int:
        """The first address of [low, high) whose page is not there for writing."""
        for page in range(low & -PAGE_SIZE, high, PAGE_SIZE):
            vma = find_vma(self.mm, page)
            allowed = vma is not None and vma.vm_start <= page and vma.vm_flags & VM_WRITE
            if not allowed or follow_page(self.mem, self.mm, page, write=True) is None:
                return max(low, page)
        return high

    def _pages_for(self, low: int, high: int, *, write: bool) -> Steps[Pfns]:
        """The frames of [low, high), one block at most, faulted in; accessed and dirty bits set."""
        wanted = PAGE_PRESENT | PAGE_RW if write else PAGE_PRESENT
        mark = PAGE_ACCESSED | PAGE_DIRTY if write else PAGE_ACCESSED
        first, nr = pte_index(low), (high - 1 >> PAGE_SHIFT) - (low >> PAGE_SHIFT) + 1
        if not self._allowed(low, high, write=write):
            # The fault comes at the first address without permission, and brings in those below.
            yield from handle_mm_fault(self.mem, self.mm, low, high, write=write, user=True)
        while True:
            pmd = pmd_of(self.mem, self.mm, low)
            if pmd and pmd_trans_huge(pmd):
                if pmd & wanted == wanted:
                    if pmd & mark != mark:
                        set_pmd(self.mem, self.mm, low, pmd | mark)
                    return np.arange(pte_pfn(pmd) + first, pte_pfn(pmd) + first + nr)
            elif pmd:
                ptes = self.mem.ram.words[pte_pfn(pmd), first : first + nr]
                if int(np.bitwise_and.reduce(ptes)) & wanted == wanted:
                    ptes |= np.uint64(mark)
                    return pte_pfns(ptes)
            yield from handle_mm_fault(self.mem, self.mm, low, high, write=write, user=True)

    def _after_fault(self, error: BaseException, *, met: bool) -> None:
        """What the host does about a fault that has failed, if the program has come as far as that.

        The log tells of poison by name (do_sigbus), before a worker takes care of the page.
        """
        if met and isinstance(error, BusError) and error.code == BUS_MCEERR_AR:
            task = self.mem.sched.current
            self.mem.printk(
                f"MCE: Killing {task.comm}:{task.pid} due to hardware memory corruption fault"
                f" at {error.address:x}"
            )
        memory_failure_work(self.mem)

    def _allowed(self, start: int, end: int, *, write: bool) -> bool:
        try:
            while start < end:
                start = access_vma(self.mm, start, write=write).vm_end
        except SegmentationFault:
            return False
        return True

    def _first_poison(self, pfns: Pfns, low: int, high: int) -> int:
        """The lowest address of [low, high) on a poisoned line; `high` if there is none."""
        words = self.mem.poison.lines[pfns]
        for index in np.flatnonzero(words).tolist():
            page = (low & -PAGE_SIZE) + (index << PAGE_SHIFT)
            word = int(words[index])
            for line in range(64):
                start = page + (line << LINE_SHIFT)
                if word >> line & 1 and start < high and start + (1 << LINE_SHIFT) > low:
                    return max(start, low)
        return high

    def _first_poison_up_to(self, low: int, high: int) -> int | None:
        """The lowest poisoned address of [low, high) below the first page that cannot be read."""
        for page in range(low & -PAGE_SIZE, high, PAGE_SIZE):
            vma, pfn = find_vma(self.mm, page), follow_page(self.mem, self.mm, page)
            readable = vma is not None and vma.vm_flags & (VM_READ | VM_WRITE | VM_EXEC)
            if vma is None or vma.vm_start > page or not readable or pfn is None:
                break
            stop = min(high, page + PAGE_SIZE)
            bad = self._first_poison(np.array([pfn]), max(low, page), stop)
            if bad < stop:
                return bad
        return None

    def _machine_check(self, addr: int) -> Steps[None]:
        """The task has touched a poisoned line: the kernel takes the page away (kill_me_maybe).

        Where the page could be dropped and will be read again, the task goes on.
        Raises: BusError.
        """
        mem, mm = self.mem, self.mm
        pfn = follow_page(mem, mm, addr)
        assert pfn is not None
        mce = mem.poison.machine_check(
            pfn,
            (addr % PAGE_SIZE) >> LINE_SHIFT,
            cpu=self.task.cpu,
            consumer=f"user access of {self.task.comm}",
            recovered=True,
        )
        # Said on the way back to user space; the events are worked off after that.
        mem.printk(f"mce: Uncorrected hardware memory error in user-access at {mce.addr:x}")
        mem.log_machine_check(mce, by_user=True)
        earlier = len(mm.signals)
        result = yield from memory_failure(mem, pfn, current=mm)
        for each in mm.signals[earlier:]:
            if each.si_code == BUS_MCEERR_AR:
                mm.signals.remove(each)
                raise BusError(each.si_addr, each.si_code, each.si_addr_lsb)
        if result:
            mem.printk("mce: Memory error not recovered")
            raise BusError(0, SI_KERNEL)


def check_access(addr: int, length: int) -> None:
    """Raises: ValueError if this cannot be a range of memory."""
    check_int(addr=addr, length=length)
    if addr < 0 or length < 0:
        raise ValueError(f"addr={addr:#x} length={length}: allowed 0 and more")


def _by_block(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(end, (start & -HPAGE_PMD_SIZE) + HPAGE_PMD_SIZE)
        yield start, stop
        start = stop


def _runs(pfns: Pfns, low: int, high: int) -> list[tuple[slice, int, int]]:
    """[low, high) as pieces of physical memory without a gap: (pages, first byte, length)."""
    breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(pfns)]
    base = low & -PAGE_SIZE
    pieces = []
    for start, stop in zip(starts, stops, strict=True):
        first, last = max(low, base + start * PAGE_SIZE), min(high, base + stop * PAGE_SIZE)
        pfn = int(pfns[start])
        pieces.append(
            (slice(pfn, pfn + stop - start), first - (base + start * PAGE_SIZE), last - first)
        )
    return pieces


def _gather(mem: Memory, pfns: Pfns, low: int, high: int) -> bytes:
    return b"".join(
        mem.ram.pages[pages].reshape(-1)[offset : offset + length].tobytes()
        for pages, offset, length in _runs(pfns, low, high)
    )


def _scatter(mem: Memory, pfns: Pfns, low: int, high: int, source: npt.NDArray[np.uint8]) -> None:
    done = 0
    for pages, offset, length in _runs(pfns, low, high) if low < high else []:
        mem.ram.pages[pages].reshape(-1)[offset : offset + length] = source[done : done + length]
        done += length
