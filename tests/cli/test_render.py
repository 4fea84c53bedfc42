"""How `pykhuge collapse` looks, on a terminal, in a pipe and as a picture."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cli_kit import HPAGE, PAGE, MakeFile, pykhuge

from pykhuge.cli import main


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints in this process."""
    assert main(["collapse", *map(str, arguments)]) in (0, 3)
    return capsys.readouterr().out


def cells(printed: str) -> str:
    """All cells of all maps, in order."""
    return "".join(re.findall(r"^\W+\d+ ([#.X?-]+) ", printed, re.MULTILINE))


def test_the_map_shows_every_page_in_80_columns(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 rows of 64 cells; the legend names each character."""
    printed = shown(capsys, make_file(100 * PAGE), "--poison", 70)
    assert cells(printed) == "-" * 70 + "X" + "?" * 29 + "." * 412
    assert "# copied   . hole   X poisoned   - copied, rolled back   ? not copied" in printed
    table = [line for line in printed.splitlines() if line.startswith(("│", "╭"))]
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize(("columns", "cells_a_row"), [(24, 8), (40, 16), (60, 32), (79, 64)])
def test_the_map_fits_a_narrow_terminal(
    make_file: MakeFile,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    cells_a_row: int,
) -> None:
    """Rows get shorter, no shorter than they must, and no cell is lost."""
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = shown(capsys, make_file(HPAGE), "--poison", 511)
    assert cells(printed) == "-" * 511 + "X"
    assert f" {'-' * cells_a_row} " in printed


def test_results_counters_trace_and_verdict_are_all_there(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scan result with its errno, the kernel's lines unfolded, counters, both checks."""
    printed = shown(capsys, make_file(HPAGE), "--poison", "3:5")
    assert "range 0: SCAN_COPY_MC (MADV_COLLAPSE: EINVAL)" in printed
    assert re.search(r"^ +khugepaged-1 .*mm_khugepaged_scan_pmd: .*unmapped=0$", printed, re.M)
    assert re.search(r"thp_collapse_alloc +\S +0 \S +1 \S +\+1", printed)
    assert re.search(r"^audit: all counters and references add up$", printed, re.M)
    assert re.search(rf"^bytes: {HPAGE - 64} .*64 on poisoned lines gave SIGBUS$", printed, re.M)


def test_a_panic_is_shown_with_the_map_up_to_it(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel log, the panic, and no claim about what cannot be looked at."""
    printed = shown(capsys, make_file(3 * HPAGE), "--poison", 2, "--no-recovery")
    assert cells(printed) == "##X" + "?" * 509
    assert printed.count("Kernel panic - not syncing: Fatal local machine check") == 2
    assert "2 more ranges were not reached" in printed
    assert "audit: cannot be looked at" in printed


def test_many_ranges_are_summed_up_unless_asked_for(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges that failed are drawn first, what is left out is said, --all leaves out nothing."""
    path = make_file(7 * HPAGE)
    printed = shown(capsys, path, "--poison", 6 * 512)
    assert "range 6: SCAN_COPY_MC" in printed
    assert "3 more ranges: of 7 in all 6 SCAN_SUCCEED, 1 SCAN_COPY_MC (--all shows them)" in printed
    assert len(cells(printed)) == 4 * 512
    every = shown(capsys, path, "--poison", 6 * 512, "--all")
    assert len(cells(every)) == 7 * 512
    assert "--all" not in every


def test_a_pipe_gets_no_escape_codes_and_no_progress(make_file: MakeFile) -> None:
    """Plain text on stdout, nothing on stderr, also for a file of several windows."""
    ran = pykhuge("collapse", make_file(6 * HPAGE), "--poison", 0)
    assert "\x1b" not in ran.stdout
    assert ran.stderr == ""


def test_an_ascii_terminal_is_no_obstacle(make_file: MakeFile) -> None:
    """Frames become ASCII where the encoding has no others."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = pykhuge("collapse", make_file(PAGE), env=environment)
    assert ran.returncode == 0
    assert ran.stdout.isascii()


def test_a_terminal_gets_a_progress_bar(make_file: MakeFile) -> None:
    """On stderr, for a file of several windows."""
    master, slave = pty.openpty()
    ran = pykhuge(
        "collapse",
        make_file(6 * HPAGE),
        capture_output=False,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    drawn = os.read(master, 1 << 16)
    os.close(master)
    assert ran.returncode == 0
    assert b"12.6" in drawn  # megabytes


def test_no_color_is_heeded(make_file: MakeFile) -> None:
    """With NO_COLOR a terminal gets no colours; the characters say it all."""
    environment = os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    ran = pykhuge("collapse", make_file(PAGE), "--poison", 0, env=environment)
    assert not re.search(r"\x1b\[[0-9;]*(3[0-8]|4[0-8])[;m]", ran.stdout)
    assert "X" in ran.stdout


def test_a_strange_file_name_is_made_printable(tmp_path: Path) -> None:
    """Control characters and bytes that are no text do not reach the terminal."""
    path = os.fsencode(tmp_path) + b"/esc\x1b[31m\xff"
    with open(path, "wb") as file:
        file.write(b"x")
    ran = pykhuge("collapse", os.fsdecode(path))
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout
    assert "esc\\x1b[31m" in ran.stdout
    assert pykhuge("collapse", os.fsdecode(path), "--json").returncode == 0


def test_the_picture_shows_what_is_printed(
    make_file: MakeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--svg writes well-formed SVG with the same map, the same each time, and with --json too."""
    path, picture = make_file(HPAGE), tmp_path / "a.svg"
    printed = shown(capsys, path, "--poison", 500, "--svg", picture)
    text = "".join(ET.parse(picture).getroot().itertext()).replace("\xa0", " ")
    assert "range 0: SCAN_COPY_MC (MADV_COLLAPSE: EINVAL)" in text
    assert text.count("X") == cells(printed).count("X") + 1  # the legend has one too
    assert text.count("-" * 64) >= 7
    first = picture.read_bytes()
    shown(capsys, path, "--poison", 500, "--json", "--svg", picture)
    assert picture.read_bytes() == first
