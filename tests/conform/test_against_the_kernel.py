"""The model as the running kernel's version, held against that kernel, layout by layout."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import pytest
from kernel_kit import lacking

from pykhuge import KernelVersion
from pykhuge.tools.conform import (
    CONTEXTS,
    MEMORIES,
    STROKES,
    Host,
    Lacking,
    Layout,
    Report,
    conform,
    draw,
    host_version,
    parse,
    running_kernel,
)

# For every scan result that a layout can bring about one that does, seldom as it may be drawn.
RESULTS = {
    "succeeded": "anon: write 0+511",
    "failed": "anon: write 0+512; arm 0+512; dontneed 7+1; uffd-poison 7+1",
    "pmd_none": "anon: write 0+512; dontneed 0+512",
    "page_pmd_mapped": "anon: write 0+512; collapse 0+512",
    "exceed_none_pte": "anon via=khugepaged none=10: write 0+501; hugepage 0+512",
    "exceed_swap_pte": "anon via=khugepaged swap=1: write 0+512; pageout 5+2; hugepage 0+512",
    "exceed_shared_pte": "anon via=khugepaged shared=9: write 0+512; fork; child.write 10+502; "
    "hugepage 0+512",
    "pte_uffd_wp": "anon: write 0+512; uffd-wp 0+512",
    "pte_mapped_hugepage": "memfd: write 0+512; collapse 0+512; dontneed 0+512",
    "lack_referenced_page": "anon via=khugepaged: write 0+512; free 0+512; hugepage 0+512",
    "not_suitable_page_count": "anon: write 0+512; pin 3+1",
    "truncated": "memfd: write 0+512; truncate 0",
}
# For each difference between kernel versions that a layout can show one that does.
WITNESSES = {
    "exceed_none_is_ebusy": "anon: write 0+512; arm 0+512; dontneed 257+1",
    "collapse_file_keeps_pages": "memfd via=khugepaged: write 0+512; pageout 15+1; "
    "hugepage 0+512; hugepage 0+512",
    "collapse_file_drains_shmem": "memfd: write 0+512; pageout 348+164",
    "retract_without_mmap_lock": "memfd: write 0+512",
    "large_folios": "anon via=khugepaged: hugepage 0+512; write 0+512; fork; "
    "child.dontneed 0+256; dontneed 3+1; hugepage 0+512",
    "shmem_heeds_past_advice": "shm via=khugepaged: write 0+512; hugepage 0+512",
    "collapse_file_addr_in_hex": "memfd: write 0+512",
    "populate_stops_at_gap": "anon: munmap 5+1; populate 0+512",
    "per_size_enabled": "anon via=khugepaged size=never: write 0+512; hugepage 0+512",
    "per_size_shmem_enabled": "memfd size_shmem=never: write 0+512",
    "khugepaged_runs_for_shmem": "memfd via=khugepaged enabled=never: write 0+512; "
    "hugepage 0+512; hugepage 0+512",
    "thp_disable_except_advised": "anon via=khugepaged: thp-disable 2; write 0+512; hugepage 0+512",
    "shmem_allocates_what_fits": "memfd head=1: hugepage 1+511; read 5+1; read 100+1",
    "finish_fault_maps_folios": "memfd: write 0+512; collapse 0+512; nohugepage 0+512; "
    "dontneed 0+512; write 5+1",
    "set_pmd_heeds_nohugepage": "memfd: write 0+512; collapse 0+512; nohugepage 0+512; "
    "dontneed 0+512; read 5+1",
    "fault_around_maps_folios": "private: read 0+512; collapse 0+512; write 100+1; "
    "dontneed 100+1; read 5+1",
    "split_maps_zero_page": "anon: hugepage 0+512; read 0+512; write 0+1; pageout 5+1",
    "huge_zero_page_gives_huge": "anon: hugepage 0+512; read 0+512; write 185+1",
    "shmem_swaps_huge": "memfd: write 0+512; collapse 0+512; pageout 0+512; read 3+1",
    "split_leaves_pieces": "memfd: write 0+512; collapse 0+512; punch 477+35; pin 450+1",
    "mremap_lifts_uffd_wp": "anon blocks=2: write 0+512; uffd-wp 0+512; move 0+512>512",
    "dontneed_frees_page_table": "anon: write 0+512; dontneed 0+512",
    "mremap_moves_many": "anon blocks=2: write 0+512; munmap 5+1; move 0+9>512",
    "no_scan_page_ro": "anon: write 0+512",
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """The running kernel, made ready once for all layouts."""
    try:
        with running_kernel(allow_sysfs=True) as kernel:
            yield kernel
    except Lacking as lack:
        lacking(str(lack))


def compared(
    layouts: Iterable[Layout], most: int, host: Host, version: KernelVersion | None = None
) -> Report:
    """The report of a run; a layout that differs is shrunk if the version is the host's."""
    shrunk = 0 if version else 3
    return deque(
        conform(layouts, host, version or host_version(), most=most, shrunk=shrunk), 1
    ).pop()


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, host: Host) -> Report:
    """Of the first layouts of seed 0, as many as --layouts says."""
    return compared(draw(0), request.config.getoption("--layouts"), host)


def test_the_model_does_what_the_kernel_does(report: Report) -> None:
    """Errno, events, page tables, sizes, counters, bytes; smallest layouts are shown otherwise."""
    assert [str(each.layout) for each in report.mismatches] == [], [
        (str(each.layout), each.error, each.differs) for each in report.smallest
    ]


def test_all_memory_all_strokes_and_both_contexts_are_drawn(report: Report) -> None:
    """So that no mismatch means something."""
    if report.layouts < 500:
        pytest.skip(f"--layouts={report.layouts}: 500 and more come to all of it")
    assert set(report.strokes) == set(STROKES)
    assert set(report.kinds) == {f"{each}, {via}" for each in MEMORIES for via in CONTEXTS}
    assert set(report.results) >= set(RESULTS) - {"failed", "lack_referenced_page"}


@pytest.mark.parametrize("result", RESULTS)
def test_each_result_that_can_be_had_is_had_by_both(host: Host, result: str) -> None:
    """Both come to it, and to all else alike."""
    report = compared([parse(RESULTS[result])], 1, host)
    assert not report.mismatches
    assert result in report.results


def test_every_difference_of_versions_has_a_witness_or_says_why_not() -> None:
    """A new switch needs one here."""
    switches = KernelVersion.switches()
    assert set(WITNESSES) == {name for name in switches if not switches[name].get("unseen")}


@pytest.mark.parametrize("switch", WITNESSES)
def test_a_difference_on_the_wrong_side_is_noticed(host: Host, switch: str) -> None:
    """The check of the check."""
    layout = parse(WITNESSES[switch])
    assert not compared([layout], 1, host).mismatches
    assert compared([layout], 1, host, host_version().flipped(switch)).mismatches
