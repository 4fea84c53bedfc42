"""What a run of `pykhuge collapse` found, and how programs are told of it (`--json`).

A report on 1 GiB holds 512 ranges; those that went the same way share the string of their map.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.scan_result import ScanResult

__all__ = [
    "COPIED",
    "HOLE",
    "LEGEND",
    "NOT_COPIED",
    "POISONED",
    "ROLLED_BACK",
    "BadLine",
    "Check",
    "RangeReport",
    "Report",
]

SCHEMA = 1
EXIT_CONSISTENT, EXIT_INCONSISTENT, EXIT_PANIC = 0, 1, 3
MAX_FINDINGS = 20

# One character for each page of a map, so that it reads without colour too.
COPIED, HOLE, POISONED, ROLLED_BACK, NOT_COPIED = "#.X-?"
LEGEND = {
    COPIED: "copied",
    HOLE: "hole",
    POISONED: "poisoned",
    ROLLED_BACK: "copied, rolled back",
    NOT_COPIED: "not copied",
}


class BadLine(NamedTuple):
    """A poisoned cache line: page of the file, counted over all ranges, and line 0..63 of it."""

    page: int
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class RangeReport:
    """What became of one range of 2 MiB.

    result: None if the host died in it.
    map: 512 characters of LEGEND.
    machine_check: the line whose machine check ended the copy.
    first_event, nr_events: its trace events, counted from the start of the run.
    log: what its collapse added to the kernel log.
    """

    index: int
    addr: int
    result: ScanResult | None
    map: str
    poisoned: tuple[BadLine, ...]
    machine_check: BadLine | None
    first_event: int
    nr_events: int
    log: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """The scan result by its name; "panic" if there is none."""
        return "panic" if self.result is None else self.result.name

    @property
    def errno_name(self) -> str | None:
        """What MADV_COLLAPSE would fail with for this result; None if it would not, or a panic."""
        return errno.errorcode.get(self.result.errno) if self.result is not None else None


@dataclass
class Check:
    """One thing that must hold. `findings` are the first contradictions, a line each."""

    findings: list[str] = field(default_factory=list)
    possible: bool = True

    def fail(self, finding: str) -> None:
        """Note a contradiction; beyond MAX_FINDINGS one more says nothing new."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    @property
    def holds(self) -> bool | None:
        """Whether all is as it must be; None if a dead host kept it from being looked at."""
        if self.findings:
            return False
        return True if self.possible else None


@dataclass
class Report:
    """A whole run.

    kind: of memory that the file was put into, one of cli.kinds.KINDS.
    poisoned: in the order of the file.
    before, after: vmstat, pages_collapsed, MM_* and what the kind adds, summed over all of the
    file: loaded and poisoned, and with every range collapsed or given up.
    trace: the newest lines; `trace_overrun` older ones were overwritten in the ring.
    verified, unreadable, wrong: bytes read back as loaded; on poisoned lines, each of which gave
    its reader SIGBUS; anything else.
    """

    file: str
    size: int
    kind: str = "anon"
    recovery: bool = True
    seed: int = 0
    poisoned: list[BadLine] = field(default_factory=list)
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
    wrong: int = 0

    @property
    def nr_pages(self) -> int:
        """Pages of the file, the last one perhaps in part."""
        return -(-self.size // PAGE_SIZE)

    @property
    def nr_ranges(self) -> int:
        """Ranges the file needs; more than `ranges` has if the host died on the way."""
        return -(-self.size // HPAGE_PMD_SIZE)

    @property
    def exit_status(self) -> int:
        """0 all consistent, 1 the audit or the bytes do not hold, 3 the host panicked."""
        if self.audit.findings or self.bytes.findings:
            return EXIT_INCONSISTENT
        return EXIT_CONSISTENT if self.panic is None else EXIT_PANIC

    def trace_of(self, each: RangeReport) -> list[str]:
        """The trace events of a range, as far as the ring still has them."""
        start = each.first_event - self.trace_overrun
        return self.trace[max(start, 0) : max(start + each.nr_events, 0)]

    def as_json(self) -> dict[str, Any]:
        """The report for --json; within one `schema`, keys and their meaning stay."""
        return {
            "schema": SCHEMA,
            "file": self.file,
            "size": self.size,
            "kind": self.kind,
            "pages": self.nr_pages,
            "seed": self.seed,
            "exit_status": self.exit_status,
            "consistent": self.exit_status != EXIT_INCONSISTENT,
            "panic": self.panic,
            "poisoned": [each._asdict() for each in self.poisoned],
            "legend": LEGEND,
            "ranges": [self._range_json(each) for each in self.ranges],
            "ranges_not_reached": self.nr_ranges - len(self.ranges),
            "trace_overrun": self.trace_overrun,
            "counters": {
                name: {"before": self.before[name], "after": self.after[name]}
                for name in self.before
            },
            "audit": self.audit.findings,
            "audit_holds": self.audit.holds,
            "bytes": {
                "verified": self.verified,
                "unreadable": self.unreadable,
                "wrong": self.wrong,
            },
            "bytes_hold": self.bytes.holds,
            "bytes_findings": self.bytes.findings,
        }

    def _range_json(self, each: RangeReport) -> dict[str, Any]:
        return {
            "range": each.index,
            "addr": each.addr,
            "result": None if each.result is None else each.result.name,
            "status": None if each.result is None else each.result.text,
            "errno": None if each.result is None else each.result.errno,
            "errno_name": each.errno_name,
            "map": each.map,
            "poisoned": [bad._asdict() for bad in each.poisoned],
            "machine_check": each.machine_check._asdict() if each.machine_check else None,
            "trace": self.trace_of(each),
            "log": list(each.log),
        }
