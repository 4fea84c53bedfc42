"""What /proc shows."""

from __future__ import annotations

from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.vmstat import EVENTS, NODE_STATS, PRINTED_IN_THP

__all__ = ["vmstat"]


def vmstat(mem: Memory) -> dict[str, int]:
    """/proc/vmstat: NR_* over all nodes, then events. Huge-page counters are in huge pages."""
    shown = {
        name: mem.vmstat.total(item) // (HPAGE_PMD_NR if item in PRINTED_IN_THP else 1)
        for item, name in enumerate(NODE_STATS)
    }
    return shown | dict(zip(EVENTS, mem.vmstat.event, strict=True))
