"""What a run of `pykhuge collapse` found, and how programs are told (`--json`).

A report on 1 GiB holds 512 ranges; those that went the same way share the string of their map.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE, PAGE_SHIFT
from pykhuge.khugepaged.scan_result import ScanResult

__all__ = ["LEGEND", "MAX_FINDINGS", "Cell", "Check", "LineOfFile", "RangeReport", "Report"]

SCHEMA = 1
EXIT_CONSISTENT, EXIT_INCONSISTENT, EXIT_PANIC = 0, 1, 3
MAX_FINDINGS = 20


class Cell:
    """One page of a range in a map; each kind has a character of its own, colour or not."""

    COPIED = "#"
    HOLE = "."
    POISONED = "x"
    STOPPED = "!"
    ROLLED_BACK = "<"
    NOT_COPIED = "-"


LEGEND = {
    Cell.COPIED: "copied into the huge page",
    Cell.HOLE: "hole: nothing there, zeros once collapsed",
    Cell.POISONED: "poisoned",
    Cell.STOPPED: "poisoned: the copy stopped here",
    Cell.ROLLED_BACK: "rolled back: as it was before",
    Cell.NOT_COPIED: "not copied",
}


class LineOfFile(NamedTuple):
    """A cache line: page of the file, counted from 0 over all ranges, and line 0..63 of it."""

    page: int
    line: int


@dataclass(frozen=True, slots=True)
class RangeReport:
    """What became of one range of 2 MiB.

    result: None if the host died in it.
    cells: 512 characters of LEGEND.
    machine_check: the line whose machine check ended the copy.
    first_event, nr_events: its trace events, counted from the start of the run.
    log: what it added to the kernel log.
    """

    index: int
    addr: int
    result: ScanResult | None
    cells: str
    machine_check: LineOfFile | None
    first_event: int
    nr_events: int
    log: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """The scan result by its name; "panic" if there is none."""
        return "panic" if self.result is None else self.result.name

    @property
    def errno_name(self) -> str | None:
        """What MADV_COLLAPSE would return for the result; None for success and for a panic."""
        return errno.errorcode[self.result.errno] if self.result and self.result.errno else None


@dataclass
class Check:
    """One thing that must hold; `holds` is None if it could not be looked at, the host being dead.

    findings: the first contradictions, a line each.
    """

    findings: list[str] = field(default_factory=list)
    done: bool = True

    def fail(self, finding: str) -> None:
        """Note a contradiction; beyond MAX_FINDINGS one more says nothing new."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    @property
    def holds(self) -> bool | None:
        """Whether all is as it must be."""
        return False if self.findings else (True if self.done else None)


@dataclass
class Report:
    """A whole run.

    poisoned: in the order of the file.
    before, after: vmstat, pages_collapsed and MM_* with the file loaded and poisoned, and when all
    ranges were collapsed or given up.
    trace: the newest lines; `trace_overrun` older ones were overwritten in the ring.
    verified, unreadable: bytes read back and found right; bytes on poisoned lines, each of which
    gave its reader SIGBUS.
    """

    file: str
    size: int
    recovery: bool
    seed: int
    poisoned: list[LineOfFile]
    ranges: list[RangeReport] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)
    trace_overrun: int = 0
    panic: str | None = None
    audit: Check = field(default_factory=Check)
    bytes: Check = field(default_factory=Check)
    verified: int = 0
    unreadable: int = 0

    @property
    def nr_pages(self) -> int:
        """Pages of the file, the last one perhaps in part."""
        return -(-self.size >> PAGE_SHIFT)

    @property
    def nr_ranges(self) -> int:
        """Ranges the file needs; more than `ranges` has if the host died on the way."""
        return -(-self.size // HPAGE_PMD_SIZE)

    @property
    def exit_status(self) -> int:
        """0 if all is consistent, 1 if the audit or the bytes do not hold, 3 after a panic."""
        if self.audit.findings or self.bytes.findings:
            return EXIT_INCONSISTENT
        return EXIT_CONSISTENT if self.panic is None else EXIT_PANIC

    def trace_of(self, each: RangeReport) -> list[str]:
        """The trace events of a range, as far as the ring still has them."""
        start = each.first_event - self.trace_overrun
        return self.trace[max(start, 0) : max(start + each.nr_events, 0)]

    def to_json(self) -> dict[str, Any]:
        """The report as `--json` prints it; keys stay what they are for one `schema`."""
        return {
            "schema": SCHEMA,
            "file": self.file,
            "size": self.size,
            "nr_pages": self.nr_pages,
            "nr_ranges": self.nr_ranges,
            "pages_in_range": HPAGE_PMD_NR,
            "recovery": self.recovery,
            "seed": self.seed,
            "poisoned": [each._asdict() for each in self.poisoned],
            "legend": LEGEND,
            "ranges": [self._range_json(each) for each in self.ranges],
            "trace_overrun": self.trace_overrun,
            "counters": {
                name: {"before": self.before[name], "after": self.after[name]}
                for name in self.before
            },
            "panic": self.panic,
            "audit": {"holds": self.audit.holds, "findings": self.audit.findings},
            "bytes": {
                "holds": self.bytes.holds,
                "verified": self.verified,
                "unreadable": self.unreadable,
                "findings": self.bytes.findings,
            },
            "exit_status": self.exit_status,
        }

    def _range_json(self, each: RangeReport) -> dict[str, Any]:
        return {
            "range": each.index,
            "addr": each.addr,
            "scan_result": None if each.result is None else each.result.name,
            "status": None if each.result is None else each.result.text,
            "errno": None if each.result is None else each.result.errno,
            "errno_name": each.errno_name,
            "machine_check": each.machine_check._asdict() if each.machine_check else None,
            "map": each.cells,
            "trace": self.trace_of(each),
            "log": list(each.log),
        }
