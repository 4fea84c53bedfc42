"""`pykhuge conform`: its report in two forms, its exit status, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from kernel_kit import lacking

from pykhuge import KernelVersion
from pykhuge.cli import conform, main
from pykhuge.tools.conform import Comparison, Report, parse
from pykhuge.tools.conform.model import in_model

Captured = pytest.CaptureFixture[str]
LAYOUT = "anon: write 0+512; pin 3+1"


@pytest.fixture
def one_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two layouts, of which one differs in its result and in its first event."""
    version = KernelVersion.V6_18
    layout = parse(LAYOUT)
    good = in_model(layout, kernel=version)
    other = in_model(layout, kernel=version)
    other.result, other.events = 0, [{"event": "mm_khugepaged_scan_pmd"}]
    report = Report("6.18.0", version)
    differs = tuple(good.differences(other))
    report.add(Comparison(layout, kernel=good, model=good, again=1))
    report.add(Comparison(layout, kernel=good, model=other, differs=differs))
    report.add(Comparison(layout, unfit="a stroke would kill its process"))
    report.smallest = report.mismatches

    def fake(*_: Any, **__: Any) -> Iterator[Report]:
        yield report

    monkeypatch.setattr(conform, "running_kernel", lambda **_: nullcontext())
    monkeypatch.setattr(conform, "conform", fake)


@pytest.mark.usefixtures("one_mismatch")
def test_a_mismatch_is_printed_with_both_sides_and_the_command_to_see_it_again(
    capsys: Captured,
) -> None:
    """Status 1; what was met, and what cannot be, stand below."""
    assert main(["conform", "--allow-sysfs"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"pykhuge conform --allow-sysfs --layout '{LAYOUT}'\n")
    assert "  result:\n    kernel 11\n    model  0\n" in printed
    assert "  > kernel who=main event=mm_khugepaged_scan_pmd scan_pfn=main 3 " in printed
    assert "  > model  event=mm_khugepaged_scan_pmd\n" in printed
    assert "\n2 layouts, 1 mismatches\n" in printed
    assert "\n1 left out: a stroke would kill its process\n" in printed
    assert "\n1 agreed only when the kernel was asked again\n" in printed
    assert "\n        2  not_suitable_page_count\n" in printed
    assert "\n        2  anon, madvise\n" in printed
    assert "\nnot reachable here:\n  copy_poisoned_page: " in printed


@pytest.mark.usefixtures("one_mismatch")
def test_json_has_all_of_it(capsys: Captured) -> None:
    """The same, for programs."""
    assert main(["conform", "--allow-sysfs", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (mismatch,) = found.pop("mismatches")
    assert found.pop("smallest") == [mismatch]
    assert "copy_poisoned_page" in found.pop("not_reachable")
    assert found == {
        "schema": 1,
        "release": "6.18.0",
        "model": "6.18",
        "layouts": 2,
        "left_out": {"a stroke would kill its process": 1},
        "kernel_asked_again": 1,
        "scan_results": {"not_suitable_page_count": 2},
        "kinds": {"anon, madvise": 2},
        "strokes": {"write": 2, "pin": 2},
    }
    assert (mismatch["layout"], mismatch["differs"]) == (LAYOUT, ["result", "events"])
    assert (mismatch["kernel"]["result"], mismatch["model"]["result"]) == (11, 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layouts", "0"], "--layouts 0: allowed 1..10000000"),
        (["--layouts", "many"], "--layouts many: allowed 1..10000000"),
        (["--seed", "-1"], "--seed -1: allowed 0..10000000"),
        (["--seed", "x"], "--seed x: allowed 0..10000000"),
        (["--layout", "anon: rite 0+1"], "--layout: 'rite 0+1': allowed strokes are write, "),
        (["--layout", "anon: ", "--layouts", "1"], "not allowed with argument"),
        (["--without", "gravity"], "--without gravity: allowed exceed_none_is_ebusy, "),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(
    capsys: Captured, arguments: list[str], complaint: str
) -> None:
    """Status 2, before anything was turned."""
    assert main(["conform", "--allow-sysfs", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_no_knob_is_turned_without_leave(capsys: Captured) -> None:
    """Whoever has no right to it is told so."""
    assert main(["conform", "--layouts", "1"]) == 2
    said = capsys.readouterr().err
    assert "--allow-sysfs permits it" in said or "root's" in said or "MADV_COLLAPSE" in said


def test_a_layout_that_cannot_be_built_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Status 2; the kernel was not asked."""
    monkeypatch.setattr(conform, "running_kernel", lambda **_: nullcontext())
    monkeypatch.setattr(conform, "host_version", lambda: KernelVersion.V6_18)
    layout = "anon: protect 0+512; write 0+1"
    assert main(["conform", "--allow-sysfs", "--json", "--layout", layout]) == 2
    assert f"--layout {layout}: a stroke would kill its process\n" in capsys.readouterr().err


def run(capsys: Captured, *arguments: str) -> tuple[int, str]:
    """Status and output of a run on the kernel itself."""
    status = main(["conform", "--allow-sysfs", *arguments])
    printed = capsys.readouterr()
    if status == 2:
        lacking(printed.err)
    return status, printed.out


def test_one_layout_is_compared(capsys: Captured) -> None:
    """And nothing differs."""
    status, printed = run(capsys, "--layout", LAYOUT)
    assert status == 0
    assert "\n1 layouts, 0 mismatches\n" in printed


def test_a_difference_taken_away_is_noticed(capsys: Captured) -> None:
    """--without turns it to the wrong side."""
    status, printed = run(capsys, "--layout", LAYOUT, "--without", "no_scan_page_ro", "--json")
    assert status == 1
    assert "no_scan_page_ro" in json.loads(printed)["model"]
