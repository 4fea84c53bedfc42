"""`pykhuge acceptance`: the table in its three forms, the exit status, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_kit import pykhuge

from pykhuge.cli import acceptance, main
from pykhuge.tools.acceptance import Scenario, all_scenarios

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def wrong_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scenario comes out as expected, one does not, and one raises."""

    def fails() -> str:
        raise ZeroDivisionError("an explanation\nof two lines")

    made = [
        Scenario("group", "right", "anon", "madvise", "yes", lambda: "yes"),
        Scenario("group", "wrong", "anon", "madvise", "yes", lambda: "no"),
        Scenario("group", "raises", "anon", "madvise", "yes", fails),
    ]
    monkeypatch.setattr(acceptance, "all_scenarios", lambda _seeds: made)


def run_json(capsys: Captured, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["acceptance", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_json_has_every_chosen_scenario_with_what_came_out(capsys: Captured) -> None:
    """The filter looks at group, name, context and memory."""
    status, found = run_json(capsys, "--filter", "collapse_fork[madvise-anon]")
    assert status == 0
    assert found == {
        "schema": 1,
        "seeds": 1000,
        "passed": 1,
        "failed": 0,
        "scenarios": [
            {
                "group": "kselftest",
                "name": "collapse_fork",
                "memory": "anon",
                "context": "madvise",
                "expected": "collapsed",
                "got": "collapsed",
                "passed": True,
            }
        ],
    }


def test_seeds_are_heeded(capsys: Captured) -> None:
    """The series' scenarios try as many as asked for."""
    status, found = run_json(capsys, "--filter", "series two tasks", "--seeds", "3")
    assert status == 0
    assert [each["got"][:8] for each in found["scenarios"]] == ["3 seeds:"] * 4


def test_table_names_what_it_shows(capsys: Captured) -> None:
    """A row for each scenario, not folded in a pipe, and a verdict at the end."""
    assert main(["acceptance", "--filter", "SCAN_COPY_MC"]) == 0
    printed = capsys.readouterr().out
    for heading in ("scenario", "memory", "context", "expected", "got"):
        assert heading in printed
    rows = [line for line in printed.splitlines() if "SCAN_COPY_MC" in line]
    assert len(rows) == 6
    assert all(line.count("copy_poisoned_page") == 2 for line in rows)
    assert printed.splitlines()[-1] == "all 6 came out as expected"


def test_markdown_joins_rows_that_differ_in_memory_or_context_alone(capsys: Captured) -> None:
    """As it stands in the README."""
    assert main(["acceptance", "--filter", "SCAN_COPY_MC", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "**scan result**",
        "",
        "| scenario | memory | context | expected | got |",
        "|---|---|---|---|---|",
        "| SCAN_COPY_MC | anon, shmem, file | khugepaged | copy_poisoned_page |"
        " copy_poisoned_page |",
        "| SCAN_COPY_MC | anon, shmem, file | madvise | copy_poisoned_page, EINVAL |"
        " copy_poisoned_page, EINVAL |",
    ]
    assert main(["acceptance", "--filter", "collapse_fork[", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| collapse_fork | anon | khugepaged, madvise | collapsed | collapsed |"
    )


@pytest.mark.usefixtures("wrong_scenario")
def test_a_scenario_that_comes_out_otherwise_is_exit_status_1(capsys: Captured) -> None:
    """In every form; what was raised is told in a line."""
    status, found = run_json(capsys)
    assert (status, found["passed"], found["failed"]) == (1, 1, 2)
    assert [each["got"] for each in found["scenarios"]] == [
        "yes",
        "no",
        "ZeroDivisionError: an explanation",
    ]
    assert main(["acceptance"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 3 did not come out as expected"
    assert main(["acceptance", "--markdown"]) == 1
    assert "| wrong | anon | madvise | yes | **no** |" in capsys.readouterr().out


@pytest.mark.usefixtures("wrong_scenario")
def test_only_what_is_chosen_counts(capsys: Captured) -> None:
    """Exit status 0 though another would fail."""
    assert main(["acceptance", "--filter", "right"]) == 0
    assert "all 1 came out as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds 0: allowed 1..1000000"),
        (["--seeds", "-1"], "--seeds -1: allowed 1..1000000"),
        (["--seeds", "ten"], "--seeds ten: allowed 1..1000000"),
        (["--seeds", "1000001"], "--seeds 1000001: allowed 1..1000000"),
        (["--filter", "no such thing"], "--filter no such thing: allowed what"),
        (["--json", "--markdown"], "not allowed with argument"),
        (["file"], "unrecognized arguments: file"),
    ],
)
def test_a_wrong_argument_is_named(capsys: Captured, arguments: list[str], said: str) -> None:
    """One line on stderr, nothing on stdout, status 2."""
    assert main(["acceptance", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_without_rich_the_table_says_what_is_missing() -> None:
    """--json and --markdown work all the same."""
    launcher = (
        "import sys; sys.modules['rich'] = None; from pykhuge.cli import main; sys.exit(main())"
    )
    chosen = ("acceptance", "--filter", "SCAN_SUCCEED[madvise-anon]")
    table = pykhuge(*chosen, launcher=launcher)
    assert (table.returncode, table.stdout) == (2, "")
    assert "the table needs rich" in table.stderr
    assert "--json or --markdown" in table.stderr
    assert pykhuge(*chosen, "--markdown", launcher=launcher).returncode == 0


def test_every_scenario_can_be_chosen_by_its_name() -> None:
    """No two have the same."""
    names = [f"{each.group} {each.id}" for each in all_scenarios(1)]
    assert len(names) == len(set(names))
