"""How `pykhuge collapse` looks: the only file that needs rich.

Lines that the kernel prints (trace, log) are never folded on a terminal or in a pipe; in the
picture, which has edges, they are.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pykhuge.cli.errors import printable
from pykhuge.cli.experiment import WINDOW
from pykhuge.cli.kinds import KINDS
from pykhuge.cli.report import (
    COPIED,
    HOLE,
    LEGEND,
    NOT_COPIED,
    POISONED,
    ROLLED_BACK,
    RangeReport,
    Report,
)
from pykhuge.hw.memory import HPAGE_PMD_NR, HPAGE_PMD_SIZE
from pykhuge.khugepaged.scan_result import ScanResult

__all__ = ["progress", "show", "svg"]

SVG_WIDTH = 120
FEW_RANGES = 4
FEW_LINES = 8
# A panel's frame and the page number in front of each row of a map.
MAP_MARGIN = 4 + 9
STYLES = {
    COPIED: "green",
    HOLE: "dim",
    POISONED: "bold white on red",
    ROLLED_BACK: "yellow",
    NOT_COPIED: "dim",
}


@contextmanager
def progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, for files that take a moment."""
    columns = (TextColumn("collapse"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    wanted = console.is_terminal and size > WINDOW
    with ProgressBar(*columns, console=console, transient=True, disable=not wanted) as bar:
        task = bar.add_task("collapse", total=size)
        yield lambda nr: bar.advance(task, nr)


def show(report: Report, *, all_ranges: bool) -> None:
    """Print the report."""
    _print(Console(highlight=False, soft_wrap=True), report, all_ranges)


def svg(report: Report, *, all_ranges: bool) -> str:
    """The report as a picture."""
    recorder = Console(
        record=True,
        width=SVG_WIDTH,
        file=io.StringIO(),
        highlight=False,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    _print(recorder, report, all_ranges)
    title = f"pykhuge collapse {printable(os.path.basename(report.file))}"
    return recorder.export_svg(title=title, unique_id="pykhuge")


def _print(console: Console, report: Report, all_ranges: bool) -> None:
    shown = report.ranges if all_ranges else _of_interest(report.ranges)
    console.print(_heading(report))
    console.print(_legend())
    for each in shown:
        console.print(_range(each, console.width))
        for line in report.trace_of(each):
            console.print(Text(line))
        for line in each.log:
            console.print(Text(line, style="red"))
    for note in _left_out(report, shown):
        console.print(note)
    console.print(_counters(report))
    for verdict in _verdict(report):
        console.print(verdict)


def _of_interest(ranges: list[RangeReport]) -> list[RangeReport]:
    """The first few ranges, those that were not collapsed before those that were."""
    by_interest = sorted(ranges, key=lambda each: each.result is ScanResult.SCAN_SUCCEED)
    return sorted(by_interest[:FEW_RANGES], key=lambda each: each.index)


def _heading(report: Report) -> Text:
    ranges = f"{report.nr_ranges} range{'s' * (report.nr_ranges > 1)} of 2 MiB"
    name = printable(report.file)
    pages = f"{report.nr_pages} pages of 4 KiB"
    return Text(f"{name}: {report.size} bytes, {pages}, {ranges}, {report.kind}")


def _legend() -> Text:
    parts = [Text.assemble((glyph, STYLES[glyph]), f" {name}") for glyph, name in LEGEND.items()]
    return Text("   ").join(parts)


def _range(each: RangeReport, width: int) -> Panel:
    cells_a_row = next((n for n in (64, 32, 16) if n + MAP_MARGIN <= width), 8)
    first = each.index * HPAGE_PMD_NR
    parts: list[RenderableType] = []
    for start in range(0, HPAGE_PMD_NR, cells_a_row):
        row = each.map[start : start + cells_a_row]
        cells = Text.assemble(*((cell, STYLES[cell]) for cell in row))
        parts.append(Text.assemble((f"{first + start:>8} ", "dim"), cells))
    if each.poisoned:
        more = len(each.poisoned) - FEW_LINES
        where = ", ".join(map(str, each.poisoned[:FEW_LINES]))
        parts.append(
            Text(f"poisoned page:line  {where}" + (f" and {more} more" if more > 0 else ""))
        )
    if each.machine_check is not None:
        parts.append(Text(f"machine check at    {each.machine_check}"))
    return Panel(Group(*parts), title=_title(each), title_align="left", expand=False)


def _title(each: RangeReport) -> str:
    title = f"range {each.index}: {each.outcome}"
    if each.result is None:
        return title
    return title + (f" (MADV_COLLAPSE: {each.errno_name})" if each.errno_name else "")


def _left_out(report: Report, shown: list[RangeReport]) -> list[Text]:
    """What is not drawn, so that nobody takes the picture for all."""
    notes = []
    left_out = len(report.ranges) - len(shown)
    if left_out:
        all_of_them = Counter(each.outcome for each in report.ranges)
        outcomes = ", ".join(f"{nr} {outcome}" for outcome, nr in all_of_them.items())
        of_all = f"of {len(report.ranges)} in all {outcomes}"
        notes.append(Text(f"{left_out} more ranges: {of_all} (--all shows them)"))
    not_reached = report.nr_ranges - len(report.ranges)
    if not_reached:
        notes.append(Text(f"{not_reached} more ranges were not reached: the host was dead"))
    if report.trace_overrun:
        notes.append(Text(f"{report.trace_overrun} older trace events were overwritten"))
    return notes


def _counters(report: Report) -> Table:
    # Looked for even if they did not move: what a rolled back collapse must leave as it was.
    always_shown = KINDS[report.kind].always_shown
    table = Table(title="counters", title_justify="left")
    table.add_column("counter")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, before in report.before.items():
        after = report.after[name]
        if before != after or name in always_shown or (before and name.startswith("MM_")):
            table.add_row(name, str(before), str(after), f"{after - before:+d}")
    return table


def _verdict(report: Report) -> Iterator[Text]:
    if report.panic is not None:
        yield Text(report.panic, style="bold red")
        yield Text("The modelled host is dead and refuses further use; it had no recovery.")
    yield _check(report.audit.holds, "audit", "all counters and references add up")
    for finding in report.audit.findings:
        yield Text(f"  {finding}", style="red")
    read = f"{report.verified} read back as the file has them"
    tail = report.nr_ranges * HPAGE_PMD_SIZE - report.size
    if tail and KINDS[report.kind].zeros_behind_end:
        read += f" ({tail} behind its end: zeros)"
    if report.unreadable:
        read += f", {report.unreadable} on poisoned lines gave SIGBUS"
    yield _check(report.bytes.holds, "bytes", read)
    for finding in report.bytes.findings:
        yield Text(f"  {finding}", style="red")


def _check(holds: bool | None, what: str, how: str) -> Text:
    if holds is None:
        return Text(f"{what}: cannot be looked at", style="yellow")
    if holds:
        return Text(f"{what}: {how}", style="green")
    return Text(f"{what}: WRONG", style="bold red")
