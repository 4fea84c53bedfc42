"""The huge page to collapse into."""

from __future__ import annotations

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR
from pykhuge.khugepaged.control import CollapseControl
from pykhuge.khugepaged.scan_result import ScanResult
from pykhuge.mm.mm_types import Mm
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import PG_in_flight
from pykhuge.mm.page_alloc import alloc_huge_page, charge
from pykhuge.mm.swap import put_pages
from pykhuge.mm.vmstat import THP_COLLAPSE_ALLOC, THP_COLLAPSE_ALLOC_FAILED

__all__ = ["alloc_charge_hpage", "put_hpage"]


def alloc_charge_hpage(mem: Memory, mm: Mm, cc: CollapseControl) -> tuple[ScanResult, int]:
    """Allocate a huge page on the node with most of the block's pages; charge `mm`'s cgroup.

    Returns: SCAN_SUCCEED and the first frame, which has one reference, the caller's;
    SCAN_ALLOC_HUGE_PAGE_FAIL; or SCAN_CGROUP_CHARGE_FAIL, with the allocation counted all the same.
    """
    nid, nodemask = cc.find_target_node()
    head = alloc_huge_page(mem, nid, nodemask or None)
    if head is None:
        mem.vmstat.count(THP_COLLAPSE_ALLOC_FAILED)
        return ScanResult.SCAN_ALLOC_HUGE_PAGE_FAIL, -1
    mem.vmstat.count(THP_COLLAPSE_ALLOC)
    if not charge(mem, mm.memcg, HPAGE_PMD_NR):
        put_pages(mem, np.array([head]))
        return ScanResult.SCAN_CGROUP_CHARGE_FAIL, -1
    mem.pages.memcg[head] = mm.memcg.key
    mem.pages.flags[head] |= np.uint32(PG_in_flight)
    mem.in_flight[head] = mem.sched.current
    return ScanResult.SCAN_SUCCEED, head


def put_hpage(mem: Memory, hpage: int) -> None:
    """Give up the huge page that nothing maps."""
    del mem.in_flight[hpage]
    put_pages(mem, np.array([hpage]))
