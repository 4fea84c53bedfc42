"""How `pykhuge collapse` looks: the only file that needs rich."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pykhuge.cli.collapse import (
    COPIED,
    HOLE,
    HPAGE_PMD_NR,
    LEGEND,
    POISONED,
    ROLLED_BACK,
    UNTOUCHED,
    Collapsed,
    Progress,
    Report,
)

__all__ = ["progress", "show"]

COLUMNS = 64
WIDTH = 120
FEW_RANGES = 4
STYLES = {
    COPIED: "green",
    HOLE: "dim",
    POISONED: "bold white on red",
    ROLLED_BACK: "yellow",
    UNTOUCHED: "dim",
}


@contextmanager
def progress(size: int) -> Iterator[Progress]:
    """A bar on a terminal's standard error, for files that take a moment."""
    columns = (TextColumn("collapse"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with ProgressBar(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("collapse", total=size)
        yield lambda nr: bar.advance(task, nr)


def show(report: Report, *, svg: str | None, quiet: bool, all_ranges: bool) -> None:
    """Print the report, unless `quiet`, and save it as a picture."""
    shown = report.ranges if all_ranges else _worth_showing(report.ranges)
    if not quiet:
        # Trace and log lines stand as the kernel prints them: they are never folded.
        _print(Console(highlight=False, soft_wrap=True), report, shown)
    if svg is not None:
        recorder = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
        _print(recorder, report, shown)
        recorder.save_svg(svg, title=f"pykhuge collapse {os.path.basename(report.file)}")


def _print(console: Console, report: Report, shown: list[Collapsed]) -> None:
    console.print(_legend())
    for each in shown:
        console.print(_range(each))
        for event in each.trace:
            console.print(Text(event.strip()))
    left_out = len(report.ranges) - len(shown)
    if left_out:
        console.print(f"{left_out} more ranges: {_results(report.ranges)} (--all shows them)")
    console.print(_counters(report))
    for line in _log(report):
        console.print(line)
    console.print(_verdict(report))


def _worth_showing(ranges: list[Collapsed]) -> list[Collapsed]:
    """The first few ranges, those with poison before those without."""
    by_interest = sorted(ranges, key=lambda each: (not each.poisoned, each.index))
    return sorted(by_interest[:FEW_RANGES], key=lambda each: each.index)


def _results(ranges: list[Collapsed]) -> str:
    names = [_name(each) for each in ranges]
    counted = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"of {len(ranges)} in all {counted}"


def _name(each: Collapsed) -> str:
    return each.result.name if each.result is not None else "panic"


def _legend() -> Text:
    parts = [Text.assemble((glyph, STYLES[glyph]), f" {name}") for glyph, name in LEGEND.items()]
    return Text("   ").join(parts)


def _range(each: Collapsed) -> Panel:
    rows = [each.map[start : start + COLUMNS] for start in range(0, HPAGE_PMD_NR, COLUMNS)]
    lines = [Text.assemble(*((cell, STYLES[cell]) for cell in row)) for row in rows]
    first = each.index * HPAGE_PMD_NR
    parts: list[RenderableType] = [
        Text.assemble((f"{first + row * COLUMNS:>8} ", "dim"), line)
        for row, line in enumerate(lines)
    ]
    if each.poisoned:
        where = ", ".join(f"{page}:{line}" for page, line in each.poisoned[:8])
        more = len(each.poisoned) - 8
        parts.append(
            Text(f"poisoned page:line  {where}" + (f" and {more} more" if more > 0 else ""))
        )
    errno = "" if each.result is None else f", errno {each.result.errno}"
    return Panel(
        Group(*parts),
        title=f"range {each.index}: {_name(each)}{errno}",
        title_align="left",
        expand=False,
    )


def _counters(report: Report) -> Table:
    """The counters that moved, and a few that one looks for even if they did not."""
    title = "counters" if report.windows < 2 else f"counters, over {report.windows} windows"
    table = Table(title=title, title_justify="left")
    table.add_column("counter")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, before in report.before.items():
        after = report.after[name]
        if before != after or name in ("nr_anon_transparent_hugepages", "nr_isolated_anon"):
            table.add_row(name, str(before), str(after), f"{after - before:+d}")
    return table


def _log(report: Report) -> list[Text]:
    few = report.log[-FEW_RANGES * 2 :]
    more = len(report.log) - len(few)
    lines = [Text(f"{more} earlier lines of the kernel log left out")] if more else []
    return lines + [Text(line, style="red") for line in few]


def _verdict(report: Report) -> Text:
    audit = "audit: all counters and references add up"
    if report.findings:
        audit = "audit FAILED:\n" + "\n".join(report.findings)
    elif report.panic:
        audit = "the modelled host is dead; it was built without recovery"
    read = (
        f"bytes: {report.verified} read back as loaded, {report.unreadable} on poisoned lines"
        f" refused with SIGBUS, {report.wrong} wrong"
    )
    good = not report.findings and not report.wrong
    return Text(f"{audit}\n{read}", style="green" if good and not report.panic else "red")
