"""The model held against the running kernel: the same layouts in both, and all that can be seen.

A layout (`layout`) is drawn (`generate`) and built twice, by the same strokes: in a process of the
running kernel (`host`) and in the model (`model`). `observe` says of both alike what came of the
collapse, `compare` what differs and which smaller layout still shows it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pykhuge.kernel.version import KernelVersion
from pykhuge.tools.conform.compare import Comparison, compare, shrink
from pykhuge.tools.conform.generate import layout as draw_layout
from pykhuge.tools.conform.host import Host
from pykhuge.tools.conform.knobs import Lacking, kernel_version, prepared
from pykhuge.tools.conform.layout import (
    CONTEXTS,
    LIMITS,
    MEMORIES,
    SPELLED,
    STROKES,
    WORDS,
    Layout,
    parse,
)

__all__ = [
    "CONTEXTS",
    "LIMITS",
    "MEMORIES",
    "NOT_REACHABLE",
    "SPELLED",
    "STROKES",
    "WORDS",
    "Comparison",
    "Host",
    "Lacking",
    "Layout",
    "Report",
    "conform",
    "draw",
    "host_version",
    "kernel_version",
    "parse",
    "running_kernel",
]

# What no layout can bring about, and why.
NOT_REACHABLE = {
    "copy_poisoned_page": "memory cannot be poisoned so that a copy meets it, without bad hardware",
    "memory_failure": "MADV_HWPOISON needs CONFIG_MEMORY_FAILURE, and raises no machine check",
    "page_has_private, and regular files": "they need CONFIG_READ_ONLY_THP_FOR_FS",
    "alloc_huge_page_failed, ccgroup_charge_failed": "memory is not made scarce here",
    "page_locked, page_filled, store_failed, no_process_for_page, vma_null, scan_aborted":
        "they need a second task at the right moment, or a second NUMA node",
}  # fmt: skip

PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42


@dataclass
class Report:
    """What a run found. release: of the kernel. model: the version the model ran as.

    left_out: why layouts were not built, and how many. again: how many agreed only when the kernel
    was asked again.
    """

    release: str
    model: KernelVersion
    layouts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    again: int = 0
    results: Counter[str] = field(default_factory=Counter)
    strokes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    mismatches: list[Comparison] = field(default_factory=list)
    smallest: list[Comparison] = field(default_factory=list)

    def add(self, comparison: Comparison) -> None:
        """Count one more layout."""
        if comparison.unfit:
            self.left_out[comparison.unfit] += 1
            return
        layout = comparison.layout
        self.layouts += 1
        self.again += comparison.again > 0 and comparison.agrees
        self.kinds[f"{layout.memory}, {layout.via}"] += 1
        self.strokes.update({stroke.name for stroke in layout.strokes})
        if comparison.kernel is not None:
            self.results.update(comparison.kernel.scan_results())
        if not comparison.agrees:
            self.mismatches.append(comparison)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "release": self.release,
            "model": self.model.name,
            "layouts": self.layouts,
            "left_out": dict(self.left_out.most_common()),
            "kernel_asked_again": self.again,
            "mismatches": [_mismatch(each) for each in self.mismatches],
            "smallest": [_mismatch(each) for each in self.smallest],
            "scan_results": dict(self.results.most_common()),
            "kinds": dict(self.kinds.most_common()),
            "strokes": dict(self.strokes.most_common()),
            "not_reachable": NOT_REACHABLE,
        }


def _mismatch(comparison: Comparison) -> dict[str, Any]:
    return {
        "layout": str(comparison.layout),
        "differs": list(comparison.differs),
        "error": comparison.error,
        "kernel": comparison.kernel and comparison.kernel.as_json(),
        "model": comparison.model and comparison.model.as_json(),
    }


def host_version() -> KernelVersion:
    """What the model knows of the running kernel."""
    return KernelVersion.at(*kernel_version())


def draw(seed: int) -> Iterator[Layout]:
    """The layouts of `seed`, without end."""
    return (draw_layout(seed, number) for number in itertools.count())


@contextlib.contextmanager
def running_kernel(*, allow_sysfs: bool) -> Iterator[Host]:
    """The kernel made ready to build layouts in.

    allow_sysfs: knobs may be turned; they are put back whatever happens.
    Raises: Lacking.
    """
    with (
        prepared(allow_sysfs=allow_sysfs) as (trace, held),
        contextlib.closing(Host(trace, held)) as host,
        _not_for_khugepaged(),
    ):
        yield host


def conform(
    layouts: Iterable[Layout], host: Host, version: KernelVersion, *, most: int, shrunk: int = 3
) -> Iterator[Report]:
    """Compare the layouts one by one; yields the same report after each, and at the end.

    Those that would kill the process that builds them, or never end, are left out and counted.

    Args:
        version: what the model runs as.
        most: how many are compared.
        shrunk: how many of the mismatches are shrunk to smallest layouts.
    """
    report = Report(platform.release(), version)
    for comparison in compare(layouts, host, version):
        report.add(comparison)
        yield report
        if report.layouts == most:
            break
    for mismatch in report.mismatches[:shrunk]:
        report.smallest.append(_shrink(mismatch, host, version))
    yield report


@contextlib.contextmanager
def _not_for_khugepaged() -> Iterator[None]:
    """The model's own arrays are nothing for the daemon that is watched."""
    prctl = ctypes.CDLL(None).prctl
    before = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0)
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_THP_DISABLE, before, 0, 0, 0)


def _shrink(mismatch: Comparison, host: Host, version: KernelVersion) -> Comparison:
    """The smallest layout that fails as this one does: that it breaks, or that it differs."""
    smallest = mismatch

    def still(layout: Layout) -> bool:
        nonlocal smallest
        (found,) = compare([layout], host, version)
        if found.unfit or found.agrees or bool(found.error) != bool(mismatch.error):
            return False
        smallest = found
        return True

    shrink(mismatch.layout, still)
    return smallest
