"""`pykhuge collapse FILE`: load a file into anonymous memory, poison it, let it collapse, look.

The file goes through a machine of 72 MiB in windows of 32 MiB, so that its size does not matter.
Exit status: 0 all is consistent (a collapse that was rolled back is), 1 the audit or a byte is
wrong, 2 usage, 3 the modelled host panicked, as it must with --no-recovery and poison.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pykhuge.kernel.panic import KernelBug, KernelPanic
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.machine import Machine
from pykhuge.mm.fault import BusError
from pykhuge.mm.vmstat import MM_COUNTERS
from pykhuge.process import Advice, Process

__all__ = ["Collapsed", "Report", "UsageError", "add_parser"]

PAGE_SIZE = 4096
LINE_SIZE = 64
LINES_PER_PAGE = PAGE_SIZE // LINE_SIZE
HPAGE_PMD_NR = 512
HPAGE_PMD_SIZE = HPAGE_PMD_NR * PAGE_SIZE
WINDOW = 16 * HPAGE_PMD_SIZE
MEMORY = 2 * WINDOW + 4 * HPAGE_PMD_SIZE

COPIED, HOLE, POISONED, ROLLED_BACK, UNTOUCHED = "#.X-?"

EXIT_CONSISTENT, EXIT_INCONSISTENT, EXIT_PANIC = 0, 1, 3

# Bad lines of each page, by the page's number in the file.
BadLines = dict[int, set[int]]
Progress = Callable[[int], None]


class UsageError(Exception):
    """What is wrong with the command line, and what is allowed."""


@dataclass
class Collapsed:
    """One 2 MiB range of the file and what became of it.

    map: a character for each of 512 pages, see the legend. result: None after a panic.
    """

    index: int
    map: str
    result: ScanResult | None
    poisoned: list[tuple[int, int]]
    trace: list[str]

    def as_json(self) -> dict[str, Any]:
        """The range for --json."""
        return {
            "range": self.index,
            "result": self.result.name if self.result is not None else None,
            "status": self.result.text if self.result is not None else None,
            "errno": self.result.errno if self.result is not None else None,
            "map": self.map,
            "poisoned": [{"page": page, "line": line} for page, line in self.poisoned],
            "trace": self.trace,
        }


@dataclass
class Report:
    """All that the command has to tell. `findings` are the audit's; none is good.

    before, after: vmstat and the mm's counters around the collapses; over several windows, `after`
    is `before` of the first and the changes of all.
    """

    file: str
    size: int
    windows: int = 0
    ranges: list[Collapsed] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    verified: int = 0
    unreadable: int = 0
    wrong: int = 0
    panic: str | None = None

    @property
    def exit_status(self) -> int:
        """0, 1 or 3; see the head of this file."""
        if self.findings or self.wrong:
            return EXIT_INCONSISTENT
        return EXIT_PANIC if self.panic else EXIT_CONSISTENT

    def count(self, before: dict[str, int], after: dict[str, int]) -> None:
        """Add one window's counters."""
        if not self.windows:
            self.before, self.after = before, dict(before)
        self.windows += 1
        for name, value in after.items():
            self.after[name] += value - before[name]

    def as_json(self) -> dict[str, Any]:
        """The report for --json; keys stay what they are."""
        return {
            "file": self.file,
            "size": self.size,
            "consistent": self.exit_status != EXIT_INCONSISTENT,
            "panic": self.panic,
            "ranges": [each.as_json() for each in self.ranges],
            "legend": LEGEND,
            "counters": {
                name: {"before": self.before[name], "after": self.after[name]}
                for name in self.before
            },
            "log": self.log,
            "audit": self.findings,
            "bytes": {
                "verified": self.verified,
                "unreadable": self.unreadable,
                "wrong": self.wrong,
            },
        }


