"""The same experiment in shmem and with the file itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import HPAGE, PAGE, MakeFile, RunJson, pykhuge

KINDS = ["anon", "shmem", "file"]
CACHED = ["shmem", "file"]
HUGE = {"shmem": "nr_shmem_hugepages", "file": "nr_file_hugepages"}
COUNTER = {"shmem": "MM_SHMEMPAGES", "file": "MM_FILEPAGES"}


def moved(report: dict[str, dict[str, dict[str, int]]]) -> dict[str, int]:
    """What the counters have moved by, but for those that did not."""
    changes = {name: c["after"] - c["before"] for name, c in report["counters"].items()}
    return {name: by for name, by in changes.items() if by}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_file_is_copied_whole(make_file: MakeFile, run_json: RunJson, kind: str) -> None:
    """Every page is copied and every byte reads back, whatever memory it was put into."""
    report = run_json(make_file(2 * HPAGE), "--kind", kind)
    assert report["kind"] == kind
    assert [each["map"] for each in report["ranges"]] == ["#" * 512] * 2
    assert [each["result"] for each in report["ranges"]] == ["SCAN_SUCCEED"] * 2
    assert report["bytes"] == {"verified": 2 * HPAGE, "unreadable": 0, "wrong": 0}
    assert report["exit_status"] == 0


@pytest.mark.parametrize("kind", CACHED)
def test_a_collapse_of_a_file_moves_the_counters_of_the_kernel(
    make_file: MakeFile, run_json: RunJson, kind: str
) -> None:
    """Reference 4.6, success, without holes: pages unmapped, one table retracted, one huge page."""
    changes = moved(run_json(make_file(HPAGE), "--kind", kind))
    assert changes.pop("nr_thps", 1) == 1
    # The table goes; LRU lists are a matter of which page is on which.
    assert {name: by for name, by in changes.items() if "active" not in name} == {
        "nr_free_pages": 1,
        "nr_mapped": -512,
        HUGE[kind]: 1,
        "nr_page_table_pages": -1,
        "thp_collapse_alloc": 1,
        "pages_collapsed": 1,
        COUNTER[kind]: -512,
    }


def test_holes_of_shmem_become_pages(make_file: MakeFile, run_json: RunJson) -> None:
    """100 pages and 412 holes: charged, counted, zeroed."""
    report = run_json(make_file(100 * PAGE), "--kind", "shmem")
    changes = moved(report)
    assert changes["nr_file_pages"] == changes["nr_shmem"] == changes["nrpages"] == 412
    assert changes["i_blocks"] == 8 * 412
    assert report["bytes"]["verified"] == HPAGE


@pytest.mark.parametrize("kind", CACHED)
def test_a_rollback_of_a_file_moves_no_page_or_huge_page(
    make_file: MakeFile, run_json: RunJson, kind: str
) -> None:
    """Reference 4.6, COPY_MC: the pages stay unmapped, and that is all."""
    report = run_json(make_file(HPAGE), "--kind", kind, "--poison", "100:7")
    (only,) = report["ranges"]
    assert (only["result"], only["machine_check"]) == ("SCAN_COPY_MC", {"page": 100, "line": 7})
    assert only["map"] == "-" * 100 + "X" + "?" * 411
    assert moved(report) == {"nr_mapped": -512, COUNTER[kind]: -512, "thp_collapse_alloc": 1}
    assert (report["bytes"]["verified"], report["bytes"]["unreadable"]) == (HPAGE - 64, 64)


def test_a_last_range_that_is_not_full_cannot_be_collapsed_as_a_file(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """There is nothing to read behind the end: SCAN_FAIL, and every byte is there."""
    size = HPAGE + 5 * PAGE + 1
    report = run_json(make_file(size), "--kind", "file")
    assert [each["result"] for each in report["ranges"]] == ["SCAN_SUCCEED", "SCAN_FAIL"]
    assert report["ranges"][1]["map"] == "?" * 6 + "." * 506
    assert report["bytes"] == {"verified": size, "unreadable": 0, "wrong": 0}
    assert report["exit_status"] == 0


@pytest.mark.parametrize("kind", CACHED)
def test_many_windows_are_as_one(make_file: MakeFile, run_json: RunJson, kind: str) -> None:
    """Ranges beyond the first window are loaded, collapsed and given up like the others."""
    report = run_json(make_file(6 * HPAGE), "--kind", kind, "--poison", 5 * 512)
    results = [each["result"] for each in report["ranges"]]
    assert results == ["SCAN_SUCCEED"] * 5 + ["SCAN_COPY_MC"]
    assert report["counters"][HUGE[kind]] == {"before": 0, "after": 5}
    assert report["bytes_hold"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_recovery_the_host_panics(
    make_file: MakeFile, run_json: RunJson, kind: str
) -> None:
    """The kernel before the series: pages below the bad one were copied, the rest never."""
    report = run_json(make_file(HPAGE), "--kind", kind, "--poison", 9, "--no-recovery")
    assert report["panic"] == "Kernel panic - not syncing: Fatal local machine check"
    assert report["exit_status"] == 3
    assert report["ranges"][0]["map"] == "#" * 9 + "X" + "?" * 502


def test_the_file_is_never_written_to(make_file: MakeFile, run_json: RunJson) -> None:
    """Poison and collapse happen in the model's page cache alone."""
    path: Path = make_file(HPAGE + 100)
    before = path.read_bytes()
    run_json(path, "--kind", "file", "--poison-random", 5)
    assert path.read_bytes() == before


def test_an_unknown_kind_is_named_with_those_there_are(make_file: MakeFile) -> None:
    """Exit status 2, one line."""
    done = pykhuge("collapse", make_file(1), "--kind", "hugetlb")
    assert done.returncode == 2
    assert "--kind hugetlb: allowed anon, shmem, file" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_shows_the_counters_of_the_kind(make_file: MakeFile, kind: str) -> None:
    """Also those that a rollback leaves as they were."""
    done = pykhuge("collapse", make_file(HPAGE), "--kind", kind, "--poison", 1)
    assert done.returncode == 0
    assert f"1 range of 2 MiB, {kind}" in done.stdout
    assert HUGE.get(kind, "nr_anon_transparent_hugepages") in done.stdout
