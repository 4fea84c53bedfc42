"""The daemon: which block of which process is looked at when, in virtual time.

`Khugepaged.step` is one turn of the kernel thread, from where it wakes to where it sleeps, and says
how long it wants to sleep; whoever calls it lets that time pass. `run` does so by the machine's own
clock. `delays` leaves it to the caller, such as a discrete-event simulator:

    for millisecs in machine.khugepaged.delays():
        yield env.timeout(millisecs)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE
from pykhuge.kernel.locking import READ
from pykhuge.kernel.sched import Preempt, Release, Steps, Task, WouldBlock, steps
from pykhuge.khugepaged.control import CollapseControl, KhugepagedSettings
from pykhuge.khugepaged.retract import khugepaged_collapse_pte_mapped_thps
from pykhuge.khugepaged.revalidate import hpage_collapse_test_exit_or_disable
from pykhuge.khugepaged.scan import khugepaged_scan_vma_block
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.huge_memory import hugepage_vma_check
from pykhuge.mm.mm_slot import free_mm_slot
from pykhuge.mm.mm_types import MmSlot
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.swap import lru_add_drain_all

__all__ = ["Khugepaged"]

NSEC_PER_MSEC = 1_000_000
NSEC_PER_SEC = 1_000_000_000
INT_MAX = (1 << 31) - 1


@dataclass
class _Scan:
    """What khugepaged_do_scan keeps in its local variables, also while it sleeps for memory."""

    pages: int
    progress: int = 0
    pass_through_head: int = 0
    wait: bool = True


class Khugepaged:
    """The kernel thread khugepaged of one machine; `Machine.khugepaged`.

    task: in whose name it runs; a new one each time `enabled` starts it.
    on_wakeup: called when its sleep is over before its time (a knob, a first process), and when
    `enabled` has started a new thread, which scans at once.
    """

    def __init__(self, mem: Memory, settings: KhugepagedSettings) -> None:
        self.mem = mem
        self.settings = settings
        self.task: Task[Any] = Task(mem.sched, "khugepaged", mem.next_pid())
        self.on_wakeup: Callable[[], None] | None = None
        self._runs = mem.thp.pmd_enabled()
        self._scan: _Scan | None = None
        self._turn: Task[Any] | None = None  # who is in the middle of a turn
        self._sleeps_after_scan = False
        self._sleep_expire_ns: float = 0
        mem.thp.on_enabled = self._start_stop
        mem.khugepaged_scan.wakeup = self._wake_up
        settings.on_sleep_written = self._sleep_written

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead."""
        if self.mem.panic is not None:
            raise self.mem.panic

    @steps
    def step(self) -> Steps[float]:
        """One turn: a scan of `pages_to_scan` pages, or what fits before a sleep for memory.

        Returns: milliseconds it wants to sleep before the next turn: 0, `scan_sleep_millisecs`,
        `alloc_sleep_millisecs` after the first failed allocation of a scan, or infinity where only
        a wake-up can give it work, while `enabled` is never, and for a sleep of 2^31 ms and more.
        Calling it again is the end of that sleep. The clock moves by the trace alone.
        Raises: KernelPanic; WouldBlock if it meets what a paused task holds and it must wait for.
        Kernel: khugepaged_do_scan, khugepaged_wait_work.
        """
        self._check_between_turns()
        self._turn = self.mem.sched.current
        try:
            millisecs = (yield from self._do_scan()) if self._runs else math.inf
        finally:
            self._turn = None
        self.mem.clock.tick()  # so that a daemon that never sleeps does not stop time
        self._sleep_expire_ns = self.mem.clock.now_ns + millisecs * NSEC_PER_MSEC
        return millisecs

    def delays(self) -> Iterator[float]:
        """Turn after turn without end: the `step` of each, to be slept by the caller."""
        while True:
            yield self.step()

    def run(self, until: float | Callable[[], bool]) -> bool:
        """Let the daemon work and sleep, by the machine's clock.

        Args:
            until: seconds since boot, or a condition, looked at after every turn.
        Returns: whether `until` has come; False if the daemon sleeps for ever before that.
        Raises: ValueError for a time that has passed, or is none; what `step` raises.
        """
        clock = self.mem.clock
        if callable(until):
            while not until():
                if self._sleep_expire_ns == math.inf:
                    return False
                clock.advance_to(int(self._sleep_expire_ns))
                self.step()
            return True
        end_ns = round(_seconds(until) * NSEC_PER_SEC)
        if end_ns < clock.now_ns:
            raise ValueError(f"until={until}: allowed {clock.now_ns / NSEC_PER_SEC} s and later")
        while max(self._sleep_expire_ns, clock.now_ns) < end_ns:
            clock.advance_to(int(self._sleep_expire_ns))
            self.step()
        clock.advance_to(end_ns)
        return True

    def has_work(self) -> bool:
        """khugepaged_has_work(): somebody is registered, and `enabled` is not never."""
        return bool(self.mem.khugepaged_scan.mm_head) and self.mem.thp.pmd_enabled()

    def _do_scan(self) -> Steps[float]:
        """One scan, or the rest of one. Returns: how long to sleep, in milliseconds."""
        mem, cursor = self.mem, self.mem.khugepaged_scan
        scan = self._scan
        if scan is None:
            scan = _Scan(self.settings.pages_to_scan)
            lru_add_drain_all(mem)
        self._scan = None
        cc = CollapseControl(is_khugepaged=True, settings=self.settings)
        while True:
            scan.pass_through_head += cursor.mm_slot is None
            if not self.has_work() or scan.pass_through_head >= 2:
                break
            progress, result = yield from self._scan_mm_slot(scan.pages - scan.progress, cc)
            scan.progress += progress
            if scan.progress >= scan.pages:
                break
            if result is ScanResult.SCAN_ALLOC_HUGE_PAGE_FAIL:
                # The first time it sleeps and goes on; hit again, the scan is over.
                if not scan.wait:
                    break
                scan.wait = False
                self._scan, self._sleeps_after_scan = scan, False
                return _msecs_to_jiffies(self.settings.alloc_sleep_millisecs)
        self._sleeps_after_scan = self.has_work()
        if not self._sleeps_after_scan:
            return math.inf
        return _msecs_to_jiffies(self.settings.scan_sleep_millisecs)

    def _scan_mm_slot(self, pages: int, cc: CollapseControl) -> Steps[tuple[int, ScanResult]]:
        """Visit the mm under the cursor, for `pages` pages or until a block drops mmap_lock.

        Returns: progress: 1 for the mm, 1 for each VMA passed over, 512 for each block; and the
        result of the last block. Kernel: khugepaged_scan_mm_slot.
        """
        mem, cursor = self.mem, self.mem.khugepaged_scan
        if cursor.mm_slot is None:
            cursor.mm_slot, cursor.address = cursor.mm_head[0], 0
        slot, mm = cursor.mm_slot, cursor.mm_slot.mm
        yield Preempt("scan_mm_slot")
        yield from khugepaged_collapse_pte_mapped_thps(mem, mm)
        progress, result, whole = 0, ScanResult.SCAN_FAIL, True
        # It does not wait for a busy mm, but goes to the next one.
        if mm.mmap_lock.trylock(mem.sched.current, READ):
            progress, result, whole = yield from self._scan_vmas(slot, pages, cc)
        if whole or mm.mm_users == 0:
            self._next_slot(slot)
        return progress, result

    def _scan_vmas(
        self, slot: MmSlot, pages: int, cc: CollapseControl
    ) -> Steps[tuple[int, ScanResult, bool]]:
        """The VMAs of one mm, from the cursor on; the third of what it returns: all are done.

        Locks: entered with mmap_lock for read, which is dropped.
        """
        mem, mm, cursor = self.mem, slot.mm, self.mem.khugepaged_scan
        progress, result = 1, ScanResult.SCAN_FAIL
        vmas = [vma for vma in mm.vmas if vma.vm_end > cursor.address]
        if hpage_collapse_test_exit_or_disable(mem, mm):
            vmas = []
        for vma in vmas:
            hend = vma.vm_end & -HPAGE_PMD_SIZE
            if not hugepage_vma_check(mem, vma) or cursor.address > hend:
                progress += 1
                continue
            cursor.address = max(
                cursor.address, vma.vm_start + HPAGE_PMD_SIZE - 1 & -HPAGE_PMD_SIZE
            )
            while cursor.address < hend:
                result, mmap_locked = yield from khugepaged_scan_vma_block(
                    mem, vma, cursor.address, cc
                )
                cursor.address += HPAGE_PMD_SIZE
                progress += HPAGE_PMD_NR
                if not mmap_locked:
                    return progress, result, False
                if progress >= pages:
                    yield Release(mm.mmap_lock)
                    return progress, result, False
        yield Release(mm.mmap_lock)
        return progress, result, True

    def _next_slot(self, slot: MmSlot) -> None:
        """The cursor moves on; the slot of a process that has ended goes free."""
        mem, cursor = self.mem, self.mem.khugepaged_scan
        place = cursor.mm_head.index(slot) + 1
        if place < len(cursor.mm_head):
            cursor.mm_slot, cursor.address = cursor.mm_head[place], 0
        else:
            cursor.mm_slot = None
            self.settings.count("full_scans")
        if slot.mm.mm_users == 0:
            free_mm_slot(mem, slot)

    def _check_between_turns(self) -> None:
        if self._turn is not None:
            raise WouldBlock(f"khugepaged is in the middle of a turn, paused in {self._turn.comm}")

    def _start_stop(self, enabled: bool) -> None:
        """start_stop_khugepaged(): a knob that decides whether it runs has been written."""
        mem, cursor = self.mem, self.mem.khugepaged_scan
        if enabled and not self._runs:
            self.task = Task(mem.sched, "khugepaged", mem.next_pid())
            self._runs = True  # before on_wakeup, which may take a turn at once
            self._wake()  # a new thread scans before it sleeps, whatever the old one slept for
        elif enabled and cursor.mm_head:
            self._wake_up()
        elif not enabled:
            self._check_between_turns()  # the writer waits until the thread has ended
            self._runs = False
            self._scan, self._sleep_expire_ns = None, math.inf
            slot, cursor.mm_slot = cursor.mm_slot, None
            if slot is not None and slot.mm.mm_users == 0:
                free_mm_slot(mem, slot)

    def _sleep_written(self) -> None:
        """A sleep knob was written: whatever it sleeps for is over."""
        if self._runs and (self._sleeps_after_scan or self._scan is not None):
            self._wake()

    def _wake_up(self) -> None:
        """wake_up_interruptible(): ends a sleep for memory or work, not the one after a scan."""
        if self._runs and not self._sleeps_after_scan:
            self._wake()

    def _wake(self) -> None:
        self._sleep_expire_ns = 0
        if self.on_wakeup is not None:
            self.on_wakeup()


def _seconds(until: object) -> float:
    """A time to run until, also as numpy has it. Raises: ValueError for what is none."""
    if not isinstance(until, bool) and isinstance(until, Real) and math.isfinite(until):
        return float(until)
    raise ValueError(f"until={until!r}: allowed a number of seconds, or a condition")


def _msecs_to_jiffies(millisecs: int) -> float:
    """What is negative as an int is MAX_JIFFY_OFFSET there: a sleep without end."""
    return millisecs if millisecs <= INT_MAX else math.inf