LEGEND = {
    COPIED: "copied",
    HOLE: "hole",
    POISONED: "poisoned",
    ROLLED_BACK: "rolled back",
    UNTOUCHED: "not reached",
}


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "collapse",
        help="load a file, poison it, let it collapse, see what happened",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="any regular file that is not empty")
    parser.add_argument(
        "--poison",
        metavar="PAGE[:LINE]",
        action="append",
        default=[],
        help="make line LINE (0..63, 0 if not given) of the file's 4 KiB page PAGE unreadable",
    )
    parser.add_argument(
        "--poison-random", metavar="N", help="poison N different lines drawn from all of the file"
    )
    parser.add_argument("--seed", metavar="S", help="draw them by this seed (0 if not given)")
    parser.add_argument(
        "--no-recovery", action="store_true", help="the kernel before the series: poison is fatal"
    )
    parser.add_argument("--json", action="store_true", help="print the same for programs")
    parser.add_argument("--svg", metavar="PATH", help="save what is shown as a picture")
    parser.add_argument("--all", action="store_true", help="show every range, however many")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    size = _file_size(options.file)
    bad_lines = _bad_lines(options, -(-size // PAGE_SIZE))
    render = None if options.json and not options.svg else _renderer()
    report = Report(options.file, size)
    with open(options.file, "rb") as file:
        if render is None or options.json:
            _collapse_file(file, report, bad_lines, not options.no_recovery, _no_progress)
        else:
            with render.progress(size) as advance:
                _collapse_file(file, report, bad_lines, not options.no_recovery, advance)
    if options.json:
        print(json.dumps(report.as_json(), indent=2))
    if render is not None:
        _show(render, report, options)
    return report.exit_status


def _no_progress(nr_bytes: int) -> None:
    """Nobody watches."""


def _show(render: Any, report: Report, options: argparse.Namespace) -> None:
    try:
        render.show(report, svg=options.svg, quiet=options.json, all_ranges=options.all)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"--svg {options.svg}: {error.strerror}") from error


def _renderer() -> Any:
    try:
        from pykhuge.cli import render  # noqa: PLC0415  rich is an extra, and --json works without
    except ModuleNotFoundError as error:
        raise UsageError(
            f'this needs {error.name}, which is not installed: pip install "pykhuge[cli]",'
            " or use --json"
        ) from error
    return render


def _file_size(path: str) -> int:
    try:
        status = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise UsageError(f"{path}: allowed is a regular file that is not empty")
    return status.st_size


def _number(name: str, text: str, low: int, high: int | None = None) -> int:
    allowed = f"{low}..{high}" if high is not None else f"{low} and more"
    if not text.isascii() or not text.isdecimal():
        raise UsageError(f"{name} {text}: allowed {allowed}")
    if int(text) < low or (high is not None and int(text) > high):
        raise UsageError(f"{name} {text}: allowed {allowed}")
    return int(text)


def _bad_lines(options: argparse.Namespace, nr_pages: int) -> BadLines:
    """The lines to poison, from the command line."""
    bad: BadLines = defaultdict(set)
    for text in options.poison:
        page, colon, line = text.partition(":")
        number = _number(f"--poison {text}: page", page, 0, nr_pages - 1)
        where = f"--poison {text}: line"
        bad[number].add(_number(where, line, 0, LINES_PER_PAGE - 1) if colon else 0)
    if options.poison_random is not None:
        nr_lines = nr_pages * LINES_PER_PAGE
        nr = _number("--poison-random", options.poison_random, 1, nr_lines)
        seed = _number("--seed", options.seed or "0", 0)
        for drawn in random.Random(seed).sample(range(nr_lines), nr):
            bad[drawn // LINES_PER_PAGE].add(drawn % LINES_PER_PAGE)
    elif options.seed is not None:
        raise UsageError(f"--seed {options.seed}: allowed with --poison-random N")
    return bad


def _collapse_file(
    file: BinaryIO, report: Report, bad_lines: BadLines, recovery: bool, advance: Progress
) -> None:
    """Take the file through a machine, window by window."""
    machine = Machine(MEMORY, recovery=recovery)
    process = machine.process(Path(report.file).name[:15])
    first_page = 0
    try:
        while data := file.read(WINDOW):
            _collapse_window(machine, process, data, first_page, bad_lines, report)
            first_page += WINDOW // PAGE_SIZE
            advance(len(data))
    except KernelPanic as panic:
        report.panic = str(panic)
    report.log = machine.log


def _collapse_window(
    machine: Machine,
    process: Process,
    data: bytes,
    first_page: int,
    bad_lines: BadLines,
    report: Report,
) -> None:
    nr_ranges = -(-len(data) // HPAGE_PMD_SIZE)
    addr = process.mmap(nr_ranges * HPAGE_PMD_SIZE)
    process.write(addr, data)
    process.madvise(addr, nr_ranges * HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
    nr_pages = -(-len(data) // PAGE_SIZE)
    bad = {
        page: bad_lines[first_page + page]
        for page in range(nr_pages)
        if first_page + page in bad_lines
    }
    pfns = [process.poison(addr + page * PAGE_SIZE, line) for page in bad for line in bad[page]]
    machine.lru_add_drain_all()
    before = _counters(machine, process)
    try:
        for start in range(0, nr_ranges * HPAGE_PMD_NR, HPAGE_PMD_NR):
            index = (first_page + start) // HPAGE_PMD_NR
            end = start + HPAGE_PMD_NR
            in_range = {page - start: bad[page] for page in bad if start <= page < end}
            nr_filled = min(nr_pages - start, HPAGE_PMD_NR)
            _collapse_range(
                machine, process, addr + start * PAGE_SIZE, index, nr_filled, in_range, report
            )
        # What was put back is still on its way to the LRU lists.
        machine.lru_add_drain_all()
    finally:
        report.count(before, _counters(machine, process))
    _verify(process, addr, data, nr_ranges * HPAGE_PMD_SIZE, bad, report)
    _audit(machine, report)
    for pfn in pfns:
        machine.mem.poison.unpoison(pfn)
    process.munmap(addr, nr_ranges * HPAGE_PMD_SIZE)
    machine.trace.clear()


def _collapse_range(
    machine: Machine,
    process: Process,
    addr: int,
    index: int,
    nr_filled: int,
    bad: BadLines,
    report: Report,
) -> None:
    seen = len(machine.trace)
    result = None
    try:
        result = machine.collapse(process, addr)
    finally:
        trace = [str(record) for record in list(machine.trace)[seen:]]
        first = index * HPAGE_PMD_NR
        poisoned = sorted((first + page, line) for page in bad for line in bad[page])
        report.ranges.append(
            Collapsed(index, _map(nr_filled, bad, result), result, poisoned, trace)
        )


def _map(nr_filled: int, bad: BadLines, result: ScanResult | None) -> str:
    """The 512 characters of a range. Without a result the host died at the first bad page."""
    fate = COPIED if result is ScanResult.SCAN_SUCCEED else ROLLED_BACK
    cells = [fate] * nr_filled + [HOLE] * (HPAGE_PMD_NR - nr_filled)
    if result is None:
        died = min(bad)
        cells = [COPIED] * died + [UNTOUCHED] * (HPAGE_PMD_NR - died)
    for page in bad:
        cells[page] = POISONED
    return "".join(cells)


def _counters(machine: Machine, process: Process) -> dict[str, int]:
    return machine.vmstat() | dict(zip(MM_COUNTERS, process.mm.rss_stat, strict=True))


def _audit(machine: Machine, report: Report) -> None:
    try:
        machine.audit()
    except KernelBug as bug:
        report.findings += bug.findings


def _verify(
    process: Process, addr: int, data: bytes, length: int, bad: BadLines, report: Report
) -> None:
    """Compare every readable byte with the file, and the tail behind it with zeros."""
    for offset, size, readable in _pieces(length, bad):
        expected = data[offset : offset + size].ljust(size, b"\0")
        try:
            got = process.read(addr + offset, size)
        except BusError:
            report.unreadable += size
            report.wrong += size if readable else 0
            continue
        same = got == expected and readable
        report.verified += size if same else 0
        report.wrong += 0 if same else size


def _pieces(length: int, bad: BadLines) -> Iterator[tuple[int, int, bool]]:
    """[0, length) in pieces all or none of which can be read: (offset, size, readable)."""
    start = 0
    for page in sorted(bad):
        for line in sorted(bad[page]):
            offset = page * PAGE_SIZE + line * LINE_SIZE
            if start < offset:
                yield start, offset - start, True
            yield offset, LINE_SIZE, False
            start = offset + LINE_SIZE
    if start < length:
        yield start, length - start, True
