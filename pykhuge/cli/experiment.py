"""The experiment behind `pykhuge collapse`: a file in a process, poisoned, collapsed, read back.

The process maps room for the whole file, and goes through it window by window: one is loaded,
poisoned, collapsed, verified and given up before the next, so that the host's memory stays bounded
whatever the file's size. The modelled machine has room for all of it, which costs nothing until it
is touched, and the counters are summed over the windows: they read as if all were there at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from operator import sub
from typing import BinaryIO

from pykhuge.cli.kinds import KINDS
from pykhuge.cli.report import (
    COPIED,
    HOLE,
    NOT_COPIED,
    POISONED,
    ROLLED_BACK,
    BadLine,
    RangeReport,
    Report,
)
from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.hw.poison import LINE_SHIFT
from pykhuge.kernel.panic import KernelBug, KernelPanic
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.errors import BusError
from pykhuge.mm.vmstat import MM_COUNTERS
from pykhuge.process import Advice

__all__ = ["WINDOW", "Experiment", "FileBecameShorter"]

WINDOW = 4 * HPAGE_PMD_SIZE
LINE_SIZE = 1 << LINE_SHIFT
SMALLEST_MACHINE = 1 << 30

Counters = dict[str, int]


class FileBecameShorter(Exception):
    """The file had fewer bytes than it said."""


class Experiment:
    """One machine, and one process that takes the file.

    Args:
        report: says what is asked; `run` fills in what was found.
        window: bytes of the file in memory at once, a multiple of 2 MiB.
    Raises: OSError if the file cannot be opened, MemoryError if the host refuses to reserve the
    machine's address space.
    """

    def __init__(self, report: Report, window: int = WINDOW) -> None:
        self.report = report
        self.window = window
        self.machine = Machine(
            _machine_size(report.nr_ranges), recovery=report.recovery, seed=report.seed
        )
        self.process = self.machine.process("app")
        kind = KINDS[report.kind]
        self.memory = kind(self.machine, self.process, report.file, report.nr_ranges)
        self.addr = self.memory.addr
        self._pages_of_frames: dict[int, int] = {}
        self._bad: dict[int, list[BadLine]] = defaultdict(list)
        for line in report.poisoned:
            self._bad[line.page * PAGE_SIZE // HPAGE_PMD_SIZE].append(line)
        report.before = self._counters()
        report.after = dict(report.before)

    def run(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        """Take the file through the machine.

        Args:
            file: at its start.
            progress: told the bytes of each window once it is done.
        Raises: FileBecameShorter; OSError if the file cannot be read.
        """
        report, window = self.report, self.window
        buffer = bytearray(min(window, report.nr_ranges * HPAGE_PMD_SIZE))
        try:
            for start in range(0, report.size, window):
                length = min(window, report.size - start)
                _read_exactly(file, memoryview(buffer)[:length])
                buffer[length:] = bytes(len(buffer) - length)
                self._run_window(start, length, memoryview(buffer))
                progress(length)
        except KernelPanic as panic:
            report.panic = str(panic)
            report.audit.possible = report.bytes.possible = False
        except KernelBug as bug:
            self._fail(bug)
        report.trace = [str(record) for record in self.machine.trace]
        report.trace_overrun = self.machine.trace.overrun

    def _run_window(self, start: int, length: int, buffer: memoryview) -> None:
        """Bytes [start, start + length) of the file, which are in `buffer`, zeros behind them."""
        report, process, addr = self.report, self.process, self.addr + start
        nr_ranges = -(-length // HPAGE_PMD_SIZE)
        first = start // HPAGE_PMD_SIZE
        empty = self._counters()
        self.memory.load(start, buffer[:length])
        for index in range(first, first + nr_ranges):
            self._poison(index)
        process.madvise(addr, nr_ranges * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
        loaded = self._counters()
        _add_change(report.before, empty, loaded)
        _add_change(report.after, empty, loaded)
        try:
            for index in range(first, first + nr_ranges):
                self._collapse(index)
        finally:
            _add_change(report.after, loaded, self._counters())
        self._audit()
        readable = nr_ranges * HPAGE_PMD_SIZE if self.memory.zeros_behind_end else length
        for index in range(first, first + nr_ranges):
            offset = (index - first) * HPAGE_PMD_SIZE
            self._verify(index, buffer[offset : min(offset + HPAGE_PMD_SIZE, readable)])
        self.memory.unload(start, nr_ranges * HPAGE_PMD_SIZE)
        self._forget_window()
        self._audit()

    def _poison(self, index: int) -> None:
        for page, line in self._bad.get(index, ()):
            self._pages_of_frames[self.process.poison(self.addr + page * PAGE_SIZE, line)] = page

    def _forget_window(self) -> None:
        """Let the next window have good frames, as if it had others; empty the logs reported."""
        poison = self.machine.mem.poison
        for pfn in self._pages_of_frames:
            poison.unpoison(pfn)
        self._pages_of_frames.clear()
        poison.log.clear()
        self.machine.log.clear()

    def _collapse(self, index: int) -> None:
        """Collapse a range as khugepaged does. Raises: KernelPanic; the range is reported first."""
        machine, addr = self.machine, self.addr + index * HPAGE_PMD_SIZE
        pfns = self._pfns(index)
        checks, log = len(machine.mem.poison.log), len(machine.log)
        first_event = machine.trace.overrun + len(machine.trace)
        result = None
        try:
            result = machine.collapse(self.process, addr)
        finally:
            met = [
                BadLine(self._pages_of_frames[mce.pfn], mce.line)
                for mce in machine.mem.poison.log[checks:]
            ]
            each = RangeReport(
                index,
                addr,
                result,
                self._map(index, pfns, result, met),
                tuple(self._bad.get(index, ())),
                met[0] if met else None,
                first_event,
                machine.trace.overrun + len(machine.trace) - first_event,
                tuple(machine.log[log:]),
            )
            self.report.ranges.append(each)
        self._check_outcome(each, pfns)

    def _pfns(self, index: int) -> list[int | None]:
        """The frame behind each page of a range."""
        first = index * HPAGE_PMD_NR
        return [self.memory.pfn(page) for page in range(first, first + HPAGE_PMD_NR)]

    def _map(
        self, index: int, pfns: list[int | None], result: ScanResult | None, met: list[BadLine]
    ) -> str:
        """The 512 characters of a range. Without a result the host died where the copy was."""
        first = index * HPAGE_PMD_NR
        nr_copied = met[0].page - first if met else 0
        if result is ScanResult.SCAN_SUCCEED:
            nr_copied = HPAGE_PMD_NR
        fates = [ROLLED_BACK if result is ScanResult.SCAN_COPY_MC else COPIED] * nr_copied
        fates += [NOT_COPIED] * (HPAGE_PMD_NR - nr_copied)
        cells = [HOLE if pfn is None else fate for pfn, fate in zip(pfns, fates, strict=True)]
        for page, _ in self._bad.get(index, ()):
            cells[page - first] = POISONED
        return "".join(cells)

    def _check_outcome(self, each: RangeReport, pfns: list[int | None]) -> None:
        """A range is huge if and only if it succeeded; if not, its pages are where they were."""
        huge = self.memory.is_huge(each.index)
        if huge != (each.result is ScanResult.SCAN_SUCCEED):
            self.report.audit.fail(f"range {each.index}: {each.outcome}, but huge is {huge}")
        elif not huge and self._pfns(each.index) != pfns:
            self.report.audit.fail(f"range {each.index}: {each.outcome}, but its pages have moved")

    def _verify(self, index: int, expected: memoryview) -> None:
        """Compare every byte of a range outside poisoned lines, and see that these are bad still.

        They are not touched: the kernel would take their pages away.
        """
        start = 0
        for page, line in self._bad.get(index, ()):
            bad = (page - index * HPAGE_PMD_NR) * PAGE_SIZE + line * LINE_SIZE
            self._verify_good(index, start, expected[start:bad])
            start = bad + LINE_SIZE
        self._verify_good(index, start, expected[start:])
        for page, line in self._bad.get(index, ()):
            self._verify_bad(page, line)

    def _verify_good(self, index: int, offset: int, expected: memoryview) -> None:
        report, where = self.report, index * HPAGE_PMD_SIZE + offset
        try:
            got = self.process.read(self.addr + where, len(expected))
        except BusError as error:
            report.wrong += len(expected)
            report.bytes.fail(f"bytes {where}..{where + len(expected) - 1} of the file: {error}")
            return
        if got == expected:
            report.verified += len(expected)
            return
        wrong = [place for place, byte in enumerate(got) if byte != expected[place]]
        report.wrong += len(wrong)
        report.verified += len(expected) - len(wrong)
        report.bytes.fail(f"{len(wrong)} bytes differ from the file, first at {where + wrong[0]}")

    def _verify_bad(self, page: int, line: int) -> None:
        report, where = self.report, page * PAGE_SIZE + line * LINE_SIZE
        pfn = self.process.pfn(self.addr + where)
        if pfn is not None and int(self.machine.mem.poison.lines[pfn]) >> line & 1:
            report.unreadable += LINE_SIZE
        else:
            report.wrong += LINE_SIZE
            report.bytes.fail(f"the poisoned line at byte {where} is not there any more")

    def _audit(self) -> None:
        try:
            self.machine.audit()
        except KernelBug as bug:
            self._fail(bug)

    def _fail(self, bug: KernelBug) -> None:
        for finding in bug.findings or (str(bug),):
            self.report.audit.fail(finding)

    def _counters(self) -> Counters:
        machine = self.machine
        if machine.mem.panic is None:
            # A page put back waits in its CPU's batch, in no list's count, until that is drained.
            machine.lru_add_drain_all()
        return {
            **machine.vmstat(),
            "pages_collapsed": machine.khugepaged_settings.pages_collapsed,
            **dict(zip(MM_COUNTERS, self.process.mm.rss_stat, strict=True)),
            **self.memory.counters(),
        }


def _machine_size(nr_ranges: int) -> int:
    """Bytes for all ranges at once, their page tables, and a huge page to collapse into."""
    return max(SMALLEST_MACHINE, (nr_ranges + nr_ranges // 256 + 4) * HPAGE_PMD_SIZE)


def _add_change(total: Counters, before: Counters, after: Counters) -> None:
    for name, change in zip(total, map(sub, after.values(), before.values()), strict=True):
        total[name] += change


def _read_exactly(file: BinaryIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        nr = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not nr:
            raise FileBecameShorter
        done += nr
