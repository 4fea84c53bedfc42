"""What the experiment finds: maps, results, counters, bytes, exit status, within bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_kit import HPAGE, PAGE, MakeFile, RunJson, pykhuge

from pykhuge import KernelPanic
from pykhuge.cli import experiment
from pykhuge.cli.experiment import Experiment
from pykhuge.cli.report import BadLine, Report


def test_a_good_file_is_copied_whole(make_file: MakeFile, run_json: RunJson) -> None:
    """Without poison every page is copied, every byte reads back, and the status is 0."""
    report = run_json(make_file(HPAGE))
    (only,) = report["ranges"]
    assert only["map"] == "#" * 512
    assert (only["result"], only["status"], only["errno"]) == ("SCAN_SUCCEED", "succeeded", 0)
    assert report["bytes"] == {"verified": HPAGE, "unreadable": 0, "wrong": 0}
    assert report["audit"] == report["bytes_findings"] == []
    assert report["audit_holds"] is report["bytes_hold"] is True
    assert report["exit_status"] == 0


@pytest.mark.parametrize("page", [0, 1, 511])
@pytest.mark.parametrize("line", [0, 63])
def test_a_poisoned_line_rolls_its_range_back(
    make_file: MakeFile, run_json: RunJson, page: int, line: int
) -> None:
    """Every other page of the range is as it was, and all bytes but the line's are verified."""
    report = run_json(make_file(HPAGE), "--poison", f"{page}:{line}")
    (only,) = report["ranges"]
    assert only["map"] == "-" * page + "X" + "?" * (511 - page)
    assert (only["result"], only["errno_name"]) == ("SCAN_COPY_MC", "EINVAL")
    assert only["machine_check"] == {"page": page, "line": line}
    assert only["poisoned"] == report["poisoned"] == [{"page": page, "line": line}]
    assert (report["bytes"]["verified"], report["bytes"]["unreadable"]) == (HPAGE - 64, 64)
    assert report["exit_status"] == 0


