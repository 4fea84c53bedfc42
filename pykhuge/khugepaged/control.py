"""CollapseControl, and the knobs of /sys/kernel/mm/transparent_hugepage/khugepaged."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import SupportsIndex

from pykhuge.hw.memory import HPAGE_PMD_NR

__all__ = ["KNOBS", "CollapseControl", "KhugepagedSettings"]

UINT_MAX = (1 << 32) - 1
# The least and the most that each knob takes.
KNOBS = {
    "defrag": (0, 1),
    "max_ptes_none": (0, HPAGE_PMD_NR - 1),
    "max_ptes_swap": (0, HPAGE_PMD_NR - 1),
    "max_ptes_shared": (0, HPAGE_PMD_NR - 1),
    "pages_to_scan": (1, UINT_MAX),
    "scan_sleep_millisecs": (0, UINT_MAX),
    "alloc_sleep_millisecs": (0, UINT_MAX),
}


COUNTERS = ("pages_collapsed", "full_scans")


@dataclass
class KhugepagedSettings:
    """The daemon's knobs, and what it has done.

    defrag: 1 lets it reclaim and compact for a huge page.
    max_ptes_none, _swap, _shared: its limits, inclusive, 0..511 each.
    pages_to_scan: pages of one scan. scan_sleep_millisecs: how long it sleeps after one,
    alloc_sleep_millisecs: within one, when there was no huge page to be had.
    pages_collapsed: huge pages made. full_scans: times it went round the list. Both are u32, and
    read only: the daemon counts.
    """

    # Told when one of the two sleeps was written: the daemon ends its own.
    on_sleep_written: Callable[[], None] = field(
        default_factory=lambda: lambda: None, init=False, repr=False, compare=False
    )
    defrag: int = 1
    max_ptes_none: int = HPAGE_PMD_NR - 1
    max_ptes_swap: int = HPAGE_PMD_NR // 8
    max_ptes_shared: int = HPAGE_PMD_NR // 2
    pages_to_scan: int = 8 * HPAGE_PMD_NR
    scan_sleep_millisecs: int = 10_000
    alloc_sleep_millisecs: int = 60_000
    pages_collapsed: int = field(default=0, init=False)
    full_scans: int = field(default=0, init=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name in KNOBS:
            object.__setattr__(self, name, _checked(name, value))
            if name.endswith("_sleep_millisecs"):
                self.on_sleep_written()
        elif name == "on_sleep_written":
            if not callable(value):
                raise TypeError(f"{name}={value!r}: allowed a function without arguments")
            object.__setattr__(self, name, value)
        elif name in COUNTERS:
            raise AttributeError(f"{name}={value!r}: read only, the daemon counts")
        else:
            raise AttributeError(f"{name}: allowed {', '.join(KNOBS)}")

    def count(self, name: str, times: int = 1) -> None:
        """`times` more in `pages_collapsed` or `full_scans`, an unsigned int of 32 bits."""
        object.__setattr__(self, name, (getattr(self, name) + times) & UINT_MAX)


def _checked(name: str, value: object) -> int:
    """A knob's value as a plain int, whatever integer it came as; True is no number here."""
    low, high = KNOBS[name]
    if not isinstance(value, bool) and isinstance(value, SupportsIndex):
        number = operator.index(value)
        if low <= number <= high:
            return number
    raise ValueError(f"{name}={value!r}: allowed {low}..{high}")


@dataclass
class CollapseControl:
    """struct collapse_control: on whose behalf a block is collapsed.

    The daemon heeds its limits and `enabled`; MADV_COLLAPSE heeds neither.
    node_load: pages of the block by node, as far as the scan came.
    """

    is_khugepaged: bool
    settings: KhugepagedSettings
    node_load: dict[int, int] = field(default_factory=dict)

    def limit(self, name: str) -> int:
        """How many PTEs of a kind may pass: max_ptes_* for the daemon, all for MADV_COLLAPSE."""
        return int(getattr(self.settings, name)) if self.is_khugepaged else HPAGE_PMD_NR

    def find_target_node(self) -> tuple[int, set[int]]:
        """hpage_collapse_find_target_node(): the first node with most pages, and cc->alloc_nmask.

        The mask holds all nodes with as many pages; any of them will do.
        """
        most = max(self.node_load.values(), default=0)
        mask = {nid for nid, load in self.node_load.items() if load == most}
        return min(mask, default=0), mask