def test_a_rollback_moves_no_counter_but_the_allocation(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """Reference 3.6, column COPY_MC: only thp_collapse_alloc differs afterwards."""
    counters = run_json(make_file(HPAGE), "--poison", 100)["counters"]
    moved = {name: c["after"] - c["before"] for name, c in counters.items()}
    assert {name: by for name, by in moved.items() if by} == {"thp_collapse_alloc": 1}


def test_a_collapse_moves_the_counters_of_the_kernel(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """Reference 3.6, column SUCCESS, for 100 pages and a hole of 412."""
    counters = run_json(make_file(100 * PAGE))["counters"]
    moved = {name: c["after"] - c["before"] for name, c in counters.items()}
    assert {name: by for name, by in moved.items() if by} == {
        "nr_free_pages": -412,
        "nr_inactive_anon": 412,
        "nr_anon_pages": 412,
        "nr_anon_transparent_hugepages": 1,
        "thp_collapse_alloc": 1,
        "pages_collapsed": 1,
        "MM_ANONPAGES": 412,
    }


def test_the_first_of_two_bad_lines_stops_the_copy(make_file: MakeFile, run_json: RunJson) -> None:
    """Both pages show as poisoned, the machine check is the lower line's, both give SIGBUS."""
    report = run_json(make_file(HPAGE), "--poison", 300, "--poison", "7:9", "--poison", "7:40")
    (only,) = report["ranges"]
    assert only["machine_check"] == {"page": 7, "line": 9}
    assert [place for place, cell in enumerate(only["map"]) if cell == "X"] == [7, 300]
    assert report["bytes"]["unreadable"] == 3 * 64
    assert report["bytes_hold"]


def test_only_ranges_with_poison_are_rolled_back(make_file: MakeFile, run_json: RunJson) -> None:
    """Acceptance 8a: poisoned ranges fail, all others collapse; pages count over all ranges."""
    size = 11 * HPAGE + 5 * PAGE + 1
    report = run_json(make_file(size), "--poison", 512, "--poison", 9 * 512 + 511)
    results = [each["result"] for each in report["ranges"]]
    assert [index for index, name in enumerate(results) if name == "SCAN_COPY_MC"] == [1, 9]
    assert results.count("SCAN_SUCCEED") == 10
    assert report["ranges"][1]["map"] == "X" + "?" * 511
    assert report["ranges"][11]["map"] == "#" * 6 + "." * 506
    assert report["bytes"]["verified"] == 12 * HPAGE - 2 * 64


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, HPAGE - 1, HPAGE + 1])
def test_the_tail_behind_the_file_is_a_hole_of_zeros(
    make_file: MakeFile, run_json: RunJson, size: int
) -> None:
    """Pages without a byte of the file are holes, whatever its size, and read as zeros."""
    report = run_json(make_file(size))
    pages = -(-size // PAGE)
    ranges = -(-pages // 512)
    assert "".join(each["map"] for each in report["ranges"]) == "#" * pages + "." * (
        ranges * 512 - pages
    )
    assert report["bytes"]["verified"] == ranges * HPAGE


def test_a_hole_stays_a_hole_when_the_range_is_rolled_back(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """Poison in the only page: nothing else was there to roll back."""
    report = run_json(make_file(10), "--poison", "0:63")
    assert report["ranges"][0]["map"] == "X" + "." * 511
    assert report["bytes"]["verified"] == HPAGE - 64


def test_windows_do_not_show(make_file: MakeFile) -> None:
    """Counters, maps and bytes are the same with one range in memory at a time as with all."""
    size = 5 * HPAGE + 77
    path = make_file(size)
    reports = []
    for window in (HPAGE, 2 * HPAGE, 8 * HPAGE):
        report = Report(str(path), size, poisoned=[BadLine(3, 1), BadLine(1030, 2)])
        run = Experiment(report, window)
        with path.open("rb", buffering=0) as file:
            run.run(file, lambda _: None)
        run.machine.audit()
        reports.append(report)
    first, *others = reports
    assert first.exit_status == 0
    for other in others:
        assert (other.before, other.after) == (first.before, first.after)
        assert [each.map for each in other.ranges] == [each.map for each in first.ranges]
        assert (other.verified, other.unreadable) == (first.verified, first.unreadable)


def test_random_poison_follows_the_seed(make_file: MakeFile, run_json: RunJson) -> None:
    """Equal seeds give equal reports, trace and all; N lines are poisoned, each once."""
    path = make_file(3 * HPAGE)
    one, same, other = (run_json(path, "--poison-random", 20, "--seed", seed) for seed in (1, 1, 2))
    assert one == same
    assert one["poisoned"] != other["poisoned"]
    assert len({(bad["page"], bad["line"]) for bad in one["poisoned"]}) == 20
    assert one["bytes_hold"]
    assert one["bytes"]["unreadable"] == 20 * 64


def test_random_poison_takes_lines_that_poison_has_not(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """N more lines: all of a small file can be poisoned, no line twice."""
    report = run_json(make_file(PAGE), "--poison", "0:0", "--poison", "0:5", "--poison-random", 62)
    assert [bad["line"] for bad in report["poisoned"]] == list(range(64))
    assert report["bytes"]["unreadable"] == PAGE
    assert report["bytes_hold"]


def test_the_trace_is_that_of_trace_pipe(make_file: MakeFile, run_json: RunJson) -> None:
    """Each range has its own events; after COPY_MC, isolation succeeded and two tell the rest."""
    report = run_json(make_file(2 * HPAGE), "--poison", 600)
    good, bad = ([line.split(": ", 1)[1] for line in each["trace"]] for each in report["ranges"])
    assert [line.split(":")[0] for line in bad] == [
        "mm_collapse_huge_page_isolate",
        "mm_collapse_huge_page",
        "mm_khugepaged_scan_pmd",
    ]
    assert [line.split("status=")[1] for line in bad] == [
        "succeeded",
        "copy_poisoned_page",
        "copy_poisoned_page, unmapped=0",
    ]
    assert all("status=succeeded" in line for line in good)
    (line,) = report["ranges"][1]["log"]
    assert line.endswith("mce: [Hardware Error]: Machine check events logged")


def test_the_trace_ring_is_bounded(make_file: MakeFile) -> None:
    """Ranges whose events were overwritten have none; the others keep exactly their own."""
    path = make_file(4 * HPAGE)
    report = Report(str(path), 4 * HPAGE)
    run = Experiment(report)
    run.machine.trace.records = type(run.machine.trace.records)(maxlen=7)
    with path.open("rb", buffering=0) as file:
        run.run(file, lambda _: None)
    run.machine.audit()
    assert report.trace_overrun == 5
    assert [len(report.trace_of(each)) for each in report.ranges] == [0, 1, 3, 3]


def test_the_logs_of_a_window_do_not_pile_up(make_file: MakeFile) -> None:
    """Machine checks of windows gone by are only in the report; their frames are good again."""
    path = make_file(6 * HPAGE)
    report = Report(str(path), 6 * HPAGE, poisoned=[BadLine(page, 0) for page in range(0, 3072, 7)])
    run = Experiment(report)
    with path.open("rb", buffering=0) as file:
        run.run(file, lambda _: None)
    run.machine.audit()
    # The kernel tells of two machine checks a minute.
    assert [len(each.log) for each in report.ranges] == [1, 1, 0, 0, 0, 0]
    assert all(each.machine_check for each in report.ranges)
    assert run.machine.log == run.machine.mem.poison.log == []
    assert not run.machine.mem.poison.lines[: 64 << 8].any()


def test_without_recovery_the_host_panics(make_file: MakeFile, run_json: RunJson) -> None:
    """Status 3: the map ends at the bad page, later ranges are not reached, nothing is claimed."""
    report = run_json(make_file(6 * HPAGE), "--no-recovery", "--poison", 515)
    assert report["panic"].startswith("Kernel panic - not syncing: ")
    assert report["exit_status"] == 3
    good, dead = report["ranges"]
    assert good["map"] == "#" * 512
    assert dead["map"] == "###X" + "?" * 508
    assert (dead["result"], dead["errno"]) == (None, None)
    assert any("Kernel panic" in line for line in dead["log"])
    assert report["ranges_not_reached"] == 4
    assert report["audit_holds"] is report["bytes_hold"] is None
    assert report["counters"]["nr_isolated_anon"]["after"] == 512


def test_the_dead_machine_refuses_further_use(make_file: MakeFile) -> None:
    """After the panic every call on the machine raises it again."""
    path = make_file(PAGE)
    run = Experiment(Report(str(path), PAGE, recovery=False, poisoned=[BadLine(0, 0)]))
    with path.open("rb", buffering=0) as file:
        run.run(file, lambda _: None)
    with pytest.raises(KernelPanic):
        run.process.read(run.addr, 1)


def test_without_recovery_and_without_poison_all_is_well(
    make_file: MakeFile, run_json: RunJson
) -> None:
    """The kernel before the series collapses good memory as ever."""
    assert run_json(make_file(HPAGE), "--no-recovery")["exit_status"] == 0


def test_a_wrong_byte_is_found(
    make_file: MakeFile, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 when a byte of a huge page is not the file's, and the report says which."""
    collapse = Experiment._collapse

    def corrupt(self: Experiment, index: int) -> None:
        collapse(self, index)
        pfn = self.process.pfn(self.addr + 9 * PAGE)
        assert pfn is not None
        self.machine.mem.ram.pages[pfn, 5] ^= 1

    monkeypatch.setattr(Experiment, "_collapse", corrupt)
    report = run_json(make_file(HPAGE))
    assert report["exit_status"] == 1
    assert not report["consistent"]
    assert (report["bytes"]["wrong"], report["bytes"]["verified"]) == (1, HPAGE - 1)
    assert report["bytes_findings"] == [f"1 bytes differ from the file, first at {9 * PAGE + 5}"]


def test_a_line_that_turns_good_or_bad_is_found(
    make_file: MakeFile, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poisoned line that can be read, and SIGBUS where none was poisoned, are both wrong."""
    collapse = Experiment._collapse

    def swap_lines(self: Experiment, index: int) -> None:
        collapse(self, index)
        pfn = self.process.pfn(self.addr)
        assert pfn is not None
        self.machine.mem.poison.lines[pfn] = np.uint64(1 << 20)

    monkeypatch.setattr(Experiment, "_collapse", swap_lines)
    report = run_json(make_file(HPAGE), "--poison", "0:3")
    assert report["exit_status"] == 1
    assert any("is not there any more" in finding for finding in report["bytes_findings"])
    assert len(report["bytes_findings"]) == 2


def test_an_audit_that_fails_is_told(
    make_file: MakeFile, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, with what the audit found."""
    audit = Experiment._audit

    def miscounted(self: Experiment) -> None:
        self.process.mm.rss_stat[1] += 1
        audit(self)
        self.process.mm.rss_stat[1] -= 1

    monkeypatch.setattr(Experiment, "_audit", miscounted)
    report = run_json(make_file(PAGE))
    assert report["exit_status"] == 1
    assert report["audit_holds"] is False
    assert "MM_ANONPAGES" in report["audit"][0]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Collapsing 96 MiB takes hardly more memory than 8 MiB."""
    peaks = []
    for megabytes in (8, 96):
        path = tmp_path / f"{megabytes}M"
        with path.open("wb") as file:
            file.truncate(megabytes << 20)
        ran = pykhuge("collapse", path, "--json", launcher=_PEAK)
        peaks.append(int(ran.stderr))
    assert peaks[1] - peaks[0] < 16 << 10


_PEAK = """
import resource, sys
from pykhuge.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def test_the_window_is_small_beside_a_large_file() -> None:
    """The bound the test above relies on."""
    assert experiment.WINDOW <= 8 << 20
